"""Schedules: recurring runs on the pipeline server, and when they run.

The server's own cron has six fields, seconds first, in UTC.
"""

import calendar
import itertools
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from components.config import Recipe
from components.runtime.errors import Tune16Error
from pipelines.cluster import Cluster
from pipelines.server import Json, PipelineServer
from pipelines.submission import ensure_experiment, ensure_version, parameters

CronLimits = tuple[str, int, int, tuple[str, ...]]  # a field's name, lowest and highest number, and words
_CRON_FIELDS: tuple[CronLimits, ...] = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")),
    ("day of week", 0, 6, ("sun", "mon", "tue", "wed", "thu", "fri", "sat")),
)
_MEANING_OF_WORDS = {
    "@hourly": "0 0 * * * *",
    "@daily": "0 0 0 * * *",
    "@midnight": "0 0 0 * * *",
    "@weekly": "0 0 0 * * 0",
    "@monthly": "0 0 0 1 * *",
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
}
_ANY = ("*", "?")
_MOST_DAYS = 8 * 366  # they include a 29th of February
_LEAP_YEAR = 2024  # any: February has its 29th
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class Trigger:
    """When a schedule starts a run: a six-field cron expression, or an interval in seconds; the other one is empty."""

    cron: str = ""
    seconds: int = 0

    def content(self) -> Json:
        """The trigger as the API takes it."""
        if self.cron:
            return {"cron_schedule": {"cron": self.cron}}
        return {"periodic_schedule": {"interval_second": str(self.seconds)}}


def schedule(
    server: PipelineServer,
    cluster: Cluster | None,
    recipe: Recipe,
    name: str,
    trigger: Trigger,
    uploaded: bool = False,
) -> tuple[Json, str]:
    """Create or update the schedule `name`.

    It starts one run at a time, does not make up for missed runs, and always uses the pipeline's newest version.
    A paused schedule stays paused.

    Returns:
        The recurring run as the API describes it, and ``created``, ``updated`` or ``unchanged``.

    Raises:
        Tune16Error: it could not be created; an existing schedule is kept.
    """
    with ExitStack() as undo:
        version = ensure_version(server, cluster, undo, uploaded)
        experiment = ensure_experiment(server, undo)
        old = [entry for entry in server.list_schedules() if entry["display_name"] == name]
        wanted = {
            "display_name": name,
            "experiment_id": experiment["experiment_id"],
            "pipeline_version_reference": {"pipeline_id": version["pipeline_id"]},
            "runtime_config": {"parameters": parameters(recipe, version)},
            "trigger": trigger.content(),
            "max_concurrency": "1",
            "no_catchup": True,
            "mode": "DISABLE" if old and old[0].get("status") == "DISABLED" else "ENABLE",
        }
        same = [entry for entry in old if _is_same(entry, wanted)]
        made = same[0] if same else server.create_schedule(wanted, lambda: _find_same(server, wanted))
        undo.pop_all()
    for entry in old:
        if entry["recurring_run_id"] != made["recurring_run_id"]:
            server.delete_schedule(entry["recurring_run_id"])
    return made, "unchanged" if same else ("updated" if old else "created")


def find_schedule(server: PipelineServer, name: str) -> Json:
    """The schedule of that name.

    Raises:
        Tune16Error: there is none.
    """
    schedules = server.list_schedules()
    found = next((entry for entry in schedules if entry["display_name"] == name), None)
    if found is None:
        names = ", ".join(sorted(entry["display_name"] for entry in schedules)) or "none"
        raise Tune16Error(f"There is no schedule '{name}'. Schedules: {names}.")
    return found


def read_cron(text: str) -> Trigger:
    """Read a cron expression: the usual five fields, or six with seconds first, or a word such as @weekly.

    Raises:
        Tune16Error: a field is wrong; the message says which.
    """
    if text in _MEANING_OF_WORDS:
        return Trigger(cron=text)
    fields = text.split()
    if text.startswith("@") or len(fields) not in (5, 6):
        raise Tune16Error(
            f"--cron '{text}': write minute, hour, day of month, month and day of week, for example '0 3 * * 1' for "
            f"Mondays at 3:00, or one of {', '.join(sorted(_MEANING_OF_WORDS))}."
        )
    fields = ["0", *fields] if len(fields) == 5 else fields
    for field, (label, low, high, names) in zip(fields, _CRON_FIELDS, strict=True):
        if not _is_cron_field(field, (label, low, high, names)):
            also = f", or {names[0]} to {names[-1]}" if names else ""
            raise Tune16Error(
                f"--cron '{text}': the {label} '{field}' is wrong. It takes {low} to {high}{also}, * for any, lists "
                "with commas, ranges with a hyphen and steps with a slash."
            )
    if not _comes(*fields[3:]):
        raise Tune16Error(f"--cron '{text}': never fires: none of these months has a day {fields[3]}.")
    return Trigger(cron=" ".join(fields))


def read_interval(text: str) -> Trigger:
    """Read an interval such as 90m, 12h, 7d or 2w.

    Raises:
        Tune16Error: it is malformed, or shorter than ten minutes.
    """
    match = re.fullmatch(r"(\d+)([mhdw])", text.strip())
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if seconds < 600:
        raise Tune16Error(f"--every '{text}': write a number and m, h, d or w, such as 12h or 7d; at least 10m.")
    return Trigger(seconds=seconds)


