"""Pipeline wrapper of the step convert."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.GGUF, install_kfp_package=False)
def convert(
    merged: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    code: str,  # in the key of the cache
    quantizations: str,
    gguf: dsl.Output[dsl.Model],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Turn the merged model into quantised GGUF files, and ask each one the rows held out."""
    from pathlib import Path

    from components.config import ConvertConfig
    from components.convert.converter import convert_model
    from components.outputs import copy_report, log_metrics
    from components.steps import step

    with step("convert"):
        config = ConvertConfig.load(quantizations=quantizations)
        made = convert_model(Path(merged.path), Path(rows.path), Path(gguf.path), config)
        copy_report(gguf.path, report.path)
        log_metrics(metrics, {f"{trial.name}_loss": trial.as_dict(made[0])["loss"] for trial in made})
