"""Rows packed into micro-batches of a fixed number of tokens."""

from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from components.engine.limits import round_up
from components.models.labels import IGNORED

_FULL = 0.98  # a micro-batch with this share of tokens is closed
_WINDOW = 64  # micro-batches that are filled together: more fill better, fewer mix rows of all lengths better


def pack(lengths: list[int], capacity: int, seed: int) -> list[list[int]]:
    """Group rows so that each group has at most `capacity` tokens, and nearly that many.

    Rows are shuffled, and a window of them is packed at a time by best-fit decreasing (Johnson, 1973); rows of groups
    that are not full go into the next window. The same seed gives the same groups.

    Args:
        lengths: tokens of each row, at most `capacity`.
        capacity: tokens of a group.
        seed: of the shuffling.

    Returns:
        Indices of rows, group by group.
    """
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    groups: list[list[int]] = []
    pending: list[int] = []
    tokens = 0
    for row in order:
        pending.append(row)
        tokens += lengths[row]
        if tokens >= _WINDOW * capacity:
            packed = _best_fit(pending, lengths, capacity)
            open_groups = [group for group in packed if sum(lengths[row] for row in group) < _FULL * capacity]
            if len(open_groups) > len(packed) // 2:
                open_groups = []  # rows of such lengths fill no better with more of their kind
            groups += [group for group in packed if group not in open_groups]
            pending = [row for group in open_groups for row in group]
            tokens = sum(lengths[row] for row in pending)
    return groups + _best_fit(pending, lengths, capacity)


def _best_fit(rows: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest row first, each into the fullest group that has room for it."""
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        at = bisect_left(room, (lengths[row], -1))
        left, group = room.pop(at) if at < len(room) else (capacity, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(row)
        insort(room, (left - lengths[row], group))
    return groups


def read_rows(path: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and labels of each row of a file that the step prepare wrote."""
    table = pq.read_table(path, columns=["input_ids", "labels"])
    columns = []
    for name in ("input_ids", "labels"):
        column = table[name].combine_chunks()
        values, bounds = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
        columns.append(np.split(values.astype(np.int32), bounds[1:-1]))
    return columns[0], columns[1]


def packed_dataset(
    path: Path, capacity: int, seed: int, *, max_rows: int | None = None, rows_per_micro_batch: int | None = None
) -> tuple[Dataset, float]:
    """The rows of a prepared file as micro-batches.

    Args:
        path: train.parquet or held_out.parquet of the step prepare.
        capacity: tokens of a micro-batch.
        seed: of the packing.
        max_rows: the first rows only.
        rows_per_micro_batch: do not pack, but take so many rows, shuffled.

    Returns:
        A data set with a row per micro-batch: ``input_ids``, ``shift_labels`` (what each token has to predict,
        :data:`IGNORED` where nothing), ``position_ids`` (which begin anew with each row), ``lengths`` of the rows, and
        ``num_tokens`` without padding; and the share of tokens that are not padding.
    """
    ids, labels = (column[:max_rows] for column in read_rows(path))
    if rows_per_micro_batch:
        order = np.random.default_rng(seed).permutation(len(ids)).tolist()
        groups = [order[start : start + rows_per_micro_batch] for start in range(0, len(ids), rows_per_micro_batch)]
    else:
        groups = pack([len(row) for row in ids], capacity, seed)
    micro_batches = [_join([ids[row] for row in group], [labels[row] for row in group], capacity) for group in groups]
    names = ("input_ids", "shift_labels", "position_ids", "lengths")
    columns = {name: pa.array([one[index] for one in micro_batches]) for index, name in enumerate(names)}
    columns["num_tokens"] = pa.array([sum(len(ids[row]) for row in group) for group in groups])
    share = sum(map(len, ids)) / sum(len(one[0]) for one in micro_batches)
    return Dataset(pa.table(columns)).with_format("torch"), share


def _join(ids: list[np.ndarray], labels: list[np.ndarray], capacity: int) -> tuple[np.ndarray, ...]:
    """One micro-batch of these rows, padded; the padding is a row of its own that predicts nothing."""
    lengths = [len(row) for row in ids]
    padding = min(capacity, round_up(sum(lengths))) - sum(lengths)
    if padding:
        lengths.append(padding)
        ids, labels = [*ids, np.zeros(padding, np.int32)], [*labels, np.full(padding, IGNORED, np.int32)]
    shifted = [np.append(row[1:], np.int32(IGNORED)) for row in labels]
    positions = [np.arange(length, dtype=np.int32) for length in lengths]
    return np.concatenate(ids), np.concatenate(shifted), np.concatenate(positions), np.array(lengths)
