"""Pipeline wrapper of the step prepare."""

from typing import Any

from kfp import dsl

from components import images


@dsl.component(base_image=images.TOOLS, install_kfp_package=False)
def prepare(
    model: str,
    code: str,  # in the key of the cache
    data: str,
    settings: dict[str, Any],
    rows: dsl.Output[dsl.Dataset],
    data_report: dsl.Output[dsl.HTML],
) -> None:
    """Turn the data set into tokenised rows to train on and rows held out."""
    from pathlib import Path

    from components.config import PrepareConfig
    from components.prepare.dataset import prepare_dataset
    from components.runtime.outputs import copy_report
    from components.runtime.steps import step

    with step("prepare"):
        config = PrepareConfig.load(settings)
        prepare_dataset(data, model, Path(rows.path), config)
        copy_report(rows.path, data_report.path)
