"""The step prepare: a data set becomes token sequences of which only the answers are trained on.

Two passes over the files. The first checks every row and finds duplicates; the second renders the chat template,
tokenises, splits and writes. Memory holds 24 bytes per row (two digests) and the batch at hand.
"""

import hashlib
import itertools
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers.models import BPE

from components.config import PrepareConfig
from components.errors import Tune16Error
from components.outputs import new_folder, write_record
from components.prepare import report
from components.prepare.chat import ChatTemplate, Messages, choose_template
from components.prepare.findings import Findings
from components.prepare.formats import BadRowError, best_threads, detect_format, to_messages
from components.prepare.readers import Place, read_rows
from components.references import DATA_FILES, TOKENIZER_FILES, fetch, file_digest, parse, read_config
from components.steps import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of tokens that are not trained on, as in torch's cross-entropy

_BATCH_ROWS = 512
_ROW_GROUP = 8192
_SAY_EVERY_ROWS = 50_000
_SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "source": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
    }
)


@dataclass
class Counts:
    """What became of the rows and tokens."""

    rows: int = 0
    duplicates: int = 0
    cut: int = 0
    dropped_answer_cut_away: int = 0
    train_rows: int = 0
    held_out_rows: int = 0
    train_tokens: int = 0
    train_answer_tokens: int = 0
    held_out_tokens: int = 0
    held_out_answer_tokens: int = 0
    longest: int = 0


@dataclass
class Prepared:
    """What the report tells of a prepared data set; `lengths[n]` counts the rows of n tokens, before any cut."""

    counts: Counts
    form: str
    template: ChatTemplate
    lengths: npt.NDArray[np.int64]
    examples: list[tuple[str, list[tuple[int, int]]]]


@dataclass(frozen=True)
class _Row:
    place: Place
    messages: Messages
    held_out: bool


def prepare_dataset(data: str, model: str, output: Path, config: PrepareConfig) -> Counts:
    """Prepare a data set for training.

    Args:
        data: reference of the data set.
        model: reference of the model whose tokenizer and chat template are used.
        output: becomes a folder with ``train.parquet`` and ``held_out.parquet`` (columns ``messages``, ``source``,
            ``input_ids``, ``labels``), ``tokenizer/`` and ``report.html``.
        config: form, template, split and limits.

    Raises:
        Tune16Error: the data set or the tokenizer cannot be used; every faulty row is named.
    """
    with tempfile.TemporaryDirectory(dir=output.parent if output.parent.is_dir() else None) as scratch:
        files = find_files(data, config.split, Path(scratch) / "data")
        tokenizer, template = load_tokenizer(model, config.template, Path(scratch) / "model")
        with new_folder(output) as folder:
            checked = check_rows(files, config, data)
            prepared = _write_rows(files, checked, tokenizer, template, config, folder)
            _finish(prepared, tokenizer, data, model, config, folder)
    return prepared.counts


def find_files(data: str, split: str, scratch: Path) -> list[Path]:
    """Fetch the data set and find the files of one split, as the `datasets` library resolves it.

    Raises:
        Tune16Error: it has no data files or no such split.
    """
    path = fetch(parse(data, "data"), scratch, [*DATA_FILES, "README.md"])
    if path.is_file():
        return [path]
    if not any(file for pattern in DATA_FILES for file in path.rglob(pattern)):
        raise Tune16Error(f"{data}: has no data files. They end in .jsonl, .json, .csv or .parquet.")
    from datasets import load_dataset_builder  # slow to import, and a single file needs none of it

    splits = {str(name): found for name, found in load_dataset_builder(str(path)).config.data_files.items()}
    if split not in splits:
        raise Tune16Error(f"{data}: has no split '{split}'. Set prepare.split to one of: {', '.join(splits)}.")
    return [Path(file) for file in splits[split]]


