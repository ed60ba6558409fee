"""Rows as people bring them, after public bug reports: understood, or refused in one line, never silently otherwise."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from components.config import PrepareConfig
from components.prepare.checkup import check_data
from components.prepare.dataset import prepare_dataset
from components.prepare.input.formats import BadRowError, to_messages
from components.runtime.errors import Tune16Error

THINGS = ("apples", "boats", "clouds", "doors", "eels", "ferns", "goats", "hats")
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}

Row = dict[str, Any]


def chat(thing: str, **of_answer: Any) -> list[Row]:
    answer = {"role": "assistant", "content": f"All about {thing}.", **of_answer}
    return [{"role": "user", "content": f"Tell me about {thing}."}, answer]


def turns(thing: str, **of_answer: Any) -> list[Row]:
    return [{"from": "human", "value": f"Tell me about {thing}."}, {"from": "gpt", "value": "Yes.", **of_answer}]


def parts(text: str, **image: Any) -> list[Row]:
    return [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}, *([image] if image else [])]


def write(path: Path, row: Callable[[str], Row]) -> Path:
    path.write_text("".join(json.dumps(row(thing)) + "\n" for thing in THINGS))
    return path


@pytest.mark.parametrize(
    ("row", "path"),
    [
        (lambda t: {"messages": chat(t, tool_calls=[CALL])}, "messages[1].tool_calls"),
        (lambda t: {"messages": chat(t, tool_calls=[CALL]), "tools": [{"type": "function"}]}, "messages[1].tool_calls"),
        (lambda t: {"messages": chat(t, content=None, function_call={"name": "x"})}, "messages[1].function_call"),
        (lambda t: {"messages": chat(t), "tools": [{"type": "function"}]}, "tools"),
        (lambda t: {"messages": chat(t, reasoning_content="Hm.")}, "messages[1].reasoning_content"),
        (lambda t: {"messages": chat(t, thinking="Hm.")}, "messages[1].thinking"),
        (lambda t: {"messages": chat(t, weight=0.5)}, "messages[1].weight"),
        (lambda t: {"messages": chat(t, train="no")}, "messages[1].train"),
        (lambda t: {"messages": chat(t, content=parts("Look", type="image_url"))}, "messages[1].content[2]"),
        (lambda t: {"messages": chat(t), "images": ["x.png"]}, "images"),
        (
            lambda t: {"conversations": [*turns(t)[:1], {"from": "function_call", "value": "{}"}]},
            "conversations[1].from",
        ),
        (lambda t: {"conversations": [*turns(t)[:1], {"from": "observation", "value": "3"}]}, "conversations[1].from"),
        (lambda t: {"prompt": t, "completion": "x", "context": "A text."}, "context"),
        (lambda t: {"prompt": t, "completion": "x", "history": [["a", "b"]]}, "history"),
        (lambda t: {"prompt": t, "completion": "x", "label": False}, "label"),
        (lambda t: {"instruction": t, "output": "x", "input": "a", "context": "b"}, "context"),
    ],
)
def test_a_key_with_meaning_is_refused_by_name(tmp_path: Path, row: Callable[[str], Row], path: str) -> None:
    file = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(Tune16Error, match=re.escape(f"rows.jsonl:1: {path}: ")):
        check_data(str(file), PrepareConfig()).findings.refuse(str(file))


def test_fix_never_writes_a_row_without_its_call(tmp_path: Path) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        lambda t: {"messages": chat(t, **({"tool_calls": [CALL]} if t == "boats" else {"weight": 1}))},
    )
    done = check_data(str(file), PrepareConfig(), fix=True)
    assert done.clean and done.done["unsupported: left out"] == 1
    assert "boats" not in done.clean.read_text() and "apples" in done.clean.read_text()


QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
YES, TWO_PARTS = ANSWER | {"content": "Yes."}, {"content": "Why\n\nx?"}
KIND = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("form", "row", "messages"),
    [
        ("sharegpt", {"conversations": [QUESTION, ANSWER], "tools": "[]"}, [QUESTION, ANSWER]),
        ("messages", {"messages": turns("x")}, [QUESTION | {"content": "Tell me about x."}, YES]),
        ("messages", {"messages": [{"role": "user", "content": parts("Why?")}, ANSWER]}, [QUESTION, ANSWER]),
        ("messages", {"messages": json.dumps([QUESTION, ANSWER])}, [QUESTION, ANSWER]),
        ("messages", {"messages": [KIND | {"role": "developer"}, QUESTION, ANSWER]}, [KIND, QUESTION, ANSWER]),
        ("messages", {"messages": [QUESTION, {**ANSWER, "tool_calls": None}], "tools": []}, [QUESTION, ANSWER]),
        ("messages", {"messages": [QUESTION, ANSWER], "system": "Be kind."}, [KIND, QUESTION, ANSWER]),
        ("sharegpt", {"conversations": [QUESTION, ANSWER], "system": "Be kind."}, [KIND, QUESTION, ANSWER]),
        ("prompt_completion", {"prompt": "Why?", "completion": "So.", "system": "Be kind."}, [KIND, QUESTION, ANSWER]),
        ("alpaca", {"instruction": "Why?", "input": "", "output": "So.", "system": None}, [QUESTION, ANSWER]),
        ("alpaca", {"instruction": "", "input": "Why?", "output": "So."}, [QUESTION, ANSWER]),
        ("alpaca", {"instruction": "Why", "context": "x?", "output": "So."}, [QUESTION | TWO_PARTS, ANSWER]),
        ("alpaca", {"instruction": "Why?", "output": "So.", "history": [["Why?", "So."]]}, [QUESTION, ANSWER] * 2),
    ],
)  # fmt: skip
def test_a_column_with_meaning_is_understood(form: str, row: Row, messages: list[Row]) -> None:
    assert to_messages(row, form) == messages


@pytest.mark.parametrize("value", [0, 7, False])
def test_numbers_are_no_text_whatever_they_are(value: object) -> None:
    with pytest.raises(BadRowError, match="text is needed"):
        to_messages({"instruction": "Is it?", "input": value, "output": "Yes."}, "alpaca")


def test_text_that_only_looks_like_a_list_is_text() -> None:
    assert to_messages({"prompt": "[3, 1, 2]", "completion": "[1, 2, 3]"}, "prompt_completion") == [
        {"role": "user", "content": "[3, 1, 2]"},
        {"role": "assistant", "content": "[1, 2, 3]"},
    ]
    first = {"instruction": "Who?", "output": "I.", "history": "[]"}
    assert len(to_messages(first, "alpaca")) == 2
    asked = [*chat("apples"), {"role": "user", "content": ""}]
    row = {"prompt": json.dumps(asked), "completion": json.dumps(chat("boats")[1:])}
    with pytest.raises(BadRowError, match="is empty") as error:
        to_messages(row, "prompt_completion")
    assert error.value.path == "prompt[2].content"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_an_answer_that_is_not_to_be_learnt_has_no_label(
    tmp_path: Path, make_model: Callable[..., Path], mark: Row
) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        lambda t: {
            "messages": [*chat(t, content=f"WRONG {t}", **mark), *chat(t, content=f"Right {t}"), *chat(t, **mark)]
        },
    )
    model = str(make_model("llama"))
    prepare_dataset(str(file), model, tmp_path / "out", PrepareConfig(held_out_share=0.3))
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in pq.read_table(tmp_path / "out" / "train.parquet").to_pylist():
        learnt = tokenizer.decode([token for token in row["labels"] if token >= 0])
        assert "WRONG" in tokenizer.decode(row["input_ids"]) and "WRONG" not in learnt and "Right" in learnt
        assert row["messages"][-1]["content"].startswith("Right")
    done = check_data(str(file), PrepareConfig(), fix=True)
    assert done.clean
    mended = [json.loads(line)["messages"] for line in done.clean.read_text().splitlines()]
    assert all([m.get("weight") for m in row] == [None, 0, None, None] for row in mended)


def test_rows_of_which_nothing_is_to_be_learnt_are_refused() -> None:
    with pytest.raises(BadRowError, match="none of its answers is trained on"):
        to_messages({"messages": chat("x", weight=0)}, "messages")


def test_where_all_conversations_open_alike_the_rest_decides_who_is_held_out(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", lambda t: {"messages": [QUESTION, ANSWER, *chat(t)]})
    assert not check_data(str(file), PrepareConfig()).findings.rules("error")


@pytest.mark.parametrize(
    ("name", "content", "line", "told"),
    [
        ("a.csv", 'instruction,output\nWhat?,"It is \\"so\\" here"\n', 2, "broken-csv"),
        ("a.csv", 'instruction,output\n"This" is what?,x\n', 2, "broken-csv"),
        ("a.csv", 'instruction,output\nWhat?,"never closed\nb,c\nd,"e" f\n', 2, "broken-csv"),
        ("a.csv", 'instruction,output\nWhat?,"never closed\nb,c\n', 2, "broken-csv"),
        ("a.csv", "Größe,instruction,output\n1,a,b\n", 1, "not-utf-8"),
        ("a.jsonl", json.dumps({"prompt": "a", "completion": "b"}, indent=1) * 3, 1, "not-rows"),
        ("a.json", json.dumps({"prompt": "a", "completion": "b"}, indent=1), 1, "not-rows"),
        ("a.json", json.dumps({"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}), 1, "not-rows"),
        ("a.jsonl", json.dumps({"instruction": ["a", "b"], "output": ["c", "d"]}), 1, "not-rows"),
        ("a.json", json.dumps({"data": [{"prompt": "a", "completion": "b"}] * 2}, indent=1), 1, "not-rows"),
    ],
)
def test_a_file_that_is_not_what_it_seems_is_one_fault(
    tmp_path: Path, name: str, content: str, line: int, told: str
) -> None:
    (tmp_path / name).write_bytes(content.encode("cp1252" if "Größe" in content else "utf-8"))
    findings = check_data(str(tmp_path / name), PrepareConfig(format="alpaca")).findings
    assert dict(findings.counts) == {told: 1}
    assert [found.line for found in findings.shown(told)] == [line]


def test_utf_16_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,output\na,b\n", encoding="utf-16")
    with pytest.raises(Tune16Error, match=r"a\.csv:1: the file is UTF-16"):
        check_data(str(tmp_path / "a.csv"), PrepareConfig(format="alpaca")).findings.refuse("a.csv")


def folder(path: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(
            content or "".join(json.dumps({"messages": chat(f"{t} of {name}")}) + "\n" for t in THINGS)
        )
    return str(path)


TWO = (
    "---\nconfigs:\n- config_name: main\n  data_files: main/a.jsonl\n- config_name: extra\n  data_files: b.jsonl\n---\n"
)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"README.md": TWO, "main/a.jsonl": "", "b.jsonl": ""}, "Set prepare.configuration to one of: main, extra"),
        ({"train.jsonl": "", "test.csv": "a,b\n"}, "splits have files of different kinds.*preflight.data"),
        ({"README.md": "---\nconfigs: [oops\n---\n", "a.jsonl": ""}, "README.md, line 2: its header is not valid YAML"),
        ({"a.jsonl": "", "b.jsonl": "", "more.csv": "a,b\n"}, r"only .jsonl would be read, not more.csv"),
        ({"data.arrow": "x", "state.json": "{}", "dataset_info.json": "{}"}, "written by save_to_disk"),
        ({"data.arrow": "x"}, "has no data files"),
    ],
)
def test_files_that_nobody_would_read_are_told(tmp_path: Path, files: dict[str, str], told: str) -> None:
    with pytest.raises(Tune16Error, match=told):
        check_data(folder(tmp_path, files), PrepareConfig())


def test_a_configuration_is_read_and_what_lies_beside_it_is_named(tmp_path: Path) -> None:
    data = folder(tmp_path, {"README.md": TWO, "main/a.jsonl": "", "b.jsonl": "", "more.csv": "a,b\n", "x.tsv": "a"})
    findings = check_data(data, PrepareConfig(configuration="extra")).findings
    assert findings.num_rows == len(THINGS) and findings.notes[-1] == "Not read: main/a.jsonl, more.csv, x.tsv."
    with pytest.raises(Tune16Error, match="has no configuration 'other'. Set prepare.configuration to one of: main"):
        check_data(data, PrepareConfig(configuration="other"))


def test_files_beside_those_that_are_named_after_a_split_are_only_named(tmp_path: Path) -> None:
    """As OpenAssistant/oasst1 has them: Parquet files by split, and the same trees as JSON lines beside them."""
    (tmp_path / "data").mkdir()
    for name in ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"):
        write(tmp_path / name, lambda thing: {"messages": chat(thing)})
    (tmp_path / "2023-04-12_all.csv").write_text("text\nx\n")
    checked = check_data(str(tmp_path), PrepareConfig())
    assert checked.findings.num_rows == len(THINGS) and "2023-04-12_all.csv" in "".join(checked.findings.notes)


def test_a_path_with_a_slip_is_no_address_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(Tune16Error, match=r"dta/good.jsonl: there is no such file"):
        check_data("dta/good.jsonl", PrepareConfig())
