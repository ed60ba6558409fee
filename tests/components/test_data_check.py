import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from components.config import PrepareConfig
from components.prepare.checkup import check_data
from components.prepare.dataset import prepare_dataset
from components.prepare.input.files import LARGEST_ROW
from components.prepare.input.readers import read_rows
from components.prepare.rules import near_duplicates
from components.prepare.rules.content import KNOWN_TOKENS, mended
from components.prepare.rules.findings import SHOWN, Findings
from components.prepare.rules.sensitive import find, quoted, redact
from components.prepare.rules.shingles import Words
from components.prepare.rules.table import RULES
from components.runtime.errors import Tune16Error
from components.runtime.outputs import REPORT
from pipelines.cli import app
from pipelines.demo.generate import ORDERS
from tests.faults.rows import WELL_FORMED, make_rows, text, write_rows
from tests.faults.seeded_defects import SECRETS

USER = {"role": "user", "content": "a"}


def _write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _check(path: Path, **options: Any) -> Findings:
    return check_data(str(path), PrepareConfig(**options)).findings


def _pair(prompt: str, completion: str = "An answer.") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


@pytest.mark.parametrize(("form", "suffix", "packed"), WELL_FORMED)
def test_well_formed_files_have_no_fault(tmp_path: Path, form: str, suffix: str, packed: str) -> None:
    path = tmp_path / f"rows{suffix}{packed}"
    write_rows(path, make_rows(random.Random(1), 30, form))
    findings = _check(path)
    assert findings.num_rows == 30
    assert not findings.counts


@pytest.mark.parametrize(
    ("row", "rule", "path"),
    [
        ({"messages": [USER, {"role": "bot", "content": "b"}]}, "unknown-role", "messages[1].role"),
        ({"messages": [USER, {"role": "assistant"}]}, "missing-key", "messages[1].content"),
        ({"messages": [USER, 3]}, "wrong-type", "messages[1]"),
        ({"messages": [USER]}, "no-answer", "messages"),
        ({"conversations": [{"from": "human", "value": ""}]}, "empty-content", "conversations[0].value"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "roles-out-of-order", "conversations[0].value"),
        ({"instruction": "a", "output": "b\0"}, "nul", "output"),
        ({"instruction": "a", "output": "b", "system": "c\0"}, "nul", "system"),
        (_pair("a", "\ud83d"), "lone-surrogate", "completion"),
        (_pair("a") | {"prompt": [{"role": "user", "content": 5}]}, "wrong-type", "prompt[0].content"),
        (_pair("a") | {"deep": [{"x": float("nan")}]}, "not-a-number", "deep[0].x"),
        ({"text": "[INST] a [/INST] b\0"}, "nul", "text"),
    ],
)  # fmt: skip
def test_faults_have_line_and_path(tmp_path: Path, row: dict[str, Any], rule: str, path: str) -> None:
    file = _write(tmp_path / "rows.jsonl", "", row)
    shown = _check(file).shown(rule)
    assert [(found.line, found.path) for found in shown] == [(2, path)]
    with pytest.raises(Tune16Error) as refused:
        _check(file).refuse("data")
    assert f"rows.jsonl:2: {path}: " in str(refused.value)
    assert str(refused.value).count(RULES[rule].remedy) == 1


