"""doctor against stand-ins for the pipeline server and the Kubernetes API, with a real S3 server."""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from components.config import Recipe
from pipelines import doctor
from pipelines.doctor import Context, examine
from pipelines.s3server import S3Server
from tests.conftest import BUCKET
from tests.pipelines.conftest import GPU_NODE, NAMESPACE, Call, secret
from tests.servers import KubernetesApi, ModelRegistryApi, PipelineApi, Reply, Request, Server, make_certificate

Findings = dict[str, doctor.Finding]


@pytest.fixture
def examined(
    kubernetes_api: KubernetesApi,
    pipelines_api: PipelineApi,
    s3_server: S3Server,
    bucket: str,
    make_model: Callable[..., Path],
    orders: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Findings]:
    """All findings by name, for a recipe on local files and a namespace in which everything is right."""
    kubernetes_api.add("v1", "secrets", secret("tune16-connection", s3_server.environment(BUCKET)))
    for name in s3_server.environment(BUCKET):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pipelines.server.PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("components.runtime.retry._FIRST_PAUSE_SECONDS", 0.01)

    def examine_all(**settings: Any) -> Findings:
        content: dict[str, Any] = {"preflight": {"model": str(make_model("llama")), "data": str(orders)}}
        for step, values in settings.items():
            content[step] = {**content.get(step, {}), **values}
        context = Context(Recipe.model_validate(content), host=pipelines_api.url)
        return {finding.check: finding for finding in examine(context)}

    return examine_all


def test_a_node_whose_disk_is_too_small_is_told(
    examined: Callable[..., Findings], kubernetes_api: KubernetesApi
) -> None:
    large = {"preflight": {"model": "NousResearch/Llama-2-7b-chat-hf"}}
    assert "the step convert" in (found := examined(**large)["disk"]).text and found.outcome == "ok"
    drop(kubernetes_api, "nodes")
    status = {"allocatable": {**GPU_NODE["status"]["allocatable"], "ephemeral-storage": "20Gi"}}
    kubernetes_api.add("v1", "nodes", GPU_NODE | {"status": status})
    found = examined(**large)["disk"]
    assert found.outcome == "problem" and "offers 20.00 GiB" in found.text
    assert examined()["disk"].outcome == "ok"


def drop(api: KubernetesApi, plural: str) -> None:
    for key in [key for key in api.objects if key[1] == plural]:
        del api.objects[key]


def test_what_the_model_is_served_and_registered_by_is_looked_at(
    examined: Callable[..., Findings], kubernetes_api: KubernetesApi
) -> None:
    assert "has no KServe" in examined(deploy={"runtime": "vllm"})["serving"].text
    runtime = {"kind": "ServingRuntime", "metadata": {"name": "vllm-cuda-runtime", "namespace": NAMESPACE}}
    runtime["spec"] = {"supportedModelFormats": [{"name": "vLLM"}]}  # type: ignore[assignment]
    kubernetes_api.add("serving.kserve.io/v1alpha1", "servingruntimes", runtime)
    assert "manifests/components/serving" in examined(deploy={"runtime": "llama.cpp"})["serving"].text
    with ModelRegistryApi() as registry:
        found = examined(deploy={"runtime": "vllm"}, register={"server": registry.url})
        assert (found["serving"].outcome, found["model registry"].outcome) == ("ok", "ok"), found
        registry.fail("GET", "registered_models", 403)
        found = examined(register={"server": registry.url})
        assert "refuses this account (403)" in found["model registry"].text
    kubernetes_api.allowed = lambda attributes: attributes.get("resource") != "inferenceservices"
    assert "may not patch inferenceservices" in examined(deploy={"runtime": "vllm"})["runner's rights"].text


def test_everything_is_right(examined: Callable[..., Findings]) -> None:
    found = examined()
    outcomes = {name: finding.outcome for name, finding in found.items()}
    assert outcomes.pop("pipeline server") == "unknown"  # --host names another one
    assert set(outcomes.values()) == {"ok"}, found
    assert "developer at http" in found["login"].text
    assert "1 suitable: gpu-1" in found["GPU"].text
    assert "tools:0.1.0" in found["images"].text


