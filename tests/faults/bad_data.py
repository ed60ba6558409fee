"""Malformed and generated data files, through the real command: it ends in time, with exit code 0 or 2, without a
traceback, and says of every fault in which file and on which line it is.
"""

import argparse
import io
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.prepare import checkup  # noqa: F401  (imported before children are forked)
from pipelines import cli
from tests.faults.harness import after, child, report
from tests.faults.rows import PACK, WELL_FORMED, make_rows, write_rows

SECONDS = 60.0
_PLACE = re.compile(r"bad\.[a-z0-9.]+(:\d+)?: ")
_WHOLE_FILE = ("zip-bomb", "broken-compression", "broken-parquet", "duplicate-key", "too-few-rows")

Mutation = Callable[[random.Random, bytes], bytes]


def main() -> int:
    """Make files, check each, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=600, help="files")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rng = random.Random(5)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.num):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            path, kind = _write(folder, number, rng)
            outcome = _check(path, folder / "log")
            outcomes[outcome] += 1
            if outcome not in ("refused", "still valid"):
                print(f"file {number} ({kind}): {outcome}\n{(folder / 'log').read_text()[-2000:]}", flush=True)
            path.unlink()
    figures = {"files": options.num, **dict(sorted(outcomes.items()))}
    good = outcomes["refused"] + outcomes["still valid"]
    return report("bad_data", figures, good == options.num, options.output)


def _check(path: Path, log: Path) -> str:
    started = time.monotonic()
    code = child(lambda: _run(path), log, after(SECONDS))
    text = log.read_text(errors="replace")
    if code == -9:
        return f"hung for {time.monotonic() - started:.0f} s"
    if "Traceback" in text:
        return "traceback"
    if code == 0:
        return "still valid"
    if code != 2:
        return f"exit code {code}"
    return "refused" if _names_places(text) else "no place named"


def _names_places(text: str) -> bool:
    """Whether each fault has its file, and its line where it is not the file's as a whole."""
    faults = re.findall(r"^  (.*) \[([a-z0-9-]+)\]$", text, re.MULTILINE)
    if not faults:  # refused as a whole: nothing in it, or no known form
        return bool(re.search(r"error: .*(is empty|not a known format)", text, re.DOTALL))
    return all((match := _PLACE.match(line)) and (match[1] or rule in _WHOLE_FILE) for line, rule in faults)


def _run(path: Path) -> None:
    sys.argv = ["tune16", "data", "check", str(path)]
    cli.main()


def _write(folder: Path, number: int, rng: random.Random) -> tuple[Path, str]:
    """A file that is generated, or a well-formed one that is mutated."""
    if number % 3 == 0:
        made = rng.choice(GENERATORS)
        suffix = rng.choice((".jsonl", ".jsonl", ".json", ".csv", ".parquet"))
        path = folder / (f"bad{suffix}" if made is not _bomb else "bad.jsonl.gz")
        path.write_bytes(made(rng))
        return path, made.__name__
    form, suffix, packed = rng.choice(WELL_FORMED)
    path = folder / f"bad{suffix}{packed}"
    write_rows(path, make_rows(rng, 8, form))
    mutate = rng.choice(MUTATIONS)
    content = path.read_bytes()
    if packed and rng.random() < 0.5:  # what is inside is damaged, not the file around it
        write_rows(path.with_name(f"plain{suffix}"), make_rows(rng, 8, form))
        content = PACK[packed](mutate(rng, path.with_name(f"plain{suffix}").read_bytes()))
    else:
        content = mutate(rng, content)
    path.write_bytes(content)
    return path, f"{mutate.__name__} {form}{suffix}{packed}"


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def _behead(rng: random.Random, content: bytes) -> bytes:
    return content[rng.randrange(1, len(content)) :]


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 20)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _double(rng: random.Random, content: bytes) -> bytes:
    start, end = sorted(rng.choices(range(len(content)), k=2))
    return content[:end] + content[start:end] + content[end:]


def _remove(rng: random.Random, content: bytes) -> bytes:
    start, end = sorted(rng.choices(range(len(content)), k=2))
    return content[:start] + content[end:]


def _insert(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + rng.choice(PIECES) + content[at:]


def _zero(rng: random.Random, content: bytes) -> bytes:
    start, end = sorted(rng.choices(range(len(content)), k=2))
    return content[:start] + bytes(end - start) + content[end:]


def _encode(rng: random.Random, content: bytes) -> bytes:
    return content.decode("latin-1").encode(rng.choice(("utf-16", "utf-32", "utf-16-be", "utf-7")))


def _pack(rng: random.Random, content: bytes) -> bytes:
    return PACK[rng.choice(list(PACK)[1:])](content)


def _swap_keys(rng: random.Random, content: bytes) -> bytes:
    words = (b"prompt", b"role", b"user", b"completion", b"value", b"from", b"messages", b"text", b"null", b'"')
    return content.replace(rng.choice(words), rng.choice(words), rng.randint(1, 5))


def _random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(5000))


