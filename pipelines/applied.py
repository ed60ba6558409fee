"""Versions of the pipeline that were applied as Kubernetes objects, and those of them that the server does not list.

The admission webhook labels a version when it is written, and the server lists what is labelled. The webhook starts
with the first pipeline server that stores pipelines as objects: what was applied before has no label, and applying it
again changes nothing. Any other change of the object is a new write, which the webhook sees.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import urllib3
from kubernetes.client.rest import ApiException

from components.runtime.errors import Tune16Error
from pipelines.cluster import Cluster

Json = dict[str, Any]

_PATH = "/apis/pipelines.kubeflow.org/v2beta1/namespaces/{namespace}/pipelineversions"
_LISTED_BY = "pipelines.kubeflow.org/pipeline-id"
_TOUCHED = "tune16.dev/touched"
_LOOKS, PAUSE_SECONDS = 10, 1.0
_MERGE_PATCH = "application/merge-patch+json"


def unlisted(cluster: Cluster) -> list[Json]:
    """The applied versions without the webhook's label; none if they cannot be read."""
    found = cluster.look(_PATH)
    return [entry for entry in (found or {}).get("items", []) if not _is_listed(entry)]


def heal(cluster: Cluster, is_wanted: Callable[[Json], bool]) -> bool:
    """Touch the wanted versions that the server does not list, and wait until the webhook has labelled them.

    Returns:
        Whether there were any, and all are listed now.

    Raises:
        Tune16Error: this account may not write them, or the webhook does not label them.
    """
    names = [entry["metadata"]["name"] for entry in unlisted(cluster) if is_wanted(_as_told(entry))]
    if not names:
        return False
    path = _PATH.format(namespace=cluster.namespace)
    try:
        for name in names:
            label = {"metadata": {"labels": {_TOUCHED: f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"}}}
            cluster.send("PATCH", f"{path}/{name}", label, content_type=_MERGE_PATCH)
    except (ApiException, urllib3.exceptions.HTTPError) as error:
        raise Tune16Error(
            f"{explain(cluster, names)} This account cannot do it ({getattr(error, 'status', error)})."
        ) from None
    for _ in range(_LOOKS):
        if not {entry["metadata"]["name"] for entry in unlisted(cluster)} & set(names):
            return True
        time.sleep(PAUSE_SECONDS)
    raise Tune16Error(
        f"{', '.join(names)}: was applied, but the pipeline server's admission webhook does not label it. Check that "
        "it exists: oc get mutatingwebhookconfigurations | grep pipelineversions"
    )


def explain(cluster: Cluster, names: list[str]) -> str:
    """Why the server does not list versions, and the command that makes the webhook label them."""
    touch = f"oc label pipelineversion {' '.join(names)} {_TOUCHED}=again --overwrite -n {cluster.namespace}"
    return (
        f"{', '.join(names)}: was applied before the pipeline server's webhook ran, so the server does not list it. "
        f"Run: {touch}."
    )


def _as_told(entry: Json) -> Json:
    """An object's names in the pipeline server's terms."""
    return {"name": entry["metadata"]["name"], "description": entry.get("spec", {}).get("description")}


def _is_listed(entry: Json) -> bool:
    return bool(entry["metadata"].get("labels", {}).get(_LISTED_BY))
