"""Every rule of the data sets' check: defects planted at many places in well-formed files are all found, on their line,
and well-formed files of every form and kind have none.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.config import PrepareConfig
from components.prepare.checkup import check_data
from components.prepare.input.files import LARGEST_ROW
from components.prepare.rules.table import RULES
from tests.faults.harness import report, write_model
from tests.faults.rows import PACK, WELL_FORMED, Row, make_rows, text, write_rows

ROWS = 40
TABLES = (".jsonl", ".json", ".csv", ".parquet")
LINES = (".jsonl", ".json")
SECRETS = {
    "secret": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "github_pat_" + "x1Y2" * 10,
        "hf_" + "QwErTy" * 6,
        "sk-proj-" + "a1b2C3" * 8,
        "xoxb-1234567890-abcdef",
        "AIza" + "Sy1_-" * 7,
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
        "Bearer abcdef0123456789abcdef",
        "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENGbPxRfiCYEXAMPLEKEY0",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    ],
    "personal-data": [
        "anna.huber@firma.co.at",
        "4111 1111 1111 1111",
        "5500-0000-0000-0004",
        "378282246310005",
        "DE89 3704 0044 0532 0130 00",
        "GB29NWBK60161331926819",
    ],
}
TOKENS = ["<|im_start|>", "<|eot_id|>", "[INST]", "</s>", "<<SYS>>", "<|end|>"]

Planter = Callable[[random.Random, list[Row], int], Any]
Spoiler = Callable[[random.Random, list[bytes], int], Any]


def _within(rng: random.Random, rows: list[Row], number: int, piece: str) -> None:
    """Put a piece into the question or the answer."""
    key = rng.choice(["prompt", "completion"])
    words = rows[number][key].split()
    words.insert(rng.randrange(len(words) + 1), piece)
    rows[number][key] = " ".join(words)


def _near(rng: random.Random, rows: list[Row], number: int) -> None:
    words = rows[rng.randrange(number)]["completion"].split()
    earlier = next(row for row in rows if row["completion"].split() == words)
    words[rng.randrange(len(words))] = "changed"
    rows[number] = {"prompt": earlier["prompt"], "completion": " ".join(words)}


def _set(key: str, value: Any) -> Planter:
    return lambda _, rows, number: rows[number].__setitem__(key, value)


# Rule, kinds of file, and how a row of prompt and completion is broken.
IN_ROWS: list[tuple[str, tuple[str, ...], Planter]] = [
    (
        "empty-content",
        TABLES,
        lambda rng, rows, n: rows[n].update({rng.choice(["prompt", "completion"]): " \n"[: n % 3]}),
    ),
    ("noncharacter", TABLES, lambda rng, rows, n: _within(rng, rows, n, "\ufdd0")),
    ("nul", TABLES, lambda rng, rows, n: _within(rng, rows, n, "a\0b")),
    ("lone-surrogate", LINES, lambda rng, rows, n: _within(rng, rows, n, rng.choice(["\ud800", "\udfff", "x\udc00y"]))),
    ("template-token", TABLES, lambda rng, rows, n: _within(rng, rows, n, rng.choice(TOKENS))),
    ("secret", TABLES, lambda rng, rows, n: _within(rng, rows, n, SECRETS["secret"][n % 11].replace("\n", " "))),
    ("personal-data", TABLES, lambda rng, rows, n: _within(rng, rows, n, SECRETS["personal-data"][n % 6])),
    (
        "wrong-type",
        LINES,
        lambda rng, rows, n: rows[n].update({"completion": rng.choice([None, 1, 2.5, True, [], {}])}),
    ),
    ("missing-key", LINES, lambda rng, rows, n: rows[n].pop(rng.choice(["prompt", "completion"]))),
    ("unknown-key", LINES, _set("promt", "x")),
    ("not-a-number", LINES, lambda rng, rows, n: rows[n].update(id=rng.choice([float("nan"), float("-inf")]))),
    ("duplicate", TABLES, lambda rng, rows, n: rows.__setitem__(n, dict(rows[rng.randrange(n)]))),
    ("near-duplicate", TABLES, _near),
    (
        "different-answers",
        TABLES,
        lambda rng, rows, n: rows[n].update(prompt=f" {rows[rng.randrange(n)]['prompt'].upper()}"),
    ),
]
# The same with messages.
IN_MESSAGES: list[tuple[str, tuple[str, ...], Planter]] = [
    (
        "unknown-role",
        LINES,
        lambda rng, rows, n: rows[n]["messages"][n % 2].update(role=rng.choice(["bot", "", None, 3])),
    ),
    ("roles-out-of-order", (*LINES, ".parquet"), lambda rng, rows, n: rows[n]["messages"].reverse()),
    ("no-answer", (*LINES, ".parquet"), lambda rng, rows, n: rows[n]["messages"].pop()),
    ("unsupported", LINES, lambda rng, rows, n: _give_meaning(rng, rows[n])),
]


def _give_meaning(rng: random.Random, row: Row) -> None:
    """A key or a value that would change what is learnt, somewhere in the row."""
    answer = row["messages"][-1]
    rng.choice(
        [
            lambda: answer.update(tool_calls=[{"id": "1"}]),
            lambda: answer.update(reasoning_content="Let me see."),
            lambda: answer.update(weight=0.5),
            lambda: answer.update(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
            lambda: row["messages"][0].update(role="tool"),
            lambda: row.update(tools=[{"type": "function"}]),
            lambda: row.update(context="A long text."),
            lambda: row.update(label=False),
        ]
    )()


def _splice(piece: bytes) -> Spoiler:
    """Put bytes somewhere into the text of a line's question."""

    def spoil(rng: random.Random, lines: list[bytes], number: int) -> None:
        at = rng.randrange(12, 60)
        lines[number] = lines[number][:at] + piece + lines[number][at:]

    return spoil


