"""The pods of a run's steps and its workflow, which know what the pipeline server does not.

The server reports a step as running as soon as its pod exists, and as failed if its pod was deleted.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from components.config import CONFIG_OF_STEP
from components.kubernetes.api import sentence
from components.kubernetes.pods import end_of_pod
from pipelines.cluster import Cluster

Json = dict[str, Any]

_NODE_ANNOTATION = "workflows.argoproj.io/node-name"
_ATTEMPT = re.compile(r"\(\d+\)")  # what a retry strategy adds to the name of a node


@dataclass(frozen=True)
class StepPod:
    """A pod of a step: the step's own, or its driver, which decides whether the step runs at all."""

    step: str
    is_driver: bool
    body: Json

    @property
    def name(self) -> str:
        """The pod's name."""
        return str(self.body["metadata"]["name"])

    @property
    def is_done_driver(self) -> bool:
        """Whether it is a driver that succeeded: it stays beside the step's pod and says nothing about it."""
        return self.is_driver and self.body.get("status", {}).get("phase") == "Succeeded"


def step_of_node(node: str) -> tuple[str, bool]:
    """The step that a node of the workflow belongs to, and whether it is its driver; empty if it belongs to none.

    Nodes are called ``wf.root.train.executor``, or ``wf(0).root(0).train(0).executor(0)`` under a retry strategy.
    """
    for part in reversed(_ATTEMPT.sub("", node).split(".")):
        name = part.removesuffix("-driver")
        if name in CONFIG_OF_STEP:
            return name, name != part
    return "", False


def list_pods(cluster: Cluster, run_id: str) -> list[StepPod]:
    """The pods of a run's steps, oldest first."""
    pods = []
    for body in cluster.list_run_pods(run_id):
        step, is_driver = step_of_node(body["metadata"].get("annotations", {}).get(_NODE_ANNOTATION, ""))
        if step:
            pods.append(StepPod(step, is_driver, body))
    return pods


def newest(pods: Iterable[StepPod], step: str) -> StepPod | None:
    """The newest pod of a step: its own where it has one, else its driver's, unless that has succeeded."""
    found = [pod for pod in pods if pod.step == step and not pod.is_done_driver]
    return max(found, key=lambda pod: (not pod.is_driver, found.index(pod)), default=None)


def what_happened(pods: Iterable[StepPod], step: str, workflow: Json | None, has_log: bool) -> str:
    """What happened to a step's pod that did not end by itself; empty if it did, or if that is unknown.

    Args:
        pods: all pods of the run.
        step: the step.
        workflow: the run's workflow, if it still exists.
        has_log: whether a log of the pod has been kept: then it may have ended long ago, and been removed since.
    """
    pod = newest(pods, step)
    if pod is not None:
        return end_of_pod(pod.body)
    messages = [
        sentence(str(node.get("message") or ""))
        for node in _nodes(workflow)
        if step_of_node(str(node.get("name", "")))[0] == step and node.get("type") == "Pod"
    ]
    said = next((message for message in reversed(messages) if message), "")
    if said == "pod deleted":
        return "its pod was deleted"
    if said or has_log:
        return f"its pod is gone: {said}" if said else ""
    return "its pod is gone: it was deleted or evicted, or its node was lost"


def workflow_messages(workflow: Json | None) -> dict[str, str]:
    """The workflow's messages about steps that have no pod yet, such as that a quota is used up."""
    found: dict[str, str] = {}
    for node in _nodes(workflow):
        step, _ = step_of_node(str(node.get("name", "")))
        if step and node.get("phase") == "Pending" and node.get("message"):
            found[step] = sentence(str(node["message"]))
    return found


def was_stopped(workflow: Json | None) -> bool:
    """Whether the workflow was stopped: the pipeline server sets its deadline to zero."""
    spec = (workflow or {}).get("spec", {})
    return spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown"))


def _nodes(workflow: Json | None) -> list[Json]:
    return list(((workflow or {}).get("status") or {}).get("nodes", {}).values())
