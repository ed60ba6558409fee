"""The step quantize: the base model, shard by shard, into a checkpoint that loads without quantising again.

The result is bit for bit what bitsandbytes makes when Transformers loads the full-precision model with
``load_in_4bit`` (NF4, double quantisation, blocks of 64) or ``load_in_8bit``; `from_pretrained` loads it as it is.
No GPU is needed, and memory is set by the largest tensor.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from components.config import QuantizeConfig
from components.errors import Tune16Error
from components.memory import read_shape
from components.outputs import new_folder, write_record
from components.quantize.nf4 import quantize_nf4
from components.references import MODEL_FILES, fetch, parse, read_config
from components.steps import say
from components.tensors import (
    INDEX_FILE,
    StoredTensor,
    TensorWriter,
    read_ahead,
    read_header,
    weight_files,
    write_index,
)

_LLM_INT8_ROW_MAJOR = 0  # bitsandbytes' number for the plain weight layout


def quantize_checkpoint(model: str, output: Path, config: QuantizeConfig) -> dict[str, float]:
    """Quantise the linear layers of a model.

    Args:
        model: reference of a model folder with safetensors weights.
        output: becomes a model folder that `AutoModelForCausalLM.from_pretrained` loads.
        config: the number of bits; with 16 the weights stay as they are.

    Returns:
        ``bytes_before``, ``bytes_after`` and ``num_quantized`` tensors.

    Raises:
        Tune16Error: the model cannot be read or its architecture is not supported.
    """
    with tempfile.TemporaryDirectory(dir=output.parent if output.parent.is_dir() else None) as scratch:
        reference = parse(model, "model")
        base_config = read_config(reference, Path(scratch))
        read_shape(base_config, where=model)
        source = fetch(reference, Path(scratch), MODEL_FILES)
        with new_folder(output) as folder:
            numbers = _write_weights(source, folder, config.bits)
            _write_companions(source, folder, base_config, config.bits)
            write_record(folder, "quantize", config, model=model, **numbers)
    return numbers


def _write_weights(source: Path, folder: Path, bits: int) -> dict[str, float]:
    """Write one file per file of the source, under the same name."""
    files = weight_files(source)
    file_of_tensor: dict[str, str] = {}
    num_quantized = 0
    for position, file in enumerate(files, 1):
        tensors = read_header(file)
        with TensorWriter(folder / file.name, num_tensors=6 * len(tensors)) as writer:
            for stored, tensor in read_ahead(tensors):
                quantized = bits < 16 and is_quantized(stored)
                num_quantized += quantized
                for name, part in _parts(stored.name, tensor, bits) if quantized else [(stored.name, tensor)]:
                    writer.add(name, part)
            file_of_tensor |= dict.fromkeys(writer.names, file.name)
        say("quantize", f"{file.name} done, {position} of {len(files)}")
    write_index(folder, file_of_tensor)
    return {
        "bytes_before": sum(file.stat().st_size for file in files),
        "bytes_after": sum((folder / file.name).stat().st_size for file in files),
        "num_quantized": num_quantized,
    }


def is_quantized(stored: StoredTensor) -> bool:
    """Whether a tensor is the weight of a decoder layer's linear; embedding, head and norms keep their precision."""
    return stored.name.startswith("model.layers.") and stored.name.endswith(".weight") and len(stored.shape) == 2


def _parts(name: str, weight: torch.Tensor, bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that stand for one quantised weight in the checkpoint, under the names Transformers expects."""
    if bits == 4:
        try:
            packed, state = quantize_nf4(weight)
        except ValueError as error:
            raise Tune16Error(
                f"The model's weight {name} cannot be quantised: {error}. Fetch the model again."
            ) from None
        yield name, packed
        for key, part in state.as_dict(packed=True).items():
            yield f"{name}.{key}", part
    else:
        from bitsandbytes.functional import int8_vectorwise_quant

        rows, scales, _ = int8_vectorwise_quant(weight.half())
        yield name, rows
        yield name.removesuffix("weight") + "SCB", scales
        yield name.removesuffix("weight") + "weight_format", torch.tensor(_LLM_INT8_ROW_MAJOR, dtype=torch.uint8)


def _write_companions(source: Path, folder: Path, base_config: dict[str, Any], bits: int) -> None:
    """Copy what is not weights, and say in config.json how the weights are stored."""
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in {"config.json", INDEX_FILE}:
            shutil.copyfile(path, folder / path.name)
    if bits < 16:
        from transformers import BitsAndBytesConfig

        settings = (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
            if bits == 4
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        base_config = {**base_config, "quantization_config": settings.to_dict()}
    (folder / "config.json").write_text(json.dumps(base_config, indent=2) + "\n")