def _line(content: bytes) -> Spoiler:
    return lambda rng, lines, number: lines.__setitem__(number, content)


def _cut(rng: random.Random, lines: list[bytes], number: int) -> None:
    lines[:] = lines[: number + 1]
    lines[number] = lines[number][: rng.randrange(1, len(lines[number]) - 2)]


# Rule and how the lines of a JSONL file are broken.
IN_LINES: list[tuple[str, Spoiler]] = [
    ("not-utf-8", _splice(b"\xff")),
    ("not-utf-8", _splice(b"\xed\xa0\x80")),
    ("nul", _splice(b"\0")),
    ("truncated", _cut),
    ("broken-json", _line(b'{"prompt": "x" "completion": "y"}\n')),
    ("not-an-object", _line(b"[1, 2]\n")),
    ("too-deep", _line(b'{"prompt": ' + b"[" * 100_000 + b"\n")),
    ("duplicate-key", _line(b'{"prompt": "a", "completion": "b", "prompt": "c"}\n')),
    ("duplicate-key", _line(b'{"prompt": "a", "completion": "b", "id": [{"k": 1, "k": 1}]}\n')),
    ("not-a-number", _line(b'{"prompt": "a", "completion": "b", "id": [1e999]}\n')),
    ("row-too-long", _line(b'{"prompt": "' + b"a" * LARGEST_ROW + b'", "completion": "b"}\n')),
]


