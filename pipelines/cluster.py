"""Finding the cluster: the Kubernetes API with token and namespace, and the pipeline server with address and CA.

Flags take precedence, then the variables ``TUNE16_HOST``, ``TUNE16_TOKEN``, ``TUNE16_NAMESPACE`` and ``TUNE16_CA``,
then the login of ``oc`` (kubeconfig), then the service account of the pod in which this runs. A token is never a flag:
flags are visible to everyone on the machine. The login's token is sent only over TLS or to this machine.
"""

import base64
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3
from kubernetes import client, config
from kubernetes.client.rest import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.incluster_config import InClusterConfigLoader

from components.kubernetes import account
from components.kubernetes import api as kubeapi
from components.kubernetes.api import conditions, sentence
from components.runtime.errors import Tune16Error

PIPELINE_SERVER = ("datasciencepipelinesapplications.opendatahub.io", "v1", "datasciencepipelinesapplications")
_CONSOLE_LINK = ("console.openshift.io", "v1", "consolelinks")
_INSIDE = "the pod's service account"
_RUN_LABEL = "pipeline/runid"
_WORKFLOWS = "/apis/argoproj.io/v1alpha1/namespaces/{namespace}/workflows"
_DASHBOARD_LINK = "rhodslink"  # what OpenShift AI calls its entry in the console's menu


