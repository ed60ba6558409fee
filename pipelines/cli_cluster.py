"""The commands of `tune16` that speak to a cluster: doctor, submit, runs and schedule."""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from components.config import CONFIG_OF_STEP, CONNECTION_VARIABLES, Recipe, override
from components.errors import USER_ERROR_EXIT_CODE, Tune16Error
from components.timeouts import limited
from pipelines import submission
from pipelines.cluster import (
    Cluster,
    NotFoundError,
    NotStartedError,
    explained,
    find_cluster,
    find_dashboard,
    find_server,
    given_host,
)
from pipelines.options import AsJson, RecipeName, Settings, find_recipe, find_shapes
from pipelines.server import Json, PipelineServer

POLL_SECONDS = 5.0
_LOG_LINES = 40
_MARKS = {"ok": "[green]ok[/]", "problem": "[red]problem[/]", "unknown": "[yellow]unknown[/]"}

Uploaded = Annotated[
    bool, typer.Option("--uploaded", help="Run the newest version that is on the server, and upload nothing.")
]
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Do not look at the Secret, GPU nodes, quotas and images first.")
]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id or name.")]
ScheduleName = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name.")]

console = Console(highlight=False)
notes = Console(highlight=False, stderr=True)


class _WithDefault(TyperGroup):
    """A group whose first command is meant where none of them is named: `schedule RECIPE` is `schedule set RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        asks_for_help = args[:1] in (["--help"], ["-h"])
        if not asks_for_help and (not args or args[0] not in self.commands):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


runs = typer.Typer(cls=_WithDefault, help="List, show, stop and retry runs, and read their logs.")
schedules = typer.Typer(cls=_WithDefault, help="Repeat a run: schedule RECIPE --cron … or --every …, and the rest.")


@dataclass(frozen=True)
class Connected:
    """A pipeline server, and the cluster that it is on where anybody is logged in there."""

    server: PipelineServer
    cluster: Cluster | None

    def url(self, run: Json) -> str:
        """The page of a run."""
        namespace = self.cluster.namespace if self.cluster else ""
        return submission.run_url(self.server, find_dashboard(self.cluster), namespace, run)


@dataclass(frozen=True)
class Where:
    """Which cluster is meant: the options that all commands here share."""

    namespace: Annotated[str, typer.Option(help="Namespace; by default the login's own. Or TUNE16_NAMESPACE.")] = ""
    host: Annotated[str, typer.Option(help="The pipeline server's URL, if it is elsewhere. Or TUNE16_HOST.")] = ""
    ca: Annotated[str, typer.Option(help="File with the CA of the cluster's certificates. Or TUNE16_CA.")] = ""
    timeout: Annotated[
        float, typer.Option(help="Seconds that one request may take, to the cluster, S3 or the Hub.", min=0.1)
    ] = 30

    def connect(self) -> Connected:
        """Find the pipeline server and see that it answers.

        Raises:
            Tune16Error: nobody is logged in, there is no server, or it does not take the token.
        """
        cluster: Cluster | None = None
        with suppress(Tune16Error) if self.host or given_host() else nullcontext():
            cluster = find_cluster(self.namespace, self.ca)
        server = PipelineServer(find_server(cluster, self.host, self.ca), self.timeout)
        server.check()
        return Connected(server, cluster)


def _somewhere(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `where` the options of :class:`Where` instead."""
    own = [entry for entry in inspect.signature(command).parameters.values() if entry.name != "where"]
    fields = list(inspect.signature(Where).parameters.values())

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        where = Where(**{entry.name: values.pop(entry.name) for entry in fields})
        with limited(where.timeout):
            command(where=where, **values)

    parameters = [entry.replace(kind=inspect.Parameter.KEYWORD_ONLY) for entry in (*own, *fields)]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_options


