import errno
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from components.config import QuantizeConfig
from components.quantize.checkpoint import quantize_checkpoint
from components.quantize.nf4 import _BOUNDARIES, quantize_nf4
from components.runtime.errors import Tune16Error, is_disk_full
from components.runtime.outputs import read_record
from tests.conftest import ARCHITECTURES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 300.0])
def test_nf4_equals_bitsandbytes(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    _assert_same((torch.randn(1024, 512) * scale).to(dtype))


def test_nf4_equals_bitsandbytes_at_and_around_every_boundary() -> None:
    near = [_BOUNDARIES]
    for direction in (-2.0, 2.0):
        neighbours = _BOUNDARIES
        for _ in range(3):
            neighbours = torch.nextafter(neighbours, torch.tensor(direction))
            near.append(neighbours)
    row = torch.cat([torch.ones(1), *near, torch.zeros(64 * 2 - 1 - 15 * 7)])
    _assert_same(row.repeat(8, 1))


def test_nf4_of_zeros_odd_sizes_and_extremes() -> None:
    torch.set_flush_denormal(False)  # bitsandbytes divides zeros by a denormal
    _assert_same(torch.zeros(4, 64))
    _assert_same(torch.randn(3, 50))
    _assert_same(torch.tensor([[1.0, -1.0] * 32, [0.0, 1e-30] * 32]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_nf4(torch.full((1, 64), float("nan")))


def _assert_same(weight: torch.Tensor) -> None:
    quantized = quantize_nf4(weight)
    wanted, wanted_state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(quantized.packed, wanted)
    ours, theirs = quantized.state, wanted_state.as_dict(packed=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_checkpoint_equals_what_transformers_makes_on_load(
    make_model: Callable[..., Path], tmp_path: Path, kind: str, bits: int
) -> None:
    source = make_model(kind)
    quantize_checkpoint(str(source), tmp_path / "ours", QuantizeConfig.load(bits=bits))
    settings = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    reference = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype="auto")
    reference.save_pretrained(tmp_path / "theirs")
    ours, theirs = _tensors(tmp_path / "ours"), _tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert loaded.config.quantization_config.to_dict() == settings.to_dict()
    ids = torch.arange(3, 40).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, reference(ids).logits)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_sixteen_bits_keep_the_weights(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model("llama")
    quantize_checkpoint(str(source), tmp_path / "out", QuantizeConfig(bits=16))
    ours, theirs = _tensors(tmp_path / "out"), _tensors(source)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert read_record(tmp_path / "out", "quantize")["model"] == str(source)


def test_a_model_with_pickle_weights_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(Tune16Error, match="as pickle only"):
        quantize_checkpoint(str(tmp_path), tmp_path / "out", QuantizeConfig())


def test_an_unknown_architecture_is_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(Tune16Error, match="BertModel is not supported. Supported: LlamaForCausalLM"):
        quantize_checkpoint(str(folder), tmp_path / "out", QuantizeConfig())
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_the_earlier_output(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's: writing fails in the middle of a tensor."""
    output = tmp_path / "out"
    quantize_checkpoint(str(make_model("llama")), output, QuantizeConfig())
    before = _tensors(output)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError) as full:
            quantize_checkpoint(str(make_model("mistral")), output, QuantizeConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.value.errno == errno.EFBIG and is_disk_full(full.value)
    after = _tensors(output)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
