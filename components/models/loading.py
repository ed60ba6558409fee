"""Loading the quantised base model on the device at hand, for training and for evaluation."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from components.runtime.errors import Tune16Error, first_line

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a full GPU has no room for fragments

_FIRST_CAPABILITY_WITH_BFLOAT16 = (8, 0)


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def choose_dtype(name: str) -> torch.dtype:
    """The number format of the computation.

    ``auto`` is bfloat16 where the GPU has it in hardware (compute capability 8.0; `is_bf16_supported` also counts a
    T4's emulation, which is slow), float16 on other GPUs, and float32 on a CPU.

    Raises:
        Tune16Error: bfloat16 is asked for on a GPU without it.
    """
    on_gpu = torch.cuda.is_available()
    cards = range(torch.cuda.device_count()) if on_gpu else []
    has_bfloat16 = on_gpu and min(map(torch.cuda.get_device_capability, cards)) >= _FIRST_CAPABILITY_WITH_BFLOAT16
    if name == "auto":
        if not on_gpu:
            return torch.float32
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if name == "bfloat16" and on_gpu and not has_bfloat16:
        raise Tune16Error(f"train.compute_dtype: {torch.cuda.get_device_name()} lacks bfloat16. Use auto, or float16.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def usable_dtype(name: str) -> tuple[torch.dtype, str]:
    """The number format `name`, or the nearest that the device at hand has, and a sentence where it is another."""
    try:
        return choose_dtype(name), ""
    except Tune16Error:
        dtype = choose_dtype("auto")
    return dtype, f"trained in {name}, which {torch.cuda.get_device_name()} lacks: evaluated in {dtype}"


def card_facts() -> list[str]:
    """The GPUs at hand, as `nvidia-smi` reports them; empty without one."""
    driver = Path("/proc/driver/nvidia/version")
    version = next(iter(re.findall(r"\s(\d+\.\d+(?:\.\d+)?)\s", driver.read_text())), "?") if driver.exists() else "?"
    lines = []
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        lines.append(
            f"GPU {number}: {card.name}, {card.total_memory / 2**30:.1f} GiB, compute capability {card.major}."
            f"{card.minor}; driver {version}, CUDA {torch.version.cuda}"
        )
    return lines


def available_memory() -> int:
    """Bytes of the GPU for this process's tensors, those that exist already included."""
    free, total = torch.cuda.mem_get_info()
    allowed = int(total * torch.cuda.get_per_process_memory_fraction())
    return min(free + torch.cuda.memory_reserved(), allowed)


def load_base(folder: Path, dtype: torch.dtype) -> Any:
    """Load a quantised checkpoint (an output of the step quantize) to compute in `dtype`.

    Raises:
        Tune16Error: the folder holds no model that can be loaded.
    """
    torch.set_flush_denormal(True)  # masked attention makes denormals, which a CPU multiplies a hundred times slower
    model = load_model(folder, dtype)
    _compute_in(model, dtype)
    return model


def load_model(folder: Path, dtype: torch.dtype | str, on_disk: bool = False) -> Any:
    """Load a model folder as Transformers does, with every weight from its files.

    Args:
        folder: the model.
        dtype: number format of the weights; ``auto`` is their own.
        on_disk: leave the weights on the disk, and compute on the CPU with a layer at a time.

    Raises:
        Tune16Error: the folder's model cannot be loaded, or a weight would be initialised randomly.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": "disk" if on_disk else device()},
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise Tune16Error(f"{folder}: the model cannot be loaded: {reason}") from error
    for what, name in (("missing", "missing_keys"), ("misshapen", "mismatched_keys"), ("unreadable", "error_msgs")):
        if found := sorted(map(str, report[name])):
            raise Tune16Error(f"{folder}: the weight {found[0]} is {what}, and would be set randomly. Refused.")
    return model


def bound_float16(model: Any) -> None:
    """Keep what a model computes in float16 within its range, as the engine does and Transformers does for T5.

    Some models (Qwen2-7B) have activations beyond 65,504, which become infinite in float16 and NaN in the next norm.
    Bounded are the inputs of norms and of the layer after the SiLU product, and the outputs of decoder layers and of
    the adapters' dropout.
    """
    limit = torch.finfo(torch.float16).max

    def bounded(value: Any) -> Any:
        is_short = isinstance(value, torch.Tensor) and value.dtype == torch.float16
        return value.clamp(-limit, limit) if is_short else value

    def before(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(bounded(value) for value in inputs)

    def after(_: Any, __: Any, output: Any) -> Any:
        return tuple(bounded(value) for value in output) if isinstance(output, tuple) else bounded(output)

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last.endswith("norm") or last == "down_proj":
            module.register_forward_pre_hook(before)
        if (name.rpartition(".")[0].endswith("layers") and last.isdigit()) or ".lora_dropout." in name:
            module.register_forward_hook(after)


def _compute_in(model: Any, dtype: torch.dtype) -> None:
    """Let everything compute in `dtype`: a quantised checkpoint keeps the base model's format whatever is asked for.

    So do its embedding, head and norms, and mixed formats would make the whole residual stream float32.
    """
    from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit

    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, (Int8Params, Params4bit)):
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            # Where a CPU has AVX512-BF16, the first evaluation would repack the weights for a kernel that has no
            # gradient, and the steps after it would learn nothing.
            module.support_avx512bf16_for_cpu = False
            module.weight.quant_state.dtype = dtype
    model.config.use_cache = False
