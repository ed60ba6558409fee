"""`python -m components STEP …`: one step on local folders, without a pipeline."""

from pathlib import Path
from typing import Annotated

import typer

from components import config as settings
from components.knobs import knobs_page
from components.runtime.errors import user_errors
from components.runtime.proxies import spare_loopback
from components.runtime.steps import say, step

Set = Annotated[list[str], typer.Option("--set", help="A setting of the step, as field=value; repeat it for more.")]
Model = Annotated[str, typer.Option(help="Base model: Hugging Face id, s3://, https:// or a folder.")]
Data = Annotated[str, typer.Option(help="Data set: Hugging Face id, s3://, https://, a file or a folder.")]
Rows = Annotated[Path, typer.Option(help="Output folder of prepare.")]
Weights = Annotated[Path, typer.Option(help="Output folder of quantize.")]
Adapter = Annotated[Path, typer.Option(help="Output folder of train.")]
Merged = Annotated[Path, typer.Option(help="Output folder of merge.")]
Place = Annotated[
    Path, typer.Argument(help="A GGUF file, a folder with a model, a run of `tune16 run`, or the folder of all runs.")
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")]
Context = Annotated[int, typer.Option(help="Longest conversation in tokens, for a GGUF file.", min=16)]
Output = Annotated[Path, typer.Option(help="Folder to write; it appears complete or not at all.")]
Bucket = Annotated[str, typer.Option(help="prefix/model-name in the bucket of the AWS_* variables; empty: none.")]

Published = Annotated[str, typer.Option("--path", help="prefix/model-name in the bucket of the AWS_* variables.")]
Version = Annotated[str, typer.Option(help="Version; empty is the champion.")]
Connection = Annotated[str, typer.Option(help="Name of the Secret with the S3 connection for reading the model.")]

_CONNECTION = settings.ClusterConfig().connection

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def preflight(
    model: Model,
    data: Data,
    path: Bucket = "",
    set_: Annotated[list[str], typer.Option("--set", help="A setting of any step, as step.field=value.")] = [],  # noqa: B006
) -> None:
    """Fix model and data set, check the storage and plan the GPU's memory."""
    from components.preflight.checks import check

    with step("preflight"):
        recipe = settings.override(settings.Recipe(), set_)
        place = settings.PreflightConfig.load(model=model, data=data, gpu_memory=recipe.preflight.gpu_memory)
        check(recipe.model_copy(update={"preflight": place}), path)


@app.command()
def prepare(model: Model, data: Data, output: Output, set_: Set = []) -> None:  # noqa: B006
    """Turn a data set into tokenised rows to train on and rows held out."""
    from components.prepare.dataset import prepare_dataset

    with step("prepare"):
        prepare_dataset(data, model, output, _load(settings.PrepareConfig, set_))


@app.command()
def quantize(model: Model, output: Output, set_: Set = []) -> None:  # noqa: B006
    """Turn a base model into a 4-bit checkpoint."""
    from components.quantize.checkpoint import quantize_checkpoint

    with step("quantize"):
        quantize_checkpoint(model, output, _load(settings.QuantizeConfig, set_))


@app.command()
def train(
    weights: Weights,
    rows: Rows,
    output: Output,
    teacher_weights: Annotated[
        Path | None, typer.Option(help="Output folder of quantize for the teacher, with method=distill.")
    ] = None,
    path: Bucket = "",
    set_: Set = [],  # noqa: B006
) -> None:
    """Train an adapter on a quantised model; when restarted, it continues from its newest checkpoint."""
    from components.train.launch import train as train_adapter

    with step("train"):
        train_adapter(weights, rows, output, _load(settings.TrainConfig, set_), teacher=teacher_weights, path=path)


@app.command()
def train_node(
    source: Annotated[str, typer.Option(help="s3:// folder with the inputs, filled by the step train.")],
) -> None:
    """Train as one node of several; the step train starts this in the pods of its job."""
    from components.train.distributed.node import train_as_node

    with step("train"):
        train_as_node(source)


@app.command()
def evaluate(
    weights: Weights,
    adapter: Adapter,
    rows: Rows,
    output: Output,
    path: Bucket = "",
    set_: Set = [],  # noqa: B006
) -> None:
    """Compare base, tuned model and champion on the rows held out."""
    from components.evaluate.evaluation import evaluate_adapter
    from components.storage.versions import read_champion

    with step("evaluate"):
        champion = read_champion(path) if path else None
        version = champion.version if champion else ""
        evaluate_adapter(weights, adapter, rows, output, _load(settings.EvaluateConfig, set_), path, version)


@app.command()
def merge(
    model: Model,
    adapter: Adapter,
    output: Output,
    rows: Annotated[Path | None, typer.Option(help="Output folder of prepare; with --evaluation:")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="check the result as it was evaluated.")] = None,
    set_: Set = [],  # noqa: B006
) -> None:
    """Add an adapter to its full-precision base model."""
    from components.merge.merger import merge_adapter

    with step("merge"):
        merge_adapter(model, adapter, output, _load(settings.MergeConfig, set_), rows, evaluation)


