"""A run as the pipeline server describes it, made readable: its state, its steps, its times.

As recorded from servers 2.16 and 2.17: an executor taken from the cache is SKIPPED while its step is SUCCEEDED at once,
a stopped run ends as FAILED, steps that never started have no state, what has not ended has an end time in 1970 or in
the year 1, and 2.17 lists every step twice, as ``train`` and ``train(0)``.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from components.config import CONFIG_OF_STEP
from pipelines.pods import step_of_node

Json = dict[str, Any]

PENDING, RUNNING, SUCCEEDED, FAILED = "PENDING", "RUNNING", "SUCCEEDED", "FAILED"
FINAL = {SUCCEEDED, FAILED, "SKIPPED", "CANCELED"}
_STOPPING = {"CANCELING", "CANCELED"}
_BEFORE_ANY_RUN = datetime(2000, 1, 1, tzinfo=UTC)
_WORDS = {"CANCELED": "stopped", "CANCELING": "stopping", PENDING: "waiting", "": "not started"}


@dataclass(frozen=True)
class Step:
    """A step of a run: its state as one word, and the seconds that it has taken so far."""

    name: str
    state: str
    seconds: float | None = None


def has_ended(run: Json) -> bool:
    """Whether a run has ended, successfully or not."""
    return run.get("state") in FINAL


def is_settled(run: Json) -> bool:
    """Whether the steps' states have caught up with the end of the run: they may lag behind for a moment."""
    return all(task.get("state") not in (PENDING, RUNNING) for task in _step_tasks(run).values())


def state_of(run: Json, was_stopped: bool = False) -> str:
    """A run's state as one word; `was_stopped` is what the server may not know about a FAILED run."""
    state = run.get("state") or PENDING
    if state == FAILED and (was_stopped or _was_stopped_last(run)):
        return "stopped"
    return _WORDS.get(state, str(state).lower())


def _was_stopped_last(run: Json) -> bool:
    """Whether the server was asked to stop the run, and not to continue it since."""
    states = [entry.get("state") for entry in run.get("state_history", [])]
    last_start = max((number for number, state in enumerate(states) if state == RUNNING), default=-1)
    return any(state in _STOPPING for state in states[last_start + 1 :])


def steps_of(run: Json) -> list[Step]:
    """The steps that have started, in pipeline order; for a run that has ended, also those that never started."""
    tasks = _step_tasks(run)
    steps = []
    for name in CONFIG_OF_STEP:
        if name not in tasks:
            continue
        task = tasks[name]
        state = str(task.get("state") or "")
        seconds = _span(task) if state else None
        word = "from the cache" if state == SUCCEEDED and _came_from_cache(task) else _WORDS.get(state, state.lower())
        steps.append(Step(name, word, None if word == "from the cache" else seconds))
    return steps


def failed_steps(run: Json) -> list[str]:
    """The steps that failed, or whose driver did, in the order of the pipeline."""
    found = {step for task in _tasks(run) if task.get("state") == FAILED and (step := _step_of(task)[0])}
    return [name for name in CONFIG_OF_STEP if name in found]


def took(run: Json) -> float | None:
    """Seconds from a run's start to its end, or until now; None where it has no start."""
    return _span({"start_time": run.get("created_at"), "end_time": run.get("finished_at")})


def local_time(text: str | None) -> str:
    """A time of the API in the local time zone; empty if it has not come yet."""
    moment = _moment(text)
    return f"{moment.astimezone():%Y-%m-%d %H:%M}" if moment else ""


def _step_tasks(run: Json) -> dict[str, Json]:
    """The task of each step: the one without an attempt's number where there are several."""
    found: dict[str, Json] = {}
    for task in _tasks(run):
        step, is_driver = _step_of(task)
        if step and not is_driver and (step not in found or task["display_name"] == step):
            found[step] = task
    return found


def _step_of(task: Json) -> tuple[str, bool]:
    return step_of_node(task.get("display_name") or "")


def _tasks(run: Json) -> list[Json]:
    return (run.get("run_details") or {}).get("task_details") or []


def _came_from_cache(task: Json) -> bool:
    """Whether nothing ran: with a pod, the step takes time and has other states first."""
    states = [entry.get("state") for entry in task.get("state_history", [])]
    return states == [SUCCEEDED] and bool(task.get("end_time")) and task.get("start_time") == task["end_time"]


def _span(task: Json) -> float | None:
    start, end = _moment(task.get("start_time")), _moment(task.get("end_time"))
    return ((end or datetime.now(UTC)) - start).total_seconds() if start else None


def _moment(text: str | None) -> datetime | None:
    moment = datetime.fromisoformat(text) if text else None
    return moment if moment and moment > _BEFORE_ANY_RUN else None