def describe(entry: Json) -> str:
    """When a schedule runs, such as ``every 7 days`` or ``cron 0 0 3 * * 1 (UTC)``."""
    cron, seconds = _times(entry)
    if cron:
        return f"cron {cron} (UTC)"
    for unit, name in ((604800, "week"), (86400, "day"), (3600, "h"), (60, "min")):
        if seconds % unit == 0:
            number = seconds // unit
            return f"every {number} {name}{'s' if number > 1 and unit > 3600 else ''}"
    return f"every {seconds} s"


def next_run(entry: Json, runs: Iterable[Json], now: datetime) -> datetime | None:
    """When a schedule starts its next run; None while it is paused, or if that is unknown.

    Args:
        entry: the schedule.
        runs: runs of the server, newest first.
        now: the present moment, with its zone.
    """
    cron, seconds = _times(entry)
    if entry.get("status") == "DISABLED" or not (cron or seconds):
        return None
    if cron:
        return next_time(cron, now)
    last = last_run(entry, runs)
    begin = datetime.fromisoformat(last["created_at"] if last else entry["created_at"])
    due = begin + timedelta(seconds=seconds)
    return due if due > now else now  # it waits for the run before it


def last_run(entry: Json, runs: Iterable[Json]) -> Json | None:
    """The newest run that a schedule has started."""
    return next((run for run in runs if run.get("recurring_run_id") == entry["recurring_run_id"]), None)


def next_time(cron: str, after: datetime) -> datetime | None:
    """The next moment that a cron expression names, in UTC.

    None if there is none within eight years, and for what other tools may write: ``@every``, or another time zone.
    """
    fields = _MEANING_OF_WORDS.get(cron, cron).split()
    fields = ["0", *fields] if len(fields) == 5 else fields
    if len(fields) != len(_CRON_FIELDS) or not all(map(_is_cron_field, fields, _CRON_FIELDS)):
        return None
    values = [
        _cron_values(field, low, high, names) for field, (_, low, high, names) in zip(fields, _CRON_FIELDS, strict=True)
    ]
    seconds, minutes, hours, days, months, weekdays = map(sorted, map(set, values))
    either = fields[3] not in _ANY and fields[5] not in _ANY  # if both are given, either may match
    after = after.astimezone(UTC)
    for number in range(_MOST_DAYS):
        day = after.date() + timedelta(days=number)
        in_month, in_week = day.day in days, (day.weekday() + 1) % 7 in weekdays
        if day.month not in months or not (in_month or in_week if either else in_month and in_week):
            continue
        for hour, minute, second in itertools.product(hours, minutes, seconds):
            moment = datetime(day.year, day.month, day.day, hour, minute, second, tzinfo=UTC)
            if moment > after:
                return moment
    return None


def _times(entry: Json) -> tuple[str, int]:
    trigger = entry.get("trigger") or {}
    cron = (trigger.get("cron_schedule") or {}).get("cron") or ""
    return cron, int((trigger.get("periodic_schedule") or {}).get("interval_second") or 0)


def _is_same(entry: Json, wanted: Json) -> bool:
    """Whether a schedule on the server does what is wanted; fields that only the server fills in do not matter."""
    trigger = entry.get("trigger") or {}
    kind, times = next(iter(wanted["trigger"].items()))
    reference = entry.get("pipeline_version_reference") or {}
    return (
        entry["display_name"] == wanted["display_name"]
        and reference.get("pipeline_id") == wanted["pipeline_version_reference"]["pipeline_id"]
        and not reference.get("pipeline_version_id")
        and (entry.get("runtime_config") or {}).get("parameters") == wanted["runtime_config"]["parameters"]
        and all((trigger.get(kind) or {}).get(name) == value for name, value in times.items())
        and entry.get("max_concurrency") == wanted["max_concurrency"]
        and entry.get("no_catchup") == wanted["no_catchup"]
    )


def _find_same(server: PipelineServer, wanted: Json) -> Json | None:
    return next((entry for entry in server.list_schedules() if _is_same(entry, wanted)), None)


def _comes(day: str, month: str, weekday: str) -> bool:
    """Whether any of the days exists in any of the months; with a day of the week given, either may match."""
    if weekday not in _ANY:
        return True
    days, months = (
        _cron_values(field, low, high, names)
        for field, (_, low, high, names) in zip((day, month), _CRON_FIELDS[3:5], strict=True)
    )
    return min(days) <= max(calendar.monthrange(_LEAP_YEAR, number)[1] for number in months)


def _cron_values(field: str, low: int, high: int, names: tuple[str, ...]) -> list[int]:
    """The numbers that a valid field stands for."""
    values: list[int] = []
    for part in field.lower().split(","):
        span, _, step = part.partition("/")
        ends = [low, high] if span in _ANY else [_cron_number(end, low, names) or 0 for end in span.split("-")]
        last = ends[1] if len(ends) > 1 else high if step else ends[0]
        values += range(ends[0], last + 1, int(step or 1))
    return values


def _is_cron_field(field: str, limits: CronLimits) -> bool:
    _, low, high, names = limits
    return all(_is_cron_part(part, low, high, names) for part in field.lower().split(","))


def _is_cron_part(part: str, low: int, high: int, names: tuple[str, ...]) -> bool:
    """Whether one part of a cron field, such as ``1-5/2``, lies within its limits."""
    span, slash, step = part.partition("/")
    if slash and not (step.isdigit() and 0 < int(step) <= high):
        return False
    if span in _ANY:
        return True
    numbers = [_cron_number(end, low, names) for end in span.split("-")]
    return len(numbers) <= 2 and all(n is not None and low <= n <= high for n in numbers) and numbers == sorted(numbers)  # type: ignore[type-var]


def _cron_number(text: str, low: int, names: tuple[str, ...]) -> int | None:
    if text in names:
        return names.index(text) + low
    return int(text) if text.isdigit() else None
