"""Pipeline wrapper of the step quantize."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAINER, install_kfp_package=False)
def quantize(model: str, bits: int, weights: dsl.Output[dsl.Model]) -> None:
    """Quantise the frozen base model once; later runs take it from the cache."""
    from pathlib import Path

    from components.config import QuantizeConfig
    from components.quantize.checkpoint import quantize_checkpoint
    from components.steps import step

    with step("quantize"):
        numbers = quantize_checkpoint(model, Path(weights.path), QuantizeConfig.load(bits=bits))
        weights.metadata.update(numbers)
