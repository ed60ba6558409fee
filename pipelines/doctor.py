"""`tune16 doctor`: checks everything that a run needs on a cluster, from the login to the GPU, before it waits for one.

Every check gives one finding: ok, a problem with its remedy, or unknown if this account lacks a right or an earlier
check failed. Nothing is changed, except for a probe in the storage, which is removed at once.
"""

import base64
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from kubernetes.utils.quantity import parse_quantity

from components import images
from components.config import GPU, TOKEN_VARIABLES, Recipe
from components.deploy.objects import NO_KSERVE, SERVED_BY
from components.kubernetes.account import is_inside_only
from components.kubernetes.kueue import QUEUE_LABEL, why_never_admitted
from components.models.fetching import pin
from components.models.references import parse
from components.planning.disk import needed
from components.register.registrar import check_registry
from components.runtime.errors import Tune16Error
from components.runtime.report import size
from components.storage import s3
from pipelines import applied
from pipelines.cluster import (
    Cluster,
    ForbiddenError,
    NotFoundError,
    explained,
    find_cluster,
    find_server,
    given_host,
    not_ready,
    server_object,
)
from pipelines.options import find_shapes
from pipelines.outcome import connection_values
from pipelines.registry import Credentials, image_status
from pipelines.resources import RESOURCES
from pipelines.server import Json, PipelineServer
from pipelines.submission import newest_version, pipeline_spec

Known = TypeVar("Known")

_PULL_CONFIG = ".dockerconfigjson"  # of a pull secret
_UPSTREAM_RUNNER = "pipeline-runner"
_GPU_MEMORY_LABEL = "nvidia.com/gpu.memory"  # MiB, set by NVIDIA's GPU feature discovery
_INTERNAL_REGISTRY = "image-registry.openshift-image-registry.svc:5000"


@dataclass(frozen=True)
class Finding:
    """What one check found: its name, its outcome, and one line of text."""

    check: str
    outcome: Literal["ok", "problem", "unknown"]
    text: str


class UnknownError(Tune16Error):
    """A check could not be made, which is not a problem by itself."""


@dataclass
class Context:
    """What is known so far: each check adds what the later ones need."""

    recipe: Recipe
    namespace: str = ""
    host: str = ""
    ca: str = ""
    timeout: float = 30
    found_cluster: Cluster | None = None
    found_server: PipelineServer | None = None
    _connection: dict[str, str] | None = None
    runner: str = "pipeline-runner-dspa"  # the steps' own account
    user: str = ""

    @property
    def cluster(self) -> Cluster:
        """The Kubernetes API."""
        return _known(self.found_cluster, "the login")

    def get(self, path: str, action: str) -> Any:
        """GET a path, with refusals explained."""
        with explained(self.cluster, action):
            return self.cluster.get(path.replace("{namespace}", self.cluster.namespace))


def examine(context: Context, names: Iterable[str] = ()) -> Iterator[Finding]:
    """Run all checks, or those with these `names`, in the order in which a run depends on them."""
    for name in names or _CHECKS:
        try:
            yield Finding(name, "ok", _CHECKS[name](context))
        except (UnknownError, ForbiddenError) as error:
            yield Finding(name, "unknown", str(error))
        except Tune16Error as error:
            yield Finding(name, "problem", str(error))


def refuse_unready(context: Context) -> None:
    """Refuse a run that the namespace is known not to support; what cannot be checked is accepted.

    Raises:
        Tune16Error: the connection's Secret, GPU nodes, quota or images do not suit the recipe; one line for each.
    """
    findings = examine(context, ("connection", "GPU", "quota", "queue", "images"))
    problems = [f"{found.check}: {found.text}" for found in findings if found.outcome == "problem"]
    if problems:
        raise Tune16Error("\n".join([*problems, "Nothing was started. Use --unchecked to start it anyway."]))