@app.command()
def convert(merged: Merged, rows: Rows, output: Output, set_: Set = []) -> None:  # noqa: B006
    """Turn a merged model into quantised GGUF files for llama.cpp."""
    from components.convert.converter import convert_model

    with step("convert"):
        convert_model(merged, rows, output, _load(settings.ConvertConfig, set_))


@app.command()
def upload(
    merged: Merged,
    gguf: Annotated[Path, typer.Option(help="Output folder of convert.")],
    evaluation: Annotated[Path, typer.Option(help="Output folder of evaluate.")],
    path: Published,
) -> None:
    """Publish a model as a new version in S3 and make it the champion."""
    from components.upload.publisher import publish

    with step("upload"):
        publish(merged, gguf, evaluation, settings.UploadConfig.load(path=path))


@app.command()
def register(
    path: Published,
    server: Annotated[str, typer.Option(help="Address of the model registry's REST service.")],
    connection: Connection = _CONNECTION,
    version: Version = "",
) -> None:
    """Enter a published version into the model registry, as its model's champion."""
    from components.register.registrar import Source, register_patiently
    from components.storage import versions

    with step("register"):
        manifest = versions.read_manifest(path, version or versions.champion_version(path))
        source = Source("by hand", "by hand", connection)
        register_patiently(manifest, path, source, settings.RegisterConfig.load(server=server))


@app.command()
def deploy(
    path: Published,
    runtime: Annotated[str, typer.Option(help="Server to use: vllm, vllm-adapter, llama.cpp or llama.cpp-gpu.")],
    connection: Connection = _CONNECTION,
    version: Version = "",
) -> None:
    """Serve a published version behind an endpoint, from within a pod of the cluster."""
    from components.deploy.deployer import deploy as deploy_version
    from components.deploy.objects import Placing
    from components.storage import versions

    with step("deploy"):
        manifest = versions.read_manifest(path, version or versions.champion_version(path))
        deploy_version(manifest, path, Placing(connection), settings.DeployConfig.load(runtime=runtime))


@app.command()
def keep(
    path: Published,
    num_versions: Annotated[int, typer.Option(help="The newest versions to keep; 0 keeps all.", min=0)],
) -> None:
    """Keep only the newest versions when publishing; the champion and the one before it are never removed."""
    from components.upload.retention import keep_versions

    with user_errors():
        keep_versions(path, num_versions)


@app.command()
def download(
    path: Published,
    output: Output,
    version: Version = "",
    part: Annotated[str, typer.Option(help="One part, such as adapter or merged; empty is all.")] = "",
    check: Annotated[bool, typer.Option("--check", help="Only check an earlier download in output.")] = False,
) -> None:
    """Download a version from S3 and check every file's SHA-256, and the signature with TUNE16_VERIFY_KEY."""
    from components.storage import versions

    with step("download"):
        name = version or versions.champion_version(path)
        if check:
            versions.check_copy(path, name, output, part)
        else:
            versions.download(path, name, output, part)


@app.command()
def serve(
    place: Place = Path("runs"),
    alias: Annotated[str, typer.Option(help="The model's name in requests and answers.")] = "tuned",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    context: Context = 4096,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run a GGUF file's layers on the GPU.")] = False,
) -> None:
    """Serve a local model with the OpenAI API: GGUF files with llama.cpp, weights with Transformers."""
    from components.playground.serve.server import serve as serve_target
    from components.playground.serve.target import find_target

    with user_errors():
        target = find_target(place)
        say("serve", f"{target.model} at http://{host}:{port}/v1")
        serve_target(target, alias, host, port, context, gpu)


@app.command()
def chat(
    place: Place = Path("runs"),
    tuned: Annotated[
        str,
        typer.Option(envvar="TUNE16_CHAT_TUNED", help="Address of the tuned model's server; #name names the model."),
    ] = "",
    base: Annotated[str, typer.Option(envvar="TUNE16_CHAT_BASE", help="The same for the base model.")] = "",
    feedback: Annotated[
        str,
        typer.Option(
            envvar="TUNE16_CHAT_FEEDBACK", help="Where to save thumbs: s3://bucket/folder or a folder; empty: nowhere."
        ),
    ] = "feedback",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page.", min=1, max=65535)] = 7860,
    context: Context = 4096,
) -> None:
    """Serve a page to chat with base and tuned model side by side; thumbs become a data set."""
    from components.playground.chat.launch import chat as open_page

    with user_errors():
        open_page(place, tuned, base, feedback, host, port, context)


@app.command()
def knobs() -> None:
    """Print the page of all settings (components/KNOBS.md)."""
    print(knobs_page(), end="")


def _load(cls: type[settings.Config], assignments: list[str]) -> settings.Config:
    """A step's settings from field=value assignments."""
    return settings.parse(cls, settings.read_assignments(assignments), where="--set")


if __name__ == "__main__":
    spare_loopback()
    with user_errors():
        app()
