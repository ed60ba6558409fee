"""The step prepare: a data set becomes token sequences of which only the answers are trained on.

Two passes over the files. The first checks every row (see check.py); the second renders the chat template, tokenises,
splits and writes.
"""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import PrepareConfig
from components.models.labels import IGNORED
from components.prepare import report
from components.prepare.input.conversations import conversations
from components.prepare.inputs import find_files, load_tokenizer
from components.prepare.results import Counts, Prepared
from components.prepare.rowfiles import RowFile
from components.prepare.rules.check import Checked, check_rows
from components.prepare.rules.content import special_tokens
from components.prepare.rules.findings import Findings
from components.prepare.tokenize.chat import ChatTemplate
from components.prepare.tokenize.tokens import PlacedRow, TokenRow, Tokens
from components.runtime.errors import Tune16Error
from components.runtime.outputs import new_folder, write_record
from components.runtime.steps import say
from components.storage.files import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 512


def prepare_dataset(data: str, model: str, output: Path, config: PrepareConfig) -> Counts:
    """Prepare a data set for training.

    Args:
        data: reference of the data set.
        model: reference of the model whose tokenizer and chat template are used.
        output: becomes a folder with ``train.parquet`` and ``held_out.parquet`` (columns ``messages``, ``source``,
            ``input_ids``, ``labels``), ``tokenizer/`` and ``report.html``.
        config: form, template, split and limits.

    Raises:
        Tune16Error: the data set or the tokenizer cannot be used; every faulty row is reported.
    """
    with tempfile.TemporaryDirectory(dir=output.parent if output.parent.is_dir() else None) as scratch:
        found = find_files(data, config.configuration, config.split, Path(scratch) / "data")
        files = found.files
        tokenizer, template, limits = load_tokenizer(model, config.template, Path(scratch) / "model")
        with new_folder(output) as folder:
            checked = check_rows(files, config, data, special_tokens(tokenizer, template), _say)
            checked.findings.note(found.note)
            checked.findings.refuse(data)
            _refuse_no_rows(checked, data)
            tokens = Tokens(tokenizer, template, config.max_tokens, checked.findings, limits)
            counts = _write_rows(files, checked, tokens, folder)
            checked.findings.refuse(data)
            _refuse_empty_sides(counts, config)
            _finish(Prepared(counts, checked, template, tokens), tokenizer, data, model, config, folder)
    return counts


def _refuse_no_rows(checked: Checked, data: str) -> None:
    if checked.is_left_out.all():
        raise Tune16Error(
            f"{data}: every row contains a token of the chat template. `tune16 data check --fix` removes it."
        )


def _write_rows(files: list[Path], checked: Checked, tokens: Tokens, folder: Path) -> Counts:
    """Tokenise and write all rows."""
    num_duplicates, num_left_out = int(checked.is_duplicate.sum()), int(checked.is_left_out.sum())
    counts = Counts(len(checked), num_duplicates, dropped_template_token=num_left_out - num_duplicates)
    with closing(RowFile(folder / "train.parquet")) as train, closing(RowFile(folder / "held_out.parquet")) as held_out:
        for batch in token_batches(files, checked, tokens):
            for file, side in ((train, "train"), (held_out, "held_out")):
                rows = [row for row in batch if row.row.held_out == (side == "held_out")]
                file.add(rows)
                _count(counts, side, rows)
    counts.cut = checked.findings.counts["too-long"]
    counts.dropped_answer_cut_away = checked.findings.counts["answer-cut-away"]
    counts.longest = tokens.longest
    return counts


def _count(counts: Counts, side: str, rows: list[TokenRow]) -> None:
    for name, number in (
        ("rows", len(rows)),
        ("tokens", sum(len(row.input_ids) for row in rows)),
        ("answer_tokens", sum(int((row.labels != IGNORED).sum()) for row in rows)),
    ):
        setattr(counts, f"{side}_{name}", getattr(counts, f"{side}_{name}") + number)


def _refuse_empty_sides(counts: Counts, config: PrepareConfig) -> None:
    if not counts.train_rows or not counts.held_out_rows:
        raise Tune16Error(
            f"prepare.max_tokens: at {config.max_tokens} tokens {counts.dropped_answer_cut_away} of {counts.rows} rows "
            f"lose their whole answer, and too few are left; the longest has {counts.longest} tokens. Raise it."
        )


def token_batches(files: list[Path], checked: Checked, tokens: Tokens) -> Iterator[list[TokenRow]]:
    """The second pass: all rows that are kept, tokenised, in batches."""
    rows = _kept_rows(files, checked)
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        yield tokens.batch(batch)


def _kept_rows(files: list[Path], checked: Checked) -> Iterator[PlacedRow]:
    for number, (place, _, messages) in enumerate(conversations(files, checked.form, Findings())):
        if not checked.is_left_out[number]:
            yield PlacedRow(place, messages, bool(checked.is_held_out[number]))


def _finish(
    prepared: Prepared,
    tokenizer: "PreTrainedTokenizerBase",
    data: str,
    model: str,
    config: PrepareConfig,
    folder: Path,
) -> None:
    """Write what goes with the rows: the tokenizer with its template, the report and the record."""
    source = prepared.template.plain_source
    if isinstance(prepared.template, ChatTemplate):
        tokenizer.chat_template = source
    if "eos_token" not in source:  # it would be rendered differently
        tokenizer.eos_token = prepared.template.stop_token  # so that servers stop where training did
    tokenizer.save_pretrained(folder / "tokenizer")
    report.write_report(prepared, data, folder)
    write_record(
        folder,
        "prepare",
        config,
        data=data,
        model=model,
        form=prepared.checked.form,
        template=prepared.template.name,
        stop_token=prepared.template.stop_token,
        held_out_sha256=file_digest(folder / "held_out.parquet"),
        counts=asdict(prepared.counts),
    )
    findings = prepared.checked.findings
    _say(f"chat template: {prepared.template.note}")
    for line in [*(f"warning: {findings.summary(rule)}" for rule in findings.rules("warning")), *findings.notes]:
        _say(line)
    counts = prepared.counts
    dropped = counts.dropped_template_token + counts.dropped_answer_cut_away
    _say(
        f"{counts.train_rows:,} rows to train on with {counts.train_tokens:,} tokens, {counts.held_out_rows:,} held "
        f"out; {counts.duplicates:,} duplicates, {counts.cut:,} cut, {dropped:,} dropped",
    )


def _say(text: str) -> None:
    say("prepare", text)
