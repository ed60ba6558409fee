"""Following a run: what each step is doing, and why it waits or has failed."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from components.kubernetes.pods import Waiting, duration, why_it_waits
from components.runtime.errors import Tune16Error
from components.runtime.progress import Progress
from pipelines.cluster import Cluster, explained
from pipelines.pods import StepPod, list_pods, newest, was_stopped, what_happened, workflow_messages
from pipelines.runs import Step, failed_steps, has_ended, is_settled, state_of, steps_of
from pipelines.server import Json, PipelineServer, UnavailableError
from pipelines.steplogs import StepLog, read_log

PATIENCE_SECONDS = 600.0
_SETTLING_LOOKS = 5
_LINES_BEFORE_ERROR = 15
_TAIL = 200  # last lines of a log, which contain training's newest step


@dataclass(frozen=True)
class Row:
    """A step at one moment: its state as one word, and a note to show beside it."""

    step: str
    state: str
    seconds: float | None
    note: str = ""
    progress: Progress | None = None


class Watch:
    """A run's steps, with what the cluster knows about their pods if there is a login.

    Args:
        server: the pipeline server.
        cluster: the cluster; None without a login, which shows states only.
        run_id: the run.
    """

    def __init__(self, server: PipelineServer, cluster: Cluster | None, run_id: str) -> None:
        self._server = server
        self._cluster = cluster
        self._run_id = run_id
        self._held_out: float | None = None
        self._waits: dict[str, Waiting] = {}

    def follow(self, pause: float) -> Iterator[Json]:
        """Yield the run every `pause` seconds, until it has ended.

        The run does not end with a server that is unavailable for some minutes, so neither does this.
        """
        last_seen, looks = time.monotonic(), 0
        while True:
            try:
                run = self._server.read_run(self._run_id)
            except UnavailableError:
                if time.monotonic() - last_seen > PATIENCE_SECONDS:
                    raise
                time.sleep(pause)
                continue
            last_seen = time.monotonic()
            looks += has_ended(run)
            if has_ended(run) and (is_settled(run) or looks > _SETTLING_LOOKS):
                yield run
                return
            if not has_ended(run):
                yield run
            time.sleep(pause)

    def state(self, run: Json) -> str:
        """The run's state as one word; its workflow may know whether a FAILED run was stopped."""
        state = state_of(run)
        if state == "failed" and self._cluster:
            return state_of(run, was_stopped(self._cluster.find_workflow(self._run_id)))
        return state

    def rows(self, run: Json) -> list[Row]:
        """The steps now: why one waits, the progress of training."""
        steps = steps_of(run)
        if has_ended(run) or self._cluster is None:
            return [Row(step.name, step.state, step.seconds) for step in steps]
        pods = self._pods()
        known = {step.name for step in steps}
        for pod in pods:  # a waiting driver is the only pod of its step
            if pod.is_driver and pod.step not in known and why_it_waits(self._cluster.look, pod.body):
                known.add(pod.step)
                steps.append(Step(pod.step, "running"))
        blocked = workflow_messages(self._cluster.find_workflow(self._run_id)) if _lacks_pods(steps, pods) else {}
        return [self._row(step, newest(pods, step.name), blocked.get(step.name, "")) for step in steps]

    def _row(self, step: Step, pod: StepPod | None, blocked: str) -> Row:
        if step.state not in ("running", "waiting") or self._cluster is None:
            return Row(step.name, step.state, step.seconds)
        if pod is None:
            return Row(step.name, "waiting" if blocked else step.state, step.seconds, blocked)
        waiting = why_it_waits(self._cluster.look, pod.body)
        self._waits.pop(step.name, None)
        if waiting:
            self._waits[step.name] = waiting
            return Row(step.name, "waiting", step.seconds, str(waiting))
        progress = self._progress(pod) if step.name == "train" and not pod.is_driver else None
        return Row(step.name, step.state, step.seconds, self._told(progress) if progress else "", progress)

    def _progress(self, pod: StepPod) -> Progress | None:
        """Where training is, from the end of its log."""
        assert self._cluster is not None
        try:
            with explained(self._cluster, "read logs"):
                lines = self._cluster.read_log(pod.name, _TAIL).splitlines()
        except Tune16Error:
            return None  # only for the display
        found = [
            progress
            for line in lines
            if line.startswith("train: ") and (progress := Progress.parse(line.removeprefix("train: ")))
        ]
        held_out = [progress.held_out for progress in found if progress.held_out is not None]
        self._held_out = held_out[-1] if held_out else self._held_out
        measured = [progress for progress in found if progress.loss is not None] or found
        return measured[-1] if measured else None

    def _told(self, progress: Progress) -> str:
        parts = [f"{progress.step / max(progress.num_steps, 1):.0%}"]
        if progress.loss is not None and progress.minutes is not None:
            parts.append(f"loss {progress.loss:.4f}")
        if self._held_out is not None:
            parts.append(f"held-out loss {self._held_out:.4f}")
        if progress.minutes is not None:
            parts.append(f"{duration(60 * progress.minutes)} left")
        return ", ".join(parts)

    def _pods(self) -> list[StepPod]:
        if self._cluster is None:
            return []
        try:
            with explained(self._cluster, "list pods"):
                return list_pods(self._cluster, self._run_id)
        except Tune16Error:
            return []  # the states are shown without

    def stuck(self, seconds: float) -> str:
        """Which step had waited this long at the last call of :meth:`rows`, and why; empty if none had."""
        for step, waiting in self._waits.items():
            if waiting.seconds > seconds:
                return f"{step} waits: {waiting.reason} ({duration(waiting.seconds)})"
        return ""

    def steps_with_pods(self) -> set[str]:
        """The steps that have a pod of their own."""
        return {pod.step for pod in self._pods() if not pod.is_driver}

    def log(self, run: Json, step: str) -> StepLog:
        """The log of a step, from wherever it is kept."""
        return next(log for _, log in self.logs(run, [step]))

    def logs(self, run: Json, steps: Iterable[str]) -> Iterator[tuple[str, StepLog]]:
        """The logs of several steps, each with its step, from wherever they are kept."""
        pods = self._pods()
        for step in steps:
            yield step, read_log(self._cluster, self._server, run, step, pods)

    def failures(self, run: Json) -> Iterator[tuple[str, str]]:
        """Lines on each step that failed, with the step's name: its own last lines, and the error at the end."""
        pods = self._pods()
        workflow = self._cluster.find_workflow(self._run_id) if self._cluster else None
        for step in failed_steps(run):
            log = read_log(self._cluster, self._server, run, step, pods)
            before, error = log.failure(step, _LINES_BEFORE_ERROR)
            happened = what_happened(pods, step, workflow, bool(log.lines)) if self._cluster else ""
            lines = before + error
            if not error:
                lines += [f"error: {line}" for line in log.complaints()[-1:]] if not happened else []
            for line in lines or ([log.remark] if log.remark and not happened else []):
                yield step, line
            if happened and not error:
                yield (
                    step,
                    f"error: {happened}. `tune16 runs retry {run['display_name']}` continues with what is missing"
                    f"{', training from its newest checkpoint' if step == 'train' else ''}.",
                )


def _lacks_pods(steps: list[Step], pods: list[StepPod]) -> bool:
    """Whether a step that should run has no pod: its workflow may tell why."""
    return any(step.state in ("running", "waiting") and newest(pods, step.name) is None for step in steps)