def main() -> int:
    """Plant, check, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=20, help="defects of each kind")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model")
        found: dict[str, list[bool]] = {}
        for rule, is_found in _defects(folder, options.num, random.Random(2)):
            found.setdefault(rule, []).append(is_found)
            if not is_found:
                print(f"missed: {rule}", flush=True)
        clean = [_has_no_error(folder, random.Random(3), *kind) for kind in WELL_FORMED]
    missing = sorted(set(RULES) - set(found))
    figures = {
        "defects": sum(map(len, found.values())),
        "found": sum(map(sum, found.values())),
        "by rule": {rule: f"{sum(hits)} of {len(hits)}" for rule, hits in sorted(found.items())},
        "rules without a defect": missing,
        "well-formed files": len(clean),
        "without an error": sum(clean),
    }
    reached = figures["found"] == figures["defects"] and not missing and all(clean) and len(clean) >= 20
    return report("seeded_defects", figures, reached, options.output)


def _defects(folder: Path, num: int, rng: random.Random) -> Any:
    for form, planters in (("prompt_completion", IN_ROWS), ("messages", IN_MESSAGES)):
        for rule, kinds, plant in planters:
            for number in range(num):
                path = folder / f"rows{kinds[number % len(kinds)]}"
                rows, place = make_rows(rng, ROWS, form), rng.randrange(1, ROWS)
                plant(rng, rows, place)
                yield rule, _finds(path, rule, write_rows(path, rows)(place))
    for rule, spoil in IN_LINES:
        for _ in range(num):
            path, place = folder / "rows.jsonl", rng.randrange(ROWS)
            lines = [json.dumps(row).encode() + b"\n" for row in make_rows(rng, ROWS)]
            spoil(rng, lines, place)
            path.write_bytes(b"".join(lines))
            yield rule, _finds(path, rule, place + 1)
    yield from _of_files(folder, num, rng)
    yield from _of_splits(folder, num, rng)
    yield from _of_tokens(folder, num, rng)
    yield from _of_models(folder, num, rng)


def _of_files(folder: Path, num: int, rng: random.Random) -> Any:
    for _ in range(num):
        path, rows = folder / "rows.jsonl", make_rows(rng, ROWS)
        write_rows(path, rows)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        yield "byte-order-mark", _finds(path, "byte-order-mark", 1)
        write_rows(folder / "rows.json", rows)
        (folder / "rows.json").rename(path)
        yield "array-in-jsonl", _finds(path, "array-in-jsonl", 1)
        packed = rng.choice(list(PACK)[1:])
        path = folder / f"rows.jsonl{packed}"
        write_rows(path, rows)
        path.write_bytes(path.read_bytes()[: -rng.randrange(5, 400)])
        yield "broken-compression", _finds(path, "broken-compression", 0)
        path = folder / "rows.parquet"
        write_rows(path, rows)
        path.write_bytes(path.read_bytes()[: rng.randrange(1, 400)])
        yield "broken-parquet", _finds(path, "broken-parquet", 0)
        path = folder / "rows.csv"
        place = write_rows(path, rows)
        lines, number = path.read_bytes().splitlines(keepends=True), rng.randrange(ROWS)
        path.write_bytes(b"".join([*lines[: number + 1], b"one value too many,b,c\r\n", *lines[number + 1 :]]))
        yield "wrong-columns", _finds(path, "wrong-columns", place(number))
        path.write_bytes(b"".join([*lines[: number + 1], b'"' + b"a" * (LARGEST_ROW - 9) + b"\n" + b"b" * 99 + b'",c']))
        yield "broken-csv", _finds(path, "broken-csv", place(number))
        path = folder / "rows.jsonl"
        texts = make_rows(rng, ROWS, "llama2_text")
        texts[number] = {"text": "no marks"}
        write_rows(path, texts)
        yield "not-llama2-text", _finds(path, "not-llama2-text", number + 1)
        path.write_text("\n".join(json.dumps(row, indent=rng.randrange(1, 5)) for row in rows))
        yield "not-rows", _finds(path, "not-rows", 1)
        write_rows(path, rows[:1] * rng.randrange(1, 9))
        yield "too-few-rows", _finds(path, "too-few-rows", 0)
    for packed in list(PACK)[1:]:
        path = folder / f"bomb.jsonl{packed}"
        line = json.dumps({"prompt": "Why?", "completion": "a" * 200_000}).encode() + b"\n"
        path.write_bytes(PACK[packed](line * (110_000_000 // len(line))))
        yield "zip-bomb", _finds(path, "zip-bomb", 0)
        path.unlink()


def _of_splits(folder: Path, num: int, rng: random.Random) -> Any:
    """Half of the rows are held out, so that there is one to copy on either side."""
    path, config = folder / "rows.jsonl", PrepareConfig(held_out_share=0.49)
    for _ in range(num):
        rows = make_rows(rng, 60)
        # The same questions under ten system messages: some are held out, some are not.
        questions = [
            {"prompt": [{"role": "system", "content": text(rng, 5)}, {"role": "user", "content": "Why is it so?"}],
             "completion": [{"role": "assistant", "content": text(rng, 20)}]}
            for _ in range(20)
        ]  # fmt: skip
        write_rows(path, rows + questions)
        yield "leakage", check_data(str(path), config).findings.counts["leakage"] > 0
        answer = text(rng, 80)
        copies = [{"prompt": text(rng, 12), "completion": answer} for _ in range(20)]
        write_rows(path, rows + copies)
        yield "overlap", check_data(str(path), config).findings.counts["overlap"] > 0


def _of_tokens(folder: Path, num: int, rng: random.Random) -> Any:
    path = folder / "rows.jsonl"
    model = str(folder / "model")
    for _ in range(num):
        number = rng.randrange(ROWS)
        for rule, key in (("too-long", "completion"), ("answer-cut-away", "prompt")):
            rows = make_rows(rng, ROWS)
            rows[number][key] = text(rng, 2000)
            write_rows(path, rows)
            yield rule, _finds(path, rule, number + 1, model, PrepareConfig(max_tokens=1024))
        yield "no-trainable-tokens", _finds_untrainable(folder, rng)


def _of_models(folder: Path, num: int, rng: random.Random) -> Any:
    """Models whose files do not fit together, and a row on which it shows."""
    refusing = "{{ raise_exception('no system messages here') if messages[0]['role'] == 'system' else '' }}"
    plain = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}</s>{% endfor %}"
    models: dict[str, tuple[str, str, Any]] = {
        "not-rendered": ("chat_template.jinja", "", lambda _: refusing + plain),
        "thought-left-out": ("chat_template.jinja", "", lambda _: plain),
        "lost-by-tokenizer": ("tokenizer.json", "{}", _without_bytes),
        "beyond-embedding": ("config.json", "", lambda text: json.dumps({**json.loads(text), "vocab_size": 200})),
        "beyond-context": (
            "config.json",
            "",
            lambda text: json.dumps({**json.loads(text), "max_position_embeddings": 9}),
        ),
    }
    for rule, (name, default, change) in models.items():
        model = folder / rule
        shutil.copytree(folder / "model", model)
        content = (model / name).read_text() if (model / name).exists() else default
        (model / name).write_text(change(content))
        for _ in range(num):
            path, number = folder / "rows.jsonl", rng.randrange(ROWS)
            rows = make_rows(rng, ROWS)
            rows[number] = {
                "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text(rng, 6)}],
                "completion": [{"role": "assistant", "content": f"<think>hm</think>{text(rng, 6)} \u4f60"}],
            }
            write_rows(path, rows)
            of_all_rows = rule in ("beyond-embedding", "beyond-context")
            yield rule, _finds(path, rule, 1 if of_all_rows else number + 1, str(model))


def _without_bytes(content: str) -> str:
    """The tokenizer without the tokens of single bytes: what it has no letter for becomes nothing."""
    description = json.loads(content)
    description["model"] |= {"byte_fallback": False, "unk_token": None}
    return json.dumps(description)


def _finds_untrainable(folder: Path, rng: random.Random) -> bool:
    """Of our templates each gives at least the token that ends an answer: this one marks none."""
    from dataclasses import replace

    from components.prepare.inputs import load_tokenizer
    from components.prepare.rules.findings import Findings
    from components.prepare.tokenize.tokens import PlacedRow, Tokens

    tokenizer, template, _ = load_tokenizer(str(folder / "model"), "auto", folder)
    findings = Findings()
    bare = replace(template, source="{{ messages[0]['content'] }}{% generation %}{% endgeneration %}")
    messages = [{"role": "user", "content": text(rng, 5)}, {"role": "assistant", "content": "x"}]
    line = rng.randrange(1, 99)
    kept = Tokens(tokenizer, bare, 64, findings).batch([PlacedRow(("rows.jsonl", line), messages, False)])
    return not kept and [found.line for found in findings.shown("no-trainable-tokens")] == [line]


def _finds(path: Path, rule: str, line: int, model: str = "", config: PrepareConfig | None = None) -> bool:
    findings = check_data(str(path), config or PrepareConfig(), model).findings
    return any((found.file, found.line) == (path.name, line) for found in findings.shown(rule))


def _has_no_error(folder: Path, rng: random.Random, form: str, suffix: str, packed: str) -> bool:
    path = folder / f"good{suffix}{packed}"
    write_rows(path, make_rows(rng, 200, form))
    errors = check_data(str(path), PrepareConfig()).findings.rules("error")
    if errors:
        print(f"{path.name} as {form}: {errors}", flush=True)
    return not errors


if __name__ == "__main__":
    raise SystemExit(main())
