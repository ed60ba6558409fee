"""Training on several nodes: the step's own pod asks the cluster for a training job, follows it, and takes it away.

The job is a TrainJob (trainer.kubeflow.org) or a PyTorchJob (kubeflow.org), whichever the cluster serves. Its pods run
this same image as this same account; inputs and the adapter pass through the connection's bucket, under ``scratch/``.
"""

import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3
from kubernetes import client, config
from kubernetes.client.rest import ApiException

from components import s3
from components.config import TrainConfig
from components.errors import Tune16Error
from components.outputs import new_folder
from components.references import fetch, parse, pin
from components.steps import say
from components.train.jobs import PYTORCH_JOB, TRAIN_JOB, Json, Kind, describe
from components.train.launch import Group, train_in_processes

POLL_SECONDS = 5.0
_SILENCE_SECONDS = 1800  # without any news from pods that should be running; waiting in a queue does not count
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_MASTER_PORT = 29500
_ERROR_LINE = re.compile(r"^error: (.+)$", re.MULTILINE)


def train_on_nodes(weights: Path, rows: Path, output: Path, config: TrainConfig) -> None:
    """Train on ``num_nodes`` nodes with ``num_gpus`` GPUs each, from within a pod of the cluster.

    Raises:
        Tune16Error: this is no pod, the cluster serves no training jobs, the account may not make them, the job failed,
            or its pods said nothing for half an hour although they were not waiting in a queue.
    """
    job = f"tune16-train-{uuid.uuid4().hex[:8]}"
    prefix = f"scratch/{job}"
    with _cluster_errors():
        pod = _own_pod()
        kind = _served_kind()
        with _in_bucket(prefix, weights, rows, config):
            source = f"s3://{s3.default_bucket()}/{prefix}"
            body = describe(kind, job, pod, source, config, kind is TRAIN_JOB and _has_patches())
            with _running(kind, pod["metadata"]["namespace"], body):
                _follow(kind, pod["metadata"]["namespace"], job)
            with new_folder(output) as folder:
                fetch(pin(parse(f"s3:///{prefix}/adapter", "model")), folder, ["*"])


def train_as_node(source: str) -> None:
    """What each pod of the job does: fetch the inputs, train with the others, and, as the first, keep the adapter.

    Args:
        source: ``s3://`` folder that :func:`train_on_nodes` has filled.

    Raises:
        Tune16Error: as for training in one pod.
    """
    node = int(os.environ.get("PET_NODE_RANK") or os.environ.get("RANK") or 0)
    address = os.environ.get("PET_MASTER_ADDR") or os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("PET_MASTER_PORT") or os.environ.get("MASTER_PORT") or _MASTER_PORT)
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = fetch(parse(f"{source}/weights", "model"), folder / "weights", ["*"])
        rows = fetch(parse(f"{source}/rows", "data"), folder / "rows", ["*"])
        content = s3.read(bucket, f"{prefix}/config.json")
        if content is None:
            raise Tune16Error(f"{source}: has no config.json. It belongs to a job that is over.")
        settings = TrainConfig.model_validate_json(content)
        output = folder / "adapter"
        train_in_processes(weights, rows, output, settings, Group(settings.num_nodes, node, address, port))
        if node == 0:
            _put_folder(output, bucket, f"{prefix}/adapter")


def _own_pod() -> Json:
    """The pod that this runs in: its image, account, tolerations and secrets are the job's too."""
    try:
        if "KUBECONFIG" in os.environ:
            config.load_kube_config(os.environ["KUBECONFIG"])
        else:
            config.load_incluster_config()
    except config.ConfigException:
        raise Tune16Error(
            "train.num_nodes: several nodes are for a cluster, where the step train runs in a pod. Set it to 1."
        ) from None
    name = os.environ.get("KFP_POD_NAME") or os.environ["HOSTNAME"]
    namespace = os.environ.get("KFP_NAMESPACE") or _NAMESPACE_FILE.read_text().strip()
    pod = client.CoreV1Api().read_namespaced_pod(name, namespace)
    content: Json = client.ApiClient().sanitize_for_serialization(pod)
    return content


def _served_kind() -> Kind:
    for kind in (TRAIN_JOB, PYTORCH_JOB):
        try:
            served = _get(f"/apis/{kind.group}/{kind.version}")["resources"]
        except ApiException as error:
            if error.status != 404:
                raise
            continue
        if any(resource["name"] == kind.plural for resource in served):
            return kind
    raise Tune16Error(
        "train.num_nodes: this cluster has neither TrainJob nor PyTorchJob. Ask its administrator for the component "
        "trainer of OpenShift AI, or set train_num_nodes to 1."
    )


