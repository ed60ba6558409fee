"""The commands of `tune16` that check a cluster and start runs on it: doctor and submit."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from components.config import CONNECTION_VARIABLES, Recipe, override
from components.kubernetes.account import is_inside_only
from components.kubernetes.pods import duration
from components.runtime.errors import USER_ERROR_EXIT_CODE, Tune16Error
from components.storage import s3
from pipelines import submission
from pipelines.cli_runs import follow
from pipelines.cli_where import Connected, Where, console, notes, show_result, somewhere
from pipelines.cluster import Cluster, ForbiddenError, NotFoundError
from pipelines.options import AsJson, RecipeName, Settings, find_recipe, find_shapes
from pipelines.outcome import connection_values

_MARKS = {"ok": "[green]ok[/]", "problem": "[red]problem[/]", "unknown": "[yellow]unknown[/]"}
_OUTCOMES = {"ok": "[green]ok[/]", "failed": "[red]failed[/]", "skipped": "[yellow]skipped[/]"}

Uploaded = Annotated[bool, typer.Option("--uploaded", help="Run the newest version on the server; upload nothing.")]
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Skip the checks of the Secret, GPU nodes, quotas and images.")
]


@somewhere
def doctor(
    where: Where,
    recipe: RecipeName = "llama2-7b-16gb",
    set_: Settings = [],  # noqa: B006
    run: Annotated[
        bool, typer.Option("--run", help="Then run the acceptance checks with the demo, and remove what they create.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="With --run: run the GPU steps on the CPU.")] = False,
    output: Annotated[Path | None, typer.Option(help="With --run: write the results to this JSON file too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check everything that a run needs on the cluster, from the login to the GPU; with --run, also run the demo."""
    from pipelines.doctor import Context, Finding, examine

    recipe = "demo" if run else recipe
    settings = override(find_recipe(recipe), [*(["train.num_gpus=0"] if cpu else []), *set_])
    context = Context(settings, where.namespace, where.host, where.ca, where.timeout)
    findings: list[Finding] = []
    for finding in examine(context):
        findings.append(finding)
        if not as_json:
            console.print(f"{_MARKS[finding.outcome]:>16}  {finding.check}: {escape(finding.text)}", soft_wrap=True)
    has_problem = any(finding.outcome == "problem" for finding in findings)
    if as_json and (has_problem or not run):
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    if has_problem:
        raise typer.Exit(USER_ERROR_EXIT_CODE)
    if run:
        _accept(where.connect(), settings, output, as_json)


def _accept(connected: Connected, settings: Recipe, output: Path | None, as_json: bool) -> None:
    """Run the acceptance checks; exit code 1 if one failed."""
    from pipelines import acceptance

    bucket = _demo_bucket(settings, connected.cluster)
    checks = acceptance.Acceptance(connected, settings, bucket, lambda text: notes.print(f"  {escape(text)}"))
    results = []
    for result in checks.make():
        results.append(result)
        if not as_json:
            mark, seconds = _OUTCOMES[result.outcome], duration(result.seconds)
            console.print(f"{mark:>16}  {result.check} ({seconds}): {escape(result.text)}", soft_wrap=True)
    content = json.dumps(acceptance.as_json(results, connected), indent=2)
    if as_json:
        print(content)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(content + "\n")
    if any(result.outcome == "failed" for result in results):
        raise typer.Exit(1)


@somewhere
def submit(
    where: Where,
    recipe: RecipeName,
    set_: Settings = [],  # noqa: B006
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    uploaded: Uploaded = False,
    unchecked: Unchecked = False,
    as_json: AsJson = False,
) -> None:
    """Start a run of a recipe on the cluster."""
    settings, connected = prepare(where, recipe, set_, unchecked)
    run = submission.submit(connected.server, connected.cluster, settings, Path(recipe).stem, uploaded)
    url = connected.url(run)
    if not (as_json and wait):
        show_result(run | {"url": url}, as_json, f"{run['display_name']} has started: {url}")
    if wait:
        follow(connected, run["run_id"], as_json)


def prepare(where: Where, recipe: str, set_: list[str], unchecked: bool) -> tuple[Recipe, Connected]:
    """Prepare any start: settings, memory plan, connection, checks of the namespace, the demo's files in the bucket."""
    settings = override(find_recipe(recipe), set_)
    _plan(settings)
    connected = where.connect()
    if not unchecked:
        _refuse_unready(connected, settings)
    _put_demo(settings, connected.cluster)
    return settings, connected


def _plan(settings: Recipe) -> None:
    """Refuse what does not fit; a model that cannot be read from here is planned by the step preflight."""
    from components.planning.memory import plan
    from components.preflight.checks import refuse_unfit

    if settings.setup == "demo":
        return  # its model is tiny, and not made yet
    try:
        shape, teacher = find_shapes(settings)
    except Tune16Error as error:
        notes.print(f"memory will be planned on the cluster, not here: {escape(str(error))}", soft_wrap=True)
        return
    refuse_unfit(plan(shape, settings, teacher=teacher), settings, shape, teacher)


def _refuse_unready(connected: Connected, settings: Recipe) -> None:
    from pipelines.doctor import Context, refuse_unready

    if connected.cluster is not None:
        refuse_unready(Context(settings, found_cluster=connected.cluster, found_server=connected.server))


def _put_demo(settings: Recipe, cluster: Cluster | None) -> None:
    """Upload the demo's model and rows to the bucket of the cluster's connection.

    It is given by exported variables, else by the namespace's Secret.

    Raises:
        Tune16Error: neither can be used from here, or the storage refuses.
    """
    if settings.setup != "demo":
        return
    with s3.environment(_demo_bucket(settings, cluster)), tempfile.TemporaryDirectory() as folder:
        from pipelines.local import put_demo

        put_demo(Path(folder))


def _demo_bucket(settings: Recipe, cluster: Cluster | None) -> dict[str, str]:
    """The variables of the bucket for the demo's files; none if they are exported already."""
    if os.environ.get("AWS_S3_ENDPOINT"):
        return {}
    remedy = f"Export the connection's variables first ({', '.join(CONNECTION_VARIABLES)})."
    if cluster is None:
        raise Tune16Error(f"The demo's model and rows are created here and uploaded to the cluster's bucket. {remedy}")
    name = settings.cluster.connection
    try:
        values = connection_values(cluster, name)
    except (NotFoundError, ForbiddenError) as error:
        raise Tune16Error(f"The demo's model and rows are uploaded to the cluster's bucket. {error} {remedy}") from None
    if is_inside_only(values["AWS_S3_ENDPOINT"]) and not cluster.inside:
        raise Tune16Error(
            f"The demo's model and rows are uploaded to the cluster's bucket, but {values['AWS_S3_ENDPOINT']} of the "
            f"Secret {name} is reachable only inside the cluster. {remedy} AWS_S3_ENDPOINT is the address of its Route."
        )
    return values
