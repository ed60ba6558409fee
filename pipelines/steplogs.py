"""The logs of a run's steps: from its pods, else from the pipeline server's archive; complete, or only its own lines.

KFP's launcher prints some 135 lines of JSON before a step's first line, and its own messages after the last one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2 as httpx

from components.runtime.errors import Tune16Error
from components.runtime.timeouts import at_most
from pipelines.cluster import Cluster, NotFoundError, NotStartedError, explained
from pipelines.pods import StepPod
from pipelines.server import Json, PipelineServer

_OF_THE_LAUNCHER = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\.go:\d+\] ")
_ERROR = "error: "
_DOWNLOAD_SECONDS = 60


@dataclass(frozen=True)
class StepLog:
    """A step's output, and a remark if it is not complete: not started, or gone."""

    lines: list[str]
    remark: str = ""

    def own(self, step: str) -> list[str]:
        """The step's own lines, without the launcher's."""
        begin = next((number for number, line in enumerate(self.lines) if line == f"{step}: started"), None)
        if begin is None:  # it did not get this far: lines that are not the launcher's may tell why
            return [line for line in self._before_the_launcher_starts() if not _OF_THE_LAUNCHER.match(line)]
        return list(self._until_the_launcher_goes_on(begin))

    def _before_the_launcher_starts(self) -> list[str]:
        """All lines, without the launcher's JSON: indented, or a brace alone."""
        return [line for line in self.lines if line.strip() and not line.startswith((" ", "{", "}", "\t"))]

    def _until_the_launcher_goes_on(self, begin: int) -> Iterator[str]:
        for line in self.lines[begin:]:
            if _OF_THE_LAUNCHER.match(line):
                return
            yield line.rpartition("\r")[2]  # of a progress bar, its last state

    def failure(self, step: str, num_lines: int) -> tuple[list[str], list[str]]:
        """The last own lines before the error, and the error's lines; empty if the step reported none."""
        own = self.own(step)
        begin = max((number for number, line in enumerate(own) if line.startswith(_ERROR)), default=len(own))
        return own[max(0, begin - num_lines) : begin], own[begin:]

    def complaints(self) -> list[str]:
        """The launcher's or driver's own errors."""
        found = [line for line in self.lines if _OF_THE_LAUNCHER.match(line) and line[0] in "EF"]
        return [_OF_THE_LAUNCHER.sub("", line) for line in found]


def read_log(cluster: Cluster | None, server: PipelineServer, run: Json, step: str, pods: list[StepPod]) -> StepLog:
    """The log of a step, of its newest attempt that has one.

    Args:
        cluster: where its pods are; None if there is no login.
        server: may keep the logs of pods that are gone.
        run: the run as the API describes it.
        step: the step.
        pods: all pods of the run.
    """
    remark = ""
    own = [pod for pod in reversed(pods) if pod.step == step and not pod.is_done_driver]
    for pod in (pod for pod in own if not pod.is_driver):
        log = _of_pod(cluster, pod)
        if log.lines:
            return log
        remark = remark or log.remark
    for text in _kept(cluster, server, run, step):
        lines = _lines(text or "")
        if f"{step}: started" in lines:  # else it may be another step's: the server names none
            return StepLog(lines)
    for pod in (pod for pod in own if pod.is_driver):  # a failed one: the step itself has no log
        log = _of_pod(cluster, pod)
        if log.lines:
            return log
        remark = remark or log.remark
    return StepLog([], remark or "its pod is gone, and the pipeline server has kept no log of it")


def _of_pod(cluster: Cluster | None, pod: StepPod) -> StepLog:
    """The log of one pod; a remark if it has none or it cannot be read."""
    assert cluster is not None
    try:
        with explained(cluster, "read logs"):
            text = cluster.read_log(pod.name)
    except NotStartedError:
        return StepLog([], f"the pod {pod.name} has not started yet")
    except NotFoundError:
        return StepLog([], f"the pod {pod.name} is gone, and its log with it")
    except Tune16Error as error:
        return StepLog([], str(error))
    return StepLog(_lines(text)) if text.strip() else StepLog([], f"the pod {pod.name} has printed nothing yet")


def _lines(text: str) -> list[str]:
    """Whole lines: what a progress bar writes over itself is one of them."""
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def _kept(cluster: Cluster | None, server: PipelineServer, run: Json, step: str) -> Iterator[str | None]:
    """The logs that the server may have kept of a step, one attempt at a time."""
    for node in _nodes(run, step):
        yield server.read_archived_log(run["run_id"], node)
    if cluster is not None:
        yield _artifact(server, cluster.namespace, f"/{run['run_id']}/{step}/")


def _nodes(run: Json, step: str) -> list[str]:
    """Nodes of the workflow that may be the step's own pod, newest first: its child, or under a retry its attempts.

    The server names no step at an executor; one that began and ended with the step may be the step's.
    """
    tasks = (run.get("run_details") or {}).get("task_details") or []
    own: Json = next((task for task in tasks if task.get("display_name") == step), {})
    if not any(task.get("display_name") == f"{step}(0)" for task in tasks):
        return _children(own)[:1]
    return [
        node
        for task in tasks
        if task.get("display_name") == "executor" and _span(task) == _span(own)
        for node in reversed(_children(task))
    ]


def _span(task: Json) -> tuple[str, str]:
    return task.get("start_time", ""), task.get("end_time", "")


def _children(task: Json) -> list[str]:
    return [child["pod_name"] for child in task.get("child_tasks", []) if child.get("pod_name")]


def _artifact(server: PipelineServer, namespace: str, part: str) -> str | None:
    """The newest artifact ``executor-logs`` of a step, fetched by the address that the server has signed."""
    logs = [
        entry
        for entry in server.list_artifacts(namespace)
        if part in entry.get("uri", "") and "/executor-logs" in entry["uri"] and entry.get("download_url")
    ]
    if not logs:
        return None
    newest = max(logs, key=lambda entry: str(entry.get("created_at")))
    try:
        answer = httpx.get(newest["download_url"], timeout=at_most(_DOWNLOAD_SECONDS), follow_redirects=True)
    except httpx.HTTPError:
        return None
    return str(answer.text) if answer.status_code == httpx.codes.OK else None
