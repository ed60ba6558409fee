"""How much of a held-out row is in the training rows: sequences of eight words, in a table of bits."""

from array import array
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from components.prepare.rules.shingles import Words

MOST_RUNS = 1 << 26  # runs of training rows that are remembered, an eighth of the bits
OVERLAP = 0.6  # share of a held-out row's runs
_BITS = 29  # 64 MB, of which only what is used takes memory
_WIDTH = 8
_FEWEST_RUNS = 8  # of shorter rows, too many overlap by chance


class Overlaps:
    """Rows come in batches, each with the side it is on; held-out rows are compared when all have come."""

    def __init__(self) -> None:
        self._seen = np.zeros(1 << (_BITS - 3), dtype=np.uint8)
        self._rows, self._offsets = array("q"), array("q", [0])
        self._runs = array("I")
        self._num_runs = 0

    @property
    def is_full(self) -> bool:
        """Whether training rows had to be left out."""
        return self._num_runs > MOST_RUNS

    def add(self, words: Words, first_row: int, is_held_out: npt.NDArray[np.bool_]) -> None:
        """Remember the runs of a batch whose first row is number `first_row`."""
        hashes, offsets = words.runs(_WIDTH)
        hashes >>= np.uint32(32 - _BITS)
        sizes = np.diff(np.append(offsets, len(hashes)))
        trained = hashes[np.repeat(~is_held_out, sizes)]
        if not self.is_full:
            self._num_runs += len(trained)
            for bit in range(8):  # one value at a time: in an assignment, the last of equal places wins
                self._seen[trained[trained & np.uint32(7) == bit] >> np.uint32(3)] |= np.uint8(1 << bit)
        for number in np.flatnonzero(is_held_out & (sizes >= _FEWEST_RUNS)):
            self._rows.append(first_row + int(number))
            self._runs.frombytes(hashes[offsets[number] : offsets[number] + sizes[number]].tobytes())
            self._offsets.append(len(self._runs))

    def shares(self) -> dict[int, float]:
        """For each held-out row by its number, the share of its runs that is in training rows."""
        runs = np.frombuffer(self._runs, dtype=np.uint32)
        return {
            row: float(np.mean((self._seen[runs[start:end] >> np.uint32(3)] & _bit(runs[start:end])) != 0))
            for row, (start, end) in zip(self._rows, pairwise(self._offsets), strict=True)
        }


def _bit(runs: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (runs & np.uint32(7)).astype(np.uint8))
