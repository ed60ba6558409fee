"""The step quantize: the base model, shard by shard, into a checkpoint that loads without quantising again.

The result is bit for bit what bitsandbytes makes when Transformers loads the full-precision model with
``load_in_4bit`` (NF4, double quantisation, blocks of 64) or ``load_in_8bit``; `from_pretrained` loads it as it is.
No GPU is needed, and memory is set by the largest tensor.
"""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from components.config import QuantizeConfig
from components.models.fetching import companions, read_config
from components.models.references import parse
from components.models.shapes import read_shape
from components.models.tensors import INDEX_FILE, StoredTensor, fetch_model, rewrite, weight_bytes
from components.planning.disk import check_space, quantized_bytes
from components.quantize.architecture import check_weights
from components.quantize.nf4 import quantize_nf4
from components.runtime.errors import Tune16Error
from components.runtime.outputs import new_folder, write_record
from components.storage.files import describe_files

_LLM_INT8_ROW_MAJOR = 0  # bitsandbytes' number for the plain weight layout

# What Transformers needs to know beyond its defaults. Its own class for this takes seconds to import.
_QUANTIZATION_CONFIG = {
    4: {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    8: {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def quantize_checkpoint(model: str, output: Path, config: QuantizeConfig) -> dict[str, int]:
    """Quantise the linear layers of a model.

    Args:
        model: reference of a model folder with safetensors weights.
        output: becomes a model folder that `AutoModelForCausalLM.from_pretrained` loads.
        config: the number of bits; with 16 the weights stay as they are.

    Returns:
        The weights' ``bytes_before`` and ``bytes_after``.

    Raises:
        Tune16Error: the model cannot be read, its architecture is not supported, or a weight is missing or misshapen.
    """
    with tempfile.TemporaryDirectory(dir=output.parent if output.parent.is_dir() else None) as scratch:
        reference = parse(model, "model")
        base_config = read_config(reference, Path(scratch))
        shape = read_shape(base_config, where=model)
        source = fetch_model(reference, Path(scratch))
        check_weights(source, where=model)
        check_space(output, quantized_bytes(shape, config.bits))
        with new_folder(output) as folder:
            numbers = {
                "bytes_before": weight_bytes(source),
                "bytes_after": rewrite(source, folder, partial(_parts, bits=config.bits), "quantize"),
            }
            _write_companions(source, folder, base_config, config.bits)
            write_record(folder, "quantize", config, model=model, files=describe_files(folder), **numbers)
    return numbers


def quantize_teacher(teacher: str, output: Path) -> None:
    """Quantise the model to learn from to 4 bits; nothing is done where `teacher` is empty.

    Raises:
        Tune16Error: as :func:`quantize_checkpoint`.
    """
    if teacher:
        quantize_checkpoint(teacher, output, QuantizeConfig(bits=4))


def _is_quantized(stored: StoredTensor) -> bool:
    """Whether a tensor is the weight of a decoder layer's linear; embedding, head and norms keep their precision."""
    return stored.name.startswith("model.layers.") and stored.name.endswith(".weight") and len(stored.shape) == 2


def _parts(stored: StoredTensor, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The tensors that represent one weight in the checkpoint, under the names Transformers expects."""
    name = stored.name
    if bits == 16 or not _is_quantized(stored):
        if weight.is_floating_point() and not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise Tune16Error(f"The model's weight {name} holds NaN or infinite values. Fetch the model again.")
        return {name: weight}
    if bits == 4:
        try:
            quantized = quantize_nf4(weight)
        except ValueError as error:
            raise Tune16Error(
                f"The model's weight {name} cannot be quantised: {error}. Fetch the model again."
            ) from None
        return {name: quantized.packed} | {f"{name}.{key}": part for key, part in quantized.state.items()}
    from bitsandbytes.functional import int8_vectorwise_quant  # takes seconds to import

    rows, scales, _ = int8_vectorwise_quant(weight.half())
    return {
        name: rows,
        name.removesuffix("weight") + "SCB": scales,
        name.removesuffix("weight") + "weight_format": torch.tensor(_LLM_INT8_ROW_MAJOR, dtype=torch.uint8),
    }


def _write_companions(source: Path, folder: Path, base_config: dict[str, Any], bits: int) -> None:
    """Copy all but the weights, and note in config.json how the weights are stored."""
    for path in companions(source):
        if path.name not in {"config.json", INDEX_FILE}:
            shutil.copyfile(path, folder / path.name)
    if bits < 16:
        base_config = {**base_config, "quantization_config": _QUANTIZATION_CONFIG[bits]}
    (folder / "config.json").write_text(json.dumps(base_config, indent=2) + "\n")