def test_a_key_that_stands_twice_is_named_where_it_stands(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", '{"prompt": "a", "completion": "b", "list": [1, {"k": 1, "k": 2}]}')
    assert _check(path).shown("duplicate-key")[0].path == "list[1].k"


def test_faults_of_a_tree_stand_on_the_messages_own_line(tmp_path: Path) -> None:
    rows = make_rows(random.Random(1), 2, "oasst")
    rows[3]["text"] = "a\0b"
    assert [found.line for found in _check(_write(tmp_path / "rows.jsonl", *rows)).shown("nul")] == [4]


def test_messages_that_are_each_others_parents_end(tmp_path: Path) -> None:
    row = {"message_tree_id": "t", "role": "prompter", "text": "x", "rank": None}
    rows = [row | {"message_id": "a", "parent_id": None}, row | {"message_id": "a", "parent_id": "a"}]
    assert _check(_write(tmp_path / "rows.jsonl", *rows)).counts == {"no-answer": 1}


def test_unknown_keys_are_told_once_and_counted(tmp_path: Path) -> None:
    rows = [_pair(str(number)) | {"score": number, "id": 1} for number in range(50)]
    findings = _check(_write(tmp_path / "rows.jsonl", *rows))
    assert findings.counts == {"unknown-key": 50}
    assert [found.path for found in findings.shown("unknown-key")] == ["score"]


def test_each_rule_shows_its_first_places(tmp_path: Path) -> None:
    rows = [_pair("", "x")] * 50 + [_pair("x", "a\0")]
    findings = _check(_write(tmp_path / "rows.jsonl", *rows))
    assert findings.counts["empty-content"] == 50 and len(findings.shown("empty-content")) == SHOWN
    assert findings.shown("nul")[0].line == 51


def test_a_line_without_end_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{" + b"a" * (3 * LARGEST_ROW) + b"\n" + json.dumps(_pair("a")).encode())
    findings = Findings()
    assert [place[1] for place, _ in read_rows([path], findings)] == [2]
    assert findings.counts == {"row-too-long": 1}


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 200_000_000))
    findings = Findings()
    assert not list(read_rows([path], findings))
    assert findings.counts["zip-bomb"] == 1
    assert "stopped at 10" in findings.shown("zip-bomb")[0].message


@pytest.mark.parametrize("value", [value for values in SECRETS.values() for value in values])
def test_secrets_are_found_and_never_shown(tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert value not in redact(f"It is {value}, as said.")
    path = _write(tmp_path / "rows.jsonl", _pair(f"It is {value}, as said."), _pair("b") | {value: 1}, _pair("c\0"),
                  {"messages": 1, "prompt": value})  # fmt: skip
    for options in (["--json"], ["--report", str(tmp_path / "r.html")], []):
        ended = CliRunner().invoke(app, ["data", "check", str(path), "--format", "prompt_completion", *options])
        assert isinstance(ended.exception, Tune16Error)
        for said in (ended.output, str(ended.exception)):
            assert value not in said.replace("\n", "")
    assert value not in (tmp_path / "r.html").read_text()
    assert value[:40] not in quoted(value)


@pytest.mark.parametrize(
    "value", ["4111 1111 1111 1112", "0000 0000 0000 0000", "DE88370400440532013000", "a@b", "task-a-b-c"]
)
def test_what_only_looks_like_a_secret_is_none(value: str) -> None:
    assert not list(find(f"It is {value}, as said."))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*sorted(KNOWN_TOKENS), "<|im_", "end|>", "\0", "\ud800", "a"]), max_size=12))
def test_what_is_mended_has_no_token_left(pieces: list[str]) -> None:
    content = mended("".join(pieces), KNOWN_TOKENS)
    assert not any(token in content for token in KNOWN_TOKENS)
    assert "\0" not in content
    content.encode()


def test_runs_of_words_have_the_same_hash_wherever_they_stand() -> None:
    first, offsets = Words([b"one two three four", b"x one two three"]).runs(3)
    assert offsets.tolist() == [0, 2]
    assert first[0] == first[3] and len(set(first.tolist())) == 3


@pytest.mark.parametrize("num_changed", [0, 1, 6, 30])
def test_signatures_agree_in_the_share_of_common_runs(num_changed: int) -> None:
    draw = random.Random(7)
    words = text(draw, 300).split()
    changed = list(words)
    for place in draw.sample(range(300), num_changed):
        changed[place] = "changed"
    sets = [{tuple(found[n : n + 3]) for n in range(298)} for found in (words, changed)]
    wanted = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    made = near_duplicates.signatures(Words([" ".join(found).encode() for found in (words, changed)]))
    assert abs(np.mean(made[0] == made[1]) - wanted) < 0.15
    assert (near_duplicates.earlier_alike(made)[1] == 0) == (num_changed < 10)


