"""The two Parquet files of a prepared data set: rows to train on and rows held out."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from components.prepare.tokenize.chat import Messages
from components.prepare.tokenize.tokens import TokenRow

_ROW_GROUP = 8192
_SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "source": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
    }
)


class RowFile:
    """A Parquet file that grows by whole row groups: one per batch would make it large and slow to read."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetWriter(path, _SCHEMA)
        self._batches: list[pa.RecordBatch] = []

    def add(self, rows: list[TokenRow]) -> None:
        """Append rows."""
        if not rows:
            return
        columns = {
            "messages": _conversation_lists([row.row.messages for row in rows]),
            "source": [f"{row.row.place[0]}:{row.row.place[1]}" for row in rows],
            "input_ids": _lists(row.input_ids for row in rows),
            "labels": _lists(row.labels for row in rows),
        }
        self._batches.append(pa.RecordBatch.from_pydict(columns, schema=_SCHEMA))
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
