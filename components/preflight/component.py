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
    train_options: dict[str, Any],
    evaluate_options: dict[str, Any],
    merge_dtype: str,
    quantizations: str,
    path: str,
    server: str,
    runtime: str,
    run_id: str,
    memory_plan: dsl.Output[dsl.Markdown],
) -> NamedTuple(  # type: ignore[valid-type]
    "Fixed",
    [(name, str) for name in ("model", "teacher", "data", "champion", "evaluation", "gpus", "evaluation_gpus", "code")],
):
    """Fix model, data set and champion, check storage and every setting, and plan the GPU's memory."""
    from pathlib import Path

    from components import config
    from components.preflight.checks import as_markdown, check
    from components.runtime.build import build
    from components.runtime.steps import step
    from components.storage.records import begin

    with step("preflight"):
        numbers = {"epochs": epochs, "learning_rate": learning_rate, "rank": rank}
        training = config.TrainConfig.load(train_options, **numbers)
        sections = {
            "preflight": config.PreflightConfig.load(model=model, data=data, gpu_memory=gpu_memory),
            "prepare": config.PrepareConfig.load(prepare_options, max_tokens=max_tokens),
            "quantize": config.QuantizeConfig.load(bits=bits),
            "train": training,
            "evaluate": config.EvaluateConfig.load(evaluate_options),
            "merge": config.MergeConfig.load(dtype=merge_dtype),
            "convert": config.ConvertConfig.load(quantizations=quantizations),
            "upload": config.UploadConfig.load(path=path),
            "register": config.RegisterConfig.load(server=server),
            "deploy": config.DeployConfig.load(runtime=runtime),
        }
        fixed = check(config.parse(config.Recipe, sections, where="form"), path)
        begin(path, run_id, fixed.evaluation)
        Path(memory_plan.path).write_text(as_markdown(fixed.plan, fixed.disk))
        # On several nodes a job of its own has the GPUs, and the step's pod, which only follows it, needs none.
        # As text: KFP's driver reads resource limits as strings, and takes a number for no limit at all.
        gpus = str(training.num_gpus if training.num_nodes == 1 else 0), str(min(training.num_gpus, 1))
    return fixed.model, fixed.teacher, fixed.data, fixed.champion, fixed.evaluation, *gpus, build()
