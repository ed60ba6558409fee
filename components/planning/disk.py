"""Disk space: how much each step holds at once, and a check before the work begins."""

import re
import shutil
from pathlib import Path

from components.config import Recipe
from components.models.shapes import ModelShape
from components.runtime.errors import Tune16Error
from components.runtime.report import size


def needed(shape: ModelShape, recipe: Recipe, teacher: ModelShape | None = None) -> dict[str, int]:
    """Bytes that the large steps hold at once: what they fetch and what they write, in files of 16-bit weights.

    A pod has them on its node, as ephemeral storage: what Kubernetes counts, and evicts for.
    """
    full, small = 2 * _num_weights(shape), quantized_bytes(shape, recipe.quantize.bits)
    fetched = full
    if teacher:
        fetched, small = full + 2 * _num_weights(teacher), small + quantized_bytes(teacher, 4)
    gguf = gguf_bytes(_num_weights(shape), recipe.convert.names)
    steps = {"quantize": fetched + small, "train": small, "evaluate": small, "merge": 2 * full}
    if gguf:
        steps["convert"] = full + gguf
    return {**steps, "upload": full + gguf}


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        Tune16Error: there are fewer than `num_bytes` free where `folder` is, or will be.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise Tune16Error(
            f"The disk is too small: {size(num_bytes)} are needed, and {size(free)} are free in {there}. Free "
            "space there; a pod needs a node with more ephemeral storage."
        )


def _num_weights(shape: ModelShape) -> int:
    return shape.num_linear_weights + shape.num_embedding_weights


def quantized_bytes(shape: ModelShape, bits: int) -> int:
    """Bytes of the linear layers in so many bits, with 4 of NF4's scales in 1,000, and of the rest in 16."""
    return round(shape.num_linear_weights * bits * 1.04 / 8) + 2 * shape.num_embedding_weights


def gguf_bytes(num_weights: int, quantizations: list[str]) -> int:
    """Bytes of these GGUF files, and of the 16-bit one that they are made of."""
    bits = sum(_gguf_bits(name) for name in dict.fromkeys([*quantizations, "F16"])) if quantizations else 0
    return round(num_weights * bits / 8)


def _gguf_bits(name: str) -> float:
    """Of each weight, with its scales: Q4_K_M takes 4.9, Q8_0 8.5."""
    bits = int(re.findall(r"\d+", name)[0])
    return bits if bits == 16 else bits + 0.9
