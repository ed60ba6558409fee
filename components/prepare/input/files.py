"""Data files as lines: unpacked on the way, within bounds that no hostile file can stretch."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zstandard

from components.models.references import COMPRESSIONS, DATA_SUFFIXES
from components.prepare.rules.findings import Findings
from components.runtime.errors import Tune16Error

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LARGEST_ROW = 16 << 20  # bytes; a row of the longest sequence, 131,072 tokens, has about half a million
LARGEST_RATIO = 250  # unpacked to packed; text has 3 to 20, rows that repeat a template some tens
_ALWAYS_UNPACKED = 100 << 20  # bytes up to which the ratio does not matter
_ZSTD_BLOCK = 1024  # bytes unpacked at once: at most some tens of MiB come out
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class BombError(Exception):
    """A file that grows out of proportion when it is unpacked."""


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
        f"{path}: unknown type of file. Data sets are {', '.join(DATA_SUFFIXES)}, also with "
        f"{', '.join(filter(None, COMPRESSIONS))}."
    )


def read_lines(path: Path, compression: str, findings: Findings) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, with those left out that are not UTF-8 or too long.

    A byte order mark is reported and left out, NUL characters likewise.
    """
    with open_data(path, compression) as file:
        first = file.readline(LARGEST_ROW + 1)
        if first.startswith(_UTF16):
            findings.add((path.name, 1), "not-utf-8", "the file is UTF-16.")
            return
        if first.startswith(_BOM):
            findings.add((path.name, 1), "byte-order-mark", "the file begins with a byte order mark (U+FEFF).")
            first = first[len(_BOM) :]
        lines = chain([first] if first else [], iter(partial(file.readline, LARGEST_ROW + 1), b""))
        for number, line in enumerate(lines, 1):
            if len(line) > LARGEST_ROW:
                findings.add((path.name, number), "row-too-long", f"the line has more than {LARGEST_ROW >> 20} MiB.")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LARGEST_ROW)
                continue
            if b"\0" in line:
                findings.add((path.name, number), "nul", f"the line has {line.count(0)} NUL characters.")
                line = line.replace(b"\0", b"")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                _tell_undecodable((path.name, number), line, error, findings)


def _tell_undecodable(place: tuple[str, int], line: bytes, error: UnicodeDecodeError, findings: Findings) -> None:
    if error.reason == "unexpected end of data" and not line.endswith(b"\n"):
        findings.add(place, "truncated", "the file ends within a character.")
    else:
        findings.add(place, "not-utf-8", f"byte {error.start + 1} of the line is not UTF-8.")


def open_data(path: Path, compression: str) -> io.BufferedReader:
    """Open a file to read bytes and lines, unpacked on the way; a bomb ends in a :class:`BombError`."""
    if not compression:
        return path.open("rb")
    return io.BufferedReader(_Bounded(_OPENERS[compression](path), path.stat().st_size), 1 << 18)


def refuse_bomb(unpacked: int, packed: int) -> None:
    """Raise a :class:`BombError` where `packed` bytes give far too many."""
    if unpacked > _ALWAYS_UNPACKED and unpacked > LARGEST_RATIO * packed:
        raise BombError(
            f"unpacks to more than {LARGEST_RATIO} times its {packed:,} bytes; stopped at {unpacked >> 20:,} MiB."
        )


class _Bounded(io.RawIOBase):
    """Counts what comes out of a packed file of `packed` bytes."""

    def __init__(self, source: Any, packed: int) -> None:
        self._source = source
        self._packed = packed
        self._unpacked = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        size: int = self._source.readinto(buffer)
        self._unpacked += size
        refuse_bomb(self._unpacked, self._packed)
        return size

    def close(self) -> None:
        self._source.close()
        super().close()


class _Zstd(io.RawIOBase):
    """Unpacks frame after frame; `zstandard.open` would accept a truncated file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_inside = False
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        while not self._unpacked:
            if not self._unpack():
                return 0
        size = min(len(view), len(self._unpacked))
        view[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self) -> bool:
        packed = self._packed or self._file.read(_ZSTD_BLOCK)
        if not packed:
            if self._is_inside:
                raise EOFError("the file ends within a frame")
            return False
        self._unpacked = memoryview(self._frame.decompress(packed))
        self._packed = self._frame.unused_data
        self._is_inside = not self._frame.eof
        if self._frame.eof:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _Zstd}
