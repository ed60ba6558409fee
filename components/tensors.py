"""Safetensors files read and written one tensor at a time, so that memory is set by the largest tensor.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON header that may
end in spaces, then the tensors' bytes one after the other. Files are read with plain reads, not memory maps: mapped
pages would count as the step's memory.
"""

import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from components.errors import Tune16Error

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000
_HEADER_BYTES_PER_TENSOR = 320


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its name, file, dtype, shape, and the offset of its first byte in the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Read the tensor into memory of its own."""
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            view = memoryview(buffer.numpy().data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise Tune16Error(f"{self.file}: ends inside the tensor {self.name}. Fetch the model again.")
                view = view[count:]
        return buffer.view(self.dtype).reshape(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        Tune16Error: one is missing, or the index names one outside the folder.
    """
    if (folder / INDEX_FILE).is_file():
        names = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise Tune16Error(f"{folder / INDEX_FILE}: names the file {outside[0]!r}, which is not in the folder.")
    else:
        names = [SINGLE_FILE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise Tune16Error(f"{folder}: the weight file {missing[0]} is missing. Fetch the model again.")
    return [folder / name for name in names]


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        Tune16Error: the file is cut short or no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LARGEST_HEADER + 1
        if length > min(size - 8, _LARGEST_HEADER):
            raise Tune16Error(f"{file}: no safetensors file, or cut short. Fetch the model again.")
        try:
            header = json.loads(stream.read(length))
            tensors = [
                StoredTensor(
                    name, file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Tune16Error(f"{file}: its safetensors header cannot be read ({error!r}).") from None
    tensors.sort(key=lambda tensor: tensor.offset)
    if tensors and tensors[-1].offset + tensors[-1].num_bytes > size:
        raise Tune16Error(f"{file}: cut short inside the tensor {tensors[-1].name}. Fetch the model again.")
    return tensors


def read_ahead(tensors: list[StoredTensor]) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
    """Read `tensors` in order, each while the caller still works on the one before: at most two are in memory."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = reader.submit(tensors[0].read) if tensors else None
        for position, stored in enumerate(tensors):
            assert upcoming is not None
            tensor = upcoming.result()
            if position + 1 < len(tensors):
                upcoming = reader.submit(tensors[position + 1].read)
            yield stored, tensor
            del tensor


class TensorWriter:
    """Writes one safetensors file, tensor after tensor; the header's room is kept free and filled in at the end."""

    def __init__(self, file: Path, num_tensors: int) -> None:
        self._stream = file.open("wb")
        self._room = 8 * ((1024 + _HEADER_BYTES_PER_TENSOR * num_tensors) // 8)
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._stream.seek(8 + self._room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor."""
        assert name not in self._entries, name
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._stream.write(data.data)
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + data.nbytes],
        }
        self._end += data.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stream:
            if error is None:
                header = json.dumps(self._entries, separators=(",", ":")).encode()
                assert len(header) <= self._room, "more or longer tensor names than announced"
                self._stream.seek(0)
                self._stream.write(struct.pack("<Q", self._room) + header.ljust(self._room))

    @property
    def names(self) -> list[str]:
        """The tensors written so far."""
        return [name for name in self._entries if name != "__metadata__"]


def write_index(folder: Path, file_of_tensor: dict[str, str]) -> None:
    """Write the index of a model folder with several weight files; none is needed for a single one."""
    files = sorted(set(file_of_tensor.values()))
    if files == [SINGLE_FILE]:
        return
    size = sum((folder / file).stat().st_size for file in files)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(file_of_tensor.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
