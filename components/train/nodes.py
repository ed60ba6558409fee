"""Training on several nodes: the step's own pod asks the cluster for a training job, follows it, and takes it away.

The job is a TrainJob (trainer.kubeflow.org) or a PyTorchJob (kubeflow.org), whichever the cluster serves. Its pods run
this same image as this same account (:mod:`components.train.node`); all that passes between them and the step lies in a
folder of the connection's bucket (:mod:`components.train.scratch`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client
from kubernetes.client.rest import ApiException

from components import kubeapi
from components.config import TrainConfig
from components.errors import Tune16Error
from components.outputs import new_folder
from components.s3errors import patience
from components.steps import say
from components.train.jobs import PYTORCH_JOB, TRAIN_JOB, Json, Kind, describe
from components.train.scratch import ALIVE_SECONDS, Scratch, new_job

POLL_SECONDS = 5.0
_SILENCE_SECONDS = 1800  # without any news from pods that should be running; waiting in a queue does not count
_TIMEOUT_SECONDS = (10, 60)  # to connect, to read


def train_on_nodes(weights: Path, rows: Path, output: Path, config: TrainConfig, path: str) -> None:
    """Train on ``num_nodes`` nodes with ``num_gpus`` GPUs each, from within a pod of the cluster.

    A storage or an API that is away for a quarter of an hour ends nothing.

    Raises:
        Tune16Error: this is no pod, the cluster serves no training jobs, the account may not make them, the job failed,
            or its pods said nothing for half an hour although they were not waiting in a queue.
    """
    if not path:
        raise Tune16Error(
            "train.num_nodes: the nodes meet below the model's place in the bucket. Set destination_path."
        )
    job = new_job()
    scratch = Scratch.of_job(job, path)
    with kubeapi.explained("train.num_nodes"), patience():
        api = kubeapi.connect("train.num_nodes: several nodes are for a cluster, whose pods train. Set it to 1.")
        pod, kind = kubeapi.patiently(lambda: kubeapi.own_pod(api), POLL_SECONDS), _served_kind()
        namespace = pod["metadata"]["namespace"]
        body = describe(kind, job, pod, scratch.address, config, kind is TRAIN_JOB and _has_patches())
        with scratch.holding(weights, rows, config), _running(kind, namespace, body):
            _follow(kind, namespace, job, scratch)
            with new_folder(output) as folder:
                scratch.fetch_adapter(folder)


def _served_kind() -> Kind:
    for kind in (TRAIN_JOB, PYTORCH_JOB):
        try:
            served = _patiently("GET", f"/apis/{kind.group}/{kind.version}")["resources"]
        except ApiException as error:
            if error.status != 404:
                raise
            continue
        if any(resource["name"] == kind.plural for resource in served):
            return kind
    raise Tune16Error(
        "train.num_nodes: this cluster has neither TrainJob nor PyTorchJob. Ask its administrator for the component "
        "trainer of OpenShift AI, or set num_nodes in more_train_options to 1."
    )


def _has_patches() -> bool:
    """Whether this cluster's TrainJob says runtimePatches, as newer trainers do, and not podTemplateOverrides."""
    answer = _patiently("GET", f"/openapi/v3/apis/{TRAIN_JOB.group}/{TRAIN_JOB.version}")
    for schema in answer["components"]["schemas"].values():
        kinds = [entry["kind"] for entry in schema.get("x-kubernetes-group-version-kind", [])]
        if TRAIN_JOB.name in kinds:
            return "runtimePatches" in schema["properties"]["spec"]["properties"]
    return False


@contextmanager
def _running(kind: Kind, namespace: str, body: Json) -> Iterator[None]:
    """The job, from its creation to its removal, whatever happens."""
    path = f"/apis/{kind.group}/{kind.version}/namespaces/{namespace}/{kind.plural}"
    name = body["metadata"]["name"]
    try:
        _create(path, body)
        yield
    finally:
        try:
            _patiently("DELETE", f"{path}/{name}", {"propagationPolicy": "Background"})
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            if getattr(error, "status", None) != 404:
                say("train", f"{kind.name} {name} could not be removed ({error}); it goes with this pod")


