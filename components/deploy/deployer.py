"""The step deploy: the published version behind an endpoint, or the previous one still serving.

The InferenceService is applied by the server (server-side apply), so that what people add to it stays. The new version
counts when it is ready, its server names it, and it answers a question; until then the old one serves, and if the
new one fails, the old one is applied again.
"""

import json
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import urllib3
from kubernetes import client
from kubernetes.client.rest import ApiException

from components.config import DeployConfig
from components.deploy.objects import (
    ALIAS,
    API,
    NO_KSERVE,
    OWNER,
    VERSION,
    Json,
    Placing,
    alias,
    describe,
    owner,
)
from components.kubernetes import account
from components.kubernetes import api as kubeapi
from components.kubernetes.pods import why_it_waits
from components.playground.client import Endpoint, Sampling
from components.runtime.errors import Tune16Error
from components.runtime.steps import say

POLL_SECONDS = 5.0
PATIENCE_SECONDS = 1800.0  # fetching 13 GiB, loading them and compiling kernels take their time
GOING_BACK_SECONDS = 600.0  # for the previous version to become ready again

_QUESTION = [{"role": "user", "content": "Who are you?"}]
_ANSWER = Sampling(temperature=0, max_tokens=16)
_STOPPED = "serving.kserve.io/stop"  # the dashboard sets it
_HOPELESS = {"InvalidSpec"}  # states that do not end by waiting
_REFUSED, _REFUSED_LOOKS = "KServe rejects this InferenceService", 3  # in a row
_LOG_LINES = 3
_REMEMBERED = "inferenceservice.json"


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
        """The ConfigMap with the last InferenceService that answered. An annotation would restart all pods."""
        return f"/api/v1/namespaces/{self.namespace}/configmaps/{self.name}-served"

    def read(self) -> Json | None:
        return self._get(self._path)

    def last_served(self) -> Json | None:
        found = self._get(self._memory)
        return json.loads(found["data"][_REMEMBERED]) if found else None

    def remember(self, body: Json) -> None:
        """Store what has answered; it is deleted with the InferenceService."""
        found = self.read()
        owner = {"apiVersion": API, "kind": "InferenceService", "name": self.name}
        owners = [{**owner, "uid": found["metadata"]["uid"]}] if found else []
        labels = {"app.kubernetes.io/managed-by": "tune16"}
        metadata = {"name": f"{self.name}-served", "labels": labels, "ownerReferences": owners}
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
            if error.status == 404:
                raise Tune16Error(f"deploy.runtime: {NO_KSERVE}") from None
            if error.status != 409:
                raise
            raise Tune16Error(
                f"InferenceService {self.name}: another manager has set fields that this run would change: "
                f"{kubeapi.sentence(kubeapi.message(error))}. Undo that change, or remove the InferenceService."
            ) from None

    def delete(self) -> None:
        try:
            kubeapi.send(self.api, "DELETE", self._path)
        except ApiException as error:
            if error.status != 404:
                raise

    def youngest_pod(self) -> Json | None:
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        query = {"labelSelector": f"serving.kserve.io/inferenceservice={self.name}"}
        found: list[Json] = kubeapi.send(self.api, "GET", path, query=query)["items"]
        return max(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp")), default=None)

    def look(self, path: str, **query: Any) -> Any:
        return kubeapi.look(self.api, path, **query)

    def last_words(self, pod: Json) -> str:
        """The last lines of a container that has crashed."""
        for status in pod.get("status", {}).get("containerStatuses", []):
            if status.get("lastState", {}).get("terminated") or status.get("state", {}).get("terminated"):
                path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}/log"
                previous = {"previous": "true"} if status.get("lastState", {}).get("terminated") else {}
                query = {"container": status["name"], "tailLines": _LOG_LINES, **previous}
                with suppress(ApiException, urllib3.exceptions.HTTPError):
                    text = str(kubeapi.send(self.api, "GET", path, query=query, answer="str"))
                    return kubeapi.sentence(text)[-300:]
        return ""


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
        say("deploy", "serving_runtime is empty: nothing deployed")
        return ""
    setting = f"deploy.runtime {config.runtime}"
    with kubeapi.explained(setting):
        api = kubeapi.connect(f"{setting}: endpoints need a cluster, where the step deploy runs in a pod.")
        pod = kubeapi.own_pod(api)
        body = describe(manifest, path, config.runtime, placing, pod)
        service = _Service(api, body["metadata"]["namespace"], body["metadata"]["name"])
        before = service.read()
        _check_owner(before, manifest)
        if before:
            _check_not_stopped(before)
        served = service.last_served() if before else None  # what somebody has removed stays removed
        try:
            service.apply(body)
        except Exception as error:
            if not kubeapi.passes(error):
                raise  # refused: nothing has changed
            raise Tune16Error(f"{_why(error)}. {_roll_back(service, body, served, before is not None)}") from None
        try:
            url = _wait(service, alias(path, manifest["version"], config.runtime))
        except (Tune16Error, ApiException, urllib3.exceptions.HTTPError) as error:
            raise Tune16Error(f"{_why(error)}. {_roll_back(service, body, served, before is not None)}") from None
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
            f"InferenceService {before['metadata']['name']}: belongs to {found or 'another owner'}. Choose "
            "another last part for destination_path, or remove it."
        )


def _check_not_stopped(service: Json) -> None:
    """Refuse an endpoint that somebody has stopped.

    Raises:
        Tune16Error: it is.
    """
    if service["metadata"].get("annotations", {}).get(_STOPPED) == "true":
        raise Tune16Error(
            f"InferenceService {service['metadata']['name']} is stopped. Start it in the dashboard, or remove its "
            f"annotation {_STOPPED}, and retry the run."
        )


