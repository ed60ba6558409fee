"""Runs on a cluster: submissions that leave nothing behind when they fail, schedules, and following a run."""

import calendar
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from components.config import CONFIG_OF_STEP, ClusterConfig, Recipe, form_values
from components.errors import Tune16Error
from pipelines.server import Json, PipelineServer, UnavailableError

PIPELINE = "tune16"
EXPERIMENT = "tune16"
SUCCEEDED, FAILED = "SUCCEEDED", "FAILED"
PATIENCE_SECONDS = 600.0
FINAL_STATES = {SUCCEEDED, FAILED, "SKIPPED", "CANCELED"}

_CRON_FIELDS = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")),
    ("day of week", 0, 6, ("sun", "mon", "tue", "wed", "thu", "fri", "sat")),
)
_CRON_WORDS = {"@hourly", "@daily", "@weekly", "@monthly", "@yearly"}
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


def submit(server: PipelineServer, recipe: Recipe, name: str, uploaded: bool = False) -> Json:
    """Start a run of `recipe`.

    Args:
        server: where.
        recipe: every setting.
        name: the run's name, to which the time is added.
        uploaded: take the newest version that the server has instead of this installation's own.

    Returns:
        The run as the API describes it.

    Raises:
        Tune16Error: it could not be started; whatever had been made on the way is removed again.
    """
    with ExitStack() as undo:
        version = _ensure_version(server, undo, uploaded)
        experiment = _ensure_experiment(server, undo)
        run = server.create_run(
            {
                "display_name": f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}",
                "experiment_id": experiment["experiment_id"],
                "pipeline_version_reference": {
                    "pipeline_id": version["pipeline_id"],
                    "pipeline_version_id": version["pipeline_version_id"],
                },
                "runtime_config": {"parameters": _parameters(recipe, version)},
            }
        )
        undo.pop_all()
    return run


