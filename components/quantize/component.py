"""Pipeline wrapper of the step quantize."""

from typing import Any

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAINER, install_kfp_package=False)
def quantize(
    model: str,
    code: str,  # in the key of the cache
    teacher: str,
    settings: dict[str, Any],
    weights: dsl.Output[dsl.Model],
) -> None:
    """Quantise the frozen base model once, and a teacher if there is one; later runs take them from the cache."""
    from pathlib import Path

    from components.config import QuantizeConfig
    from components.quantize.checkpoint import quantize_checkpoint, quantize_teacher
    from components.runtime.outputs import TEACHER
    from components.runtime.steps import step

    with step("quantize"):
        numbers = quantize_checkpoint(model, Path(weights.path), QuantizeConfig.load(settings))
        weights.metadata.update(numbers)
        quantize_teacher(teacher, Path(weights.path) / TEACHER)
