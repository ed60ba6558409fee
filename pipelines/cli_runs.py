"""`tune16 runs`: the runs in a list, and each with its steps, scores and verdict, its logs and its report."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from components.config import CONFIG_OF_STEP, PROMOTED
from components.kubernetes.pods import duration
from components.runtime.errors import Tune16Error
from pipelines.cli_where import Connected, Where, WithDefault, console, notes, show_result, somewhere
from pipelines.following import Row, Watch
from pipelines.options import AsJson
from pipelines.outcome import Bucket, Ending, find_ending
from pipelines.runs import SUCCEEDED, has_ended, local_time, steps_of, took
from pipelines.server import Json

POLL_SECONDS = 5.0
_REMIND_SECONDS = 600  # after which a step that still waits is printed again
_DONE = ("succeeded", "from the cache")
_PERCENT = 10  # of training between two printed lines

RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id or name.")]

runs = typer.Typer(cls=WithDefault, help="List, show, stop and retry runs, and read their logs and reports.")


@runs.command(name="list")
@somewhere
def list_runs(
    where: Where,
    limit: Annotated[int, typer.Option(help="Maximum number of runs.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """List the newest runs."""
    connected = where.connect()
    found = connected.server.list_runs(limit)
    verdict_of = VerdictOf(connected)
    verdicts = [verdict_of(run) for run in found]
    if as_json:
        show_result([run | {"verdict": verdict} for run, verdict in zip(found, verdicts, strict=True)], True, None)
        return
    table = Table("run", "state", "verdict", "started", "took", "id")
    for run, verdict in zip(found, verdicts, strict=True):
        state = state_in_words(connected, run)
        seconds = took(run)
        times = (local_time(run.get("created_at")), duration(seconds) if seconds is not None else "")
        table.add_row(run["display_name"], state, verdict, *times, run["run_id"])
    show_result(found, False, table)


@runs.command()
@somewhere
def show(
    where: Where,
    run: RunId,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run, its steps, its scores and its verdict."""
    connected = where.connect()
    content = find_run(connected, run)
    if wait:
        follow(connected, content["run_id"], as_json)
        return
    watch = Watch(connected.server, connected.cluster, content["run_id"])
    if as_json:
        show_result(_as_json(connected, watch, content), True, None)
        return
    console.print(_state_table(watch, content))
    if has_ended(content):
        _print_ending(connected, watch, content)
    console.print(connected.url(content), soft_wrap=True)


@runs.command()
@somewhere
def stop(where: Where, run: RunId) -> None:
    """Stop a run."""
    connected = where.connect()
    content = find_run(connected, run)
    if has_ended(content):
        raise Tune16Error(f"{content['display_name']} has ended already: {state_in_words(connected, content)}.")
    connected.server.stop_run(content["run_id"])
    console.print(f"{content['display_name']} is being stopped")


@runs.command()
@somewhere
def retry(where: Where, run: RunId) -> None:
    """Continue a run that failed or was stopped: only what is missing is run."""
    connected = where.connect()
    content = find_run(connected, run)
    if not has_ended(content) or content.get("state") == SUCCEEDED:
        raise Tune16Error(f"{content['display_name']} has not failed: {state_in_words(connected, content)}.")
    connected.server.retry_run(content["run_id"])
    console.print(f"{content['display_name']} continues")


@runs.command()
@somewhere
def logs(
    where: Where,
    run: RunId,
    step: Annotated[str, typer.Option(help="Only this step; the default is all that have started.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Include the output of KFP's launcher.")] = False,
) -> None:
    """Print the output of the steps."""
    connected = where.connect()
    content = find_run(connected, run)
    watch = Watch(connected.server, connected.cluster, content["run_id"])
    begun = [found.name for found in steps_of(content) if found.state not in ("not started", "from the cache")]
    begun = [name for name in CONFIG_OF_STEP if name in {*begun, *watch.steps_with_pods()}]
    if step and step not in begun:
        raise Tune16Error(f"The step '{step}' has not run in this run. These have: {', '.join(begun) or 'none yet'}.")
    for name, log in watch.logs(content, [step] if step else begun):
        for line in log.lines if everything else log.own(name):
            console.print(f"[bold cyan]{name:>9}[/] {escape(line)}", soft_wrap=True)
        if log.remark:
            console.print(f"[bold cyan]{name:>9}[/] ({escape(log.remark)})", soft_wrap=True)


@runs.command()
@somewhere
def report(
    where: Where,
    run: RunId,
    output: Annotated[Path | None, typer.Option(help="File to write; the default is <run>.html.")] = None,
) -> None:
    """Fetch a run's report: base and tuned model side by side."""
    connected = where.connect()
    content = find_run(connected, run)
    page = Bucket(connected.server, connected.cluster).report(content)
    target = output or Path(f"{content['display_name']}.html")
    target.write_bytes(page)
    console.print(str(target), soft_wrap=True)


def state_in_words(connected: Connected, run: Json) -> str:
    """A run's state as one word, from its workflow where the server does not know it."""
    return Watch(connected.server, connected.cluster, run["run_id"]).state(run)


def find_run(connected: Connected, name: str) -> Json:
    """A run by its id or its name.

    Raises:
        Tune16Error: there is none.
    """
    found = connected.server.find_run(name)
    return connected.server.read_run(found["run_id"] if found else name)


