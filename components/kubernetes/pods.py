"""Why a pod is not running yet, and how it ended, as messages.

The events of the pod and the Workload of its queue add to it, as far as this account may see them.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from components.kubernetes import kueue
from components.kubernetes.api import conditions, sentence
from components.kubernetes.kueue import Look

Json = dict[str, Any]

_PULL_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_STARTING = {None, "", "ContainerCreating", "PodInitializing"}
_PULL_FAULTS = (  # by the text of the runtime's message, in this order: what is wrong and what to do
    (r"unauthorized|authentication required|denied|forbidden|\b40[13]\b", "access denied", "pull secret"),
    (r"not found|manifest unknown|does not exist|\b404\b", "not found", "push"),
    (r"no such host|timeout|refused|unreachable|dial tcp", "its registry cannot be reached", "registry"),
    (r"x509|certificate", "its registry's certificate is not trusted", "registry"),
)
_PULL_HINTS = {
    "pull secret": "Link a pull secret to the service account of the steps",
    "push": "Build and push it (make images), or name where the images are (manifests/components/images)",
    "registry": "Check that the cluster's nodes reach it, or set a mirror in manifests/components/images",
}
_NODE_HINTS = (
    ("Insufficient nvidia.com/gpu", "All GPUs are in use, or no node has one: run tune16 doctor"),
    ("untolerated taint", "Add the taint to the tolerations, or free a node"),
    ("node affinity", "No node has the labels of the node selector: run tune16 doctor"),
    ("Insufficient", "Free resources, or add a node"),
)


@dataclass(frozen=True)
class Waiting:
    """Why a step waits, since when (seconds), and what can be done about it."""

    reason: str
    seconds: float
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.reason} ({duration(self.seconds)})" if self.seconds >= 60 else self.reason
        return f"{text}. {self.hint}." if self.hint else text


def duration(seconds: float) -> str:
    """A time span for people, such as ``40 s``, ``3 min`` or ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{minutes} min" if not hours else f"{hours} h {rest} min" if rest else f"{hours} h"


def why_it_waits(look: Look, pod: Json) -> Waiting | None:
    """Why a pod does not run yet; None where it does, has ended, or is only just being made."""
    status = pod.get("status", {})
    if status.get("phase", "Pending") not in ("Pending", "Running"):
        return None
    scheduled = conditions(pod).get("PodScheduled", {})
    since = _seconds_since(scheduled.get("lastTransitionTime") or pod["metadata"].get("creationTimestamp"))
    if scheduled.get("status") == "False":
        gates = [gate["name"] for gate in pod["spec"].get("schedulingGates", [])]
        if any(gate.startswith("kueue.x-k8s.io/") for gate in gates):
            metadata = pod["metadata"]
            queue = metadata.get("labels", {}).get(kueue.QUEUE_LABEL, "")
            return Waiting(kueue.waiting(look, metadata["namespace"], metadata.get("uid", ""), queue), since)
        if gates:
            return Waiting(f"held back by {', '.join(gates)}", since)
        return Waiting(*_unscheduled(str(scheduled.get("message", "no node accepts it")), since))
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") not in _STARTING:
            return Waiting(*_stuck(container, waiting, since))
    if status.get("phase") == "Pending":
        event = _last_warning(look, pod)
        return Waiting(event, since) if event else None
    return None


def _unscheduled(message: str, seconds: float) -> tuple[str, float, str]:
    """The scheduler's message, shortened: ``0/1 nodes: Insufficient nvidia.com/gpu``."""
    text = sentence(message.partition("preemption:")[0]).replace(" are available", "").replace(" is available", "")
    match = re.fullmatch(r"(0/(\d+) nodes: )(\d+) ([^,]+)", text)
    if match and match[2] == match[3]:
        text = match[1] + match[4]
    return text, seconds, next((hint for word, hint in _NODE_HINTS if word in text), "")


def _stuck(container: Json, waiting: Json, seconds: float) -> tuple[str, float, str]:
    """What a container waits for in vain."""
    reason, message = waiting["reason"], sentence(str(waiting.get("message") or ""))
    if reason in _PULL_REASONS:
        fault, hint = pull_fault(message)
        return f"image {container['image']} cannot be pulled: {fault}", seconds, hint
    text = f"container {container['name']}: {reason} {message}".rstrip()
    ended = container.get("lastState", {}).get("terminated", {})
    if ended:
        text += f"; started {container.get('restartCount', 0)} times again, and last time it {_end_of(ended)}"
    return text, seconds, ""


def pull_fault(message: str) -> tuple[str, str]:
    """What is wrong with an image that cannot be pulled, from the runtime's message, and what to do."""
    for pattern, fault, remedy in _PULL_FAULTS:
        if re.search(pattern, message, re.IGNORECASE):
            return fault, _PULL_HINTS[remedy]
    return message[-200:] or "no reason given", ""


def _last_warning(look: Look, pod: Json) -> str:
    """What keeps a pod whose containers are being made, as its newest event: a volume or a Secret that is not there."""
    metadata = pod["metadata"]
    path = f"/api/v1/namespaces/{metadata['namespace']}/events"
    found = look(path, fieldSelector=f"involvedObject.name={metadata['name']}")
    events = (found or {}).get("items", [])
    event: Json = max(
        events, key=lambda entry: str(entry.get("lastTimestamp") or entry.get("eventTime") or ""), default={}
    )
    if event.get("type") != "Warning" or event.get("reason") == "FailedScheduling":
        return ""  # it has progressed, or a node has accepted it since
    return f"{event.get('reason')}: {sentence(str(event.get('message')))[:200]}"


def end_of_pod(pod: Json, container: str = "main") -> str:
    """How a pod ended whose container left no message: evicted, out of memory, killed, deleted; else empty."""
    status = pod.get("status", {})
    if status.get("reason"):  # of the whole pod: Evicted, Preempted, NodeLost, DeadlineExceeded …
        message = sentence(str(status.get("message") or ""))
        return f"its pod was terminated: {status['reason']}{f' ({message})' if message else ''}"
    for found in status.get("containerStatuses", []):
        ended = found.get("state", {}).get("terminated", {})
        is_told = ended.get("exitCode") in (0, 1, 2) and ended.get("reason") != "OOMKilled"
        if found["name"] == container and ended and not is_told:
            return f"it {_end_of(ended)}"
    return "its pod is being deleted" if pod["metadata"].get("deletionTimestamp") else ""


def _end_of(ended: Json) -> str:
    if ended.get("reason") == "OOMKilled":
        return "was killed because it ran out of memory (OOMKilled)"
    code = ended.get("exitCode")
    return f"was killed (exit code {code})" if code in (137, 143) else f"ended with exit code {code}"


def _seconds_since(text: str | None) -> float:
    if not text:
        return 0.0
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds())
