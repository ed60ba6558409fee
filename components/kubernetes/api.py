"""The Kubernetes API in plain JSON, for kinds that the client has no classes for, and its refusals as messages."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.rest import ApiException

from components.kubernetes import account
from components.runtime.errors import Tune16Error
from components.runtime.retry import OUTAGE_SECONDS, Answer, retry

FIELD_MANAGER = "tune16"
_LONGEST_LABEL = 63  # of a DNS name
_LONGEST_NAME = 40  # of these, which the names of the service's parts and its host's label share

_APPLY = "application/apply-patch+yaml"  # JSON is YAML
PASSING_FAULTS = {429, 500, 502, 503, 504}  # transient statuses


def send(
    api: client.ApiClient,
    method: str,
    path: str,
    body: Any = None,
    query: dict[str, Any] | None = None,
    answer: str = "object",
    timeout: tuple[float, float] = (10, 30),
    content_type: str = "application/json",
) -> Any:
    """Send one request with a JSON body, and read the answer: JSON, or text where `answer` is ``str``.

    `timeout` is in seconds, to connect and to read.

    Raises:
        kubernetes.client.rest.ApiException: the API refuses.
        urllib3.exceptions.HTTPError: it gives no answer.
    """
    try:
        found = api.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params={"Accept": "*/*", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
            response_type="object",
            _return_http_data_only=True,
            _preload_content=answer != "str",  # the client would read text that is JSON as such
            _request_timeout=timeout,
        )
        return found.data.decode(errors="replace") if answer == "str" else found
    except ApiException as error:
        refuse_certificate(error)
        raise


def refuse_certificate(error: Any) -> None:
    """Raise the error of an untrusted certificate itself: the clients turn it into a refusal with the status 0.

    Raises:
        urllib3.exceptions.SSLError: that is what it was.
    """
    if not error.status:
        raise urllib3.exceptions.SSLError(str(error.reason)) from None


def look(api: client.ApiClient, path: str, **query: Any) -> Any:
    """GET optional information; None where it does not exist, may not be read, or there is no answer."""
    try:
        return send(api, "GET", path, query=query)
    except (ApiException, urllib3.exceptions.HTTPError):
        return None


def apply(api: client.ApiClient, path: str, body: dict[str, Any]) -> Any:
    """Server-side apply of one object: its fields become ours, and fields that others set stay theirs.

    Raises:
        kubernetes.client.rest.ApiException: the API refuses; 409 where another manager has a field of ours.
        urllib3.exceptions.HTTPError: it gives no answer.
    """
    return send(api, "PATCH", path, body, {"fieldManager": FIELD_MANAGER}, content_type=_APPLY)


def connect(otherwise: str) -> client.ApiClient:
    """The API of the cluster that this runs in, or of KUBECONFIG.

    Raises:
        Tune16Error: this is not a pod; `otherwise` is the message.
    """
    try:
        if "KUBECONFIG" in os.environ:
            config.load_kube_config(os.environ["KUBECONFIG"])
        else:
            config.load_incluster_config()
    except config.ConfigException:
        raise Tune16Error(otherwise) from None
    return client.ApiClient()


def own_pod(api: client.ApiClient) -> dict[str, Any]:
    """The pod that this runs in.

    Raises:
        Tune16Error: it is not a pod.
        kubernetes.client.rest.ApiException: the API refuses.
        urllib3.exceptions.HTTPError: it gives no answer.
    """
    name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
    namespace = os.environ.get("KFP_NAMESPACE") or account.namespace()
    if not name or not namespace:
        raise Tune16Error("This is not a pod of a cluster. This step needs one: it creates objects beside its own pod.")
    pod: dict[str, Any] = send(api, "GET", f"/api/v1/namespaces/{namespace}/pods/{name}")
    return pod


def conditions(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the controllers say of an object in its status, by type."""
    return {entry["type"]: entry for entry in found.get("status", {}).get("conditions", [])}


def main_container(pod: dict[str, Any]) -> dict[str, Any]:
    """The container of a pipeline step's pod that the step itself runs in; the others are the workflow's own."""
    found: dict[str, Any] = next(entry for entry in pod["spec"]["containers"] if entry["name"] == "main")
    return found


def service_name(path: str) -> str:
    """A name that Kubernetes takes, from the last part of ``destination_path``."""
    name = re.sub(r"[^a-z0-9]+", "-", path.rpartition("/")[2].lower()).strip("-")
    name = name if name[:1].isalpha() else f"model-{name}"
    return name[:_LONGEST_NAME].rstrip("-")


def check_service_name(path: str, namespace: str) -> None:
    """Check that the endpoint of the model at `path` gets a valid address: KServe makes one label of both names.

    Raises:
        Tune16Error: it would have more than 63 characters.
    """
    label = f"{service_name(path)}-predictor-{namespace}"
    if len(label) > _LONGEST_LABEL:
        raise Tune16Error(
            f"deploy.runtime: the endpoint's address would begin with {label!r}, {len(label)} characters, and DNS "
            f"allows {_LONGEST_LABEL}. Shorten the last part of destination_path by {len(label) - _LONGEST_LABEL}."
        )


def patiently(request: Callable[[], Answer], pause: float) -> Answer:
    """A request that may be repeated, so that an API outage of minutes does not end the work of hours."""
    return retry(request, passes, outage=OUTAGE_SECONDS, pause=pause)


def passes(error: BaseException) -> bool:
    """Whether a request that failed so may work a little later."""
    if isinstance(error, ApiException):
        return error.status in PASSING_FAULTS
    reason = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
    return isinstance(error, urllib3.exceptions.HTTPError) and not isinstance(reason, urllib3.exceptions.SSLError)


@contextmanager
def explained(setting: str) -> Iterator[None]:
    """Refusals of the cluster's API as messages; `setting` is what asked for the cluster."""
    try:
        yield
    except ApiException as error:
        said = sentence(message(error))
        remedy = " Apply manifests/base, which brings its Role." if " cannot " in said else ""
        raise Tune16Error(f"{setting}: the cluster refuses: {error.status} {said}.{remedy}") from None
    except urllib3.exceptions.HTTPError as error:
        raise Tune16Error(f"{setting}: the cluster's API cannot be reached ({error}).") from None


def sentence(text: str) -> str:
    """A controller's message in one line, without its final punctuation, to become a part of a sentence."""
    return " ".join(text.split()).rstrip(" .;,:")


def message(error: ApiException) -> str:
    """The API's message, from the Status object around it."""
    try:
        text = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        text = error.body or error.reason
    return " ".join(str(text).split())[:500]
