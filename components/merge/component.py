"""Pipeline wrapper of the step merge."""

from typing import Any

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAINER, install_kfp_package=False)
def merge(
    model: str,
    code: str,  # in the key of the cache
    adapter: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Artifact],
    settings: dict[str, Any],
    merged: dsl.Output[dsl.Model],
) -> None:
    """Add the adapter to the full-precision base model, and check the result as it was evaluated."""
    from pathlib import Path

    from components.config import MergeConfig
    from components.merge.merger import merge_adapter
    from components.runtime.steps import step

    with step("merge"):
        config, judged = MergeConfig.load(settings), (Path(rows.path), Path(evaluation.path))
        numbers = merge_adapter(model, Path(adapter.path), Path(merged.path), config, *judged)
        merged.metadata.update(numbers)