def _why(error: Exception) -> str:
    """Why something failed, without the final punctuation."""
    return kubeapi.sentence(kubeapi.message(error) if isinstance(error, ApiException) else str(error))


def _roll_back(service: _Service, body: Json, served: Json | None, was_there: bool) -> str:
    """Restore what served before, and say what that is; only what this step has made is removed."""
    try:
        if served is None and was_there:
            return "It existed before this step, so it stays applied; whether it serves is unknown."
        if served is None:
            kubeapi.patiently(service.delete, POLL_SECONDS)
            return "It was removed; nothing was served before."
        kubeapi.patiently(lambda: service.apply(served), POLL_SECONDS)
    except (Tune16Error, ApiException, urllib3.exceptions.HTTPError) as error:
        return f"Rolling back failed as well: {_why(error)}."
    if served == body:
        return "It served before, and stays applied."
    return _wait_for_the_one_before(service, served["metadata"]["annotations"])


def _wait_for_the_one_before(service: _Service, annotations: Json) -> str:
    """What became of the version that was applied again."""
    name, version = annotations.get(ALIAS), annotations[VERSION]
    started, why = time.monotonic(), ""
    while name and time.monotonic() - started < min(GOING_BACK_SECONDS, PATIENCE_SECONDS):
        with suppress(ApiException, urllib3.exceptions.HTTPError):
            found = service.read()
            if found and kubeapi.conditions(found).get("Ready", {}).get("status") == "True":
                url, why = _question(found, name)
                if url:
                    return f"{version} still serves."
        time.sleep(POLL_SECONDS)
    return f"{version} is applied again, but not ready yet{f': {kubeapi.sentence(why)}' if why else ''}."


def _wait(service: _Service, served: str) -> str:
    """Wait until the version is ready and has answered; returns the endpoint's address.

    Raises:
        Tune16Error: it took too long, with the last reason that the cluster or the endpoint gave.
    """
    started, reason, num_refused = time.monotonic(), "", 0
    while time.monotonic() - started < PATIENCE_SECONDS:
        url, now = _look(service, served)
        if url:
            return url
        num_refused = num_refused + 1 if now.startswith(_REFUSED) else 0
        if num_refused >= _REFUSED_LOOKS:
            raise Tune16Error(f"{now}. Check `oc get servingruntimes`")
        if now != reason:
            say("deploy", f"waiting: {now}")
        reason = now
        time.sleep(POLL_SECONDS)
    raise Tune16Error(f"{served} was not serving within {PATIENCE_SECONDS / 60:.0f} minutes: {reason}")


def _look(service: _Service, served: str) -> tuple[str, str]:
    """The address of the endpoint that has answered, else why it has not."""
    try:
        found = service.read()
        if found is None:
            raise Tune16Error(f"InferenceService {service.name} was removed while this step waited for it.")
        _check_not_stopped(found)
        reason = _not_ready(found, service)
    except (ApiException, urllib3.exceptions.HTTPError) as error:
        if not kubeapi.passes(error):
            raise
        return "", f"the cluster's API does not answer: {_why(error)}"
    return ("", reason) if reason else _question(found, served)


def _not_ready(found: Json, service: _Service) -> str:
    """Why it is not ready: what its youngest pod waits for, what KServe says of the model, what its condition says."""
    failure = _failure(found)
    pod = service.youngest_pod()
    waiting = why_it_waits(service.look, pod) if pod else None
    if pod and waiting:
        words = service.last_words(pod)
        return f"{waiting.reason}{f'; its log ends: {words}' if words else ''}"
    ready = kubeapi.conditions(found).get("Ready", {})
    if ready.get("status") == "True":
        return ""
    said = kubeapi.sentence(str(ready.get("message") or ready.get("reason") or ""))
    return failure or said or "the cluster has not processed it yet"


def _failure(service: Json) -> str:
    """What KServe reports of the last model; empty where nothing went wrong.

    KServe never accepts a spec that it rejected, but its message may still be about an earlier spec: no field tells.
    """
    status = service.get("status", {})
    model = status.get("modelStatus", {})
    failed = model.get("lastFailureInfo") or {}
    said = kubeapi.sentence(str(failed.get("message") or ""))
    text = ": ".join(part for part in (str(failed.get("reason") or ""), said) if part)
    transition = model.get("transitionStatus")
    if transition in _HOPELESS:
        return f"{_REFUSED}: {text or transition}"
    return text if transition != "UpToDate" else ""


def _question(service: Json, served: str) -> tuple[str, str]:
    """Ask the new version one question: the endpoint's address, else why it has none yet."""
    status = service["status"]
    url = str(status.get("address", {}).get("url") or status.get("url") or "")
    if not url:
        return "", "it has no address yet"
    reasons = []
    for endpoint in Endpoint(url, account.token()).candidates():
        place, why = _ask(endpoint, served)
        if place:
            return place, ""
        reasons.append(why)
    # A closed port says less than the answer of a server.
    return "", next((why for why in reasons if "cannot be reached" not in why), reasons[0])


def _ask(endpoint: Endpoint, served: str) -> tuple[str, str]:
    """The address if the version behind it answers, else why not. The account's token goes over TLS only."""
    url = endpoint.url
    if not url.startswith("https://"):
        endpoint = replace(endpoint, token="")
    try:
        if served not in endpoint.list_models():
            return "", f"{url} still serves the previous version"
        answer = endpoint.ask(served, _QUESTION, _ANSWER).strip()
    except Tune16Error as error:
        return "", kubeapi.sentence(str(error))
    if not answer:
        return "", f"{url} returns an empty answer"
    say("deploy", f"{url} serves {served}; asked who it is, it says: {answer[:80]}")
    return url, ""