def test_it_works_in_the_tools_image_which_has_no_compiler(
    examined: Callable[..., Findings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("docstring_parser", "kfp.compiler", "pipelines.compile", "pipelines.finetune"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "unknown" not in {finding.outcome for name, finding in examined().items() if name != "pipeline server"}


def node(**changes: Any) -> Callable[[KubernetesApi], None]:
    def change(api: KubernetesApi) -> None:
        drop(api, "nodes")
        api.add("v1", "nodes", {**GPU_NODE, **changes})

    return change


def quota(**hard: str) -> Callable[[KubernetesApi], None]:
    def change(api: KubernetesApi) -> None:
        names = {key.replace("__", "."): value for key, value in hard.items()}
        metadata = {"name": "small", "namespace": NAMESPACE}
        api.add("v1", "resourcequotas", {"kind": "ResourceQuota", "metadata": metadata, "status": {"hard": names}})

    return change


def without(plural: str) -> Callable[[KubernetesApi], None]:
    return lambda api: drop(api, plural)


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (without("namespaces"), "namespace", "there is no namespace tune16. Create it (oc new-project tune16)"),
        (without("secrets"), "connection", "there is no Secret tune16-connection"),
        (without("nodes"), "GPU", "no node offers 1 nvidia.com/gpu"),
        (node(status={"allocatable": {}}), "GPU", "no node offers 1 nvidia.com/gpu"),
        (
            node(metadata={"name": "n", "labels": {"nvidia.com/gpu.memory": "8192"}}),
            "GPU",
            "no GPU has 14.2 GiB: the largest has 8.0",
        ),
        (
            node(spec={"taints": [{"key": "team", "value": "b", "effect": "NoSchedule"}]}),
            "GPU",
            "gpu-1 has the taint team=b:NoSchedule, which is not tolerated",
        ),
        (
            quota(requests__memory="8Gi"),
            "quota",
            "allows 8.0 GiB of requests.memory, but the step train needs 24.0 GiB",
        ),
        (quota(limits__cpu="1500m"), "quota", "allows 1.5 of limits.cpu, but the step train needs 4"),
        (
            lambda api: quota(**{"requests__nvidia__com/gpu": "0"})(api),
            "quota",
            "allows 0 of requests.nvidia.com/gpu, but the step train needs 1",
        ),
        (without("imagestreamtags"), "images", "gguf:0.1.0 is not in the cluster's registry"),
    ],
)
def test_a_problem_says_what_to_do(
    examined: Callable[..., Findings],
    kubernetes_api: KubernetesApi,
    change: Callable[[KubernetesApi], None],
    check: str,
    message: str,
) -> None:
    change(kubernetes_api)
    finding = examined()[check]
    assert finding.outcome == "problem" and message in finding.text, finding
    assert len(finding.text.splitlines()) == 1


def test_settings_that_do_not_fit_the_cluster(examined: Callable[..., Findings], kubernetes_api: KubernetesApi) -> None:
    assert "no node offers 2" in examined(train={"num_gpus": 2})["GPU"].text
    assert "has the labels {'zone': 'b'}" in examined(cluster={"node_selector": {"zone": "b"}})["GPU"].text
    assert "taint nvidia.com/gpu" in examined(cluster={"tolerations": []})["GPU"].text
    assert "there is no such file" in examined(preflight={"data": "/nowhere"})["model and data"].text
    quota(requests__memory="32Gi")(kubernetes_api)
    (key,) = (key for key in kubernetes_api.objects if key[1] == "resourcequotas")
    kubernetes_api.objects[key]["status"]["used"] = {"requests.memory": "16Gi"}
    finding = examined()["quota"]
    assert finding.outcome == "ok" and "needs 24.0 GiB of requests.memory and waits" in finding.text
    kubernetes_api.allowed = lambda attributes: attributes["resource"] != "trainjobs"
    assert examined()["runner's rights"].outcome == "ok"
    finding = examined(train={"num_nodes": 2})["runner's rights"]
    assert "may not create trainjobs. Apply manifests/base" in finding.text
    assert "suitable nodes: 1, but train.num_nodes is 2" in examined(train={"num_nodes": 2})["GPU"].text


def test_keys_and_values_of_the_connection(
    examined: Callable[..., Findings], kubernetes_api: KubernetesApi, s3_server: S3Server
) -> None:
    values = s3_server.environment(BUCKET)
    kubernetes_api.add("v1", "secrets", secret("tune16-connection", {**values, "AWS_S3_BUCKET": ""}))
    found = examined()
    assert "has no AWS_S3_BUCKET" in found["connection"].text
    assert found["storage"].outcome == "unknown"
    kubernetes_api.add("v1", "secrets", secret("tune16-connection", {**values, "AWS_SECRET_ACCESS_KEY": "wrong-one"}))
    text = json.dumps([finding.text for finding in examined().values()])
    assert "the secret key is wrong" in text and "wrong-one" not in text
    inside = {**values, "AWS_S3_ENDPOINT": "http://127.0.0.1.svc:9"}
    kubernetes_api.add("v1", "secrets", secret("tune16-connection", inside))
    assert examined()["storage"].outcome == "unknown"


def test_with_few_rights_it_says_what_it_could_not_see(
    examined: Callable[..., Findings], kubernetes_api: KubernetesApi
) -> None:
    for part in ("nodes", "resourcequotas", "secrets", "namespaces/tune16", "localsubjectaccessreviews"):
        kubernetes_api.forbid("*", part)
    found = examined()
    unknown = {name for name, finding in found.items() if finding.outcome == "unknown"}
    assert {"GPU", "quota", "connection", "storage", "runner's rights"} <= unknown
    assert not any(finding.outcome == "problem" for finding in found.values()), found
    assert "may not list the nodes" in found["GPU"].text


def test_a_wrong_login_and_a_dead_server(
    examined: Callable[..., Findings],
    kubernetes_api: KubernetesApi,
    pipelines_api: PipelineApi,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kubernetes_api.token = "renewed"
    found = examined()
    assert found["login"].outcome == "problem" and "Log in again: oc login" in found["login"].text
    assert found["GPU"].text == "not checked, because the login failed."
    kubernetes_api.token = "good"
    pipelines_api.forbidden = True
    assert "may not use the pipeline server" in examined()["API"].text


def test_the_servers_own_storage_is_the_connections(
    call: Call, kubernetes_api: KubernetesApi, monkeypatch: Any
) -> None:
    monkeypatch.delenv("TUNE16_HOST")
    (server,) = (found for key, found in kubernetes_api.objects.items() if key[1].startswith("datascience"))

    def look(**storage: Any) -> str:
        credentials = {"secretName": "tune16-connection"}
        server["spec"]["objectStorage"] = {"externalStorage": {"s3CredentialsSecret": credentials, **storage}}
        *_, finding = examine(Context(Recipe()), ("login", "namespace", "pipeline server"))
        return finding.text

    assert look(host="s3.svc", bucket="x") == "dspa is ready"
    assert "keeps its files in the bucket other, but the connection tune16-connection has x" in look(
        host="s3.svc", bucket="other"
    )
    assert "in the host s3.svc:9000" in look(host="s3.svc", port="9000", bucket="x")
    version = {"kind": "PipelineVersion", "metadata": {"name": "tune16-5ff", "namespace": NAMESPACE}}
    kubernetes_api.add("pipelines.kubeflow.org/v2beta1", "pipelineversions", version)
    assert "Run: oc label pipelineversion tune16-5ff tune16.dev/touched" in look(host="s3.svc", bucket="x")


def queued(quota: int, *resources: str, **spec: Any) -> Callable[[KubernetesApi], None]:
    """A queue as Kueue 0.20 shows it, whose ClusterQueue has this much of each resource."""

    def change(api: KubernetesApi) -> None:
        amounts = [{"name": name, "nominalQuota": quota} for name in resources]
        group = {"coveredResources": list(resources), "flavors": [{"name": "t4", "resources": amounts}]}
        body: dict[str, Any] = {"kind": "ClusterQueue", "metadata": {"name": "all"}}
        api.add("kueue.x-k8s.io/v1beta2", "clusterqueues", body | {"spec": {"resourceGroups": [group], **spec}})
        queue = {"kind": "LocalQueue", "metadata": {"name": "gpus", "namespace": NAMESPACE}}
        api.add("kueue.x-k8s.io/v1beta2", "localqueues", queue | {"spec": {"clusterQueue": "all"}})

    return change


@pytest.mark.parametrize(
    ("queue", "change", "outcome", "message"),
    [
        ("", queued(1), "ok", "use none"),
        ("gpus", queued(100 * 2**30, "cpu", "memory", doctor.GPU), "ok", "gpus can admit the step train"),
        ("gpus", queued(100 * 2**30, "cpu", "memory"), "problem", "ClusterQueue all does not cover nvidia.com/gpu"),
        ("gpus", queued(0, "cpu", "memory", doctor.GPU), "problem", "has 0 cpu in all, and 4 are requested"),
        ("gpus", queued(0, "cpu", "memory", doctor.GPU, cohort="x"), "ok", "can admit"),
        ("none", queued(1), "problem", "there is no LocalQueue none in tune16. There are: gpus"),
    ],
)
def test_the_queue_of_the_gpu_steps(
    examined: Callable[..., Findings],
    kubernetes_api: KubernetesApi,
    monkeypatch: pytest.MonkeyPatch,
    queue: str,
    change: Callable[[KubernetesApi], None],
    outcome: str,
    message: str,
) -> None:
    change(kubernetes_api)
    monkeypatch.setattr(doctor, "_queue_of_train", lambda context: queue)
    finding = examined()["queue"]
    assert (finding.outcome, message in finding.text) == (outcome, True), finding


@pytest.mark.slow
def test_the_pipeline_server_of_the_namespace(call: Call, kubernetes_api: KubernetesApi, monkeypatch: Any) -> None:
    monkeypatch.delenv("TUNE16_HOST")
    code, out, _ = call("doctor", "demo", "--json")
    found = {finding["check"]: finding for finding in json.loads(out)}
    assert code == 2 and found["pipeline server"]["text"] == "dspa is ready"
    (server,) = (found for key, found in kubernetes_api.objects.items() if key[1].startswith("datascience"))
    store = server["spec"]["apiServer"].pop("pipelineStore")
    *_, finding = examine(Context(Recipe()), ("login", "namespace", "pipeline server"))
    assert store and "submit uploads them, oc apply does not" in finding.text
    server["status"]["conditions"] = []
    code, out, err = call("doctor", "demo")
    assert code == 2 and "problem  pipeline server: dspa is not ready: its operator has not reconciled it yet" in out
    assert "Traceback" not in err


class Registry(Server):
    """An image registry with one public image, one private one, and anonymous tokens, as public registries have."""

    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", "/token", "_token"),
        ("HEAD", r"/v2/(?P<repository>.+)/manifests/(?P<tag>.+)", "_manifest"),
    ]

    def _authorize(self, request: Request) -> None:
        pass

    def _token(self, request: Request) -> dict[str, str]:
        user = request.headers.get("Authorization", "")
        is_known = user == f"Basic {base64.b64encode(b'puller:secret').decode()}"
        return {"token": f"for {request.query['scope']}{' by puller' if is_known else ''}"}

    def _manifest(self, request: Request, repository: str, tag: str) -> Reply:
        scope = f"repository:{repository}:pull"
        token = request.headers.get("Authorization", "").removeprefix("Bearer for ")
        if token != (f"{scope} by puller" if repository == "tune16/private" else scope):
            challenge = f'Bearer realm="{self.url}/token",service="registry",scope="{scope}"'
            return Reply(401, b"", headers={"WWW-Authenticate": challenge})
        return Reply(200 if (repository, tag) == ("tune16/tools", "0.1.0") else 404, b"")


def test_images_of_a_public_registry(
    examined: Callable[..., Findings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kubernetes_api: KubernetesApi,
) -> None:
    ca, *tls = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    with Registry(tls=(tls[0], tls[1])) as registry:
        host = registry.url.removeprefix("https://")

        def look(name: str) -> doctor.Finding:
            monkeypatch.setattr("components.images.IMAGE_OF_STEP", {"train": f"{host}/tune16/{name}"})
            return examined()["images"]

        assert look("tools:0.1.0").outcome == "ok"
        assert look("tools:9").outcome == "problem" and "has no tune16/tools:9 (status 404)" in look("tools:9").text
        assert look("private:0.1.0").outcome == "unknown" and "pull secret" in look("private:0.1.0").text
        metadata = {"name": "pipeline-runner", "namespace": NAMESPACE}
        account = {"kind": "ServiceAccount", "metadata": metadata, "imagePullSecrets": [{"name": "pull"}]}
        kubernetes_api.add("v1", "serviceaccounts", account)
        for password, outcome in (("secret", "problem"), ("wrong", "problem")):
            auth = base64.b64encode(f"puller:{password}".encode()).decode()
            config = json.dumps({"auths": {host: {"auth": auth}}})
            kubernetes_api.add("v1", "secrets", secret("pull", {".dockerconfigjson": config}))
            found = look("private:0.1.0")
            assert found.outcome == outcome and password not in found.text.replace("pull secret", "")
            assert ("has no tune16/private" in found.text) == (password == "secret")  # it answers: not there
            assert ("the pull secret is refused" in found.text) == (password == "wrong")


def test_images_of_another_registry(examined: Callable[..., Findings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.images.IMAGE_OF_STEP", {"train": "127.0.0.1:9/tune16/trainer:0.1.0"})
    finding = examined()["images"]
    assert finding.outcome == "unknown" and "127.0.0.1:9 cannot be reached from here" in finding.text
