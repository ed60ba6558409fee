import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from components.config import PrepareConfig
from components.prepare.dataset import prepare_dataset
from components.prepare.input.formats import BadRowError, to_messages
from components.prepare.input.readers import read_rows
from components.prepare.rules.findings import Findings
from components.prepare.tokenize.chat import ChatTemplate, choose_template
from components.prepare.tokenize.tokens import IGNORED
from components.runtime.errors import Tune16Error
from components.runtime.outputs import read_record
from tests.conftest import ARCHITECTURES

TURNS = [("What is two and two?", "Four."), ("And three?", "Seven, naturally.")]
MESSAGES = [
    {"role": role, "content": text} for pair in TURNS for role, text in zip(("user", "assistant"), pair, strict=True)
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("messages", {"messages": [SYSTEM, *MESSAGES]}, [SYSTEM, *MESSAGES]),
        (
            "sharegpt",
            {"conversations": [{"from": f, "value": v} for q, a in TURNS for f, v in (("human", q), ("gpt", a))]},
            MESSAGES,
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            [{"role": "user", "content": "Add.\n\n2 2"}, {"role": "assistant", "content": "4"}],
        ),
        ("prompt_completion", {"prompt": TURNS[0][0], "completion": TURNS[0][1]}, MESSAGES[:2]),
        ("prompt_completion", {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, MESSAGES),
        (
            "llama2_text",
            {"text": "".join(f"<s>[INST] {question} [/INST] {answer} </s>" for question, answer in TURNS)},
            MESSAGES,
        ),
        (
            "llama2_text",
            {"text": f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{TURNS[0][0]} [/INST] {TURNS[0][1]}"},
            [SYSTEM, *MESSAGES[:2]],
        ),
    ],
)
def test_every_form_becomes_messages(form: str, row: dict[str, Any], expected: list[dict[str, str]]) -> None:
    assert to_messages(row, form) == expected


def test_message_trees_give_their_best_thread(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    def message(tree: int, name: str, parent: str | None, role: str, rank: int | None = None) -> dict[str, Any]:
        keys = {"message_tree_id": str(tree), "message_id": f"{tree}{name}", "parent_id": parent and f"{tree}{parent}"}
        return {**keys, "role": role, "text": f"text {tree}{name}", "rank": rank}

    rows = []
    for tree in range(30):
        rows += [
            message(tree, "a", None, "prompter"),
            message(tree, "b", "a", "assistant", 1),
            message(tree, "c", "a", "assistant", 0),
            message(tree, "d", "c", "prompter", 0),
        ]
    rows.append(message(99, "a", None, "prompter"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare_dataset(str(path), str(make_model("llama")), tmp_path / "out", PrepareConfig()).rows == 30
    row = _rows(tmp_path / "out", "train")[0]
    tree = row["messages"][0]["content"].removeprefix("text ").removesuffix("a")
    assert [m["content"] for m in row["messages"]] == [f"text {tree}a", f"text {tree}c"]


@pytest.mark.parametrize(
    ("form", "row", "rule"),
    [
        ("messages", {"messages": MESSAGES[:3]}, "no-answer"),
        ("messages", {"messages": []}, "no-answer"),
        ("messages", {"messages": MESSAGES[1:]}, "roles-out-of-order"),
        ("messages", {"messages": [MESSAGES[0], SYSTEM, MESSAGES[1]]}, "roles-out-of-order"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "unsupported"),
        ("messages", {"messages": [{"role": "bot", "content": "x"}]}, "unknown-role"),
        ("messages", {"messages": [{"role": "user"}]}, "missing-key"),
        ("messages", {"messages": "hello"}, "wrong-type"),
        ("alpaca", {"instruction": "x", "output": " "}, "empty-content"),
        ("alpaca", {"instruction": "x", "output": None}, "wrong-type"),
        ("alpaca", {"instruction": "x"}, "missing-key"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "unknown-role"),
        ("llama2_text", {"text": "<s>[INST] only a question [/INST]"}, "no-answer"),
        ("llama2_text", {"text": "no marks at all"}, "not-llama2-text"),
        ("prompt_completion", {"prompt": "x", "completion": "a\ufdd0b"}, "noncharacter"),
    ],
)
def test_bad_rows_name_the_rule(form: str, row: dict[str, Any], rule: str) -> None:
    with pytest.raises(BadRowError) as fault:
        to_messages(row, form)
    assert fault.value.rule == rule


ROWS = [{"prompt": f"Question {n}, with a comma\nand a line é", "completion": f"Answer {n}"} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _write_files(folder: Path) -> list[Path]:
    import csv

    (folder / "rows.jsonl").write_bytes(LINES)
    (folder / "lines.json").write_bytes(LINES)
    (folder / "rows.json").write_text("\ufeff" + json.dumps(ROWS, indent=1), encoding="utf-8")
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (folder / f"rows.jsonl{suffix}").write_bytes(pack(LINES))
    (folder / "rows.jsonl.zst").write_bytes(zstandard.compress(LINES))
    (folder / "rows.csv.gz").write_bytes(gzip.compress((folder / "rows.csv").read_bytes()))
    return sorted(folder.iterdir())


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    for path in _write_files(tmp_path):
        findings = Findings()
        assert [row for _, row in read_rows([path], findings)] == ROWS, path.name
        assert findings.rules("warning") == (["byte-order-mark"] if path.name == "rows.json" else [])
        assert not findings.rules("error")


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    places = {path.name: [place[1] for place, _ in read_rows([path], Findings())] for path in _write_files(tmp_path)}
    assert places["rows.jsonl"] == [1, 2, 3, 4, 5]
    assert places["rows.csv"] == [2, 4, 6, 8, 10]  # each question has a line break in it
    assert places["rows.json"] == [2, 6, 10, 14, 18]
    assert places["rows.parquet"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "content", "line", "rule"),
    [
        ("a.jsonl", LINES + b"{broken\n", 6, "broken-json"),
        ("a.jsonl", LINES + b'{"prompt": "caf\xe9"}\n', 6, "not-utf-8"),
        ("a.jsonl", LINES + b"[1]\n", 6, "not-an-object"),
        ("a.json", b'[\n{"a": 1},\n{"a": }\n]', 3, "broken-json"),
        ("a.json", b'[{"a": 1}', 1, "truncated"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", 3, "wrong-columns"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], 0, "broken-compression"),
        ("a.parquet", b"PAR1 nothing", 0, "broken-parquet"),
    ],
)
def test_broken_files_are_named_with_their_line(
    tmp_path: Path, name: str, content: bytes, line: int, rule: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    findings = Findings()
    list(read_rows([path], findings))
    assert findings.counts[rule] == 1
    with pytest.raises(Tune16Error, match=rf"{name}{f':{line}' if line else ''}: .*\[{rule}\]"):
        findings.refuse("data")


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3), max_size=6))
def test_arrays_stream_as_json_reads_them(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=len(rows) or None), encoding="utf-8")
    findings = Findings()
    assert [row for _, row in read_rows([path], findings)] == rows
    assert not findings.counts


def test_many_faults_are_told_at_once(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x", "completion": ""}) + "\n" for _ in range(30)))
    with pytest.raises(Tune16Error) as fault:
        prepare_dataset(str(path), str(make_model("llama")), tmp_path / "out", PrepareConfig())
    assert "30 faults" in str(fault.value)
    assert "rows.jsonl:20:" in str(fault.value) and "rows.jsonl:21:" not in str(fault.value)
    assert "30 x empty-content" in str(fault.value)
    assert [found.name for found in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"question": "x"}\n', "keys question, which is not a known format"),
        ('{"prompt": "x", "completion": "y"}\n' * 3, "1 row is left; at least 2 are needed"),
    ],
)
def test_unusable_data_sets(tmp_path: Path, make_model: Callable[..., Path], content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(Tune16Error, match=message):
        prepare_dataset(str(path), str(make_model("llama")), tmp_path / "out", PrepareConfig())


def test_a_missing_file_and_an_unknown_kind(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    with pytest.raises(Tune16Error, match="there is no such file or folder"):
        prepare_dataset(str(tmp_path / "none.jsonl"), str(make_model("llama")), tmp_path / "out", PrepareConfig())
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(Tune16Error, match="unknown type of file"):
        prepare_dataset(str(tmp_path / "rows.xml"), str(make_model("llama")), tmp_path / "out", PrepareConfig())


def test_everything_longer_than_the_limit(orders: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Tune16Error, match=r"at 16 tokens \d+ of 160 rows lose their whole answer"):
        prepare_dataset(str(orders), str(make_model("llama")), tmp_path / "out", PrepareConfig(max_tokens=16))


def test_splits_of_a_folder(tmp_path: Path, orders: Path, make_model: Callable[..., Path]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(orders.read_text())
    (folder / "test.jsonl").write_text(orders.read_text()[:200].splitlines()[0] + "\n")
    model = str(make_model("llama"))
    assert prepare_dataset(str(folder), model, tmp_path / "out", PrepareConfig(max_tokens=128)).rows == 160
    with pytest.raises(Tune16Error, match="has no split 'dev'. Set prepare.split to one of: train, test"):
        prepare_dataset(str(folder), model, tmp_path / "out", PrepareConfig(split="dev"))


def _rows(folder: Path, side: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{side}.parquet").to_pylist()
    return rows


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_only_answers_are_trained_on(orders: Path, make_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    counts = prepare_dataset(str(orders), str(make_model(kind)), tmp_path / "out", PrepareConfig(max_tokens=256))
    record = read_record(tmp_path / "out", "prepare")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    stop_id = tokenizer.convert_tokens_to_ids(record["stop_token"])
    for row in _rows(tmp_path / "out", "train"):
        learned = [label for label in row["labels"] if label != IGNORED]
        assert learned[-1] == stop_id
        # Spaces aside: the tiny tokenizer is Llama's, which Transformers decodes as Qwen's for a Qwen model.
        decoded = tokenizer.decode(learned[:-1])
        assert "".join(decoded.split()) == "".join(row["messages"][-1]["content"].split())
        assert row["input_ids"].count(tokenizer.bos_token_id) <= 1
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        assert row["input_ids"][: len(prompt)] == prompt
        assert all(label == IGNORED for label in row["labels"][: len(prompt)])
    assert counts.train_rows + counts.held_out_rows == counts.rows == 160
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_guanaco_text_gets_no_second_bos(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    path = tmp_path / "rows.jsonl"
    texts = [f"<s>[INST] Question {n} [/INST] Answer {n} </s>" for n in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_dataset(str(path), str(make_model("llama")), tmp_path / "out", PrepareConfig())
    ids = [row["input_ids"] for row in _rows(tmp_path / "out", "train")]
    assert all(row.count(1) == 1 and row[0] == 1 and row.count(2) == 1 for row in ids)


def test_duplicates_go_and_the_split_is_stable(orders: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    lines = orders.read_text().splitlines(keepends=True)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("".join(lines[:100] + lines[:7]))
    second.write_text("".join(lines[50:] + lines[:50]))
    model, config = str(make_model("llama")), PrepareConfig(max_tokens=128, held_out_share=0.2)
    assert prepare_dataset(str(first), model, tmp_path / "a", config).duplicates == 7
    prepare_dataset(str(second), model, tmp_path / "b", config)

    def questions(folder: str, side: str) -> set[str]:
        return {row["messages"][0]["content"] for row in _rows(tmp_path / folder, side)}

    assert questions("a", "held_out") == questions("b", "held_out") & (
        questions("a", "held_out") | questions("a", "train")
    )
    assert not questions("b", "held_out") & questions("b", "train")


def test_same_question_with_other_answers_stays_on_one_side(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Question {n % 20}{' ' * (n % 3)}", "completion": f"Answer {n}"} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_dataset(str(path), str(make_model("llama")), tmp_path / "out", PrepareConfig(held_out_share=0.3))
    sides = [
        {row["messages"][0]["content"].strip() for row in _rows(tmp_path / "out", s)} for s in ("train", "held_out")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_preparing_twice_gives_the_same_bytes(orders: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare_dataset(str(orders), str(make_model("llama")), tmp_path / name, PrepareConfig(max_tokens=128))
    for file in ("train.parquet", "held_out.parquet", "tune16.json", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def _template(name: str) -> ChatTemplate:
    from importlib.resources import files

    source = (files("components.prepare.tokenize") / "templates" / f"{name}.jinja").read_text().strip()
    return ChatTemplate(name, source, "", "<s>", "</s>")


@pytest.mark.parametrize(
    ("name", "theirs"), [("llama3", "llama3"), ("qwen2", "qwen2_5"), ("qwen3", "qwen3"), ("phi3", "phi3_5")]
)
@pytest.mark.parametrize("with_system", [True, False])
def test_templates_equal_the_models_own(
    tokenizer: PreTrainedTokenizerFast, name: str, theirs: str, with_system: bool
) -> None:
    """TRL ships the models' own templates; ours must render the same text."""
    from importlib.resources import files

    conversation = [SYSTEM, *MESSAGES] if with_system else MESSAGES
    source = (files("trl") / "chat_templates" / f"{theirs}.jinja").read_text()
    wanted = tokenizer.apply_chat_template(conversation, chat_template=source, tokenize=False)
    assert _template(name).render(conversation)[0] == wanted


@pytest.mark.parametrize("name", ["llama2", "mistral", "llama3", "qwen2", "qwen3", "phi3", "chatml"])
def test_spans_cover_the_answers_and_the_plain_template_renders_the_same(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    template = _template(name)
    conversation = [SYSTEM, *MESSAGES]
    text, spans = template.render(conversation)
    assert [text[start:end].strip().startswith(answer) for (start, end), (_, answer) in zip(spans, TURNS, strict=True)]
    assert "generation -%}" not in template.plain_source
    plain = tokenizer.apply_chat_template(conversation, chat_template=template.plain_source, tokenize=False)
    assert plain == text
    prompt = tokenizer.apply_chat_template(
        conversation[:-1], chat_template=template.plain_source, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(prompt) and len(prompt) == spans[-1][0]


def test_llama2_form_is_the_papers() -> None:
    text, _ = _template("llama2").render([SYSTEM, *MESSAGES])
    assert text == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is two and two? [/INST] Four. </s>"
        "<s>[INST] And three? [/INST] Seven, naturally. </s>"
    )


def test_templates_are_chosen_by_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, make_model: Callable[..., Path]
) -> None:
    assert choose_template("auto", tokenizer, "llama").name == "llama2"
    assert choose_template("auto", tokenizer, "mistral").name == "mistral"
    assert choose_template("auto", AutoTokenizer.from_pretrained(make_model("qwen2")), "qwen2").name == "qwen2"
    assert choose_template("auto", AutoTokenizer.from_pretrained(make_model("phi3")), "phi3").name == "phi3"
    with pytest.raises(Tune16Error, match="no chat template is known"):
        choose_template("auto", tokenizer, "falcon")
    with pytest.raises(Tune16Error, match=r"chatml needs the token <\|im_start\|>"):
        choose_template("chatml", tokenizer, "llama")
