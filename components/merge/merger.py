"""The step merge: the adapter added to the full-precision base model, shard by shard, on a CPU.

W' = W + scale * B @ A for every adapted layer (LoRA, https://arxiv.org/abs/2106.09685), computed in float32 a slice
of rows at a time. Merging into the 4-bit copy would lose precision; here each weight is rounded once. Memory is set
by the largest tensor.
"""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.config import MergeConfig
from components.merge.published import check_published
from components.models.fetching import companions, read_config
from components.models.references import parse
from components.models.stopping import GENERATION_CONFIG, generation_settings
from components.models.tensors import INDEX_FILE, StoredTensor, fetch_model, read_header, rewrite, weight_bytes
from components.planning.disk import check_space
from components.runtime.errors import Tune16Error
from components.runtime.outputs import RECORD, new_folder, read_record, write_json, write_record
from components.runtime.report import size
from components.runtime.steps import say
from components.storage.files import describe_files

ADAPTER_FOLDER = "adapter"

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_SLICE_BYTES = 4 << 20  # of float32, which stays in the processor's cache
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Delta:
    """The update of one weight: `scale` times `b` of [rows, rank] times `a` of [rank, columns]."""

    scale: float
    a: torch.Tensor
    b: torch.Tensor


def merge_adapter(
    model: str,
    adapter: Path,
    output: Path,
    config: MergeConfig,
    rows: Path | None = None,
    evaluation: Path | None = None,
) -> dict[str, float]:
    """Merge an adapter into its base model.

    Args:
        model: reference of the full-precision base model.
        adapter: output of the step train.
        output: becomes a folder with ``merged/``, a Hugging Face model folder, and ``adapter/``, a copy.
        config: the number format of the result.
        rows: output of the step prepare, and
        evaluation: that of the step evaluate: with both, the result is checked as it was evaluated.

    Returns:
        ``num_merged`` weights and ``bytes`` written.

    Raises:
        Tune16Error: the adapter belongs to another base model, or does not fit it, or the result does not do as it
            was evaluated.
    """
    trained = read_record(adapter, "train")
    if trained["model"] != model:
        raise Tune16Error(f"The adapter in {adapter} belongs to the base model {trained['model']}, not to {model}.")
    with tempfile.TemporaryDirectory(dir=output.parent if output.parent.is_dir() else None) as scratch:
        source = fetch_model(parse(model, "model"), Path(scratch))
        if config.dtype == "auto":
            check_space(output, weight_bytes(source))
        with new_folder(output) as folder:
            numbers = merge_weights(source, adapter, folder / "merged", config.dtype)
            _write_generation(source, adapter, folder / "merged", trained["stop_token"])
            shutil.copytree(adapter, folder / ADAPTER_FOLDER)
            if rows and evaluation:
                check_published(folder, rows, evaluation)
            files = describe_files(folder / "merged")
            write_record(folder, "merge", config, model=model, files=files, **numbers)
    say("merge", f"{numbers['num_merged']} weights merged, {size(numbers['bytes'])} written")
    return numbers


