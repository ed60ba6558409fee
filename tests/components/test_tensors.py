from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.errors import Tune16Error
from components.tensors import StoredTensor, TensorWriter, read_header, rewrite, weight_files

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