def _has_patches() -> bool:
    """Whether this cluster's TrainJob says runtimePatches, as newer trainers do, and not podTemplateOverrides."""
    schemas = _get(f"/openapi/v3/apis/{TRAIN_JOB.group}/{TRAIN_JOB.version}")["components"]["schemas"]
    for schema in schemas.values():
        kinds = [entry["kind"] for entry in schema.get("x-kubernetes-group-version-kind", [])]
        if TRAIN_JOB.name in kinds:
            return "runtimePatches" in schema["properties"]["spec"]["properties"]
    return False


@contextmanager
def _running(kind: Kind, namespace: str, body: Json) -> Iterator[None]:
    """The job, from its creation to its removal, whatever happens."""
    jobs, place = client.CustomObjectsApi(), (kind.group, kind.version, namespace, kind.plural)
    jobs.create_namespaced_custom_object(*place, body)
    try:
        yield
    finally:
        name = body["metadata"]["name"]
        try:
            jobs.delete_namespaced_custom_object(*place, name, propagation_policy="Background")
        except ApiException as error:
            if error.status != 404:
                raise


def _follow(kind: Kind, namespace: str, job: str) -> None:
    """Say the job's states and the first pod's lines until it has ended.

    Raises:
        Tune16Error: it failed, with the step's own message where it has one, or it hangs.
    """
    said, state, last_news = 0, "", time.monotonic()
    while True:
        content = client.CustomObjectsApi().get_namespaced_custom_object(
            kind.group, kind.version, namespace, kind.plural, job
        )
        now, why = _state(content)
        lines = _first_log(kind, namespace, job)
        if now != state or len(lines) > said or now == "queued":
            last_news = time.monotonic()
        if now != state:
            say("train", f"{kind.name} {job} is {now}")
        for line in lines[said:]:
            if line.startswith("train: "):  # the rest is what libraries print
                say("train", line.removeprefix("train: "))
        said, state = max(said, len(lines)), now
        if state == "complete":
            return
        if state == "failed":
            own = _ERROR_LINE.search("\n".join(lines))
            raise Tune16Error(own[1] if own else f"{kind.name} {job} failed: {why or 'no reason given'}.")
        if time.monotonic() - last_news > _SILENCE_SECONDS:
            raise Tune16Error(
                f"{kind.name} {job} has said nothing for {_SILENCE_SECONDS // 60} minutes. Look at its pods' events: "
                "are there nodes with enough free GPUs, and can they pull the image?"
            )
        time.sleep(POLL_SECONDS)


def _state(job: Json) -> tuple[str, str]:
    """``queued``, ``running``, ``complete`` or ``failed``, and the reason."""
    conditions = {entry["type"]: entry for entry in job.get("status", {}).get("conditions", [])}
    active = {name: entry for name, entry in conditions.items() if entry["status"] == "True"}
    for name, state in (
        ("Complete", "complete"),
        ("Succeeded", "complete"),
        ("Failed", "failed"),
        ("Suspended", "queued"),
    ):
        if name in active:
            return state, active[name].get("message", "")
    return "running", ""


def _first_log(kind: Kind, namespace: str, job: str) -> list[str]:
    """The whole lines that the first pod has printed so far."""
    core = client.CoreV1Api()
    pods = core.list_namespaced_pod(namespace, label_selector=kind.first_pod.format(job=job)).items
    if not pods:
        return []
    try:
        text: str = core.read_namespaced_pod_log(pods[0].metadata.name, namespace, container=kind.container)
    except ApiException as error:
        if error.status in (400, 404):  # the container has not started, or the pod is gone
            return []
        raise
    return text[: text.rfind("\n") + 1].splitlines()


@contextmanager
def _in_bucket(prefix: str, weights: Path, rows: Path, config: TrainConfig) -> Iterator[None]:
    """The job's inputs in the bucket while it runs."""
    bucket = s3.default_bucket()
    try:
        _put_folder(weights, bucket, f"{prefix}/weights")
        _put_folder(rows, bucket, f"{prefix}/rows")
        s3.create(bucket, f"{prefix}/config.json", config.model_dump_json().encode())
        yield
    finally:
        for stored in s3.list_objects(bucket, f"{prefix}/"):
            s3.delete(bucket, stored.key)


def _put_folder(folder: Path, bucket: str, prefix: str) -> None:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        s3.upload(path, bucket, f"{prefix}/{path.relative_to(folder)}")


def _get(path: str) -> Json:
    content: Json = client.ApiClient().call_api(
        path, "GET", auth_settings=["BearerToken"], response_type="object", _return_http_data_only=True
    )
    return content


@contextmanager
def _cluster_errors() -> Iterator[None]:
    """Refusals of the cluster's API as messages."""
    try:
        yield
    except ApiException as error:
        if error.status == 403:
            raise Tune16Error(
                "train.num_nodes: the steps' account may not make training jobs. Apply manifests/base with its Role."
            ) from None
        raise Tune16Error(f"train.num_nodes: the cluster's API answers {error.status} {error.reason}.") from None
    except urllib3.exceptions.HTTPError as error:
        raise Tune16Error(f"train.num_nodes: the cluster's API cannot be reached ({error}).") from None
