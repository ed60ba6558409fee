"""Training on several nodes: the step's own pod asks the cluster for a training job, follows it, and takes it away.

The job is a TrainJob (trainer.kubeflow.org) or a PyTorchJob (kubeflow.org), whichever the cluster serves. Its pods run
this same image as this same account (:mod:`.node`); all that passes between them and the step lies in a folder of the
connection's bucket (:mod:`.scratch`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client
from kubernetes.client.rest import ApiException
from kubernetes.utils.quantity import parse_quantity

from components.config import TrainConfig
from components.kubernetes import api as kubeapi
from components.kubernetes.kueue import QUEUE_LABEL, Look, why_never_admitted
from components.kubernetes.kueue import waiting as kueue_waiting
from components.kubernetes.pods import end_of_pod, why_it_waits
from components.runtime.errors import Tune16Error
from components.runtime.lines import ERROR, FINISHED, STARTED, Line
from components.runtime.outputs import new_folder
from components.runtime.retry import patience
from components.runtime.steps import say
from components.train.distributed.jobs import PYTORCH_JOB, TRAIN_JOB, Json, Kind, describe, resources_of
from components.train.distributed.scratch import ALIVE_SECONDS, Scratch, new_job

POLL_SECONDS = 5.0
_SILENCE_SECONDS = 1800  # without any news from pods that should be running; waiting in a queue does not count
_TIMEOUT_SECONDS = (10, 60)  # to connect, to read
_LAST_LINES = 8  # of a pod that failed without a message of ours


def train_on_nodes(inputs: dict[str, tuple[Path, str]], output: Path, config: TrainConfig, path: str) -> None:
    """Train on ``num_nodes`` nodes with ``num_gpus`` GPUs each, from within a pod of the cluster.

    A storage or an API that does not answer for a quarter of an hour ends nothing.

    Args:
        inputs: ``weights`` and ``rows``, each with its folder and the URI of its artifact.
        output: becomes the adapter's folder.
        config: the settings.
        path: ``prefix/model-name`` in the connection's bucket.

    Raises:
        Tune16Error: this is not a pod, the cluster serves no training jobs, the account may not make them, the job
            failed, or its pods said nothing for half an hour although they were not waiting in a queue.
    """
    if not path:
        raise Tune16Error("train.num_nodes: the nodes exchange files below destination_path in the bucket. Set it.")
    job = new_job()
    scratch = Scratch.of_job(job, path)
    with kubeapi.explained("train.num_nodes"), patience():
        api = kubeapi.connect("train.num_nodes: training on several nodes needs a cluster. Set it to 1.")
        pod, kind = kubeapi.patiently(lambda: kubeapi.own_pod(api), POLL_SECONDS), _served_kind()
        namespace = pod["metadata"]["namespace"]
        _check_queue(_look, pod, config)
        body = describe(kind, job, pod, scratch.address, config, kind is TRAIN_JOB and _has_patches())
        with scratch.holding(inputs, config), _running(kind, namespace, body):
            _follow(_Job(kind, namespace, body), scratch)
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
                say("train", f"{kind.name} {name} could not be removed ({error}); it is removed with this pod")


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


def _check_queue(look: Look, pod: Json, config: TrainConfig) -> None:
    """Refuse what the queue of the step's pod can never admit.

    Raises:
        Tune16Error: it cannot, and why.
    """
    queue = pod["metadata"].get("labels", {}).get(QUEUE_LABEL, "")
    if not queue:
        return
    requests = resources_of(pod, config)["requests"]
    needs = {name: config.num_nodes * float(parse_quantity(amount)) for name, amount in requests.items()}
    why = why_never_admitted(look, pod["metadata"]["namespace"], queue, needs)
    if why:
        raise Tune16Error(f"train.num_nodes: {why}. Ask the queue's administrator, or lower num_nodes or num_gpus.")


class _Job:
    """A training job on the cluster: its state, and what its pods say.

    Args:
        kind: what it is.
        namespace: where.
        body: the object that was created.
    """

    def __init__(self, kind: Kind, namespace: str, body: Json) -> None:
        self.title = f"{kind.name} {body['metadata']['name']}"
        self._kind = kind
        self._namespace = namespace
        self._name = body["metadata"]["name"]
        self._queue = body["metadata"]["labels"].get(QUEUE_LABEL, "")
        self._num_said = 0
        self._pods: list[Json] = []  # as they were when the state was asked for

    def state(self) -> tuple[str, str]:
        """``queued``, ``waiting``, ``running``, ``complete`` or ``failed``, and why.

        Raises:
            Tune16Error: somebody has deleted it.
        """
        path = f"/apis/{self._kind.group}/{self._kind.version}/namespaces/{self._namespace}/{self._kind.plural}"
        try:
            job = _patiently("GET", f"{path}/{self._name}")
        except ApiException as error:
            if error.status != 404:
                raise
            raise Tune16Error(
                f"{self.title} was deleted while it ran. Retry the run: it continues from its newest checkpoint."
            ) from None
        self._pods = self._list_pods()
        state, why = _state(job)
        if state == "queued":
            return state, kueue_waiting(_look, self._namespace, job["metadata"].get("uid", ""), self._queue)
        waiting = next(filter(None, (why_it_waits(_look, pod) for pod in self._pods)), None)
        return ("waiting", waiting.reason) if state in ("waiting", "running") and waiting else (state, why)

    def new_lines(self) -> list[str]:
        """The whole lines that the first pod has printed since the last call."""
        name, value = self._kind.first
        pod = next((pod for pod in self._pods if pod["metadata"].get("labels", {}).get(name) == value), None)
        text = self._log(pod) if pod else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        said, self._num_said = self._num_said, len(lines)
        return lines[said if said <= len(lines) else 0 :]  # fewer than before: another pod, or it was started again

    def last_words(self) -> list[str]:
        """How each pod ended, and its last lines, whatever they begin with: the logs go with the job."""
        words = []
        for pod in self._pods:
            lines = [str(Line.parse(line) or line) for line in self._log(pod).splitlines() if line.strip()][
                -_LAST_LINES:
            ]
            ended = end_of_pod(pod, self._kind.container)
            words += [f"{pod['metadata']['name']}: {line}" for line in [*lines, *([ended] if ended else [])]]
        return words

    def _list_pods(self) -> list[Json]:
        query = {"labelSelector": self._kind.pods.format(job=self._name)}
        pods: list[Json] = _patiently("GET", f"/api/v1/namespaces/{self._namespace}/pods", query=query)["items"]
        return pods

    def _log(self, pod: Json) -> str:
        path = f"/api/v1/namespaces/{self._namespace}/pods/{pod['metadata']['name']}/log"
        try:
            return str(_patiently("GET", path, query={"container": self._kind.container}, answer="str"))
        except ApiException as error:
            if error.status in (400, 404):  # the container has not started, or the pod is gone
                return ""
            raise


def _follow(job: _Job, scratch: Scratch) -> None:
    """Say the job's states and the first pod's lines until it has ended.

    Raises:
        Tune16Error: it failed, with the pod's own message where it left one, or it hangs, or was deleted.
    """
    state, why, renewed, last_news = "", "", 0.0, time.monotonic()
    while state != "complete":
        if time.monotonic() - renewed > ALIVE_SECONDS:
            scratch.renew()
            renewed = time.monotonic()
        before = state, why
        state, why = job.state()
        lines = job.new_lines()
        if (state, why) != before or lines or state == "queued":
            last_news = time.monotonic()
        if (state, why) != before and state != "failed":
            say("train", f"{job.title} is {state}{f': {why}' if why and state != 'complete' else ''}")
        for line in lines:
            of_pod = Line.parse(line)  # None is what libraries print
            if of_pod and of_pod.event not in (STARTED, FINISHED, ERROR):  # which this step says itself
                of_pod.write()
        scratch.raise_reported()  # at once, before the pod is started again
        if state == "failed":
            for line in job.last_words():
                say("train", line)
            said = kubeapi.sentence(why) or "no reason given"
            raise Tune16Error(f"{job.title} failed: {said}. The last lines of its pods are above.")
        if time.monotonic() - last_news > _SILENCE_SECONDS:
            raise Tune16Error(
                f"{job.title} has reported nothing for {_SILENCE_SECONDS // 60} minutes{f': {why}' if why else ''}. "
                "Check its pods' events: nodes with enough free GPUs, image pulls."
            )
        time.sleep(POLL_SECONDS)


def _state(job: Json) -> tuple[str, str]:
    """``queued``, ``running``, ``complete`` or ``failed``, and the reason, as the job itself says."""
    said = kubeapi.conditions(job).items()
    active = {name: entry.get("message", "") for name, entry in said if entry["status"] == "True"}
    for name, state in (
        ("Complete", "complete"),
        ("Succeeded", "complete"),
        ("Failed", "failed"),
        ("Suspended", "queued"),
    ):
        if name in active:
            return state, active[name]
    if job.get("spec", {}).get("suspend"):
        return "queued", ""
    counts = job.get("status", {}).get("jobsStatus", [])  # a TrainJob has no condition while it runs
    is_ready = any(entry.get("ready") or entry.get("succeeded") or entry.get("failed") for entry in counts)
    return ("waiting", "its pods are not ready yet") if counts and not is_ready else ("running", "")


def _patiently(method: str, path: str, body: Any = None, **options: Any) -> Any:
    return kubeapi.patiently(lambda: _request(method, path, body, **options), POLL_SECONDS)


def _look(path: str, **query: Any) -> Any:
    return kubeapi.look(client.ApiClient(), path, **query)


def _request(
    method: str, path: str, body: Any = None, query: dict[str, str] | None = None, answer: str = "object"
) -> Any:
    return kubeapi.send(client.ApiClient(), method, path, body, query, answer, _TIMEOUT_SECONDS)
