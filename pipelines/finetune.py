"""The pipeline: which step feeds which, what each asks of the cluster, and the form that people fill in."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from kfp import dsl, kubernetes

from components.config import (
    CONNECTION_VARIABLES,
    FORM,
    GPU,
    PROMOTED,
    SESSION_TOKEN,
    TOKEN_VARIABLES,
    form_help,
    form_parameters,
)
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


def _with_form(function: Callable[..., None]) -> Callable[..., None]:
    """Give a pipeline function the form's fields as its parameters, and their help as kfp looks for it.

    Both are the settings' own: components/config.py has the one table of the form.
    """
    fields = form_parameters()
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind)
        if default is None
        else inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in fields.items()
    ]

    @functools.wraps(function)
    def with_form(*values: Any) -> None:
        function(**dict(zip(fields, values, strict=True)))

    with_form.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    help_lines = [f"    {name}: {form_help(name)}" for name in fields]
    with_form.__doc__ = "\n".join([str(function.__doc__), "", "Args:", *help_lines])
    return with_form


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
@_with_form
def finetune(**form: Any) -> None:
    """Prepare data, train an adapter, compare it with the base model, and publish it if it is better."""
    path, connection = form["destination_path"], form["with_connection_secret"]
    node_selector, tolerations = form["with_node_selector"], form["with_tolerations"]
    checked = {name: value for name, value in form.items() if not FORM[name].startswith("cluster.")}
    preflight_task = preflight(**checked, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    preflight_task.set_caching_options(False)  # names may point to something else today
    fixed = preflight_task.outputs
    model, code = fixed["model"], fixed["code"]
    prepared = prepare(model=model, data=fixed["data"], code=code, settings=fixed["prepare"])
    quantized = quantize(model=model, code=code, teacher=fixed["teacher"], settings=fixed["quantize"])
    trained = train(
        weights=quantized.outputs["weights"],
        rows=prepared.outputs["rows"],
        code=code,
        settings=fixed["train"],
        path=path,
    )
    evaluated = evaluate(
        weights=quantized.outputs["weights"],
        adapter=trained.outputs["adapter"],
        rows=prepared.outputs["rows"],
        code=code,
        settings=fixed["evaluate"],
        path=path,
        champion=fixed["champion"],
        key=fixed["evaluation_key"],
    )
    with dsl.If(evaluated.outputs["Output"] == PROMOTED, name="if better"):
        merged = merge(
            model=model,
            code=code,
            adapter=trained.outputs["adapter"],
            rows=prepared.outputs["rows"],
            evaluation=evaluated.outputs["evaluation"],
            settings=fixed["merge"],
        )
        converted = convert(
            merged=merged.outputs["merged"],
            rows=prepared.outputs["rows"],
            code=code,
            settings=fixed["convert"],
        )
        uploaded = upload(
            merged=merged.outputs["merged"],
            gguf=converted.outputs["gguf"],
            evaluation=evaluated.outputs["evaluation"],
            path=path,
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        )
        registered = register(
            manifest=uploaded.outputs["manifest"],
            path=path,
            settings=fixed["register"],
            connection=connection,
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
        )
        deployed = deploy(
            manifest=uploaded.outputs["manifest"],
            path=path,
            settings=fixed["deploy"],
            connection=connection,
            model_id=registered.outputs["model_id"],
            version_id=registered.outputs["version_id"],
            node_selector=node_selector,
            tolerations=tolerations,
        )
        for task in (uploaded, registered, deployed):
            task.set_caching_options(False)  # what was published, registered or served may have been removed since

    for task in (
        preflight_task,
        prepared,
        quantized,
        trained,
        evaluated,
        merged,
        converted,
        uploaded,
        registered,
        deployed,
    ):
        _place(task, connection, form["with_tokens_secret"])
    # GPUs of one pod exchange gradients through shared memory, of which a container has 64 MiB by itself.
    kubernetes.empty_dir_mount(trained, "shm", "/dev/shm", medium="Memory", size_limit="2Gi")
    for task, num_gpus in ((trained, fixed["train_gpus"]), (evaluated, fixed["evaluate_gpus"])):
        task.set_accelerator_type(GPU).set_accelerator_limit(num_gpus)
        kubernetes.add_node_selector_json(task, node_selector_json=node_selector)
        kubernetes.add_toleration_json(task, toleration_json=tolerations)
