"""Pipeline wrapper of the step preflight."""

from typing import Any, NamedTuple

from kfp import dsl

from components import images


@dsl.component(base_image=images.TOOLS, install_kfp_package=False)
def preflight(
    base_model: str,
    dataset: str,
    destination_path: str,
    epochs: float,
    gguf_quantizations: str,
    gpu_memory_gib: float,
    learning_rate: float,
    load_in_bits: int,
    lora_rank: int,
    max_tokens_per_row: int,
    merged_dtype: str,
    more_evaluate_options: dict[str, Any],
    more_prepare_options: dict[str, Any],
    more_train_options: dict[str, Any],
    registry_url: str,
    serving_runtime: str,
    run_id: str,
    memory_plan: dsl.Output[dsl.Markdown],
) -> NamedTuple(  # type: ignore[valid-type]
    "Fixed",
    [
        *((name, str) for name in ("model", "teacher", "data", "champion", "evaluation_key")),
        *((name, str) for name in ("train_gpus", "evaluate_gpus", "code")),
        *((name, dict) for name in ("prepare", "quantize", "train", "evaluate", "merge", "convert")),
        *((name, dict) for name in ("register", "deploy")),
    ],
):
    """Fix model, data set and champion, check storage and every setting, and plan the GPU's memory."""
    arguments = dict(locals())

    from pathlib import Path

    from components import config
    from components.preflight.checks import as_markdown, check
    from components.runtime.build import build
    from components.runtime.steps import step
    from components.storage.records import begin

    with step("preflight"):
        recipe = config.read_form({name: value for name, value in arguments.items() if name in config.FORM})
        fixed = check(recipe, destination_path)
        begin(destination_path, run_id, fixed.evaluation)
        Path(memory_plan.path).write_text(as_markdown(fixed.plan, fixed.disk))
        # On several nodes a job of its own has the GPUs, and the step's pod, which only follows it, needs none.
        # As text: KFP's driver reads resource limits as strings, and takes a number for no limit at all.
        num_gpus, is_one_node = recipe.train.num_gpus, recipe.train.num_nodes == 1
        gpus = str(num_gpus if is_one_node else 0), str(min(num_gpus, 1))
        settings = recipe.model_dump(mode="json")
    return (
        fixed.model,
        fixed.teacher,
        fixed.data,
        fixed.champion,
        fixed.evaluation,
        *gpus,
        build(),
        *(settings[name] for name in ("prepare", "quantize", "train", "evaluate", "merge", "convert")),
        *(settings[name] for name in ("register", "deploy")),
    )
