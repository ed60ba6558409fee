"""Pipeline wrapper of the step convert."""

from typing import Any

from kfp import dsl

from components import images


@dsl.component(base_image=images.GGUF, install_kfp_package=False)
def convert(
    merged: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    code: str,  # in the key of the cache
    settings: dict[str, Any],
    gguf: dsl.Output[dsl.Model],
    gguf_report: dsl.Output[dsl.HTML],
) -> None:
    """Turn the merged model into quantised GGUF files, and test each on the held-out rows."""
    from pathlib import Path

    from components.config import ConvertConfig
    from components.convert.converter import convert_model
    from components.runtime.outputs import copy_report
    from components.runtime.steps import step

    with step("convert"):
        config = ConvertConfig.load(settings)
        convert_model(Path(merged.path), Path(rows.path), Path(gguf.path), config)
        copy_report(gguf.path, gguf_report.path)
