"""Pipeline wrapper of the step merge."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAINER, install_kfp_package=False)
def merge(model: str, adapter: dsl.Input[dsl.Model], dtype: str, merged: dsl.Output[dsl.Model]) -> None:
    """Add the adapter to the full-precision base model."""
    from pathlib import Path

    from components.config import MergeConfig
    from components.merge.merger import merge_adapter
    from components.steps import step

    with step("merge"):
        numbers = merge_adapter(model, Path(adapter.path), Path(merged.path), MergeConfig.load(dtype=dtype))
        merged.metadata.update(numbers)
