import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.models.tensors import StoredTensor, TensorWriter, read_header, rewrite, weight_files
from components.runtime.errors import Tune16Error

TENSORS = {
    "a": torch.randn(5, 7, dtype=torch.float32),
    "b": torch.randn(3, 64).to(torch.bfloat16),
    "c": torch.arange(9, dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5),
}


def test_written_files_are_read_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with TensorWriter(path, num_tensors=len(TENSORS)) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_files_of_safetensors_are_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    read = {stored.name: stored.read() for stored in read_header(tmp_path / "model.safetensors")}
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_weights_are_rewritten_in_order(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    save_file(TENSORS, tmp_path / "model.safetensors")
    threads = torch.get_num_threads()
    rewrite(
        tmp_path, tmp_path / "new", lambda stored, tensor: {f"{stored.name}.0": tensor, f"{stored.name}.1": tensor}, "x"
    )
    assert torch.get_num_threads() == threads
    new, old = (read_header(folder / "model.safetensors") for folder in (tmp_path / "new", tmp_path))
    assert [stored.name for stored in new] == [f"{stored.name}.{part}" for stored in old for part in "01"]
    assert all(torch.equal(stored.read(), TENSORS[stored.name[:-2]]) for stored in new)


@pytest.mark.parametrize("length", [0, 4, 20, 300, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(Tune16Error, match=r"cut short|cannot be read"):
        read_header(path)


def test_a_tensor_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    with pytest.raises(Tune16Error, match="ends inside the tensor t"):
        StoredTensor("t", path, torch.float32, (4,), 0).read()


def test_an_index_may_not_point_outside_nor_at_nothing(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(Tune16Error, match="not in the folder"):
        weight_files(tmp_path)
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(Tune16Error, match=r"model-1\.safetensors is missing"):
        weight_files(tmp_path)


def _write(path: Path, header: str, num_bytes: int) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(num_bytes))
    return path


def _entry(begin: int, end: int, shape: object = (4,), dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": _entry(0, 4), "b": _entry(2, 6)}, "b does not begin where the one before ends"),
        ({"a": _entry(0, 4), "b": _entry(0, 4)}, "does not begin where the one before ends"),
        ({"a": _entry(2, 6)}, "a does not begin where the one before ends"),
        ({"a": _entry(-4, 0), "b": _entry(0, 8, [8])}, "whole numbers from 0"),
        ({"a": _entry(0, 8, [-8])}, "whole numbers from 0"),
        ({"a": _entry(0, 8, [True])}, "whole numbers from 0"),
        ({"a": _entry(0, 8, [8.0])}, "whole numbers from 0"),
        ({"a": _entry(0, 8, [2**62, 2**62])}, "takes .* bytes, not 8"),
        ({"a": _entry(0, 2**60, [2**60])}, "cut short inside the tensor a"),
        ({"a": _entry(0, 8, [8], "F32")}, "takes 32 bytes, not 8"),
        ({"a": _entry(0, 8, [8], "F5")}, "cannot be read"),
        ({"a": _entry(0, 4)}, "has 4 bytes outside its tensors"),
        ({"a": 3}, "cannot be read"),
        ({"a": {"dtype": "U8"}}, "cannot be read"),
        ([], "bytes outside its tensors"),
        ({"a": {**_entry(0, 8, [8]), "data_offsets": [0, 4, 8]}}, "cannot be read"),
    ],
)
def test_headers_that_cannot_be_are_refused(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(Tune16Error, match=message):
        read_header(_write(tmp_path / "x.safetensors", json.dumps(header), 8))


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    entry = json.dumps(_entry(0, 8, [8]))
    with pytest.raises(Tune16Error, match="a name occurs twice"):
        read_header(_write(tmp_path / "x.safetensors", f'{{"a": {entry}, "a": {entry}}}', 8))


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Tune16Error, match="cannot be read"):
        read_header(_write(tmp_path / "x.safetensors", '{"a":' * 100_000, 8))


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 10**9])
def test_nothing_is_allocated_for_a_header_that_is_not_there(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    tracemalloc.start()
    with pytest.raises(Tune16Error, match="not a safetensors file, or cut short"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("index", ["{}", "[]", "{", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(Tune16Error, match=r"model.safetensors.index.json: (names no files|is no|is nested)"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["..", ".", "", "/etc/passwd", "a/../b", "a\\b", "a\0b"])
def test_no_weight_file_is_taken_from_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(Tune16Error, match=r"not in the folder|is missing"):
        weight_files(tmp_path)
