"""Pipeline wrapper of the step preflight."""

from typing import Any, NamedTuple

from kfp import dsl

from components import images


@dsl.component(base_image=images.TOOLS, install_kfp_package=False)
def preflight(
    model: str,
    data: str,
    gpu_memory: float,
    max_tokens: int,
    prepare_options: dict[str, Any],
    bits: int,
    epochs: float,
    learning_rate: float,
    rank: int,
    micro_batch: int,
    train_options: dict[str, Any],
    minimum_improvement: float,
    evaluate_options: dict[str, Any],
    path: str,
    plan: dsl.Output[dsl.Markdown],
) -> NamedTuple("Fixed", [("model", str), ("data", str), ("champion", str)]):  # type: ignore[valid-type]
    """Fix model, data set and champion, check storage and every setting, and plan the GPU's memory."""
    from pathlib import Path

    from components import config
    from components.preflight.checks import as_markdown, check
    from components.steps import step

    with step("preflight"):
        config.EvaluateConfig.load(evaluate_options, minimum_improvement=minimum_improvement)
        config.UploadConfig.load(path=path)
        fixed = check(
            config.PreflightConfig.load(model=model, data=data, gpu_memory=gpu_memory),
            config.PrepareConfig.load(prepare_options, max_tokens=max_tokens),
            config.QuantizeConfig.load(bits=bits),
            config.TrainConfig.load(
                train_options, epochs=epochs, learning_rate=learning_rate, rank=rank, micro_batch=micro_batch
            ),
            path,
        )
        Path(plan.path).write_text(as_markdown(fixed.plan))
    return fixed.model, fixed.data, fixed.champion
