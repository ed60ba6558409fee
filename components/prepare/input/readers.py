"""Rows out of files, one at a time: JSONL, JSON arrays, CSV and Parquet, compressed or not.

Every row comes with the place it stands at, ``file:line`` (``file:row`` for Parquet), and nothing is held in memory
but the row at hand.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from components.prepare.input.documents import not_rows
from components.prepare.input.files import (
    DAMAGED,
    LARGEST_ROW,
    BombError,
    open_data,
    read_lines,
    refuse_bomb,
    split_suffix,
)
from components.prepare.input.strictjson import StrictDecoder
from components.prepare.rules.findings import Findings, Place
from components.prepare.rules.sensitive import path_key, quoted
from components.runtime.errors import Tune16Error

Row = dict[str, Any]

_BLOCK = 1 << 20
_PARQUET_BATCH = 256  # rows; a dictionary lets few bytes stand for many long values
_SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(files: list[Path], findings: Findings) -> Iterator[tuple[Place, Row]]:
    """All rows of `files` in order; what cannot be read goes to `findings` with its place and is skipped."""
    for path in files:
        suffix, compression = split_suffix(path)
        try:
            yield from _READERS[suffix](path, compression, findings)
        except BombError as error:
            findings.add((path.name, 0), "zip-bomb", str(error))
        except DAMAGED as error:
            findings.add((path.name, 0), "broken-compression", f"the {compression} file is damaged: {error}.")
        except OSError as error:
            if compression != ".bz2" or error.errno:
                raise
            findings.add((path.name, 0), "broken-compression", f"the .bz2 file is damaged: {error}.")


def _read_jsonl(path: Path, compression: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    if _first_character(path, compression) == b"[":
        findings.add((path.name, 1), "array-in-jsonl", "the file is a JSON array, not one row a line.")
        yield from _read_array(path, compression, findings)
        return
    if told := not_rows(path, compression):
        findings.add((path.name, 1), "not-rows", told)
        return
    json_ = StrictDecoder()
    for number, line in read_lines(path, compression, findings):
        if line.isspace():
            continue
        try:
            row = json_.decode(line)
        except RecursionError:
            findings.add((path.name, number), "too-deep", "the row is nested too deeply to be read.")
        except ValueError as error:
            if line.endswith("\n"):
                findings.add((path.name, number), "broken-json", f"not valid JSON: {_reason(error)}.")
            else:
                findings.add(
                    (path.name, number), "truncated", f"the last line is cut off and not valid JSON: {_reason(error)}."
                )
        else:
            yield from _row((path.name, number), row, json_, findings)


def _read_json(path: Path, compression: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    """A JSON file is an array of rows, or JSON lines under another name."""
    reader = _read_array if _first_character(path, compression) == b"[" else _read_jsonl
    yield from reader(path, compression, findings)


def _first_character(path: Path, compression: str) -> bytes:
    with open_data(path, compression) as file:
        return file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_array(path: Path, compression: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    """The elements of one JSON array, decoded as the text streams by."""
    json_ = StrictDecoder()
    text, line, due = "", 1, "["  # what comes next: "[", the first row or none, a comma or the end, a row
    lines = read_lines(path, compression, findings)
    while True:
        block, ended = _take(lines)
        text += block
        position = 0
        while True:
            skip = _SPACE.match(text, position).end()  # type: ignore[union-attr]
            line += text.count("\n", position, skip)
            position = skip
            if position == len(text):
                break
            if text[position] == due:
                position, due = position + 1, "first" if due == "[" else "row"
                continue
            if text[position] == "]" and due in ("first", ","):
                _refuse_rest(text[position + 1 :], (path.name, line), lines, findings)
                return
            if due == ",":
                findings.add((path.name, line), "broken-json", "no comma stands before this row.")
                due = "row"
            try:
                row, end = json_.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                if ended or len(text) - position > LARGEST_ROW or isinstance(error, RecursionError):
                    _tell_array_end((path.name, line), error, text, findings)
                    return
                break
            yield from _row((path.name, line), row, json_, findings)
            line += text.count("\n", position, end)
            position, due = end, ","
        text = text[position:]
        if ended:
            findings.add((path.name, line), "truncated", "the array does not end: ']' is missing.")
            return


def _tell_array_end(place: Place, error: Exception, text: str, findings: Findings) -> None:
    """Where an element cannot be decoded, the start of the next one is unknown."""
    after = "The rows after it were not read"
    if isinstance(error, RecursionError):
        findings.add(place, "too-deep", f"the row is nested too deeply to be read. {after}.")
    elif isinstance(error, json.JSONDecodeError) and (
        error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    ):
        findings.add(place, "truncated", f"the array ends within this row: {error.msg}.")
    else:
        findings.add(place, "broken-json", f"not valid JSON: {_reason(error)}. {after}.")


def _reason(error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg.removesuffix(' at')} at character {error.colno}"


def _refuse_rest(text: str, place: Place, lines: Iterator[tuple[int, str]], findings: Findings) -> None:
    """Nothing but space may follow the array."""
    if text.strip() or any(not line.isspace() for _, line in lines):
        findings.add(place, "broken-json", "text follows the end of the array.")


def _take(lines: Iterator[tuple[int, str]]) -> tuple[str, bool]:
    """About one block of text, and whether the file has ended."""
    taken: list[str] = []
    size = 0
    for _, line in lines:
        taken.append(line)
        size += len(line)
        if size >= _BLOCK:
            return "".join(taken), False
    return "".join(taken), True


def _read_csv(path: Path, compression: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    csv.field_size_limit(LARGEST_ROW)
    record = _Record(read_lines(path, compression, findings))
    reader = csv.reader(record, strict=True)
    place = (path.name, 1)
    try:
        header = next(reader, [])
        if record.num_first != 1:
            return  # the header cannot be read, which is reported; no row takes its place
        _tell_doubled(header, place, findings)
        while True:
            record.start()
            values = next(reader, None)
            place = (path.name, record.first)
            if values is None:
                break
            if record.is_cut and (record.num_quotes % 2 or len(values) < len(header)):
                findings.add(place, "truncated", "the last row does not end.")
            elif values and len(values) != len(header):
                findings.add(place, "wrong-columns", f"{len(values)} values, but the header names {len(header)}.")
            elif values:
                yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        place = (path.name, record.first)
        if "unexpected end" not in str(error):
            findings.add(place, "broken-csv", f"not valid CSV: {error}. The rows after it were not read.")
        elif record.is_cut:
            findings.add(place, "truncated", "the last row does not end.")
        else:
            findings.add(place, "broken-csv", "a quote begins here and never ends. The rows after it were not read.")


class _Record:
    """The lines of one CSV record after the other: where it begins, and whether it ends."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._last = ""
        self.num_first = 0  # the line that the file's first record begins at
        self.first = 1
        self.num_quotes = 0

    def start(self) -> None:
        """Begin a record."""
        self.first, self.num_quotes = 0, 0

    @property
    def is_cut(self) -> bool:
        """Whether the last line has no line break at its end."""
        return not self._last.endswith(("\n", "\r"))

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.num_first = self.num_first or number
            self.first = self.first or number
            self.num_quotes += line.count('"')
            self._last = line
            yield line


