"""Pipeline wrapper of the step train."""

from typing import Any

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAINER, install_kfp_package=False)
def train(
    weights: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    code: str,  # in the key of the cache
    settings: dict[str, Any],
    path: str,
    adapter: dsl.Output[dsl.Model],
    training_report: dsl.Output[dsl.HTML],
    training_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train a LoRA adapter on the frozen base model."""
    from pathlib import Path

    from components.config import TrainConfig
    from components.runtime.outputs import TEACHER, copy_report, log_metrics
    from components.runtime.steps import step
    from components.train.launch import compared
    from components.train.launch import train as train_adapter

    with step("train"):
        config = TrainConfig.load(settings)
        folders = (Path(weights.path), Path(rows.path), Path(adapter.path))
        numbers = train_adapter(*folders, config, Path(weights.path) / TEACHER, path, (weights.uri, rows.uri))
        copy_report(adapter.path, training_report.path)
        log_metrics(training_metrics, compared(numbers))