def follow(connected: Connected, run_id: str, as_json: bool) -> None:
    """Show the steps until the run has ended, then how it did; exit code 1 if it failed or was stopped.

    Ctrl-C ends the display, not the run.
    """
    run: Json = {}
    watch = Watch(connected.server, connected.cluster, run_id)
    with _state_display(watch, as_json) as display:
        for run in watch.follow(POLL_SECONDS):
            display(run)
    if as_json:
        print(json.dumps(_as_json(connected, watch, run), indent=2))
    else:
        _print_ending(connected, watch, run)
    if run["state"] == SUCCEEDED:
        return
    if as_json:
        _print_failures(watch, run)
    raise typer.Exit(1)


def _print_ending(connected: Connected, watch: Watch, run: Json) -> None:
    """How a run ended: its scores and verdict, or what failed."""
    if run["state"] != SUCCEEDED:
        _print_failures(watch, run)
        return
    ending = _ending(connected, watch, run)
    if ending.scores:
        table = Table("on held-out rows", "base", "tuned")
        for name, (base, tuned) in ending.scores.items():
            table.add_row(name.replace("_", " "), f"{base:g}", f"{tuned:g}")
        console.print(table)
    for line in ending.lines(run["display_name"]):
        console.print(escape(line), soft_wrap=True)


def _print_failures(watch: Watch, run: Json) -> None:
    """The last lines of the failed steps, the error last; for a stopped run, only that it was stopped."""
    message = (run.get("error") or {}).get("message", "")
    state = watch.state(run)
    notes.print(f"[red]{state}[/] {escape(message)}".rstrip(), soft_wrap=True)
    if state == "stopped":
        notes.print(f"`tune16 runs retry {run['display_name']}` continues with what is missing.", soft_wrap=True)
        return
    for step, line in watch.failures(run):
        notes.print(f"[bold cyan]{step:>9}[/] {escape(line)}", soft_wrap=True)


def _ending(connected: Connected, watch: Watch, run: Json) -> Ending:
    bucket = Bucket(connected.server, connected.cluster)
    return find_ending(bucket, run, lambda step: watch.log(run, step))


def _as_json(connected: Connected, watch: Watch, run: Json) -> Json:
    """The API's own answer, with what the tables show."""
    found = run | {"url": connected.url(run), "steps": [_as_dict(row) for row in watch.rows(run)]}
    found["outcome"] = {"state": watch.state(run)}
    if run.get("state") == SUCCEEDED:
        found["outcome"] |= _ending(connected, watch, run).as_dict()
    return found


def _as_dict(row: Row) -> Json:
    return {name: value for name, value in asdict(row).items() if name != "progress"}


class VerdictOf:
    """The verdict of a run as one word, for a list: from the bucket, else from the steps that have run."""

    def __init__(self, connected: Connected) -> None:
        self._server = connected.server
        self._bucket = Bucket(connected.server, connected.cluster)

    def __call__(self, run: Json) -> str:
        """The verdict; empty if the run has none, or it cannot be determined from here."""
        if run.get("state") != SUCCEEDED:
            return ""
        with suppress(Tune16Error):
            outcome = self._bucket.outcome(run)
            if outcome and outcome.evaluation:
                return str(outcome.evaluation["verdict"])
        done = {step.name for step in steps_of(self._server.read_run(run["run_id"])) if step.state in _DONE}
        return PROMOTED if "upload" in done else "not promoted" if "evaluate" in done else ""


@contextmanager
def _state_display(watch: Watch, as_json: bool) -> Iterator[Callable[[Json], None]]:
    """A live table on a terminal; elsewhere a line for each change."""
    out = notes if as_json else console
    if out.is_terminal:
        with Live(console=out) as live:
            yield lambda run: live.update(_state_table(watch, run))
        return
    shown: dict[str, object] = {}
    said = 0.0

    def show_changes(run: Json) -> None:
        nonlocal said
        if time.monotonic() - said > _REMIND_SECONDS:
            shown.update({step: None for step, key in shown.items() if isinstance(key, tuple) and "waiting" in key})
            said = time.monotonic()
        lines = [(row.step, _change(row), _text(row)) for row in watch.rows(run)]
        state = watch.state(run)
        for step, key, text in [*lines, ("run", state, state)]:
            if shown.get(step) != key:
                shown[step] = key
                out.print(f"{step:>9} {escape(text)}", soft_wrap=True)
                out.file.flush()

    yield show_changes


def _change(row: Row) -> object:
    """What must change for a row to be printed again: not the minutes of a wait, nor a single step of training."""
    if row.progress:
        return row.state, int(100 * row.progress.step / max(row.progress.num_steps, 1)) // _PERCENT
    return row.state, row.note.partition(" (")[0]


def _text(row: Row) -> str:
    ended = row.state in ("succeeded", "failed") and row.seconds is not None
    text = f"{row.state} after {duration(row.seconds or 0)}" if ended else row.state
    return f"{text}: {row.note}" if row.note else text


def _state_table(watch: Watch, run: Json) -> Table:
    table = Table("step", "state", "time", "", title=f"{run['display_name']}: {watch.state(run)}")
    for row in watch.rows(run):
        table.add_row(row.step, row.state, "" if row.seconds is None else duration(row.seconds), escape(row.note))
    return table