def _read_parquet(path: Path, compression: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    if compression:
        raise Tune16Error(f"{path}: Parquet compresses by itself. Unpack the file.")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            refuse_bomb(sum(group.total_byte_size for group in groups), path.stat().st_size)
            _tell_doubled(file.schema_arrow.names, (path.name, 0), findings)
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for row in _rows_of(batch):
                    number += 1
                    if row is None:
                        findings.add((path.name, number), "not-utf-8", "a text in the row is not UTF-8.")
                    else:
                        yield (path.name, number), row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = quoted(str(error).partition("\n")[0])
        findings.add((path.name, number), "broken-parquet", f"the Parquet file is damaged: {reason}.")


def _rows_of(batch: pyarrow.RecordBatch) -> Iterator[Row | None]:
    """A batch's rows; None stands for one that has text which is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


def _tell_doubled(names: list[str], place: Place, findings: Findings) -> None:
    for name in sorted({name for name in names if names.count(name) > 1}):
        findings.add(place, "duplicate-key", f"two columns are called {quoted(name)}.", path_key(name))


def _row(place: Place, row: Any, json_: StrictDecoder, findings: Findings) -> Iterator[tuple[Place, Row]]:
    faults = json_.faults(row)
    for rule, message, path in faults:
        findings.add(place, rule, message, path)
    if not isinstance(row, dict):
        findings.add(place, "not-an-object", f"a row must be an object with keys, not a {type(row).__name__}.")
    elif not faults:
        yield place, row


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
