"""Pipeline wrapper of the step evaluate."""

from typing import Any

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAINER, install_kfp_package=False)
def evaluate(
    weights: dsl.Input[dsl.Model],
    adapter: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    code: str,  # in the key of the cache
    settings: dict[str, Any],
    path: str,
    champion: str,
    key: str,
    evaluation: dsl.Output[dsl.Artifact],
    evaluation_report: dsl.Output[dsl.HTML],
    scores: dsl.Output[dsl.Metrics],
) -> str:
    """Compare tuned and base model on held-out rows; the verdict is promoted, kept or inconclusive."""
    from pathlib import Path

    from components.config import EvaluateConfig
    from components.evaluate.evaluation import evaluate_adapter
    from components.runtime.outputs import copy_report, log_metrics
    from components.runtime.steps import step
    from components.storage.records import keep_evaluation

    with step("evaluate"):
        config = EvaluateConfig.load(settings)
        inputs = (Path(weights.path), Path(adapter.path), Path(rows.path))
        result = evaluate_adapter(*inputs, Path(evaluation.path), config, path, champion)
        keep_evaluation(path, key, Path(evaluation.path))
        copy_report(evaluation.path, evaluation_report.path)
        log_metrics(scores, result.metrics())
    return result.verdict
