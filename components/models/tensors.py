"""Safetensors files read and written one tensor at a time, so that memory is set by the largest tensor.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON header that may
end in spaces, then the tensors' bytes one after the other. Files are read with plain reads, not memory maps: mapped
pages would count as the step's memory.
"""

import json
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from components.models.fetching import TOKENIZER_FILES, fetch, fetch_more, read_document
from components.models.references import Reference
from components.runtime.errors import Tune16Error
from components.runtime.steps import say

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
_PARTS = 6  # tensors that one may become; a quantised weight has this many
_BYTES_AT_ONCE = 256 << 20


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


# What becomes of one tensor: the tensors that take its place, by name. Runs in several threads at once.
Work = Callable[[StoredTensor, torch.Tensor], dict[str, torch.Tensor]]


def fetch_model(reference: Reference, folder: Path) -> Path:
    """Bring a whole model onto this disk; of its weights only the safetensors files: some have them twice.

    Returns:
        The folder with the files.

    Raises:
        Tune16Error: it is missing or unreachable, or its content is no longer what the reference says.
    """
    path = fetch(reference, folder, TOKENIZER_FILES)
    return fetch_more(reference, folder, _weight_names(path))


def num_weights(folder: Path) -> int:
    """The weights of a model folder, counted in its files' headers."""
    return sum(prod(stored.shape) for file in weight_files(folder) for stored in read_header(file))


def weight_bytes(folder: Path) -> int:
    """Size in bytes of a model folder's safetensors files."""
    return sum(file.stat().st_size for file in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        Tune16Error: one is missing, or the index names one outside the folder.
    """
    names = _weight_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise Tune16Error(f"{folder}: the weight file {missing[0]} is missing. Fetch the model again.")
    return [folder / name for name in names]


def _weight_names(folder: Path) -> list[str]:
    if (folder / INDEX_FILE).is_file():
        weight_map = read_document(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise Tune16Error(f"{folder / INDEX_FILE}: names no files. Fetch the model again.")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise Tune16Error(f"{folder / INDEX_FILE}: names the file {outside[0]!r}, which is not in the folder.")
        return names
    return [SINGLE_FILE]


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        Tune16Error: the file is cut short or not a safetensors file, or its header is inconsistent.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LARGEST_HEADER + 1
        if length > min(size - 8, _LARGEST_HEADER):
            raise Tune16Error(f"{file}: not a safetensors file, or cut short. Fetch the model again.")
        content = stream.read(length)
    try:
        header = json.loads(content, object_pairs_hook=_without_duplicates)
        tensors = [_stored(name, file, header[name], 8 + length) for name in header if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Tune16Error(
            f"{file}: its safetensors header cannot be read ({error!r}). Fetch the model again."
        ) from None
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise Tune16Error(f"{file}: the tensor {tensor.name} does not begin where the one before ends. Refused.")
        end += tensor.num_bytes
        if end > size:
            raise Tune16Error(f"{file}: cut short inside the tensor {tensor.name}. Fetch the model again.")
    if end < size:
        raise Tune16Error(f"{file}: has {size - end:,} bytes outside its tensors. Refused.")
    return tensors


def _stored(name: str, file: Path, entry: dict[str, Any], start: int) -> StoredTensor:
    """One tensor of a header.

    Raises:
        ValueError: its shape, number format and place do not agree.
    """
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name}: the number format {entry['dtype']} is not supported")
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: shape and offsets must be whole numbers from 0")
    stored = StoredTensor(name, file, _DTYPES[entry["dtype"]], tuple(shape), start + begin)
    if stored.num_bytes != end - begin:
        raise ValueError(f"{name}: {entry['dtype']} of shape {shape} takes {stored.num_bytes} bytes, not {end - begin}")
    return stored


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys, of which readers would choose different ones."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def rewrite(source: Path, target: Path, work: Work, step: str) -> int:
    """Rewrite a model's weights: for each tensor of the folder `source` what `work` makes of it.

    The files in `target` have the names of those they come from. `step` begins the progress lines.

    Returns:
        The bytes written.
    """
    file_of_tensor: dict[str, str] = {}
    files = weight_files(source)
    for position, file in enumerate(files, 1):
        tensors = read_header(file)
        with TensorWriter(target / file.name, num_tensors=_PARTS * len(tensors)) as writer:
            for parts in _stream(tensors, work):
                for name, part in parts.items():
                    writer.add(name, part)
        file_of_tensor |= dict.fromkeys(writer.names, file.name)
        say(step, f"{file.name} done, {position} of {len(files)}")
    write_index(target, file_of_tensor)
    return sum((target / file.name).stat().st_size for file in files)


def _stream(tensors: list[StoredTensor], work: Work) -> Iterator[dict[str, torch.Tensor]]:
    """Read `tensors` and work on them, several at once; the results come in order.

    Each tensor is read and worked on by one thread: single threads on whole tensors do twice the work of operations
    split over the cores. No more tensors are begun than fit into 256 MiB together, or one that is larger.
    """
    num_threads = torch.get_num_threads()
    begun: deque[tuple[int, Future[dict[str, torch.Tensor]]]] = deque()
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for stored in tensors:
            while begun and stored.num_bytes + sum(size for size, _ in begun) > _BYTES_AT_ONCE:
                yield begun.popleft()[1].result()
            begun.append((stored.num_bytes, pool.submit(_read_and_work, stored, work)))
        while begun:
            yield begun.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def _read_and_work(stored: StoredTensor, work: Work) -> dict[str, torch.Tensor]:
    return work(stored, stored.read())


class TensorWriter:
    """Writes one safetensors file, tensor after tensor; the header's room is kept free and filled in at the end."""

    def __init__(self, file: Path, num_tensors: int) -> None:
        self._stream = file.open("wb", buffering=0)
        self._room = 8 * ((1024 + _HEADER_BYTES_PER_TENSOR * num_tensors) // 8)
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._stream.seek(8 + self._room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor."""
        assert name not in self._entries, name
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._write(data)
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + data.nbytes],
        }
        self._end += data.nbytes

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._stream.write(data) :]

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
                self._write(memoryview(struct.pack("<Q", self._room) + header.ljust(self._room)))

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
