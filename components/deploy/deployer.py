"""The step deploy: the published version behind an endpoint, or the one before still there.

The InferenceService is applied by the server (server-side apply), so that what people add to it stays. The new version
counts when it is ready, its server names it, and it answers a question; until then the old one serves, and when it does
not come, the old one is applied again.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from kubernetes import client
from kubernetes.client.rest import ApiException

from components import kubeapi
from components.chatapi import Endpoint, Sampling
from components.config import DeployConfig
from components.deploy.objects import (
    API,
    OWNER,
    VERSION,
    Json,
    Placing,
    alias,
    describe,
    owner,
)
from components.errors import Tune16Error
from components.steps import say

POLL_SECONDS = 5.0
PATIENCE_SECONDS = 1800.0  # fetching 13 GiB, loading them and compiling kernels take their time

_QUESTION = [{"role": "user", "content": "Who are you?"}]
_ANSWER = Sampling(temperature=0, max_tokens=16)
_PORT = 8080  # of the pods
_REMEMBERED = "inferenceservice.json"
_TOKEN_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True)
class _Service:
    """The InferenceService on the cluster."""

    api: client.ApiClient
    namespace: str
    name: str

    @property
    def _path(self) -> str:
        return f"/apis/{API}/namespaces/{self.namespace}/inferenceservices/{self.name}"

    @property
    def _memory(self) -> str:
        """The ConfigMap with the last InferenceService that has answered. An annotation would start all pods anew."""
        return f"/api/v1/namespaces/{self.namespace}/configmaps/{self.name}-served"

    def read(self) -> Json | None:
        return self._get(self._path)

    def last_served(self) -> Json | None:
        found = self._get(self._memory)
        return json.loads(found["data"][_REMEMBERED]) if found else None

    def remember(self, body: Json) -> None:
        metadata = {"name": f"{self.name}-served", "labels": {"app.kubernetes.io/managed-by": "tune16"}}
        content = {_REMEMBERED: json.dumps(body)}
        kubeapi.apply(
            self.api, self._memory, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": content}
        )

    def _get(self, path: str) -> Json | None:
        try:
            found: Json = kubeapi.send(self.api, "GET", path)
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        return found

    def apply(self, body: Json) -> None:
        try:
            kubeapi.apply(self.api, self._path, body)
        except ApiException as error:
            if error.status != 409:
                raise
            raise Tune16Error(
                f"InferenceService {self.name}: somebody else has set what this run would change: "
                f"{kubeapi.message(error)} Undo that change, or remove the InferenceService."
            ) from None

    def delete(self) -> None:
        try:
            kubeapi.send(self.api, "DELETE", self._path)
        except ApiException as error:
            if error.status != 404:
                raise

    def pods(self) -> list[Json]:
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        query = {"labelSelector": f"serving.kserve.io/inferenceservice={self.name}"}
        found: list[Json] = kubeapi.send(self.api, "GET", path, query=query)["items"]
        return found


def deploy(manifest: Json, path: str, placing: Placing, config: DeployConfig) -> str:
    """Serve a published version.

    Args:
        manifest: the version's manifest, from the step upload.
        path: ``prefix/model-name`` in the connection's bucket; its last part names the endpoint.
        placing: the connection, the registry's ids, and GPU nodes.
        config: what serves it; nothing is done where it names nothing.

    Returns:
        The endpoint's address; empty where nothing is deployed.

    Raises:
        Tune16Error: it did not become ready or did not answer; what was served before serves.
    """
    if not config.runtime:
        say("deploy", "no server is named in serving_runtime: nothing deployed")
        return ""
    setting = f"deploy.runtime {config.runtime}"
    with kubeapi.explained(setting):
        api = kubeapi.connect(f"{setting}: endpoints are for a cluster, where the step deploy runs in a pod.")
        pod = kubeapi.own_pod(api)
        body = describe(manifest, path, config.runtime, placing, pod)
        service = _Service(api, body["metadata"]["namespace"], body["metadata"]["name"])
        before = service.read()
        _check_owner(before, manifest)
        served = service.last_served() if before else None  # what somebody has taken away stays away
        try:
            service.apply(body)
        except Exception as error:
            if not kubeapi.passes(error):
                raise  # refused: nothing has changed
            raise Tune16Error(f"{_why(error)} {_roll_back(service, body, served, before is not None)}") from None
        try:
            url = _wait(service, alias(path, manifest["version"], config.runtime))
        except (Tune16Error, ApiException, urllib3.exceptions.HTTPError) as error:
            raise Tune16Error(f"{_why(error)} {_roll_back(service, body, served, before is not None)}") from None
        kubeapi.patiently(lambda: service.remember(body), POLL_SECONDS)
        return url


def _check_owner(before: Json | None, manifest: Json) -> None:
    """Refuse an InferenceService that is somebody else's, before anything is changed.

    Raises:
        Tune16Error: it is.
    """
    if before is None:
        return
    found = before["metadata"].get("annotations", {}).get(OWNER)
    if found != owner(manifest):
        raise Tune16Error(
            f"InferenceService {before['metadata']['name']}: belongs to {found or 'somebody else'}. Choose "
            "another last part for destination_path, or remove it."
        )


def _why(error: Exception) -> str:
    return kubeapi.message(error) if isinstance(error, ApiException) else str(error)


def _roll_back(service: _Service, body: Json, served: Json | None, was_there: bool) -> str:
    """Bring back what has served before, and say what that is; only what this step has made is removed."""
    try:
        if served is None and was_there:
            return "It was there before this step, so it stays applied; whether it serves is not known."
        if served is None:
            kubeapi.patiently(service.delete, POLL_SECONDS)
            return "It was removed; nothing was served before."
        kubeapi.patiently(lambda: service.apply(served), POLL_SECONDS)
    except (Tune16Error, ApiException, urllib3.exceptions.HTTPError) as error:
        return f"Going back failed as well: {_why(error)}"
    if served == body:
        return "It has served before, and stays applied."
    return f"{served['metadata']['annotations'][VERSION]} serves on."


def _wait(service: _Service, served: str) -> str:
    """Wait until the version is ready and has answered; returns the endpoint's address.

    Raises:
        Tune16Error: it took too long, with the last reason that the cluster or the endpoint gave.
    """
    started, reason = time.monotonic(), ""
    while time.monotonic() - started < PATIENCE_SECONDS:
        url, now = _look(service, served)
        if url:
            return url
        if now != reason:
            say("deploy", f"waiting: {now}")
        reason = now
        time.sleep(POLL_SECONDS)
    raise Tune16Error(f"{served} was not serving within {PATIENCE_SECONDS / 60:.0f} minutes: {reason}.")


def _look(service: _Service, served: str) -> tuple[str, str]:
    """The address of the endpoint that has answered, else why it has not."""
    try:
        found = service.read()
        if found is None:
            raise Tune16Error(f"InferenceService {service.name} was removed while this step waited for it.")
        reason = _not_ready(found, service.pods())
    except (ApiException, urllib3.exceptions.HTTPError) as error:
        if not kubeapi.passes(error):
            raise
        return "", f"the cluster's API is away: {_why(error)}"
    return ("", reason) if reason else _question(found, served)


def _not_ready(service: Json, pods: list[Json]) -> str:
    """Why it is not ready: what its youngest pod waits for, else what its condition says; empty if it is ready."""
    ready: Json = next((c for c in service.get("status", {}).get("conditions", []) if c["type"] == "Ready"), {})
    youngest = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")), default=None)
    waiting = _pod_reason(youngest) if youngest else ""
    if ready.get("status") == "True" and not waiting:
        return ""
    return waiting or str(ready.get("message") or ready.get("reason") or "the cluster has not looked at it yet")


def _pod_reason(pod: Json) -> str:
    """What a pod waits for or fails of; empty if nothing is wrong with it."""
    status = pod.get("status", {})
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        waiting = container.get("state", {}).get("waiting", {})
        ended = container.get("lastState", {}).get("terminated", {})
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            last = f"; it ended with exit code {ended['exitCode']} ({ended.get('reason')})" if ended else ""
            return f"container {container['name']}: {waiting['reason']} {waiting.get('message', '')}".strip() + last
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"no node takes it: {condition.get('message', condition.get('reason'))}"
    return ""


def _question(service: Json, served: str) -> tuple[str, str]:
    """Ask the new version one question: the endpoint's address, else why it has none yet."""
    status = service["status"]
    url = str(status.get("address", {}).get("url") or status.get("url") or "")
    if not url:
        return "", "it has no address"
    # The address of a headless service lacks the pods' port; that of another has its own.
    ports = ["", f":{_PORT}"] if urlsplit(url).port is None and urlsplit(url).scheme == "http" else [""]
    why = ""
    for port in ports:
        place, why = _ask(f"{url.rstrip('/')}{port}", served)
        if place:
            return place, ""
    return "", why


def _ask(url: str, served: str) -> tuple[str, str]:
    """The address if the version at `url` answers, else why not. Over TLS the account's token goes along."""
    token = _TOKEN_FILE.read_text().strip() if url.startswith("https://") and _TOKEN_FILE.is_file() else ""
    endpoint = Endpoint(url, token)
    try:
        if served not in endpoint.list_models():
            return "", f"{url} still serves the version before"
        answer = endpoint.ask(served, _QUESTION, _ANSWER).strip()
    except Tune16Error as error:
        return "", str(error).rstrip(".")
    if not answer:
        return "", f"{url} gives an empty answer"
    say("deploy", f"{url} serves {served}; asked who it is, it says: {answer[:80]}")
    return url, ""