def load_tokenizer(model: str, template: str, scratch: Path) -> "tuple[PreTrainedTokenizerBase, ChatTemplate]":
    """Load the model's tokenizer and choose its chat template.

    Raises:
        Tune16Error: the model has no fast tokenizer, or no template fits.
    """
    from transformers import AutoTokenizer

    reference = parse(model, "model")
    model_type = str(read_config(reference, scratch).get("model_type", ""))
    folder = fetch(reference, scratch, TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Tune16Error(f"{model}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise Tune16Error(
            f"{model}: has no tokenizer.json, which a fast tokenizer needs. Convert it once with `AutoTokenizer`."
        )
    return tokenizer, choose_template(template, tokenizer, model_type)


class Checked:
    """What the first pass found: the rows' form, which of them to skip, and which to hold out."""

    def __init__(self, form: str, content: bytes, questions: "array[int]", share: float) -> None:
        digests = np.frombuffer(content, dtype="V16")
        first = np.unique(digests, return_index=True)[1]
        self.form = form
        self.is_duplicate = np.ones(len(digests), dtype=bool)
        self.is_duplicate[first] = False
        places = np.frombuffer(questions, dtype=np.uint64)
        self.is_held_out = places < np.uint64(min(share * 2**64, 2**64 - 1))
        if not self.is_held_out[first].any():
            self.is_held_out = places == places.min()

    @property
    def num_duplicates(self) -> int:
        """Rows that stand in the data set already."""
        return int(self.is_duplicate.sum())


def check_rows(files: list[Path], config: PrepareConfig, name: str) -> Checked:
    """Read and check all rows.

    A row is held out by the hash of its question (system message and first question, case and spaces aside): it
    stays on its side when rows are added, and rows with the same question are never on both sides.

    Raises:
        Tune16Error: there are no rows, or faulty ones; each is named with file and line.
    """
    findings = Findings()
    contents, questions = bytearray(), array("Q")
    form = config.format if config.format != "auto" else _form_of(files, name)
    for _, messages in _conversations(files, form, findings):
        text = "\x1f".join([part for message in messages for part in message.values()])
        contents += hashlib.blake2b(text.encode(), digest_size=16).digest()
        questions.append(_question_hash(messages))
        if len(questions) % _SAY_EVERY_ROWS == 0:
            say("prepare", f"checked {len(questions):,} rows")
    findings.refuse(name)
    if not questions:
        raise Tune16Error(f"{name}: the data set is empty.")
    say("prepare", f"checked {len(questions):,} rows of the form {form}: no faults")
    checked = Checked(form, bytes(contents), questions, config.held_out_share)
    if (checked.is_held_out | checked.is_duplicate).all():
        raise Tune16Error(f"{name}: all rows ask the same question, so none can be held out. Add different rows.")
    return checked


def _question_hash(messages: Messages) -> int:
    until_question = 2 if messages[0]["role"] == "system" else 1
    text = "\x1f".join([message["content"] for message in messages[:until_question]])
    normal = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


def _form_of(files: list[Path], name: str) -> str:
    """The form of the first readable row; empty where there is none."""
    first = next(read_rows(files, Findings()), None)
    return detect_format(first[1], name) if first else ""


def _conversations(files: list[Path], form: str, findings: Findings) -> Iterator[tuple[Place, Messages]]:
    """All rows as conversations; bad ones go to `findings`."""
    rows = read_rows(files, findings)
    for place, row in best_threads(rows) if form == "oasst" else rows:
        try:
            yield place, to_messages(row, form)
        except BadRowError as fault:
            findings.add(place, fault.rule, str(fault))


def _write_rows(
    files: list[Path],
    checked: Checked,
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    config: PrepareConfig,
    folder: Path,
) -> Prepared:
    """Second pass: render, tokenise and write, a batch at a time."""
    counts = Counts(rows=len(checked.is_duplicate), duplicates=checked.num_duplicates)
    prepared = Prepared(counts, checked.form, template, np.zeros(config.max_tokens + 2, dtype=np.int64), [])
    with _Writer(folder, tokenizer, prepared, config.max_tokens) as writer:
        for batch in _batches(_kept_rows(files, checked), _BATCH_ROWS):
            rendered = [template.render(row.messages) for row in batch]
            if not prepared.examples:
                prepared.examples = rendered[:3]
            writer.write(batch, rendered)
    if not counts.train_rows or not counts.held_out_rows:
        raise Tune16Error(
            f"prepare.max_tokens: at {config.max_tokens} tokens {counts.dropped_answer_cut_away} of {counts.rows} rows "
            f"lose their whole answer, and too few are left; the longest has {counts.longest} tokens. Raise it."
        )
    return prepared


def _kept_rows(files: list[Path], checked: Checked) -> Iterator[_Row]:
    conversations = _conversations(files, checked.form, Findings())
    for number, (place, messages) in enumerate(conversations):
        if not checked.is_duplicate[number]:
            yield _Row(place, messages, bool(checked.is_held_out[number]))


def _batches(rows: Iterable[_Row], size: int) -> Iterator[list[_Row]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


class _Writer:
    """Tokenises batches of rendered rows and appends them to the two Parquet files."""

    def __init__(self, folder: Path, tokenizer: "PreTrainedTokenizerBase", prepared: Prepared, max_tokens: int) -> None:
        backend = tokenizer.backend_tokenizer
        if isinstance(backend.model, BPE) and backend.pre_tokenizer is None:
            backend.model._resize_cache(0)  # its words are whole rows: never found again, only kept
        self._encode = backend.encode_batch
        self._prepared = prepared
        self._max_tokens = max_tokens
        self._train = _RowFile(folder / "train.parquet")
        self._held_out = _RowFile(folder / "held_out.parquet")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._train.close()
        self._held_out.close()

    def write(self, rows: list[_Row], rendered: list[tuple[str, list[tuple[int, int]]]]) -> None:
        """Tokenise, cut, count and write one batch."""
        counts = self._prepared.counts
        encodings = self._encode([text for text, _ in rendered], add_special_tokens=False)
        kept: tuple[list[Any], list[Any]] = ([], [])
        for row, encoding, (_, spans) in zip(rows, encodings, rendered, strict=True):
            input_ids = np.array(encoding.ids, dtype=np.int32)
            labels = _labels(encoding, input_ids, spans)
            counts.longest = max(counts.longest, len(input_ids))
            self._prepared.lengths[min(len(input_ids), self._max_tokens + 1)] += 1
            if len(input_ids) > self._max_tokens:
                input_ids, labels = input_ids[: self._max_tokens], labels[: self._max_tokens]
                if (labels == IGNORED).all():
                    counts.dropped_answer_cut_away += 1
                    continue
                counts.cut += 1
            kept[row.held_out].append((row, input_ids, labels))
        self._append(self._train, kept[False], "train")
        self._append(self._held_out, kept[True], "held_out")

    def _append(self, file: "_RowFile", kept: list[Any], side: str) -> None:
        if not kept:
            return
        rows, input_ids, labels = zip(*kept, strict=True)
        counts = self._prepared.counts
        num_answer_tokens = sum(int((row_labels != IGNORED).sum()) for row_labels in labels)
        for name, number in (
            ("rows", len(rows)),
            ("tokens", sum(map(len, input_ids))),
            ("answer_tokens", num_answer_tokens),
        ):
            setattr(counts, f"{side}_{name}", getattr(counts, f"{side}_{name}") + number)
        columns = {
            "messages": _conversation_lists([row.messages for row in rows]),
            "source": [f"{row.place[0]}:{row.place[1]}" for row in rows],
            "input_ids": _lists(input_ids),
            "labels": _lists(labels),
        }
        file.add(pa.RecordBatch.from_pydict(columns, schema=_SCHEMA))


class _RowFile:
    """A Parquet file that grows by whole row groups: one per batch would make it large and slow to read."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetWriter(path, _SCHEMA)
        self._batches: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        self._batches.append(batch)
        if sum(waiting.num_rows for waiting in self._batches) >= _ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what waits, and the file's end."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if self._batches:
            self._file.write_table(pa.Table.from_batches(self._batches))
            self._batches = []


def _labels(encoding: Any, input_ids: npt.NDArray[np.int32], spans: list[tuple[int, int]]) -> npt.NDArray[np.int32]:
    """The ids of the answers' tokens, and IGNORED elsewhere. A token counts to the span that its characters lie in."""
    labels = np.full_like(input_ids, IGNORED)
    for start, end in spans:
        first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
        last = next((t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
        if first is not None and last is not None:
            labels[first : last + 1] = input_ids[first : last + 1]
    return labels


def _conversation_lists(conversations: list[Messages]) -> pa.ListArray:
    """Arrow's column of conversations, several times faster than from dicts."""
    offsets = np.zeros(len(conversations) + 1, dtype=np.int32)
    np.cumsum([len(messages) for messages in conversations], out=offsets[1:])
    keys = ("role", "content")
    columns = [pa.array([message[key] for messages in conversations for message in messages]) for key in keys]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(columns, keys))


def _lists(arrays: Iterable[npt.NDArray[np.int32]]) -> pa.ListArray:
    """Arrow's list column out of numpy arrays, without a Python object per token."""
    arrays = list(arrays)
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(values) for values in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _finish(
    prepared: Prepared,
    tokenizer: "PreTrainedTokenizerBase",
    data: str,
    model: str,
    config: PrepareConfig,
    folder: Path,
) -> None:
    """Write what goes with the rows: the tokenizer with its template, the report and the record."""
    tokenizer.chat_template = prepared.template.plain_source
    tokenizer.save_pretrained(folder / "tokenizer")
    report.write_report(prepared, data, folder)
    write_record(
        folder,
        "prepare",
        config,
        data=data,
        model=model,
        form=prepared.form,
        template=prepared.template.name,
        stop_token=prepared.template.stop_token,
        held_out_sha256=file_digest(folder / "held_out.parquet"),
        counts=asdict(prepared.counts),
    )
    counts = prepared.counts
    say(
        "prepare",
        f"{counts.train_rows:,} rows to train on with {counts.train_tokens:,} tokens, {counts.held_out_rows:,} held "
        f"out; {counts.duplicates:,} duplicates, {counts.cut:,} cut, {counts.dropped_answer_cut_away:,} dropped",
    )
