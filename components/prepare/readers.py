"""Rows out of files, one at a time: JSONL, JSON arrays, CSV and Parquet, compressed or not.

Every row comes with the place it stands at, ``file:line`` (``file:row`` for Parquet), and nothing is held in memory
but the row at hand.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from components.errors import Tune16Error
from components.prepare.findings import Findings
from components.references import COMPRESSIONS, DATA_SUFFIXES

Row = dict[str, Any]
Place = tuple[str, int]

_BLOCK = 1 << 20
_LARGEST_ROW = 64 << 20
_OPENERS: dict[str, Callable[..., Any]] = {
    "": open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": zstandard.open,
}


def read_rows(files: list[Path], findings: Findings) -> Iterator[tuple[Place, Row]]:
    """All rows of `files` in order; what cannot be read goes to `findings` with its place and is passed over."""
    for path in files:
        suffix, compression = split_suffix(path)
        try:
            yield from _READERS[suffix](path, compression, findings)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError) as error:
            findings.add((path.name, 0), "broken-compression", f"the {compression} file is damaged: {error}")
        except pyarrow.ArrowException as error:
            findings.add((path.name, 0), "broken-parquet", f"the Parquet file is damaged: {error}")


def split_suffix(path: Path) -> tuple[str, str]:
    """The format's suffix and the compression's (or empty) of a data file.

    Raises:
        Tune16Error: neither is known.
    """
    name = path.name.lower()
    for suffix in DATA_SUFFIXES:
        for compression in COMPRESSIONS:
            if name.endswith(suffix + compression):
                return suffix, compression
    raise Tune16Error(
        f"{path}: unknown kind of file. Data sets are {', '.join(DATA_SUFFIXES)}, also with "
        f"{', '.join(filter(None, COMPRESSIONS))}."
    )


def _open(path: Path, compression: str) -> io.BufferedReader:
    """Open a file to read bytes and lines, unpacked on the way."""
    return io.BufferedReader(_OPENERS[compression](path, "rb"))


def _lines(path: Path, compression: str, findings: Findings) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, with those left out that are not UTF-8."""
    with _open(path, compression) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                findings.add(
                    (path.name, number), "not-utf-8", f"byte {error.start + 1} is not UTF-8. Save the file as UTF-8."
                )


def _read_jsonl(path: Path, compression: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    loads = json.loads
    for number, line in _lines(path, compression, findings):
        if line.isspace():
            continue
        try:
            row = loads(line)
        except (ValueError, RecursionError) as error:
            findings.add((path.name, number), "broken-json", f"no JSON: {error}")
            continue
        yield from _row((path.name, number), row, findings)


def _read_json(path: Path, compression: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    """A JSON file is an array of rows, or JSON lines under another name."""
    with _open(path, compression) as file:
        start = file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    reader = _read_array if start == b"[" else _read_jsonl
    yield from reader(path, compression, findings)


def _read_array(path: Path, compression: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    """The elements of one JSON array, decoded as the text streams by."""
    decode = json.JSONDecoder().raw_decode
    text, line, inside = "", 1, False
    lines = _lines(path, compression, findings)
    while True:
        block, ended = _take(lines)
        text += block
        position = 0
        while True:
            skip = len(text) - len(text[position:].lstrip(" \t\r\n," if inside else " \t\r\n"))
            line += text.count("\n", position, skip)
            position = skip
            if position == len(text):
                break
            if not inside:
                position, inside = position + 1, True
                continue
            if text[position] == "]":
                return
            try:
                row, end = decode(text, position)
            except (ValueError, RecursionError) as error:
                if ended or len(text) - position > _LARGEST_ROW:
                    findings.add((path.name, line), "broken-json", f"no JSON: {error}")
                    return
                break
            yield from _row((path.name, line), row, findings)
            line += text.count("\n", position, end)
            position = end
        text = text[position:]
        if ended:
            findings.add((path.name, line), "broken-json", "the array does not end: ']' is missing.")
            return


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
    csv.field_size_limit(_LARGEST_ROW)
    reader = csv.reader(line for _, line in _lines(path, compression, findings))
    start = 1
    try:
        header = next(reader, [])
        start = reader.line_num + 1
        for values in reader:
            place = (path.name, start)
            start = reader.line_num + 1
            if not values:
                continue
            if len(values) != len(header):
                findings.add(place, "wrong-columns", f"{len(values)} values, but the header names {len(header)}.")
                continue
            yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        findings.add((path.name, start), "broken-csv", f"no CSV: {error}")


def _read_parquet(path: Path, compression: str, findings: Findings) -> Iterator[tuple[Place, Row]]:
    if compression:
        raise Tune16Error(f"{path}: Parquet compresses by itself. Unpack the file.")
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield (path.name, number), row


def _row(place: Place, row: Any, findings: Findings) -> Iterator[tuple[Place, Row]]:
    if isinstance(row, dict):
        yield place, row
    else:
        findings.add(place, "not-an-object", f"a row is an object with keys, this is a {type(row).__name__}.")


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