@_somewhere
def doctor(
    where: Where,
    recipe: RecipeName = "llama2-7b-16gb",
    set_: Settings = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Check the whole road of a run on the cluster, from the login to the GPU."""
    from pipelines.doctor import Finding, Road, examine

    road = Road(override(find_recipe(recipe), set_), where.namespace, where.host, where.ca, where.timeout)
    findings: list[Finding] = []
    for finding in examine(road):
        findings.append(finding)
        if not as_json:
            console.print(f"{_MARKS[finding.outcome]:>16}  {finding.check}: {escape(finding.text)}", soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.outcome == "problem" for finding in findings):
        raise typer.Exit(USER_ERROR_EXIT_CODE)


@_somewhere
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
    settings, connected = _prepare(where, recipe, set_, unchecked)
    run = submission.submit(connected.server, settings, Path(recipe).stem, uploaded)
    url = connected.url(run)
    if not (as_json and wait):
        _show(run | {"url": url}, as_json, f"{run['display_name']} has started: {url}")
    if wait:
        _follow(connected, run["run_id"], as_json)


@runs.command(name="list")
@_somewhere
def list_runs(
    where: Where,
    limit: Annotated[int, typer.Option(help="The most that are listed.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """List the newest runs."""
    found = where.connect().server.list_runs(limit)
    table = Table("run", "state", "started", "id")
    for run in found:
        table.add_row(run["display_name"], run.get("state"), _time(run.get("created_at")), run["run_id"])
    _show(found, as_json, table)


@runs.command()
@_somewhere
def show(
    where: Where,
    run: RunId,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run and its steps."""
    connected = where.connect()
    content = _find_run(connected, run)
    if wait:
        _follow(connected, content["run_id"], as_json)
        return
    _show(content, as_json, _state_table(content))
    if not as_json:
        console.print(connected.url(content), soft_wrap=True)


@runs.command()
@_somewhere
def stop(where: Where, run: RunId) -> None:
    """Stop a run."""
    connected = where.connect()
    content = _find_run(connected, run)
    if content.get("state") in submission.FINAL_STATES:
        raise Tune16Error(f"{content['display_name']} has ended already: {content['state']}.")
    connected.server.stop_run(content["run_id"])
    console.print(f"{content['display_name']} is being stopped")


@runs.command()
@_somewhere
def retry(where: Where, run: RunId) -> None:
    """Start the failed steps of a run again."""
    connected = where.connect()
    content = _find_run(connected, run)
    if content.get("state") not in (submission.FAILED, "CANCELED"):
        raise Tune16Error(f"{content['display_name']} has not failed: {content.get('state')}.")
    connected.server.retry_run(content["run_id"])
    console.print(f"{content['display_name']} goes on")


@runs.command()
@_somewhere
def logs(
    where: Where,
    run: RunId,
    step: Annotated[str, typer.Option(help="Only this step; the default is all that have begun.")] = "",
) -> None:
    """Print the steps' logs."""
    connected = where.connect()
    content = _find_run(connected, run)
    pods = _step_pods(connected, content)
    if step and step not in pods:
        raise Tune16Error(f"The step '{step}' has no pod in this run. There are: {', '.join(pods) or 'none yet'}.")
    for name in [step] if step else pods:
        for line in _read_logs(connected, pods[name]):
            console.print(f"[bold cyan]{name:>9}[/] {escape(line)}", soft_wrap=True)


@schedules.command(name="set")
@_somewhere
def set_schedule(
    where: Where,
    recipe: RecipeName,
    cron: Annotated[str, typer.Option(help="When, as a cron expression, such as '0 3 * * 1'.")] = "",
    every: Annotated[str, typer.Option(help="How often, such as 12h or 7d.")] = "",
    name: Annotated[str, typer.Option(help="The schedule's name; the default is the recipe's.")] = "",
    set_: Settings = [],  # noqa: B006
    uploaded: Uploaded = False,
    unchecked: Unchecked = False,
    as_json: AsJson = False,
) -> None:
    """Create the schedule of a recipe, or bring it up to date; one run at a time, and none is made up for."""
    if bool(cron) == bool(every):
        raise Tune16Error("Say when: --cron '0 3 * * 1' or --every 7d, one of the two.")
    trigger = submission.read_cron(cron) if cron else submission.read_interval(every)
    settings, connected = _prepare(where, recipe, set_, unchecked)
    name = name or Path(recipe).stem
    made, change = submission.schedule(connected.server, settings, name, trigger, uploaded)
    _show(made | {"change": change}, as_json, f"schedule {name}: {change}, {_when(made)}")


@schedules.command(name="list")
@_somewhere
def list_schedules(where: Where, as_json: AsJson = False) -> None:
    """List the schedules."""
    found = where.connect().server.list_schedules()
    table = Table("schedule", "state", "when", "id")
    for entry in found:
        table.add_row(entry["display_name"], entry.get("status"), _when(entry), entry["recurring_run_id"])
    _show(found, as_json, table)


@schedules.command()
@_somewhere
def pause(where: Where, name: ScheduleName) -> None:
    """Pause a schedule."""
    _with_schedule(name, where.connect(), lambda server, id_: server.set_schedule_enabled(id_, False))
    console.print(f"schedule {name}: paused")


@schedules.command()
@_somewhere
def resume(where: Where, name: ScheduleName) -> None:
    """Let a paused schedule go on."""
    _with_schedule(name, where.connect(), lambda server, id_: server.set_schedule_enabled(id_, True))
    console.print(f"schedule {name}: goes on")


@schedules.command()
@_somewhere
def delete(where: Where, name: ScheduleName) -> None:
    """Delete a schedule; its runs stay."""
    _with_schedule(name, where.connect(), lambda server, id_: server.delete_schedule(id_))
    console.print(f"schedule {name}: deleted")


def _with_schedule(name: str, connected: Connected, action: Callable[[PipelineServer, str], None]) -> None:
    action(connected.server, submission.find_schedule(connected.server, name)["recurring_run_id"])


def _prepare(where: Where, recipe: str, set_: list[str], unchecked: bool) -> tuple[Recipe, Connected]:
    """What comes before any start: settings, memory, connection, the namespace, and the demo's files in the bucket."""
    settings = override(find_recipe(recipe), set_)
    _plan(settings)
    connected = where.connect()
    if not unchecked:
        _refuse_unready(connected, settings)
    _put_demo(settings)
    return settings, connected


def _plan(settings: Recipe) -> None:
    """Refuse what will not fit; a model that cannot be seen from here is planned by the step preflight."""
    from components.memory import plan
    from components.preflight.checks import refuse_unfit

    if settings.setup == "demo":
        return  # its model is tiny, and not made yet
    try:
        shape, teacher = find_shapes(settings)
    except Tune16Error as error:
        notes.print(f"the memory is planned on the cluster, not here: {escape(str(error))}", soft_wrap=True)
        return
    refuse_unfit(plan(shape, settings, teacher=teacher), settings, shape, teacher)


def _refuse_unready(connected: Connected, settings: Recipe) -> None:
    from pipelines.doctor import Road, refuse_unready

    if connected.cluster is not None:
        refuse_unready(Road(settings, found_cluster=connected.cluster, found_server=connected.server))


def _put_demo(settings: Recipe) -> None:
    """Bring the demo's model and rows into the bucket of the cluster's connection."""
    if settings.setup != "demo":
        return
    if not os.environ.get("AWS_S3_ENDPOINT"):
        raise Tune16Error(
            "The demo's model and rows are made here and go into the cluster's bucket: export the connection's "
            f"variables first ({', '.join(CONNECTION_VARIABLES)})."
        )
    import tempfile

    from pipelines.local import put_demo

    with tempfile.TemporaryDirectory() as folder:
        put_demo(Path(folder))


def _find_run(connected: Connected, name: str) -> Json:
    """A run by its id or its name."""
    match = next((run for run in connected.server.list_runs() if name in (run["run_id"], run["display_name"])), None)
    return connected.server.read_run(match["run_id"] if match else name)


def _follow(connected: Connected, run_id: str, as_json: bool) -> None:
    """Show the steps' states until the run has ended; then the log of what failed, and exit code 1 if it did.

    Leaving with Ctrl-C leaves the run alone.
    """
    run: Json = {}
    with _state_display(as_json) as display:
        for run in submission.follow(connected.server, run_id, POLL_SECONDS):
            display(run)
    if as_json:
        print(json.dumps(run, indent=2))
    if run["state"] == submission.SUCCEEDED:
        return
    message = (run.get("error") or {}).get("message", "")
    notes.print(f"[red]{run['state']}[/] {escape(message)}".rstrip(), soft_wrap=True)
    states = submission.step_states(run)
    for step, pods in _step_pods(connected, run).items() if connected.cluster else ():
        if states.get(step) == submission.FAILED:
            for line in _read_logs(connected, pods)[-_LOG_LINES:]:
                notes.print(f"[bold cyan]{step:>9}[/] {escape(line)}", soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def _state_display(as_json: bool) -> Iterator[Callable[[Json], None]]:
    """A live table on a terminal; elsewhere a line for each change."""
    out = notes if as_json else console
    if out.is_terminal:
        with Live(console=out) as live:
            yield lambda run: live.update(_state_table(run))
        return
    shown: dict[str, str] = {}

    def show_changes(run: Json) -> None:
        for step, state in (*submission.step_states(run).items(), ("run", run.get("state", ""))):
            if state and shown.get(step) != state:
                shown[step] = state
                out.print(f"{step:>9} {state.lower()}")
                out.file.flush()

    yield show_changes


def _state_table(run: Json) -> Table:
    table = Table("step", "state", title=f"{run['display_name']}: {run.get('state', 'PENDING').lower()}")
    for step, state in submission.step_states(run).items():
        table.add_row(step, state.lower())
    return table


def _step_pods(connected: Connected, run: Json) -> dict[str, list[str]]:
    """The pods of each step that has begun, in the order of the pipeline.

    Raises:
        Tune16Error: nobody is logged in to the cluster, or it does not answer.
    """
    cluster = _logged_in(connected)
    with explained(cluster, "list pods"):
        nodes = cluster.list_step_pods(run["run_id"])
    pods: dict[str, list[str]] = {}
    for step in CONFIG_OF_STEP:
        found = [name for node, names in nodes.items() if submission.step_of_node(node) == step for name in names]
        if found:
            pods[step] = found
    return pods


def _read_logs(connected: Connected, pods: list[str]) -> list[str]:
    """The lines of the pods' main containers, as far as the pods have begun and are still there."""
    cluster = _logged_in(connected)
    lines: list[str] = []
    for pod in pods:
        try:
            with explained(cluster, "read logs"):
                lines += cluster.read_log(pod).splitlines()
        except NotFoundError:
            lines.append(f"(the pod {pod} is gone, and its log with it)")
        except NotStartedError:
            lines.append(f"(the pod {pod} has not started yet)")
    return lines


def _logged_in(connected: Connected) -> Cluster:
    if connected.cluster is None:
        raise Tune16Error("Logs come from the cluster, not from the pipeline server: log in with `oc login`.")
    return connected.cluster


def _show(content: Any, as_json: bool, text: Any) -> None:
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        console.print(text, soft_wrap=isinstance(text, str))
    sys.stdout.flush()


def _when(schedule: Json) -> str:
    trigger = schedule.get("trigger") or {}
    cron = (trigger.get("cron_schedule") or {}).get("cron")
    return f"cron {cron}" if cron else f"every {(trigger.get('periodic_schedule') or {}).get('interval_second')} s"


def _time(text: str | None) -> str:
    return (text or "")[:16].replace("T", " ")
