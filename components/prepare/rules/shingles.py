"""Runs of words as numbers, for a whole batch of texts at once: by which near duplicates and leakage are found."""

import numpy as np
import numpy.typing as npt

BATCH_BYTES = 1 << 18  # a batch's texts together; no text is longer
_PRIME = np.uint64(0x9E3779B97F4A7C15 | 1)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_WIDE_CHARACTER = 0xE3  # first byte in UTF-8 of Chinese, Japanese and Korean, which put no spaces between words
_SPACE = 32

Hashes = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]


class Words:
    """The words of texts that are normalised: one space between words, none elsewhere; none is empty.

    A run's hash comes from prefix sums of a polynomial (Karp and Rabin, 1987), so no run is cut out of its text.
    """

    def __init__(self, texts: list[bytes]) -> None:
        values = np.frombuffer(b"\n".join(texts) + b"\n", dtype=np.uint8)
        is_space = values <= _SPACE
        is_start = ~is_space
        is_start[1:] &= is_space[:-1] | (values[1:] >= _WIDE_CHARACTER)
        starts = np.flatnonzero(is_start)
        first = np.searchsorted(starts, np.cumsum([0, *(len(text) + 1 for text in texts)]))
        self._first = first[:-1]  # the number of each text's first word
        self._end = np.repeat(first[1:], np.diff(first))  # for each word, the number after its text's last
        self._starts = np.append(starts, len(values))
        sums = np.zeros(len(values) + 1, dtype=np.uint64)
        np.cumsum(np.maximum(values, _SPACE) * _powers()[: len(values)], out=sums[1:])
        self._sums = sums[self._starts]

    def runs(self, width: int) -> tuple[Hashes, Offsets]:
        """Hashes of all runs of `width` words, or of the whole text where it has fewer.

        Returns:
            The hashes, and where those of each text begin.
        """
        word = np.arange(len(self._end))
        text_first = np.repeat(self._first, np.diff([*self._first, len(word)]))
        is_kept = word <= np.maximum(self._end - width, text_first)
        begin = word[is_kept]
        end = np.minimum(begin + width, self._end[is_kept])
        hashes = (self._sums[end] - self._sums[begin]) * _inverse_powers()[self._starts[begin]]
        hashes = (hashes ^ (hashes >> np.uint64(32))) * _MIX
        return (hashes >> np.uint64(32)).astype(np.uint32), np.searchsorted(begin, self._first)


def _table(factor: np.uint64) -> npt.NDArray[np.uint64]:
    table = np.full(BATCH_BYTES * 2 + 1, factor, dtype=np.uint64)
    table[0] = 1
    return np.cumprod(table, out=table)


_tables: dict[str, npt.NDArray[np.uint64]] = {}


def _powers() -> npt.NDArray[np.uint64]:
    if "powers" not in _tables:
        _tables["powers"] = _table(_PRIME)
    return _tables["powers"]


def _inverse_powers() -> npt.NDArray[np.uint64]:
    """Powers of the number that gives 1 with the base, modulo 2^64."""
    if "inverse" not in _tables:
        _tables["inverse"] = _table(np.uint64(pow(int(_PRIME), -1, 1 << 64)))
    return _tables["inverse"]