def schedule(
    server: PipelineServer, recipe: Recipe, name: str, trigger: Trigger, uploaded: bool = False
) -> tuple[Json, str]:
    """Create the schedule `name`, or bring it up to date.

    It starts one run at a time, makes up for none that was missed, and always takes the newest version of the pipeline.
    A schedule that is paused stays paused.

    Returns:
        The recurring run as the API describes it, and ``created``, ``updated`` or ``unchanged``.

    Raises:
        Tune16Error: it could not be made; a schedule that was there goes on.
    """
    with ExitStack() as undo:
        version = _ensure_version(server, undo, uploaded)
        experiment = _ensure_experiment(server, undo)
        old = [entry for entry in server.list_schedules() if entry["display_name"] == name]
        wanted = {
            "display_name": name,
            "experiment_id": experiment["experiment_id"],
            "pipeline_version_reference": {"pipeline_id": version["pipeline_id"]},
            "runtime_config": {"parameters": _parameters(recipe, version)},
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
        raise Tune16Error(f"There is no schedule '{name}'. There are: {names}.")
    return found


def read_cron(text: str) -> Trigger:
    """Read a cron expression: five fields as everywhere, or six with seconds first, or a word such as @weekly.

    Raises:
        Tune16Error: a field is wrong; the message says which.
    """
    if text in _CRON_WORDS:
        return Trigger(cron=text)
    fields = text.split()
    if text.startswith("@") or len(fields) not in (5, 6):
        raise Tune16Error(
            f"--cron '{text}': write minute, hour, day of month, month and day of week, for example '0 3 * * 1' for "
            f"Mondays at 3:00, or one of {', '.join(sorted(_CRON_WORDS))}."
        )
    fields = ["0", *fields] if len(fields) == 5 else fields
    for field, (label, low, high, names) in zip(fields, _CRON_FIELDS, strict=True):
        if not all(_is_cron_part(part, low, high, names) for part in field.lower().split(",")):
            also = f", or {names[0]} to {names[-1]}" if names else ""
            raise Tune16Error(
                f"--cron '{text}': the {label} '{field}' is wrong. It takes {low} to {high}{also}, * for any, lists "
                "with commas, ranges with a hyphen and steps with a slash."
            )
    if not _comes(*fields[3:]):
        raise Tune16Error(f"--cron '{text}': never fires: no such month has a day {fields[3]}.")
    return Trigger(cron=" ".join(fields))


def read_interval(text: str) -> Trigger:
    """Read an interval such as 90m, 12h, 7d or 2w.

    Raises:
        Tune16Error: it has another form, or is shorter than ten minutes.
    """
    match = re.fullmatch(r"(\d+)([mhdw])", text.strip())
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if seconds < 600:
        raise Tune16Error(f"--every '{text}': write a number and m, h, d or w, such as 12h or 7d; 10m at the least.")
    return Trigger(seconds=seconds)


def follow(server: PipelineServer, run_id: str, pause: float) -> Iterator[Json]:
    """Yield the run each time that it is looked at, every `pause` seconds, until it has ended.

    A server that is away for some minutes does not end the run, so it does not end this either.
    """
    last_seen = time.monotonic()
    while True:
        try:
            run = server.read_run(run_id)
        except UnavailableError:
            if time.monotonic() - last_seen > PATIENCE_SECONDS:
                raise
            time.sleep(pause)
            continue
        last_seen = time.monotonic()
        yield run
        if run.get("state") in FINAL_STATES:
            return
        time.sleep(pause)


def step_states(run: Json) -> dict[str, str]:
    """The state of each step that has begun, in the order of the pipeline."""
    tasks = {task.get("display_name", ""): task.get("state", "PENDING") for task in _tasks(run)}
    return {step: tasks[step] for step in CONFIG_OF_STEP if step in tasks}


def step_of_node(node: str) -> str:
    """The step that a node of the workflow belongs to, such as ``x.root.train.executor``; empty for drivers."""
    return next((part for part in reversed(node.split(".")) if part in CONFIG_OF_STEP), "")


def run_url(server: PipelineServer, dashboard: str, namespace: str, run: Json) -> str:
    """The run's page: in the OpenShift AI dashboard, or in the server's own interface where there is none."""
    if dashboard:
        return f"{dashboard}/experiments/{namespace}/{run['experiment_id']}/runs/{run['run_id']}"
    return f"{server.url}/#/runs/details/{run['run_id']}"


def _tasks(run: Json) -> list[Json]:
    return (run.get("run_details") or {}).get("task_details") or []


def newest_version(server: PipelineServer) -> Json | None:
    """The newest version of the pipeline on the server, with its spec; None where there is none."""
    pipeline = server.find_pipeline(PIPELINE)
    versions = server.list_versions(pipeline["pipeline_id"]) if pipeline else []
    return _read_version(server, versions[0]) if versions else None


def pipeline_spec(version: Json) -> Json:
    """A version's spec, which the server wraps where the pipeline has a part for Kubernetes."""
    spec: Json = version["pipeline_spec"]
    return dict(spec.get("pipeline_spec", spec))


def _ensure_version(server: PipelineServer, undo: ExitStack, uploaded: bool) -> Json:
    """The version to run, with its spec; uploaded where the server does not have this content yet."""
    if uploaded:
        newest = newest_version(server)
        if newest is None:
            raise Tune16Error(f"{server.url}: has no pipeline '{PIPELINE}' yet. Apply an overlay of manifests/ first.")
        return newest
    pipeline = server.find_pipeline(PIPELINE)
    with tempfile.TemporaryDirectory() as folder:
        from pipelines.compile import compile_ir, version_name

        file, name = Path(folder) / f"{PIPELINE}.yaml", version_name()
        compile_ir(file)
        if pipeline is None:
            pipeline = server.create_pipeline(PIPELINE, "Tune16")
            undo.callback(_remove, server.delete_pipeline, pipeline["pipeline_id"])
        found = server.find_version(pipeline["pipeline_id"], name)
        if found is None:
            found = server.upload_version(file, name, pipeline["pipeline_id"])
            undo.callback(_remove, server.delete_version, pipeline["pipeline_id"], found["pipeline_version_id"])
    return _read_version(server, found)


def _read_version(server: PipelineServer, version: Json) -> Json:
    return server.read_version(version["pipeline_id"], version["pipeline_version_id"])


def _ensure_experiment(server: PipelineServer, undo: ExitStack) -> Json:
    experiment = server.find_experiment(EXPERIMENT)
    if experiment is None:
        experiment = server.create_experiment(EXPERIMENT)
        undo.callback(_remove, server.delete_experiment, experiment["experiment_id"])
    return experiment


def _remove(delete: Callable[..., None], *ids: str) -> None:
    """Remove what a failed submission made; if that fails too, say so and let the first error through."""
    try:
        delete(*ids)
    except Tune16Error as error:
        print(f"left behind on the server: {' '.join(ids)} ({error})", file=sys.stderr)


def _parameters(recipe: Recipe, version: Json) -> Json:
    """The form filled in from the recipe; what it leaves to the cluster stays as the version's own form has it."""
    names = pipeline_spec(version)["root"]["inputDefinitions"]["parameters"]
    default = ClusterConfig().model_dump()
    return {
        name: value
        for name, value in form_values(recipe, names).items()
        if not (name.startswith("cluster_") and value == default[name.removeprefix("cluster_")])
    }


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
    """Whether any of the days is one of the months': with a day of the week beside it, either is enough."""
    if weekday not in ("*", "?"):
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
        ends = [low, high] if span in ("*", "?") else [_cron_number(end, low, names) or 0 for end in span.split("-")]
        last = ends[1] if len(ends) > 1 else high if step else ends[0]
        values += range(ends[0], last + 1, int(step or 1))
    return values


def _is_cron_part(part: str, low: int, high: int, names: tuple[str, ...]) -> bool:
    """Whether one part of a cron field, such as ``1-5/2``, lies within its limits."""
    span, slash, step = part.partition("/")
    if slash and not (step.isdigit() and 0 < int(step) <= high):
        return False
    if span in ("*", "?"):
        return True
    numbers = [_cron_number(end, low, names) for end in span.split("-")]
    return len(numbers) <= 2 and all(n is not None and low <= n <= high for n in numbers) and numbers == sorted(numbers)  # type: ignore[type-var]


def _cron_number(text: str, low: int, names: tuple[str, ...]) -> int | None:
    if text in names:
        return names.index(text) + low
    return int(text) if text.isdigit() else None
