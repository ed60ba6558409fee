"""Kueue, the cluster's queue for pods and jobs: why a Workload is not admitted, and its place in the queue.

Both its versions v1beta2 and v1beta1 are asked, newest first.
"""

from collections.abc import Callable
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from components.kubernetes.api import conditions, sentence

Json = dict[str, Any]
Look = Callable[..., Any]  # asks for a path of the Kubernetes API; None where that has no answer

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_VERSIONS = ("v1beta2", "v1beta1")


def waiting(look: Look, namespace: str, uid: str, queue: str) -> str:
    """Where the object with this uid waits: its queue, its place there, and what it waits for, as far as known.

    Args:
        look: asks the Kubernetes API.
        namespace: of the object and its queue.
        uid: of the pod or the job that was put into the queue.
        queue: the LocalQueue's name; empty where it is not known.
    """
    text = f"in the queue {queue}" if queue else "in a queue"
    workload = find_workload(look, namespace, uid)
    if workload is None:
        return text
    place, why = _place(look, namespace, queue, workload["metadata"]["name"]), why_not_admitted(workload)
    return f"{text}{f', place {place}' if place else ''}{f': {why}' if why else ''}"


def find_workload(look: Look, namespace: str, uid: str) -> Json | None:
    """The Workload that Kueue keeps for the object with this uid."""
    for version in _VERSIONS:
        found = look(f"/apis/kueue.x-k8s.io/{version}/namespaces/{namespace}/workloads")
        for workload in (found or {}).get("items", []):
            if uid in [entry.get("uid") for entry in workload["metadata"].get("ownerReferences", [])]:
                return dict(workload)
    return None


def why_not_admitted(workload: Json) -> str:
    """Why Kueue does not admit a Workload; empty where it gives no reason."""
    said = conditions(workload)
    for name in ("QuotaReserved", "Admitted"):
        if said.get(name, {}).get("status") == "False":
            return sentence(str(said[name].get("message") or said[name].get("reason") or ""))
    return ""


def _place(look: Look, namespace: str, queue: str, workload: str) -> int:
    """A Workload's place in its queue, from 1; 0 where Kueue does not report it."""
    group = "/apis/visibility.kueue.x-k8s.io"
    for version in _VERSIONS:
        found = look(f"{group}/{version}/namespaces/{namespace}/localqueues/{queue}/pendingworkloads")
        for entry in (found or {}).get("items", []):
            if entry["metadata"]["name"] == workload:
                return int(entry.get("positionInLocalQueue", 0)) + 1
    return 0


def why_never_admitted(look: Look, namespace: str, queue: str, needs: dict[str, float]) -> str | None:
    """Why a queue can never admit what asks for this much; empty where it can, None where that cannot be seen.

    Args:
        look: asks the Kubernetes API.
        namespace: of the LocalQueue.
        queue: its name.
        needs: amounts by resource, such as ``{"nvidia.com/gpu": 1}``; memory in bytes.
    """
    queues, version = _local_queues(look, namespace)
    if queues is None:
        return None
    if queue not in queues:
        names = ", ".join(sorted(queues)) or "none"
        return f"there is no LocalQueue {queue} in {namespace}. There are: {names}"
    name = queues[queue]["spec"]["clusterQueue"]
    cluster_queue = look(f"/apis/kueue.x-k8s.io/{version}/clusterqueues/{name}")
    if cluster_queue is None:
        return _inactive(queues[queue]) or None
    return _inactive(cluster_queue) or _too_small(cluster_queue, needs)


def _local_queues(look: Look, namespace: str) -> tuple[dict[str, Json] | None, str]:
    for version in _VERSIONS:
        found = look(f"/apis/kueue.x-k8s.io/{version}/namespaces/{namespace}/localqueues")
        if found is not None:
            return {entry["metadata"]["name"]: entry for entry in found["items"]}, version
    return None, ""


def _inactive(queue: Json) -> str:
    active = conditions(queue).get("Active", {})
    if active.get("status") != "False":
        return ""
    why = sentence(str(active.get("message") or active.get("reason")))
    return f"the queue {queue['metadata']['name']} is not active: {why}"


def _too_small(cluster_queue: Json, needs: dict[str, float]) -> str:
    """What a ClusterQueue does not cover, or has too little of; with a cohort it may borrow."""
    name, spec = cluster_queue["metadata"]["name"], cluster_queue["spec"]
    quotas: dict[str, float] = {}
    for group in spec.get("resourceGroups", []):
        for flavor in group["flavors"]:
            for resource in flavor["resources"]:
                nominal = float(parse_quantity(resource["nominalQuota"]))
                quotas[resource["name"]] = max(quotas.get(resource["name"], 0), nominal)
    may_borrow = spec.get("cohort") or spec.get("cohortName")
    for resource, amount in needs.items():
        if not amount:
            continue
        if resource not in quotas:
            return f"the ClusterQueue {name} does not cover {resource}"
        if quotas[resource] < amount and not may_borrow:
            return f"the ClusterQueue {name} has {quotas[resource]:g} {resource} in all, and {amount:g} are requested"
    return ""
