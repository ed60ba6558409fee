"""The pipeline: which step feeds which, what each asks of the cluster, and the form that people fill in."""

import inspect
from collections.abc import Callable
from typing import Any

from kfp import dsl, kubernetes

from components.config import CONNECTION_VARIABLES, GPU, PROMOTED, SESSION_TOKEN, TOKEN_VARIABLES, Recipe, form_help
from components.convert.component import convert
from components.deploy.component import deploy
from components.evaluate.component import evaluate
from components.merge.component import merge
from components.preflight.component import preflight
from components.prepare.component import prepare
from components.quantize.component import quantize
from components.register.component import register
from components.train.component import train
from components.upload.component import upload
from pipelines.resources import RESOURCES

_DEFAULT = Recipe()


def _with_help(function: Callable[..., None]) -> Callable[..., None]:
    """Add the help of each form field to the docstring, which is where kfp looks for it: the config's own sentence."""
    lines = [f"{name}: {form_help(name)}" for name in inspect.signature(function).parameters]
    function.__doc__ = "\n".join([str(function.__doc__), "", "Args:", *(f"    {line}" for line in lines)])
    return function


def _place(task: dsl.PipelineTask, connection: Any, tokens: Any) -> None:
    """Give a task its resources, and the secrets by name."""
    cpu, memory = RESOURCES[task.name]
    task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)
    kubernetes.use_secret_as_env(task, connection, {name: name for name in CONNECTION_VARIABLES})
    kubernetes.use_secret_as_env(task, connection, {SESSION_TOKEN: SESSION_TOKEN}, optional=True)
    kubernetes.use_secret_as_env(task, tokens, {name: name for name in TOKEN_VARIABLES}, optional=True)
    # For Pod Security "restricted". OpenShift adds it by itself; pipeline servers before 2.17 pass it over.
    kubernetes.set_security_context(task, run_as_non_root=True)


@dsl.pipeline(
    name="tune16",
    display_name="Tune16",
    description="Fine-tunes a large language model with QLoRA on one 16 GB GPU and proves that it got better.",
)
@_with_help
def finetune(
    destination_path: str,
    base_model: str = _DEFAULT.preflight.model,
    dataset: str = _DEFAULT.preflight.data,
    epochs: float = _DEFAULT.train.epochs,
    gguf_quantizations: str = _DEFAULT.convert.quantizations,
    gpu_memory_gib: float = _DEFAULT.preflight.gpu_memory,
    learning_rate: float = _DEFAULT.train.learning_rate,
    load_in_bits: int = _DEFAULT.quantize.bits,
    lora_rank: int = _DEFAULT.train.rank,
    max_tokens_per_row: int = _DEFAULT.prepare.max_tokens,
    merged_dtype: str = _DEFAULT.merge.dtype,
    more_evaluate_options: dict[str, Any] = {},  # noqa: B006
    more_prepare_options: dict[str, Any] = {},  # noqa: B006  (kfp needs the default itself)
    more_train_options: dict[str, Any] = {},  # noqa: B006
    registry_url: str = _DEFAULT.register.server,
    serving_runtime: str = _DEFAULT.deploy.runtime,
    with_connection_secret: str = _DEFAULT.cluster.connection,
    with_node_selector: dict[str, str] = _DEFAULT.cluster.node_selector,
    with_tokens_secret: str = _DEFAULT.cluster.tokens,
    with_tolerations: list[dict[str, Any]] = _DEFAULT.cluster.tolerations,
) -> None:
    """Prepare data, train an adapter, compare it with the base model, and publish it if it is better."""
    fixed = preflight(
        model=base_model,
        data=dataset,
        gpu_memory=gpu_memory_gib,
        max_tokens=max_tokens_per_row,
        prepare_options=more_prepare_options,
        bits=load_in_bits,
        epochs=epochs,
        learning_rate=learning_rate,
        rank=lora_rank,
        train_options=more_train_options,
        evaluate_options=more_evaluate_options,
        merge_dtype=merged_dtype,
        quantizations=gguf_quantizations,
        path=destination_path,
        server=registry_url,
        runtime=serving_runtime,
        run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )
    fixed.set_caching_options(False)  # names may point to something else today
    model, data, code = fixed.outputs["model"], fixed.outputs["data"], fixed.outputs["code"]
    prepared = prepare(model=model, data=data, code=code, max_tokens=max_tokens_per_row, options=more_prepare_options)
    quantized = quantize(model=model, code=code, teacher=fixed.outputs["teacher"], bits=load_in_bits)
    trained = train(
        weights=quantized.outputs["weights"],
        rows=prepared.outputs["rows"],
        code=code,
        epochs=epochs,
        learning_rate=learning_rate,
        rank=lora_rank,
        options=more_train_options,
        path=destination_path,
    )
    evaluated = evaluate(
        weights=quantized.outputs["weights"],
        adapter=trained.outputs["adapter"],
        rows=prepared.outputs["rows"],
        code=code,
        options=more_evaluate_options,
        path=destination_path,
        champion=fixed.outputs["champion"],
        key=fixed.outputs["evaluation"],
    )
    with dsl.If(evaluated.outputs["Output"] == PROMOTED, name="if better"):
        merged = merge(
            model=model,
            code=code,
            adapter=trained.outputs["adapter"],
            rows=prepared.outputs["rows"],
            evaluation=evaluated.outputs["evaluation"],
            dtype=merged_dtype,
        )
        converted = convert(
            merged=merged.outputs["merged"],
            rows=prepared.outputs["rows"],
            code=code,
            quantizations=gguf_quantizations,
        )
        uploaded = upload(
            merged=merged.outputs["merged"],
            gguf=converted.outputs["gguf"],
            evaluation=evaluated.outputs["evaluation"],
            path=destination_path,
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        )
        registered = register(
            manifest=uploaded.outputs["manifest"],
            path=destination_path,
            server=registry_url,
            connection=with_connection_secret,
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
        )
        deployed = deploy(
            manifest=uploaded.outputs["manifest"],
            path=destination_path,
            runtime=serving_runtime,
            connection=with_connection_secret,
            model_id=registered.outputs["model_id"],
            version_id=registered.outputs["version_id"],
            node_selector=with_node_selector,
            tolerations=with_tolerations,
        )
        for task in (uploaded, registered, deployed):
            task.set_caching_options(False)  # what was published, registered or served may have been removed since

    for task in (fixed, prepared, quantized, trained, evaluated, merged, converted, uploaded, registered, deployed):
        _place(task, with_connection_secret, with_tokens_secret)
    # GPUs of one pod exchange gradients through shared memory, of which a container has 64 MiB by itself.
    kubernetes.empty_dir_mount(trained, "shm", "/dev/shm", medium="Memory", size_limit="2Gi")
    for task, num_gpus in ((trained, fixed.outputs["gpus"]), (evaluated, fixed.outputs["evaluation_gpus"])):
        task.set_accelerator_type(GPU).set_accelerator_limit(num_gpus)
        kubernetes.add_node_selector_json(task, node_selector_json=with_node_selector)
        kubernetes.add_toleration_json(task, toleration_json=with_tolerations)