def _login(context: Context) -> str:
    cluster = find_cluster(context.namespace, context.ca)
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    with explained(cluster, "ask who it is"):
        try:
            answer = cluster.send("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
            name = answer["status"]["userInfo"]["username"]
        except Exception as error:
            if getattr(error, "status", None) != 404:
                raise
            cluster.get("/version")  # before Kubernetes 1.28
            name = "an unnamed user"
    context.found_cluster, context.user = cluster, name
    return f"{name} at {cluster.api.configuration.host}, by {cluster.origin}"


def _namespace(context: Context) -> str:
    try:
        context.get("/api/v1/namespaces/{namespace}", "see the namespace")
    except NotFoundError:
        name = context.cluster.namespace
        raise Tune16Error(
            f"there is no namespace {name}. Create it (oc new-project {name}) or use --namespace."
        ) from None
    return context.cluster.namespace


def _pipeline_server(context: Context) -> str:
    host = context.host or given_host()
    if host:
        context.runner = _UPSTREAM_RUNNER
        raise UnknownError(f"{host} was given; the namespace's own was not checked.")
    server = server_object(context.cluster)
    name = server["metadata"]["name"]
    context.runner = f"pipeline-runner-{name}"
    why = not_ready(server)
    if why:
        raise Tune16Error(f"{name} is not ready: {why}. See `oc describe dspa {name}`.")
    _check_same_storage(context, server)
    if server["spec"].get("apiServer", {}).get("pipelineStore") != "kubernetes":
        return f"{name} is ready; it stores pipelines in its database: submit uploads them, oc apply does not"
    names = [entry["metadata"]["name"] for entry in applied.unlisted(context.cluster)]
    if names:
        raise Tune16Error(f"{applied.explain(context.cluster, names)} `tune16 submit` does this automatically.")
    return f"{name} is ready"


def _check_same_storage(context: Context, server: Json) -> None:
    """Check that the server stores its files in the connection's bucket: a wrong one it creates without notice.

    Raises:
        Tune16Error: it is another host or bucket.
    """
    storage = server["spec"].get("objectStorage", {}).get("externalStorage", {})
    try:
        values = connection_values(context.cluster, context.recipe.cluster.connection)
    except Tune16Error:
        return  # reported by its own check
    secret = storage.get("s3CredentialsSecret", {}).get("secretName")
    if secret != context.recipe.cluster.connection:
        return  # another storage, on purpose
    scheme, port = storage.get("scheme", "https"), storage.get("port")
    host = _place(f"{scheme}://{storage.get('host')}{f':{port}' if port else ''}")
    endpoint = _place(values["AWS_S3_ENDPOINT"])
    for what, own, theirs in (("host", host, endpoint), ("bucket", storage.get("bucket"), values["AWS_S3_BUCKET"])):
        if own != theirs:
            raise Tune16Error(
                f"the pipeline server {server['metadata']['name']} keeps its files in the {what} {own}, but the "
                f"connection {secret} has {theirs}. Correct {what} in the overlay's storage.yaml."
            )


def _place(address: str) -> str:
    """Host and port of an address, without the scheme's default port."""
    parts = urlsplit(address if "://" in address else f"https://{address}")
    usual = {"https": 443, "http": 80}.get(parts.scheme)
    return f"{parts.hostname}:{parts.port}" if parts.port and parts.port != usual else str(parts.hostname)


def _api(context: Context) -> str:
    address = find_server(context.found_cluster, context.host, context.ca)
    server = PipelineServer(address, context.timeout)
    server.check()
    context.found_server = server
    return f"{address.url} answers and accepts the token"


def _connection(context: Context) -> str:
    name = context.recipe.cluster.connection
    try:
        context._connection = connection_values(context.cluster, name)
    except NotFoundError:
        raise Tune16Error(
            f"there is no Secret {name}. Create the S3 connection in the dashboard and set cluster.connection to "
            "its Secret, or see manifests/components/connection."
        ) from None
    return f"the Secret {name} has all keys"


def _storage(context: Context) -> str:
    values = _known(context._connection, "the connection")
    with _as_the_steps(context):
        try:
            s3.check_writable(values["AWS_S3_BUCKET"], context.recipe.upload.path)
        except Tune16Error:
            if is_inside_only(values["AWS_S3_ENDPOINT"]) and not context.cluster.inside:
                raise UnknownError(f"{values['AWS_S3_ENDPOINT']} is reachable only inside the cluster.") from None
            raise
    return f"s3://{values['AWS_S3_BUCKET']}/{context.recipe.upload.path} is writable"


def _model(context: Context) -> str:
    """Model and data set, with the tokens and the storage that the steps would use."""
    if context.recipe.setup:
        return f"created by `tune16 submit {context.recipe.setup}`"
    with _as_the_steps(context):
        found = [pin(parse(context.recipe.preflight.model, "model")), pin(parse(context.recipe.preflight.data, "data"))]
    return " and ".join(str(reference) for reference in found)


def _as_the_steps(context: Context) -> AbstractContextManager[None]:
    """The environment of the steps: their storage and tokens, and none of this login's own."""
    values = dict(context._connection or {})
    with suppress(NotFoundError, ForbiddenError, UnknownError):  # an open model needs none, and a gated one reports it
        values |= context.cluster.read_secret(context.recipe.cluster.tokens, TOKEN_VARIABLES)
    return s3.environment(values)


def _gpu(context: Context) -> str:
    if not context.recipe.train.num_gpus:
        return "none is requested: training and evaluation run on the CPU"
    nodes = context.get("/api/v1/nodes", "list the nodes")["items"]
    cluster, wanted, num_nodes = context.recipe.cluster, context.recipe.train.num_gpus, context.recipe.train.num_nodes
    with_gpu = [node for node in nodes if int(node["status"].get("allocatable", {}).get(GPU, 0)) >= wanted]
    if not with_gpu:
        raise Tune16Error(f"no node offers {wanted} {GPU}. Add a GPU node, or have NVIDIA's GPU operator installed.")
    selected = [
        node for node in with_gpu if cluster.node_selector.items() <= node["metadata"].get("labels", {}).items()
    ]
    if not selected:
        raise Tune16Error(f"no GPU node has the labels {cluster.node_selector}. Correct cluster.node_selector.")
    needed = context.recipe.preflight.gpu_memory * 1024
    large = [node for node in selected if _gpu_memory(node, needed) >= needed]
    if not large:
        raise Tune16Error(
            f"no GPU has {context.recipe.preflight.gpu_memory} GiB: the largest has "
            f"{max(_gpu_memory(node, needed) for node in selected) / 1024:.1f}. Lower preflight.gpu_memory."
        )
    refused = {node["metadata"]["name"]: _refusing_taint(node, cluster.tolerations) for node in large}
    free = [name for name, taint in refused.items() if not taint]
    if not free:
        name, taint = next(iter(refused.items()))
        raise Tune16Error(f"{name} has the taint {taint}, which is not tolerated. Add it to cluster.tolerations.")
    if len(free) < num_nodes:
        raise Tune16Error(f"suitable nodes: {len(free)}, but train.num_nodes is {num_nodes}. Lower it.")
    return f"{len(free)} suitable: {', '.join(sorted(free)[:3])}"


def _disk(context: Context) -> str:
    """Whether a node has as much ephemeral storage as the largest step needs at once."""
    if context.recipe.setup:
        return "the demo needs little"
    with _as_the_steps(context):
        try:
            shape, teacher = find_shapes(context.recipe)
        except Tune16Error:
            raise UnknownError("not checked, because the model's sizes cannot be read.") from None
    amounts = needed(shape, context.recipe, teacher)
    step = max(amounts, key=lambda name: amounts[name])
    nodes = context.get("/api/v1/nodes", "list the nodes")["items"]
    disks = [node["status"].get("allocatable", {}).get("ephemeral-storage") for node in nodes]
    known = [int(parse_quantity(disk)) for disk in disks if disk]
    if not known:
        raise UnknownError(f"no node reports its disk; the step {step} needs {size(amounts[step])} at once.")
    if max(known) < amounts[step]:
        raise Tune16Error(
            f"the step {step} needs {size(amounts[step])} of disk at once, but the largest node offers "
            f"{size(max(known))}. Add a node with a larger disk, or request fewer GGUF files."
        )
    return f"up to {size(amounts[step])} (the step {step}); the largest node has {size(max(known))}"


def _quota(context: Context) -> str:
    """A quota below what a step needs is a problem; a quota that others use up now only makes the step wait."""
    quotas = context.get("/api/v1/namespaces/{namespace}/resourcequotas", "read the quotas")["items"]
    cpu = max((parse_quantity(needs[0]), step) for step, needs in RESOURCES.items())
    memory = max((parse_quantity(needs[1]), step) for step, needs in RESOURCES.items())
    num_gpus = context.recipe.train.num_gpus * context.recipe.train.num_nodes
    needed = {"cpu": cpu, "memory": memory, GPU: (num_gpus, "train"), "pods": (1, "train")}
    waits = ""
    for quota in quotas:
        if quota.get("spec", {}).get("scopes") or quota.get("spec", {}).get("scopeSelector"):
            continue  # it applies to other kinds of pods
        status = quota.get("status", {})
        for key, hard in status.get("hard", {}).items():
            kind = key.removeprefix("requests.").removeprefix("limits.")
            if kind not in needed:
                continue
            amount, step = needed[kind]
            allowed, used = parse_quantity(hard), parse_quantity(status.get("used", {}).get(key, 0))
            name, needs = quota["metadata"]["name"], f"the step {step} needs {_plain(kind, amount)}"
            if allowed < amount:
                raise Tune16Error(
                    f"the quota {name} allows {_plain(kind, allowed)} of {key}, but {needs}. Ask for a larger quota."
                )
            if allowed - used < amount:
                waits = f"; {needs} of {key} and waits: {name} has {_plain(kind, allowed - used)} left now"
    return f"{len(quotas)} quotas are large enough{waits}" if quotas else "none"


def _images(context: Context) -> str:
    names = sorted(set(_deployed_images(context) or images.IMAGE_OF_STEP.values()))
    for name in names:
        registry, _, rest = name.partition("/")
        repository, _, tag = rest.partition("@") if "@" in rest else rest.partition(":")
        if registry == _INTERNAL_REGISTRY:
            _check_internal_image(context, repository, tag)
        else:
            _check_external_image(registry, repository, tag, _pull_credentials(context, registry))
    return ", ".join(names)


def _queue(context: Context) -> str:
    """Whether Kueue's queue, if the GPU steps use one, exists and can ever admit them."""
    queue = _queue_of_train(context)
    if not queue:
        return "the GPU steps use none"
    cpu, memory = RESOURCES["train"]
    num_pods = context.recipe.train.num_nodes
    needs = {
        "cpu": num_pods * float(parse_quantity(cpu)),
        "memory": num_pods * float(parse_quantity(memory)),
        GPU: float(num_pods * context.recipe.train.num_gpus),
    }
    why = why_never_admitted(context.cluster.look, context.cluster.namespace, queue, needs)
    if why is None:
        raise UnknownError(f"this account may not read {queue} or its ClusterQueue.")
    if why:
        raise Tune16Error(f"{why}: the step train would wait forever. Ask the queue's administrator.")
    return f"{queue} can admit the step train"


def _queue_of_train(context: Context) -> str:
    """The queue that the pipeline's newest version uses for the step train; empty for none."""
    version = newest_version(context.found_server) if context.found_server else None
    platform = (version or {}).get("pipeline_spec", {}).get("platform_spec", {}).get("platforms", {})
    executors = platform.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    return str(executors.get("exec-train", {}).get("podMetadata", {}).get("labels", {}).get(QUEUE_LABEL, ""))


def _registry(context: Context) -> str:
    """The model registry, queried with this login's token; the steps use their own account's."""
    server = context.recipe.register.server
    if not server:
        return "register.server is not set"
    try:
        check_registry(server, context.cluster.token)
    except Tune16Error as error:
        if is_inside_only(server) and not context.cluster.inside:
            raise UnknownError(f"{server} is reachable only inside the cluster.") from None
        raise error from None
    return f"{server} answers"


def _serving(context: Context) -> str:
    """Whether the cluster has KServe and the ServingRuntime that the step deploy needs."""
    runtime = context.recipe.deploy.runtime
    if not runtime:
        return "no deployment is requested"
    path = "/apis/serving.kserve.io/v1alpha1/namespaces/{namespace}/servingruntimes"
    try:
        found = context.get(path, "see the serving runtimes")["items"]
    except NotFoundError:
        raise Tune16Error(NO_KSERVE) from None
    names = {entry["metadata"]["name"] for entry in found}
    formats = {name["name"] for entry in found for name in entry["spec"].get("supportedModelFormats", [])}
    wanted = SERVED_BY.get(runtime)
    if wanted and wanted not in names:
        raise Tune16Error(f"there is no ServingRuntime {wanted}. Apply manifests/components/serving.")
    if not wanted and "vLLM" not in formats:
        raise Tune16Error("no ServingRuntime here serves vLLM. See manifests/components/serving for how to add one.")
    return f"{wanted or 'a vLLM runtime'} is available"


def _runner(context: Context) -> str:
    """The rights of the steps' own account."""
    account = context.runner
    if not _may(context, account, {"group": "", "resource": "secrets", "subresource": "", "verb": "get"}):
        raise Tune16Error(
            f"the account {account} may not get secrets: the operator has not created its Role yet, which it does when "
            "the pipeline server becomes ready. Try again then; upstream's installation includes it."
        )
    resources = [("", "pods", "get")]
    if context.recipe.train.num_nodes > 1:
        resources += [("trainer.kubeflow.org", "trainjobs", "create"), ("", "pods/log", "get")]
    if context.recipe.deploy.runtime:
        resources += [("serving.kserve.io", "inferenceservices", "patch")]
    for group, resource, verb in resources:
        name, _, sub = resource.partition("/")
        attributes = {"group": group, "resource": name, "subresource": sub, "verb": verb}
        if not _may(context, account, attributes):
            raise Tune16Error(
                f"the account {account} may not {verb} {resource}. Apply manifests/base, which contains its Role."
            )
    return f"{account} has the rights that the steps need"


_CHECKS: dict[str, Callable[[Context], str]] = {
    "login": _login,
    "namespace": _namespace,
    "pipeline server": _pipeline_server,
    "API": _api,
    "connection": _connection,
    "storage": _storage,
    "model and data": _model,
    "GPU": _gpu,
    "disk": _disk,
    "quota": _quota,
    "queue": _queue,
    "images": _images,
    "model registry": _registry,
    "serving": _serving,
    "runner's rights": _runner,
}


def _known(value: Known | None, check: str) -> Known:
    if value is None:
        raise UnknownError(f"not checked, because {check} failed.")
    return value


def _gpu_memory(node: Json, default: float) -> float:
    """MiB of a node's GPU; `default` if it has no label."""
    return float(node["metadata"].get("labels", {}).get(_GPU_MEMORY_LABEL, default))


def _refusing_taint(node: Json, tolerations: list[dict[str, Any]]) -> str:
    """The first taint of a node that keeps the GPU steps away, as key=value:effect; empty if there is none."""
    for taint in node["spec"].get("taints") or []:
        if taint["effect"] != "PreferNoSchedule" and not any(_tolerates(entry, taint) for entry in tolerations):
            return f"{taint['key']}={taint.get('value', '')}:{taint['effect']}"
    return ""


def _tolerates(toleration: dict[str, Any], taint: dict[str, Any]) -> bool:
    """Kubernetes' rule: an empty key or effect matches all; Exists ignores the value."""
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    exists = toleration.get("operator") == "Exists"
    if not toleration.get("key"):
        return exists
    return toleration["key"] == taint["key"] and (exists or toleration.get("value", "") == taint.get("value", ""))


def _plain(kind: str, amount: Any) -> str:
    return f"{float(amount) / 2**30:.1f} GiB" if kind == "memory" else f"{float(amount):g}"


def _deployed_images(context: Context) -> list[str]:
    """The images of the pipeline's newest version on the server, which an overlay may have changed."""
    if context.found_server is None:
        return []
    version = newest_version(context.found_server)
    if version is None:
        return []
    return [
        executor["container"]["image"] for executor in pipeline_spec(version)["deploymentSpec"]["executors"].values()
    ]


def _check_internal_image(context: Context, repository: str, tag: str) -> None:
    namespace, _, name = repository.partition("/")
    path = f"/apis/image.openshift.io/v1/namespaces/{namespace}/imagestreamtags/{name}:{tag}"
    try:
        context.get(path, f"read the image {name}:{tag}")
    except NotFoundError:
        raise Tune16Error(
            f"{repository}:{tag} is not in the cluster's registry. Build it there (manifests/components/builds), push "
            "it, or take the images from elsewhere (manifests/components/images)."
        ) from None


def _check_external_image(registry: str, repository: str, tag: str, credentials: Credentials | None) -> None:
    try:
        status = image_status(registry, repository, tag, credentials)
    except OSError as error:
        raise UnknownError(f"{registry} cannot be reached from here ({error}).") from None
    if status in (401, 403) and credentials:
        raise Tune16Error(f"{registry}/{repository}: the pull secret is refused ({status}). Renew it.")
    if status in (401, 403):
        raise UnknownError(f"{registry}/{repository} is private; the cluster needs a pull secret for it.")
    if status == 404:
        raise Tune16Error(f"{registry} has no {repository}:{tag} (status 404). Build and push it.")
    if status != 200:
        raise UnknownError(f"{registry} does not report whether it has {repository}:{tag} (status {status}).")


def _pull_credentials(context: Context, registry: str) -> Credentials | None:
    """User and password for a registry, from the pull secrets of the steps' account; None if none can be read."""
    account = context.cluster.look(f"/api/v1/namespaces/{{namespace}}/serviceaccounts/{context.runner}") or {}
    for entry in account.get("imagePullSecrets") or []:
        with suppress(NotFoundError, ForbiddenError, ValueError, AttributeError):  # or it is not a pull secret
            found = context.cluster.read_secret(entry["name"], {_PULL_CONFIG})
            auths = json.loads(found.get(_PULL_CONFIG, "{}")).get("auths", {})
            auth = auths.get(registry) or auths.get(f"https://{registry}")
            if auth:
                user, _, password = base64.b64decode(auth.get("auth", "")).decode().partition(":")
                return auth.get("username") or user, auth.get("password") or password
    return None


def _may(context: Context, account: str, attributes: dict[str, str]) -> bool:
    """Whether the account has a right: a self review if this login is that account, else a review by name."""
    namespace = context.cluster.namespace
    spec: Json = {"resourceAttributes": {**attributes, "namespace": namespace}}
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    review: Json = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec}
    user = f"system:serviceaccount:{namespace}:{account}"
    if context.user != user:
        path = f"/apis/authorization.k8s.io/v1/namespaces/{namespace}/localsubjectaccessreviews"
        review["kind"], review["metadata"] = "LocalSubjectAccessReview", {"namespace": namespace}
        spec["user"] = user
        spec["groups"] = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    with explained(context.cluster, "review the rights of accounts"):
        return bool(context.cluster.send("POST", path, review)["status"]["allowed"])