def _nested(rng: random.Random) -> bytes:
    depth = rng.choice((10, 300, 900, 990, 1100, 10_000, 2_000_000))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return b'{"prompt": "a", "completion": ' + opened * depth + b"1" + closed * rng.choice((0, depth)) + b"}\n"


def _huge_number(rng: random.Random) -> bytes:
    digits = b"9" * rng.choice((30, 4000, 5000, 1_000_000))
    number = rng.choice((digits, b"-" + digits, b"1e" + digits[:30], digits + b".5"))
    return b'{"prompt": "a", "completion": "b", "id": ' + number + b"}\n"


def _endless_line(rng: random.Random) -> bytes:
    return b'{"prompt": "' + rng.choice((b"a", b"\\", b'"', b"\0", b"[")) * rng.choice((10_000, 40_000_000))


def _bomb(rng: random.Random) -> bytes:
    return PACK[".gz"](b'{"prompt": "a", "completion": "' + b"b" * 200_000_000 + b'"}\n')


def _any_json(rng: random.Random) -> bytes:
    """Rows whose keys are those of the forms and whose values are anything."""
    keys = [key for row in (TREE, *EXAMPLES) for key in row] + ["role", "from", "content", "value", "\ud800", "", "a b"]

    def value(depth: int) -> Any:
        kind = rng.randrange(9 if depth else 7)
        if kind == 7:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        if kind == 8:
            return {rng.choice(keys): value(depth - 1) for _ in range(rng.randrange(5))}
        texts = (
            "user",
            "assistant",
            "prompter",
            "gpt",
            "",
            " ",
            "a\ud800",
            "<s>",
            "\0",
            "x" * 3000,
            "a@b.cd",
            "4" * 19,
        )
        return (None, True, rng.randrange(-9, 9), 1e308 * 10, 0.5, rng.choice(texts), rng.choice(texts))[kind]

    rows = [{rng.choice(keys): value(3) for _ in range(rng.randrange(1, 7))} for _ in range(rng.randrange(1, 9))]
    for row in rows:
        if rng.random() < 0.7:
            row.update(rng.choice(({"messages": value(3)}, {"prompt": value(2), "completion": value(2)}, TREE)))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _csv_text(rng: random.Random) -> bytes:
    pieces = ("prompt", "completion", ",", ",", "\n", "\r\n", "\r", '"', '"', "a", "\0", ";", "é", "x" * 200)
    return ("prompt,completion\n" + "".join(rng.choices(pieces, k=rng.randrange(200)))).encode()


def _parquet(rng: random.Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = (
        pa.array([1, None, 3]),
        pa.array(["a", None, "c"]),
        pa.array([b"\xff", b"b", None]),
        pa.array([[{"role": "user", "content": None}], None, []]),
        pa.array([float("nan"), 1.0, None]),
        pa.array([2**62, 2**61, 0]).cast(pa.timestamp("us")),
        pa.array([[["x"]], [], None]),
        pa.array([[("role", "user")], [], None], pa.map_(pa.string(), pa.string())),
        pa.array([b"\xff", b"b", b"\xc3"]).view(pa.string()),
    )
    names = rng.choice((("prompt", "completion"), ("messages", "id"), ("prompt", "prompt"), ("text", "x")))
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([rng.choice(columns) for _ in names], names=list(names)), sink)
    return sink.getvalue()


EXAMPLES = (
    {"messages": []},
    {"conversations": []},
    {"prompt": "", "completion": ""},
    {"instruction": "", "output": ""},
)
TREE = {"message_tree_id": "t", "message_id": "m", "parent_id": "m", "role": "prompter", "text": "x"}
PIECES = (
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\xef\xb7\x90", b"\xef\xbb\xbf", b"\n", b"\r", b"\\"),
    *(b'"', b"{", b"[", b"]", b"}", b",", b"NaN", b"Infinity", b"1e999", b"null", b"<|im_end|>", b"ghp_" + b"a1B2" * 9),
)
MUTATIONS: tuple[Mutation, ...] = (
    *(_cut, _behead, _flip, _double, _remove, _zero, _encode, _pack),
    *(_insert, _insert, _swap_keys, _swap_keys),
)
GENERATORS: tuple[Callable[[random.Random], bytes], ...] = (
    *(_random_bytes, _nested, _huge_number, _endless_line, _bomb),
    *(_any_json, _any_json, _any_json, _csv_text, _csv_text, _parquet, _parquet),
)

if __name__ == "__main__":
    raise SystemExit(main())