def _create(path: str, body: Json) -> None:
    """Make the job; where the answer to an earlier try was lost, it is there already: its name is nobody else's."""
    num_tries = 0

    def post() -> None:
        nonlocal num_tries
        num_tries += 1
        try:
            _request("POST", path, body)
        except ApiException as error:
            if error.status != 409 or num_tries == 1:
                raise

    kubeapi.patiently(post, POLL_SECONDS)


def _follow(kind: Kind, namespace: str, job: str, scratch: Scratch) -> None:
    """Say the job's states and the first pod's lines until it has ended.

    Raises:
        Tune16Error: it failed, with the pod's own message where it left one, or it hangs.
    """
    path = f"/apis/{kind.group}/{kind.version}/namespaces/{namespace}/{kind.plural}/{job}"
    said, state, renewed, last_news = 0, "", 0.0, time.monotonic()
    while state != "complete":
        if time.monotonic() - renewed > ALIVE_SECONDS:
            scratch.renew()
            renewed = time.monotonic()
        now, why = _state(_patiently("GET", path))
        lines = _first_log(kind, namespace, job)
        said = said if said <= len(lines) else 0  # another pod, or the same one started again
        if now != state or len(lines) > said or now == "queued":
            last_news = time.monotonic()
        if now != state:
            say("train", f"{kind.name} {job} is {now}")
        for line in lines[said:]:
            if line.startswith("train: "):  # the rest is what libraries print
                say("train", line.removeprefix("train: "))
        said, state = len(lines), now
        scratch.raise_reported()  # at once, before the pod is started again
        if state == "failed":
            raise Tune16Error(f"{kind.name} {job} failed: {why or 'no reason given'}. Its pods' logs may say more.")
        if time.monotonic() - last_news > _SILENCE_SECONDS:
            raise Tune16Error(
                f"{kind.name} {job} has said nothing for {_SILENCE_SECONDS // 60} minutes. Look at its pods' events: "
                "are there nodes with enough free GPUs, and can they pull the image?"
            )
        time.sleep(POLL_SECONDS)


def _state(job: Json) -> tuple[str, str]:
    """``queued``, ``running``, ``complete`` or ``failed``, and the reason."""
    conditions = job.get("status", {}).get("conditions", [])
    active = {entry["type"]: entry.get("message", "") for entry in conditions if entry["status"] == "True"}
    for name, state in (
        ("Complete", "complete"),
        ("Succeeded", "complete"),
        ("Failed", "failed"),
        ("Suspended", "queued"),
    ):
        if name in active:
            return state, active[name]
    return "running", ""


def _first_log(kind: Kind, namespace: str, job: str) -> list[str]:
    """The whole lines that the first pod has printed so far."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    pods = _patiently("GET", path, query={"labelSelector": kind.first_pod.format(job=job)})["items"]
    if not pods:
        return []
    try:
        path = f"{path}/{pods[0]['metadata']['name']}/log"
        text = str(_patiently("GET", path, query={"container": kind.container}, answer="str"))
    except ApiException as error:
        if error.status in (400, 404):  # the container has not started, or the pod is gone
            return []
        raise
    return text[: text.rfind("\n") + 1].splitlines()


def _patiently(method: str, path: str, body: Any = None, **options: Any) -> Any:
    return kubeapi.patiently(lambda: _request(method, path, body, **options), POLL_SECONDS)


def _request(
    method: str, path: str, body: Any = None, query: dict[str, str] | None = None, answer: str = "object"
) -> Any:
    return kubeapi.send(client.ApiClient(), method, path, body, query, answer, _TIMEOUT_SECONDS)