def test_only_the_first_rows_are_compared_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.prepare.rules.check.MOST_ROWS", 50)
    rows = make_rows(random.Random(1), 80)
    rows[60] = rows[3] | {"prompt": rows[3]["prompt"] + " indeed"}
    rows[40] = rows[3] | {"prompt": rows[3]["prompt"] + " surely"}
    findings = _check(_write(tmp_path / "rows.jsonl", *rows))
    assert [found.line for found in findings.shown("near-duplicate")] == [41]
    assert "the other 30 were not" in findings.notes[0]


def test_questions_that_differ_in_punctuation_are_on_one_side(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    rows = [_pair(f"What is {n % 40}{'?!.,'[n // 40]}", f"It is {n}") for n in range(160)]
    path = _write(tmp_path / "rows.jsonl", *rows)
    prepare_dataset(str(path), str(make_model("llama")), tmp_path / "out", PrepareConfig(held_out_share=0.2))
    import pyarrow.parquet as pq

    sides = [
        {row["messages"][0]["content"][:-1] for row in pq.read_table(tmp_path / "out" / f"{side}.parquet").to_pylist()}
        for side in ("train", "held_out")
    ]
    assert all(sides) and not sides[0] & sides[1]


def test_the_demos_rows_are_all_kept() -> None:
    findings = _check(ORDERS)
    assert not findings.rules("error")
    assert not set(findings.counts) & {"duplicate", "leakage", "different-answers"}


def test_prepare_tells_its_warnings(
    tmp_path: Path, make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [_pair(f"Question {n}", f"Answer {n} to anna@firma.at" if n == 3 else f"Answer {n}") for n in range(40)]
    path = _write(tmp_path / "rows.jsonl", *rows, rows[0])
    prepare_dataset(str(path), str(make_model("llama")), tmp_path / "out", PrepareConfig())
    said = capsys.readouterr().out
    assert "warning: 1 x duplicate, 2.44% of the rows, first at rows.jsonl:41." in said
    assert "first at rows.jsonl:4: completion." in said and "anna@" not in said
    page = (tmp_path / "out" / REPORT).read_text()
    assert "personal-data" in page and "rows.jsonl:41" in page


def test_with_a_model_tokens_count(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    rows = [_pair(f"Question {n}", "word " * (200 if n == 5 else 3)) for n in range(20)]
    path = _write(tmp_path / "rows.jsonl", *rows, _pair("word " * 200))
    findings = check_data(str(path), PrepareConfig(max_tokens=64), str(make_model("llama"))).findings
    assert [found.line for found in findings.shown("too-long")] == [6]
    assert [found.line for found in findings.shown("answer-cut-away")] == [21]


def test_with_a_model_only_its_tokens_count(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    path = _write(tmp_path / "rows.jsonl", _pair("<|eot_id|>"), _pair("</s>"))
    assert _check(path).counts["template-token"] == 2
    assert check_data(str(path), PrepareConfig(), str(make_model("llama"))).findings.counts["template-token"] == 1


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}]', 2),
        ('[{"prompt": "a", "completion": "b"},\n,{"prompt": "c", "completion": "d"}]', 2),
        ('[{"prompt": "a", "completion": "b"},\n]', 2),
        ('[,{"prompt": "a", "completion": "b"}]', 1),
    ],
)
def test_commas_of_an_array_stand_between_its_rows(tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert [found.line for found in _check(path).shown("broken-json")] == [line]


def test_the_same_in_other_letters_is_no_other_answer(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "rows.jsonl", _pair("What is X?", "42"), _pair("what  is x?", "42"), _pair("what is X?", "43")
    )
    assert [found.line for found in _check(path).shown("different-answers")] == [3]


def test_a_row_made_to_be_slow_is_not(tmp_path: Path) -> None:
    assert not _check(_write(tmp_path / "rows.jsonl", _pair("eyJ" * 300_000), _pair("short"))).counts


def test_rows_with_the_templates_tokens_are_left_out(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    path = _write(tmp_path / "rows.jsonl", *make_rows(random.Random(1), 30), _pair("a</s>", "b"), _pair("c", "<s>"))
    counts = prepare_dataset(str(path), str(make_model("llama")), tmp_path / "out", PrepareConfig())
    assert (counts.rows, counts.dropped_template_token, counts.train_rows + counts.held_out_rows) == (32, 2, 30)
    _write(path, _pair("a</s>", "b"), _pair("c", "<s>"))
    with pytest.raises(Tune16Error, match="every row contains a token of the chat template"):
        prepare_dataset(str(path), str(make_model("llama")), tmp_path / "out", PrepareConfig())


def test_fix_mends_what_it_can_and_says_so(tmp_path: Path) -> None:
    kept = make_rows(random.Random(1), 5)
    path = tmp_path / "rows.jsonl"
    mendable = [_pair("a@firma.at", "x\0"), _pair("\ud800b", "<|im_end|>y") | {"extra": 1}]
    _write(path, *kept, kept[0], *mendable, _pair("", "x"), _pair("<s>", "only a token"), '{"prompt": "cut')
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()[:-1])
    found = check_data(str(path), PrepareConfig(), fix=True)
    assert found.clean == tmp_path / "rows.clean.jsonl"
    rows = [json.loads(line)["messages"] for line in found.clean.read_text().splitlines()]
    assert [[message["content"] for message in row] for row in rows] == [
        *([row["prompt"], row["completion"]] for row in kept),
        ["[EMAIL]", "x"],
        ["b", "y"],
    ]
    assert found.done == {
        "rows kept": 7,
        "duplicate: left out": 1,
        "empty after repair: left out": 1,
        "byte-order-mark: taken out": 1,
        "empty-content: left out": 1,
        "truncated: left out": 1,
        "nul: taken out": 1,
        "lone-surrogate: taken out": 1,
        "template-token: taken out": 2,
        "unknown-key: dropped": 1,
        "personal-data: replaced by placeholders": 1,
    }
    assert not _check(found.clean).counts
    assert sorted(item.name for item in tmp_path.iterdir()) == ["rows.clean.jsonl", "rows.jsonl"]
    with pytest.raises(Tune16Error, match="exists already"):
        check_data(str(path), PrepareConfig(), fix=True)


def test_fix_writes_no_empty_copy(tmp_path: Path) -> None:
    found = check_data(str(_write(tmp_path / "rows.jsonl", _pair("", "x"))), PrepareConfig(), fix=True)
    assert found.clean is None and "no row can be repaired" in found.findings.notes[0]
    with pytest.raises(Tune16Error, match="no row is left after repair"):
        check_data(str(_write(tmp_path / "rows.jsonl", _pair("<s>", "x"))), PrepareConfig(), fix=True)
    assert [item.name for item in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_command_in_all_its_outputs(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", *make_rows(random.Random(1), 5), {"prompt": "[/INST]", "completion": "x"})
    ended = CliRunner().invoke(app, ["data", "check", str(path), "--json", "--report", str(tmp_path / "r.html")])
    assert json.loads(ended.stdout)["rules"]["template-token"]["places"][0]["line"] == 6
    assert ended.exit_code == 0
    assert "rows.jsonl:6: prompt" in (tmp_path / "r.html").read_text()
    ended = CliRunner().invoke(app, ["data", "check", str(path)])
    assert "template-token" in ended.stdout and "6 readable rows, 0 errors, 1 warnings" in ended.stdout
    good = _write(tmp_path / "good.jsonl", *make_rows(random.Random(1), 5))
    assert CliRunner().invoke(app, ["data", "check", str(good)]).exit_code == 0
