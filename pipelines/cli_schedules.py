"""`tune16 schedule`: create, list, pause, resume and delete recurring runs of recipes."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from components.runtime.errors import Tune16Error
from pipelines.cli_cluster import Unchecked, Uploaded, prepare
from pipelines.cli_runs import VerdictOf, state_in_words
from pipelines.cli_where import Connected, Where, WithDefault, console, show_result, somewhere
from pipelines.options import AsJson, RecipeName, Settings
from pipelines.runs import local_time
from pipelines.schedules import describe, find_schedule, last_run, next_run, read_cron, read_interval, schedule
from pipelines.server import Json, PipelineServer

_LOOK_THROUGH = (100, 2000)  # runs: many others may be newer than a weekly schedule's last one

ScheduleName = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name.")]

schedules = typer.Typer(cls=WithDefault, help="Recurring runs: schedule RECIPE --cron … or --every …")


@schedules.command(name="set")
@somewhere
def set_schedule(
    where: Where,
    recipe: RecipeName,
    cron: Annotated[str, typer.Option(help="When to run: a cron expression in UTC, such as '0 3 * * 1'.")] = "",
    every: Annotated[str, typer.Option(help="How often to run, such as 12h or 7d.")] = "",
    name: Annotated[str, typer.Option(help="The schedule's name; the default is the recipe's.")] = "",
    set_: Settings = [],  # noqa: B006
    uploaded: Uploaded = False,
    unchecked: Unchecked = False,
    as_json: AsJson = False,
) -> None:
    """Create or update the schedule of a recipe; one run at a time, and missed runs are not made up for."""
    if bool(cron) == bool(every):
        raise Tune16Error("Give either --cron '0 3 * * 1' or --every 7d.")
    trigger = read_cron(cron) if cron else read_interval(every)
    settings, connected = prepare(where, recipe, set_, unchecked)
    name = name or Path(recipe).stem
    made, change = schedule(connected.server, connected.cluster, settings, name, trigger, uploaded)
    show_result(made | {"change": change}, as_json, f"schedule {name}: {change}, {describe(made)}")


@schedules.command(name="list")
@somewhere
def list_schedules(where: Where, as_json: AsJson = False) -> None:
    """List the schedules, with the last run and the next one of each."""
    connected = where.connect()
    found, now = connected.server.list_schedules(), datetime.now(UTC)
    runs, verdict_of = _runs_of(connected, found), VerdictOf(connected)
    table = Table("schedule", "state", "when", "next run", "last run", "outcome", "id")
    for entry in found:
        last, due = last_run(entry, runs), next_run(entry, runs, now)
        entry["next_run_at"] = due.isoformat() if due else ""
        outcome = (verdict_of(last) or state_in_words(connected, last)) if last else ""
        entry["last_run"] = {"name": last["display_name"], "outcome": outcome} if last else None
        times = (local_time(entry["next_run_at"]), local_time(last["created_at"]) if last else "")
        table.add_row(
            entry["display_name"],
            "paused" if entry.get("status") == "DISABLED" else "on",
            describe(entry),
            *times,
            outcome,
            entry["recurring_run_id"],
        )
    show_result(found, as_json, table)


def _runs_of(connected: Connected, schedules: list[Json]) -> list[Json]:
    """The newest runs: enough to include the last one of each schedule, or up to the limit."""
    runs: list[Json] = []
    for limit in _LOOK_THROUGH:
        runs = connected.server.list_runs(limit)
        if len(runs) < limit or all(last_run(entry, runs) for entry in schedules):
            break
    return runs


@schedules.command()
@somewhere
def pause(where: Where, name: ScheduleName) -> None:
    """Pause a schedule."""
    _with_schedule(name, where.connect(), lambda server, id_: server.set_schedule_enabled(id_, False))
    console.print(f"schedule {name}: paused")


@schedules.command()
@somewhere
def resume(where: Where, name: ScheduleName) -> None:
    """Resume a paused schedule."""
    _with_schedule(name, where.connect(), lambda server, id_: server.set_schedule_enabled(id_, True))
    console.print(f"schedule {name}: resumed")


@schedules.command()
@somewhere
def delete(where: Where, name: ScheduleName) -> None:
    """Delete a schedule; its runs are kept."""
    _with_schedule(name, where.connect(), lambda server, id_: server.delete_schedule(id_))
    console.print(f"schedule {name}: deleted; its runs are kept")


def _with_schedule(name: str, connected: Connected, action: Callable[[PipelineServer, str], None]) -> None:
    action(connected.server, find_schedule(connected.server, name)["recurring_run_id"])