@dataclass(frozen=True)
class Cluster:
    """Access to a Kubernetes API: the client, the namespace that Tune16 works in, and the origin of the login."""

    api: client.ApiClient
    namespace: str
    origin: str

    @property
    def token(self) -> str:
        """The bearer token; empty where the login uses certificates."""
        return str(self.api.configuration.api_key.get("authorization", "")).rpartition(" ")[2]  # without Bearer

    @property
    def inside(self) -> bool:
        """Whether this runs in a pod of the cluster."""
        return self.origin.endswith(_INSIDE)

    def get(self, path: str, **query: Any) -> Any:
        """GET a path of the API as plain JSON.

        Raises:
            kubernetes.client.rest.ApiException: the API refuses; see :func:`explained`.
        """
        return self.send("GET", path, query=query)

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: dict[str, Any] | None = None,
        answer: str = "object",
        **options: Any,
    ) -> Any:
        """Send one request; see :func:`components.kubernetes.api.send`."""
        return kubeapi.send(self.api, method, path, body, query, answer, **options)

    def list_run_pods(self, run_id: str) -> list[dict[str, Any]]:
        """The pods of a pipeline run, oldest first.

        The pipeline server's own answer names nodes of the workflow, not pods (kubeflow/pipelines#14007).
        """
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        pods: list[dict[str, Any]] = self.get(path, labelSelector=f"{_RUN_LABEL}={run_id}")["items"]
        return sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))

    def find_workflow(self, run_id: str) -> dict[str, Any] | None:
        """The workflow of a pipeline run; None if it was removed, or this account may not read workflows."""
        found = self.look(_WORKFLOWS, labelSelector=f"{_RUN_LABEL}={run_id}")
        return next(iter(found["items"]), None) if found else None

    def look(self, path: str, **query: Any) -> Any:
        """GET optional information; None if it does not exist or may not be read."""
        return kubeapi.look(self.api, path.format(namespace=self.namespace), **query)

    def read_log(self, pod: str, last: int = 0) -> str:
        """The log of a pod's main container, or its `last` lines."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log"
        query = {"container": "main", **({"tailLines": last} if last else {})}
        return str(self.send("GET", path, query=query, answer="str"))

    def read_secret(self, name: str, wanted: Collection[str]) -> dict[str, str]:
        """The `wanted` keys of a Secret, as far as it has them.

        Raises:
            NotFoundError: there is no such Secret.
            ForbiddenError: this account may not read it.
        """
        with explained(self, f"read the Secret {name}"):
            secret = self.get(f"/api/v1/namespaces/{self.namespace}/secrets/{name}")
        data = {key: value for key, value in (secret.get("data") or {}).items() if key in wanted}
        return {key: base64.b64decode(value).decode(errors="replace") for key, value in data.items()}


@dataclass(frozen=True)
class ServerAddress:
    """Address of the pipeline server: URL, bearer token (empty: none), and CA file (empty: the system's CAs)."""

    url: str
    token: str
    ca: str


def find_cluster(namespace: str = "", ca: str = "") -> Cluster:
    """Find the Kubernetes API.

    Raises:
        Tune16Error: there is no login.
    """
    settings = client.Configuration()
    settings.retries = False
    try:
        own, origin = _load_kubeconfig(settings)
    except (ConfigException, OSError) as error:
        if not account.token():
            raise Tune16Error(f"Not logged in to a cluster ({error}). Log in with `oc login`.") from None
        files = (str(account.FOLDER / name) for name in ("token", "ca.crt"))
        InClusterConfigLoader(*files).load_and_set(settings)
        own, origin = account.namespace(), _INSIDE
    token = os.environ.get("TUNE16_TOKEN")
    if token:
        settings.api_key["authorization"] = f"Bearer {token}"
        settings.refresh_api_key_hook = None  # otherwise the next request restores the login's token
        settings.cert_file = settings.key_file = None
        origin = f"TUNE16_TOKEN, {origin}"
    chosen_ca = ca or os.environ.get("TUNE16_CA", "")
    if chosen_ca and not settings.ssl_ca_cert:
        settings.ssl_ca_cert = _existing_ca(chosen_ca)
    return Cluster(client.ApiClient(settings), namespace or os.environ.get("TUNE16_NAMESPACE") or own, origin)


def find_server(cluster: Cluster | None, host: str = "", ca: str = "") -> ServerAddress:
    """Find the pipeline server: the given `host`, which needs no login, or the one in the namespace.

    Raises:
        Tune16Error: there is none, or it is not ready yet.
    """
    host = host or given_host()
    ca = ca or os.environ.get("TUNE16_CA", "") or os.environ.get("SSL_CERT_FILE", "")
    if not host:
        if cluster is None:
            raise Tune16Error("No pipeline server is known. Log in with `oc login`, or give its address with --host.")
        host = _server_in_namespace(cluster)
    if not ca and cluster is not None and cluster.inside:
        ca = account.service_ca(host)
    url = (host if "://" in host else f"https://{host}").rstrip("/")
    is_private = urlsplit(url).scheme == "https" or urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    token = os.environ.get("TUNE16_TOKEN", "") or (cluster.token if cluster and is_private else "")
    return ServerAddress(url, token, _existing_ca(ca))


def given_host() -> str:
    """The pipeline server that the environment names."""
    return os.environ.get("TUNE16_HOST", "")


def server_object(cluster: Cluster) -> dict[str, Any]:
    """The namespace's DataSciencePipelinesApplication.

    Raises:
        Tune16Error: there is none, or it may not be read.
    """
    group, version, plural = PIPELINE_SERVER
    missing = Tune16Error(
        f"The namespace {cluster.namespace} has no pipeline server. Apply manifests/overlays/openshift-ai, create one "
        "in the dashboard, or use --namespace. For upstream Kubeflow Pipelines, use --host."
    )
    try:
        with explained(cluster, "read the pipeline server"):
            found = cluster.get(f"/apis/{group}/{version}/namespaces/{cluster.namespace}/{plural}")["items"]
    except NotFoundError:
        raise missing from None
    if not found:
        raise missing
    return dict(found[0])


def not_ready(server: dict[str, Any]) -> str:
    """Why a DataSciencePipelinesApplication is not ready; empty if it is."""
    said = conditions(server)
    ready = said.pop("Ready", None)
    if ready is None:
        return "its operator has not reconciled it yet"
    if ready["status"] == "True":
        return ""
    others = [
        f"{name}: {sentence(str(found.get('message') or '')) or found.get('reason')}"
        for name, found in said.items()
        if found["status"] != "True"
    ]
    return sentence(str(ready.get("message") or "")) or "; ".join(others) or str(ready.get("reason"))


def find_dashboard(cluster: Cluster | None) -> str:
    """The URL of the OpenShift AI dashboard, from its entry in the console's menu; empty if there is none."""
    if cluster is None:
        return ""
    group, version, plural = _CONSOLE_LINK
    try:
        link = cluster.get(f"/apis/{group}/{version}/{plural}/{_DASHBOARD_LINK}")
    except (ApiException, urllib3.exceptions.HTTPError):
        return ""  # only used for a link
    return str(link["spec"]["href"]).rstrip("/")


class NotFoundError(Tune16Error):
    """The object is not on the cluster, or the cluster does not know its kind."""


class ForbiddenError(Tune16Error):
    """The account may not do that."""


class NotStartedError(Tune16Error):
    """The object does not exist yet, such as the log of a container before it runs."""


@contextmanager
def explained(cluster: Cluster, action: str) -> Iterator[None]:
    """Turn the API's refusals into messages; `action` completes "may not …".

    Raises:
        NotFoundError: status 404.
        ForbiddenError: status 403.
        Tune16Error: any other refusal, or no answer.
    """
    where = cluster.api.configuration.host
    try:
        yield
    except ApiException as error:
        if error.status == 401:
            remedy = "Renew TUNE16_TOKEN." if "TUNE16_TOKEN" in cluster.origin else f"Log in again: oc login {where}"
            raise Tune16Error(f"{where}: the login ({cluster.origin}) is invalid or has expired. {remedy}") from None
        if error.status == 403:
            raise ForbiddenError(
                f"This account may not {action} in namespace {cluster.namespace}. {_right_for(action)}"
            ) from None
        if error.status == 400 and "waiting to start" in str(error.body):
            raise NotStartedError(f"{where}: cannot {action} yet.") from None
        if error.status == 404:
            raise NotFoundError(f"{where}: cannot {action} in namespace {cluster.namespace}: not found.") from None
        raise Tune16Error(f"{where}: cannot {action}: {error.status} {error.reason}.") from None
    except urllib3.exceptions.HTTPError as error:
        raise unreachable(where, error) from None


# Who can grant a right, by a word in the action.
_RIGHTS = {
    "nodes": "Nodes belong to the whole cluster: ask its administrator for view on nodes (ClusterRole cluster-reader).",
    "review": "Only the role admin may review other accounts: ask the namespace's owner for it.",
    "Secret": "Ask its owner for the role edit; an account of a pod needs a Role that names the Secret.",
    "pipeline server": "Ask its owner for get on datasciencepipelinesapplications, or use --host.",
    "serving runtimes": "Ask its owner for list on servingruntimes.serving.kserve.io.",
    "quotas": "Ask its owner for list on resourcequotas, which the role view includes.",
    "the image": "Ask the owner of the image's namespace for get on imagestreamtags (role registry-viewer).",
    "logs": "Ask its owner for get on pods/log, which the role view includes.",
    "pods": "Ask its owner for list on pods, which the role view includes.",
    "queue": "Ask its owner for get on localqueues.kueue.x-k8s.io.",
}


def _right_for(action: str) -> str:
    found = next((remedy for word, remedy in _RIGHTS.items() if word in action), "")
    return found or f"Ask its owner for the right to {action}, or choose another namespace with --namespace."


def unreachable(where: str, error: Exception) -> Tune16Error:
    """The error for a server that does not answer."""
    text = " ".join(str(getattr(error, "reason", None) or error).split())
    if "certificate" in text.lower() or "ssl" in text.lower():
        return Tune16Error(
            f"{where}: its certificate is not trusted ({text}). Give its CA: --ca ca.crt, or TUNE16_CA. "
            "OpenShift's own is in the ConfigMap default-ingress-cert in openshift-config-managed."
        )
    refused = isinstance(error, urllib3.exceptions.NewConnectionError)  # urllib3 counts it as a time-out too
    if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
        return Tune16Error(f"{where}: no answer in time. Check the network, or try again later.")
    return Tune16Error(f"{where}: cannot be reached ({text}). Check the address and the network.")


def _load_kubeconfig(settings: client.Configuration) -> tuple[str, str]:
    """Load the login of `oc` into `settings`; returns its namespace and its description."""
    file = os.environ.get("KUBECONFIG")  # read here: the library reads it once, when it is imported
    config.load_kube_config(file, client_configuration=settings)
    _, context = config.list_kube_config_contexts(file)
    return context["context"].get("namespace") or "default", f"the kubeconfig's context {context['name']}"


def _server_in_namespace(cluster: Cluster) -> str:
    server = server_object(cluster)
    name, why = server["metadata"]["name"], not_ready(server)
    if why:
        raise Tune16Error(f"The pipeline server {name} in {cluster.namespace} is not ready: {why}. Try again later.")
    if cluster.inside:
        return f"https://ds-pipeline-{name}.{cluster.namespace}.svc.cluster.local:8443"
    external = server.get("status", {}).get("components", {}).get("apiServer", {}).get("externalUrl")
    if external:
        return str(external)
    try:
        with explained(cluster, "read the pipeline server's route"):
            route = cluster.get(
                f"/apis/route.openshift.io/v1/namespaces/{cluster.namespace}/routes/ds-pipeline-{name}",
            )
    except NotFoundError:
        raise Tune16Error(
            f"The pipeline server {name} in {cluster.namespace} has no Route, so it cannot be reached from here. Set "
            f"spec.apiServer.enableOauth: true in it (oc edit dspa {name}), or give its address with --host."
        ) from None
    return f"https://{route['spec']['host']}"


def _existing_ca(path: str) -> str:
    if path and not Path(path).is_file():
        raise Tune16Error(f"{path}: the CA file does not exist. Correct --ca, TUNE16_CA or SSL_CERT_FILE.")
    return path
