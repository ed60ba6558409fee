"""Pipeline wrapper of the step merge."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAINER, install_kfp_package=False)
def merge(
    model: str,
    code: str,  # in the key of the cache
    adapter: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Artifact],
    dtype: str,
    merged: dsl.Output[dsl.Model],
) -> None:
    """Add the adapter to the full-precision base model, and ask the result what it was judged by."""
    from pathlib import Path

    from components.config import MergeConfig
    from components.merge.merger import merge_adapter
    from components.runtime.steps import step

    with step("merge"):
        config, judged = MergeConfig.load(dtype=dtype), (Path(rows.path), Path(evaluation.path))
        numbers = merge_adapter(model, Path(adapter.path), Path(merged.path), config, *judged)
        merged.metadata.update(numbers)
