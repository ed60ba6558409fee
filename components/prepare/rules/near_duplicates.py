"""Near duplicates, by MinHash (Broder, 1997) and locality-sensitive hashing, in 64 bytes a row.

A row's signature holds one byte for each of 64 hash functions; two rows agree in as many bytes as they have runs of
three words in common (their Jaccard similarity). Only rows that agree in four neighbouring bytes are compared.
"""

import numpy as np
import numpy.typing as npt

from components.prepare.rules.shingles import Words

MOST_ROWS = 500_000  # rows that are compared, which takes 32 MB
ALIKE = 0.75  # share of the bytes that agree in near duplicates
_NUM_HASHES = 64
_BAND = 4  # bytes; rows that are 0.8 alike agree in one of the 16 bands with a probability of 99.98 %
_WIDTH = 3

_DRAW = np.random.default_rng(16)
_FACTORS = _DRAW.integers(1, 1 << 31, _NUM_HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_SHIFTS = _DRAW.integers(0, 1 << 32, _NUM_HASHES, dtype=np.uint32)
_SPREAD = np.uint32(0x9E3779B1)

Signatures = npt.NDArray[np.uint8]


def signatures(words: Words) -> Signatures:
    """One signature of 64 bytes for each text."""
    hashes, offsets = words.runs(_WIDTH)
    made = np.empty((len(offsets), _NUM_HASHES), dtype=np.uint8)
    for number in range(_NUM_HASHES):
        least = np.minimum.reduceat(hashes * _FACTORS[number] + _SHIFTS[number], offsets)
        # The least numbers all begin with zeros: spread, then keep the first byte.
        made[:, number] = (least * _SPREAD) >> np.uint32(24)
    return made


def earlier_alike(made: Signatures) -> npt.NDArray[np.int64]:
    """For each row an earlier one that is a near duplicate of it, or -1."""
    partner = np.full(len(made), -1, dtype=np.int64)
    bands = made.view(np.uint32)
    for number in range(_NUM_HASHES // _BAND):
        keys = bands[:, number]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        is_new = np.append(True, ordered[1:] != ordered[:-1])
        first = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
        for later, earlier in ((order, first), (order[1:], order[:-1])):
            same = ~is_new[len(order) - len(later) :] & (partner[later] < 0)
            _note(partner, made, later[same], earlier[same])
    return partner


def _note(
    partner: npt.NDArray[np.int64], made: Signatures, later: npt.NDArray[np.int64], earlier: npt.NDArray[np.int64]
) -> None:
    """Keep the pairs that are alike indeed; in blocks, so that a data set of one template fills no memory."""
    block = 1 << 16
    for start in range(0, len(later), block):
        left, right = later[start : start + block], earlier[start : start + block]
        alike = (made[left] == made[right]).mean(axis=1) >= ALIKE
        partner[left[alike]] = right[alike]