def _write_generation(source: Path, adapter: Path, target: Path, stop_token: str) -> None:
    """Write where answers end, as in training and evaluation, for everyone who loads the model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
    write_json(target / GENERATION_CONFIG, generation_settings(source, tokenizer, stop_token))


def merge_weights(source: Path, adapter: Path, target: Path, dtype: str = "auto") -> dict[str, float]:
    """Merge the adapter folder `adapter` (PEFT's format) into the model folder `source`, giving `target`.

    Raises:
        Tune16Error: a part of the adapter does not fit the model's weights, or the result is not finite.
    """
    target.mkdir(parents=True)
    deltas = read_deltas(adapter)
    num_deltas = len(deltas)
    base_config = read_config(parse(str(source.absolute()), "model"), source)
    number_format: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
    untied = bool(base_config.get("tie_word_embeddings")) and bool({_EMBEDDING, _HEAD} & set(deltas))

    def merge(stored: StoredTensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if untied and stored.name == _HEAD:
            return {}  # the embedding again; it stands for both
        names = [_HEAD, _EMBEDDING] if untied and stored.name == _EMBEDDING else [stored.name]
        copies = [weight.clone() for _ in names[1:]] + [weight]
        return {
            name: _merged(name, copy, deltas.pop(name, None), number_format)
            for name, copy in zip(names, copies, strict=True)
        }

    num_bytes = rewrite(source, target, merge, "merge")
    if deltas:
        raise Tune16Error(f"{adapter}: adapts {min(deltas)}, which the base model does not have.")
    _write_companions(source, adapter, target, base_config, number_format, untied)
    return {"num_merged": num_deltas, "bytes": num_bytes}


def read_deltas(adapter: Path) -> dict[str, Delta]:
    """The updates of an adapter, by the name of the weight that each belongs to.

    Raises:
        Tune16Error: it is not a plain LoRA adapter.
    """
    try:
        config = json.loads((adapter / _ADAPTER_CONFIG).read_text())
        tensors = {stored.name: stored.read() for stored in read_header(adapter / _ADAPTER_WEIGHTS)}
    except FileNotFoundError as error:
        raise Tune16Error(f"{error.filename}: missing. {adapter} is not a PEFT adapter folder.") from None
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise Tune16Error(f"{adapter}: only LoRA adapters can be merged, this is {config.get('peft_type')}.")
    deltas = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        a = tensors.pop(name)
        b = tensors.pop(name.replace(".lora_A.", ".lora_B."))
        deltas[f"{module}.weight"] = Delta(_scale(config, module), a, b)
    embeddings = [name for name in tensors if name.endswith(".lora_embedding_A")]
    for name in embeddings:
        module = name.removeprefix(_PREFIX).removesuffix(".lora_embedding_A")
        a = tensors.pop(name)  # of an embedding PEFT keeps both transposed
        b = tensors.pop(name.replace("_embedding_A", "_embedding_B"))
        deltas[f"{module}.weight"] = Delta(_scale(config, module), b.T.contiguous(), a.T.contiguous())
    if tensors:
        raise Tune16Error(f"{adapter}: holds {min(tensors)}, which is not part of a plain LoRA adapter.")
    return deltas


def _scale(config: dict[str, Any], module: str) -> float:
    """Alpha / rank, or alpha / sqrt(rank) where the adapter is rank-stabilised."""
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise Tune16Error(
            f"The adapter gives {module} a rank or alpha of its own (rank_pattern), which is not supported."
        )
    rank: int = config["r"]
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _merged(name: str, weight: torch.Tensor, delta: Delta | None, dtype: torch.dtype | None) -> torch.Tensor:
    """The weight in its final format, the update added."""
    if delta is not None:
        if (delta.b.shape[0], delta.a.shape[1]) != tuple(weight.shape):
            raise Tune16Error(
                f"The adapter's update of {name} is {delta.b.shape[0]} x {delta.a.shape[1]}, the weight "
                f"{' x '.join(map(str, weight.shape))}. It belongs to another base model."
            )
        weight = add_delta(weight, delta, dtype or weight.dtype)
        if not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise Tune16Error(
                f"{name}: the merged weight exceeds the range of {weight.dtype}. Set merged_dtype to bfloat16."
            )
    return weight if dtype is None or not weight.is_floating_point() else weight.to(dtype)


def add_delta(weight: torch.Tensor, delta: Delta, dtype: torch.dtype) -> torch.Tensor:
    """The sum of `weight` and its update, computed in float32 a slice of rows at a time and rounded once to `dtype`."""
    merged = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    a, b = delta.a.float(), delta.b.float()
    num_rows, num_columns = weight.shape
    rows_at_once = max(1, _SLICE_BYTES // (4 * num_columns))
    workspace = torch.empty(min(rows_at_once, num_rows), num_columns)
    for start in range(0, num_rows, rows_at_once):
        rows = slice(start, min(start + rows_at_once, num_rows))
        total = workspace[: rows.stop - start].copy_(weight[rows])
        merged[rows] = total.addmm_(b[rows], a, alpha=delta.scale)
    return merged


def _write_companions(
    source: Path, adapter: Path, target: Path, base_config: dict[str, Any], dtype: torch.dtype | None, untied: bool
) -> None:
    """Copy what is not weights; the tokenizer, with its chat template, is the one the adapter was trained with."""
    for folder in (source, adapter):
        for path in companions(folder):
            if path.name not in {"config.json", INDEX_FILE, RECORD, _ADAPTER_CONFIG}:
                shutil.copyfile(path, target / path.name)
    changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps({**base_config, **changes}, indent=2) + "\n")
