"""The step deploy against a Kubernetes API with server-side apply, and a KServe that is slow, fails or falls silent."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.config import DeployConfig, Recipe, parse
from components.deploy import deployer
from components.deploy.deployer import deploy
from components.deploy.objects import Placing, alias, describe
from components.kubernetes.api import check_service_name, service_name
from components.runtime.errors import Tune16Error
from tests.servers import KubernetesApi

PATH = "tune16/Llama-2 7B_chat"
NAME = "llama-2-7b-chat"
API = "serving.kserve.io/v1beta1"
KEY = (API, "inferenceservices", "project", NAME)
PLACING = Placing("tune16-connection", "1", "2", {"gpu": "big"}, [{"key": "nvidia.com/gpu", "operator": "Exists"}])
OLD, NEW = "20260101T000000Z-aaaaaaaa", "20260201T000000Z-bbbbbbbb"
POD = {
    "kind": "Pod",
    "metadata": {"name": "deploy-step", "namespace": "project"},
    "spec": {
        "containers": [
            {"name": "wait", "image": "argoexec"},
            {"name": "main", "image": "registry.example.com/tools:0.1.0"},
        ]
    },
}


def manifest(version: str = NEW, model: str = "hf://org/base@abc") -> dict[str, Any]:
    files = [{"path": "gguf/model-Q4_K_M.gguf", "size": 4 << 30, "sha256": "x"}]
    return {
        "version": version,
        "address": f"s3://bucket/{PATH}/{version}",
        "lineage": {"model": model},
        "adapter_rank": 48,
        "context": 131072,
        "trained_tokens": 1024,
        "cache_bytes_per_token": 524288,
        "gguf": ["gguf/model-Q4_K_M.gguf"],
        "files": files,
    }


class Model(ThreadingHTTPServer):
    """The server behind the endpoint; ``serves`` is the name that it gives, ``answer`` what it says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ModelHandler)
        self.serves, self.answer = "", "A model."
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class ModelHandler(BaseHTTPRequestHandler):
    server: Model

    def do_GET(self) -> None:
        self._say({"data": [{"id": self.server.serves}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say({"choices": [{"message": {"content": self.server.answer}}]})

    def _say(self, found: Any) -> None:
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class Cluster:
    """A namespace with KServe in it: what it does with a version is ``behave``'s choice."""

    def __init__(self, api: KubernetesApi, model: Model) -> None:
        self.api, self.model = api, model
        self.behave: Callable[[str], str] = lambda version: ""  # why the version never becomes ready
        self.delay = 0.05
        self.waiting: list[threading.Thread] = []
        api.served[API] = [("inferenceservices", "InferenceService", True)]
        api.add("v1", "pods", POD)
        api.on_apply["inferenceservices"] = self._reconcile

    @property
    def service(self) -> dict[str, Any]:
        return self.api.objects[KEY]

    @property
    def remembered(self) -> str:
        """The version that a failure would go back to."""
        content = self.api.objects["v1", "configmaps", "project", f"{NAME}-served"]["data"]["inferenceservice.json"]
        version: str = json.loads(content)["metadata"]["annotations"]["tune16.dev/version"]
        return version

    def _reconcile(self, service: dict[str, Any]) -> None:
        version = service["metadata"]["annotations"]["tune16.dev/version"]
        names = re.findall(r"[a-z0-9-]+@[\w.-]+", " ".join(service["spec"]["predictor"]["model"]["args"]))
        thread = threading.Thread(target=self._roll_out, args=(version, names[-1]))
        self.waiting.append(thread)
        thread.start()

    def _roll_out(self, version: str, served_name: str) -> None:
        time.sleep(self.delay)
        reason = self.behave(version)
        with self.api.lock:
            if KEY not in self.api.objects:
                return
            state: dict[str, Any] = {"running": {}}
            if reason:
                state = {"waiting": {"reason": "CrashLoopBackOff", "message": reason}}
            self.api.add("v1", "pods", {
                "kind": "Pod",
                "metadata": {"name": f"pod-{version[-8:].lower()}-{len(self.waiting)}", "namespace": "project",
                             "creationTimestamp": f"2026-01-01T00:00:{len(self.waiting):02}Z",
                             "labels": {"serving.kserve.io/inferenceservice": NAME}},
                "status": {"containerStatuses": [{"name": "kserve-container", "state": state}]},
            })  # fmt: skip
            served = self.service.get("status", {}).get("address")
            ready = not reason or bool(served)  # the pods from before go on serving
            conditions = [{"type": "Ready", "status": str(ready), "message": "" if ready else "RevisionFailed"}]
            self.service["status"] = {"conditions": conditions}
            if ready:
                self.service["status"]["address"] = {"url": self.model.url}
            if not reason:
                self.model.serves = served_name


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    model = Model()
    monkeypatch.setattr(deployer, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(deployer, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setenv("KFP_POD_NAME", "deploy-step")
    monkeypatch.setenv("KFP_NAMESPACE", "project")
    with KubernetesApi() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig", "project")))
        found = Cluster(api, model)
        yield found
        for thread in found.waiting:
            thread.join()
    model.shutdown()
    model.server_close()


def run(runtime: str = "llama.cpp", version: str = NEW) -> str:
    return deploy(manifest(version), PATH, PLACING, DeployConfig(runtime=runtime))  # type: ignore[arg-type]


def test_the_first_version_is_served_when_it_is_ready_and_has_answered(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.delay = 0.3
    assert run() == cluster.model.url
    assert f"serves {NAME}@{NEW}-llama.cpp; asked who it is, it says: A model." in capsys.readouterr().out
    metadata, predictor = cluster.service["metadata"], cluster.service["spec"]["predictor"]
    assert metadata["labels"]["modelregistry.opendatahub.io/model-version-id"] == "2"
    assert metadata["annotations"]["serving.kserve.io/deploymentMode"] == "RawDeployment"
    model = predictor["model"]
    assert model["runtime"] == "tune16-llama-cpp"
    assert model["storage"] == {"key": "tune16-connection", "path": f"{PATH}/{NEW}/gguf/model-Q4_K_M.gguf"}
    assert model["resources"]["limits"] == {"cpu": "4", "memory": "9Gi"} and "tolerations" not in predictor


def test_what_people_added_stays_and_the_same_again_is_fine(cluster: Cluster) -> None:
    run(version=OLD)
    cluster.api.edit(KEY, "kubectl", ("metadata", "labels", "networking.kserve.io/visibility"), "exposed")
    cluster.api.edit(KEY, "dashboard", ("spec", "predictor", "maxReplicas"), 1)
    run(version=NEW)
    run(version=NEW)
    assert cluster.service["metadata"]["labels"]["networking.kserve.io/visibility"] == "exposed"
    assert cluster.remembered == NEW


def test_another_server_takes_over_and_leaves_nothing_of_the_one_before(cluster: Cluster) -> None:
    run("vllm-adapter", OLD)
    assert "initContainers" in cluster.service["spec"]["predictor"]
    run("llama.cpp", NEW)
    assert set(cluster.service["spec"]["predictor"]) == {"model", "minReplicas", "maxReplicas"}


def test_a_field_that_somebody_else_has_set_is_a_conflict_and_nothing_changes(cluster: Cluster) -> None:
    run(version=OLD)
    cluster.api.edit(KEY, "kubectl-edit", ("spec", "predictor", "model", "resources", "limits", "memory"), "64Gi")
    cluster.api.edit(KEY, "kubectl-edit", ("spec", "predictor", "model", "storage", "path"), "elsewhere")
    with pytest.raises(Tune16Error, match='conflict with "kubectl-edit": .*storage.path.*Undo that change') as error:
        run(version=NEW)
    assert "\n" not in str(error.value)
    assert cluster.service["spec"]["predictor"]["model"]["storage"]["path"] == "elsewhere"
    assert cluster.model.serves == alias(PATH, OLD, "llama.cpp")


def test_a_version_that_crashes_gives_way_to_the_one_before(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    run(version=OLD)
    before = cluster.service["spec"]
    cluster.behave = lambda version: "CUDA out of memory" if version == NEW else ""
    with pytest.raises(Tune16Error) as error:
        run(version=NEW)
    assert f"{NAME}@{NEW}-llama.cpp was not serving within" in str(error.value)
    assert f"container kserve-container: CrashLoopBackOff CUDA out of memory. {OLD} still serves." in str(error.value)
    assert "waiting: container kserve-container: CrashLoopBackOff" in capsys.readouterr().out
    assert cluster.service["spec"] == before
    assert cluster.remembered == OLD


def test_a_first_version_that_never_answers_is_taken_away(cluster: Cluster) -> None:
    cluster.model.answer = ""
    with pytest.raises(Tune16Error, match="returns an empty answer. It was removed; nothing was served before"):
        run()
    assert KEY not in cluster.api.objects


class KilledError(BaseException):
    """Stands for the end of a process."""


def run_killed(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """The step is killed while it waits for the version that it has applied."""

    def killed(*_: object) -> str:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(deployer, "_wait", killed)
        with pytest.raises(KilledError):
            run(**options)


def test_a_first_version_that_nobody_has_remembered_is_not_taken_away(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was killed after the version served; what comes next must not end it."""
    run_killed(monkeypatch)
    cluster.model.answer = ""
    with pytest.raises(Tune16Error, match="It existed before this step, so it stays applied"):
        run()
    assert KEY in cluster.api.objects


def test_a_server_that_answers_nonsense_or_goes_on_with_the_old_version_does_not_count(cluster: Cluster) -> None:
    run(version=OLD)
    cluster.model.answer = [1]  # type: ignore[assignment]
    cluster.behave = lambda version: ""
    served = cluster.model.serves
    original = cluster._roll_out
    cluster._roll_out = lambda version, served_name: None  # type: ignore[method-assign]  # KServe is asleep
    with pytest.raises(Tune16Error, match=f"still serves the previous version. {OLD} still serves"):
        run(version=NEW)
    assert cluster.model.serves == served
    cluster._roll_out = original  # type: ignore[method-assign]


def test_going_back_is_to_what_has_served_whatever_was_killed_in_between(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(version=OLD)
    cluster.behave = lambda version: "CUDA out of memory" if version == NEW else ""
    run_killed(monkeypatch, version=NEW)
    assert cluster.service["metadata"]["annotations"]["tune16.dev/version"] == NEW
    with pytest.raises(Tune16Error, match=f"CUDA out of memory. {OLD} still serves"):
        run(version=NEW)
    assert cluster.service["metadata"]["annotations"]["tune16.dev/version"] == OLD
    cluster.behave = lambda version: "the node is gone"
    with pytest.raises(Tune16Error, match="It served before, and stays applied"):
        cluster.model.serves = ""
        run(version=OLD)


def test_what_somebody_has_taken_away_stays_away(cluster: Cluster) -> None:
    run(version=OLD)
    with cluster.api.lock:
        del cluster.api.objects[KEY]
    cluster.behave = lambda version: "broken"
    cluster.model.serves = ""
    with pytest.raises(Tune16Error, match="It was removed; nothing was served before"):
        run(version=NEW)
    assert KEY not in cluster.api.objects


def test_the_same_version_on_another_server_has_to_answer_itself(cluster: Cluster) -> None:
    run("llama.cpp", NEW)
    cluster.behave = lambda version: "no such runtime"
    with pytest.raises(Tune16Error, match=f"CrashLoopBackOff no such runtime. {NEW} still serves"):
        run("vllm", NEW)
    assert cluster.service["spec"]["predictor"]["model"]["runtime"] == "tune16-llama-cpp"


def test_another_models_endpoint_of_the_same_name_is_left_alone(cluster: Cluster) -> None:
    run(version=OLD)
    found = {**manifest(), "address": f"s3://bucket/other/Llama-2 7B_chat/{NEW}"}
    with pytest.raises(Tune16Error, match="belongs to s3://bucket/tune16/Llama-2 7B_chat. Choose another last part"):
        deploy(found, "other/Llama-2 7B_chat", PLACING, DeployConfig(runtime="llama.cpp"))
    del cluster.service["metadata"]["annotations"]["tune16.dev/path"]
    with pytest.raises(Tune16Error, match="belongs to another owner"):
        run(version=NEW)
    assert cluster.model.serves == alias(PATH, OLD, "llama.cpp")


def test_an_api_that_is_away_for_a_moment_is_waited_for(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.api.fail("GET", "inferenceservices", 503)
    with pytest.raises(Tune16Error, match="deploy.runtime llama.cpp: the cluster refuses: 503"):
        run()  # nothing was changed yet

    def apply_and_go_away(service: dict[str, Any]) -> None:
        cluster.api.fail("GET", "inferenceservices", 503, times=2)
        cluster.api.drop("inferenceservices", method="GET")
        cluster._reconcile(service)

    cluster.api.on_apply["inferenceservices"] = apply_and_go_away
    assert run() == cluster.model.url
    assert "waiting: the cluster's API does not answer" in capsys.readouterr().out


def test_rights_that_are_missing_are_named(cluster: Cluster) -> None:
    cluster.api.forbid("PATCH", "inferenceservices")
    with pytest.raises(Tune16Error, match="403 .*Apply manifests/base, which brings its Role"):
        run()


def test_without_a_name_or_a_cluster_there_is_no_endpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    assert run("") == "" and "nothing deployed" in capsys.readouterr().out
    with pytest.raises(Tune16Error, match="endpoints need a cluster, where the step deploy runs in a pod"):
        run()


@pytest.mark.parametrize(
    ("runtime", "model", "message"),
    [
        ("vllm-adapter", "file:///models/base", "KServe cannot fetch the base model file:///models/base"),
        ("llama.cpp", "", "has no GGUF file. Name one in gguf_quantizations"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_changes(
    cluster: Cluster, runtime: str, model: str, message: str
) -> None:
    found = manifest(model=model or "m/m") | ({} if model else {"gguf": []})
    with pytest.raises(Tune16Error, match=message):
        deploy(found, PATH, PLACING, DeployConfig(runtime=runtime))  # type: ignore[arg-type]
    assert KEY not in cluster.api.objects


def test_vllm_with_weights_and_with_an_adapter() -> None:
    weights = describe(manifest(), PATH, "vllm", PLACING, POD)["spec"]["predictor"]
    assert weights["model"]["args"][-3:] == ["--served-model-name", NAME, f"{NAME}@{NEW}-vllm"]
    assert weights["model"]["storage"] == {"key": "tune16-connection", "path": f"{PATH}/{NEW}/merged"}
    assert (
        weights["nodeSelector"] == {"gpu": "big"} and weights["model"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    )
    adapter = describe(manifest(), PATH, "vllm-adapter", PLACING, POD)["spec"]["predictor"]
    assert adapter["model"]["storageUri"] == "hf://org/base:abc" and "--max-lora-rank=64" in adapter["model"]["args"]
    (container,) = adapter["initContainers"]
    assert container["image"] == "registry.example.com/tools:0.1.0"
    with pytest.raises(Tune16Error, match="up to rank 512, this one has 1000"):
        describe(manifest() | {"adapter_rank": 1000}, PATH, "vllm-adapter", PLACING, POD)
    with pytest.raises(Tune16Error, match="cannot fetch the base model s3://other/base"):
        describe(manifest(model=f"s3://other/base#{32 * '1'}"), PATH, "vllm-adapter", PLACING, POD)
    stored = describe(manifest(model=f"s3://bucket/models/base#{32 * '1'}"), PATH, "vllm-adapter", PLACING, POD)
    assert stored["spec"]["predictor"]["model"]["storage"] == {"path": "models/base", "key": "tune16-connection"}


def test_names_and_runtimes_that_do_not_fit_are_told_at_once() -> None:
    assert (
        service_name("a/Ünder_score..") == "nder-score"
        and service_name("a/7b-chat") == "model-7b-chat"
        and service_name("a/" + "x" * 80) == "x" * 40
    )
    with pytest.raises(
        Tune16Error, match=r"deploy.runtime llama.cpp .*serves a GGUF file, but convert.quantizations .*names"
    ):
        parse(Recipe, {"deploy": {"runtime": "llama.cpp"}, "convert": {"quantizations": ""}}, where="form")
    with pytest.raises(Tune16Error, match="'runtime' is 'tgi': input should be '', 'vllm', 'vllm-adapter'"):
        DeployConfig.load(runtime="tgi")


def test_an_address_that_dns_does_not_take_is_refused_before_the_run() -> None:
    check_service_name("team/llm", "tune16")
    with pytest.raises(
        Tune16Error, match=r"66 characters, and DNS allows 63. Shorten the last part of destination_path by 3"
    ):
        check_service_name(f"team/{'x' * 35}", "my-data-science-team")


def test_a_spec_that_no_runtime_serves_is_refused_at_once(cluster: Cluster) -> None:
    def refuse(service: dict[str, Any]) -> None:
        failure = {"reason": "NoSupportingRuntime", "message": "No runtime found to support predictor with model gguf."}
        model = {"transitionStatus": "InvalidSpec", "lastFailureInfo": failure}
        service["status"] = {"modelStatus": model, "conditions": []}

    cluster.api.on_apply["inferenceservices"] = refuse
    started = time.monotonic()
    with pytest.raises(Tune16Error, match="KServe rejects this InferenceService: NoSupportingRuntime: No runtime") as e:
        run()
    assert time.monotonic() - started < deployer.PATIENCE_SECONDS
    assert str(e.value).endswith("Check `oc get servingruntimes`. It was removed; nothing was served before.")


def test_while_one_version_replaces_another_the_reason_is_the_new_ones(cluster: Cluster) -> None:
    run(version=OLD)

    def fail(service: dict[str, Any]) -> None:
        failure = {"reason": "ModelLoadFailed", "message": "Error: tensor shapes do not match.\n"}
        service["status"]["modelStatus"] = {"transitionStatus": "BlockedByFailedLoad", "lastFailureInfo": failure}
        service["status"]["conditions"] = [{"type": "Ready", "status": "False", "message": "x"}]

    cluster.api.on_apply["inferenceservices"] = fail
    with pytest.raises(Tune16Error, match="ModelLoadFailed: Error: tensor shapes do not match. ") as error:
        run(version=NEW)
    assert f"{OLD} is applied again, but not ready yet." in str(error.value)  # nobody has seen it serve
    assert ".." not in str(error.value)


def test_the_last_words_of_a_server_that_crashes(cluster: Cluster) -> None:
    def crash(service: dict[str, Any]) -> None:
        ended = {"exitCode": 1, "reason": "Error"}
        status = {"name": "kserve-container", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 2}
        cluster.api.add("v1", "pods", {
            "kind": "Pod",
            "metadata": {"name": "p", "namespace": "project",
                         "labels": {"serving.kserve.io/inferenceservice": NAME}},
            "status": {"phase": "Running", "containerStatuses": [{**status, "lastState": {"terminated": ended}}]},
        })  # fmt: skip
        cluster.api.logs["project", "p"] = "loading\nerror: /mnt/models: no GGUF file is there.\n"

    cluster.api.on_apply["inferenceservices"] = crash
    with pytest.raises(
        Tune16Error, match="ended with exit code 1; its log ends: .*no GGUF file is there. It was removed"
    ):
        run()


def test_a_volume_that_cannot_be_mounted_is_named(cluster: Cluster) -> None:
    def wait(service: dict[str, Any]) -> None:
        state = {"waiting": {"reason": "ContainerCreating"}}
        labels = {"serving.kserve.io/inferenceservice": NAME}
        cluster.api.add("v1", "pods", {
            "kind": "Pod", "metadata": {"name": "p", "namespace": "project", "labels": labels},
            "status": {"phase": "Pending", "containerStatuses": [{"name": "kserve-container", "state": state}]},
        })  # fmt: skip
        event = {"kind": "Event", "metadata": {"name": "e", "namespace": "project"}, "type": "Warning"}
        event |= {"involvedObject": {"name": "p"}, "reason": "FailedMount", "message": 'secret "x" not found'}
        cluster.api.add("v1", "events", event)

    cluster.api.on_apply["inferenceservices"] = wait
    with pytest.raises(Tune16Error, match='FailedMount: secret "x" not found. It was removed'):
        run()


def test_an_endpoint_that_was_stopped_in_the_dashboard(cluster: Cluster) -> None:
    run(version=OLD)
    cluster.api.edit(KEY, "dashboard", ("metadata", "annotations", "serving.kserve.io/stop"), "true")
    with pytest.raises(Tune16Error, match="is stopped. Start it in the dashboard"):
        run(version=NEW)
    assert cluster.service["metadata"]["annotations"]["tune16.dev/version"] == OLD  # nothing was changed


def test_a_cluster_without_kserve(cluster: Cluster) -> None:
    del cluster.api.served[API]
    with pytest.raises(Tune16Error, match="this cluster has no KServe. Ask its administrator"):
        run()


def test_what_is_remembered_goes_with_the_endpoint(cluster: Cluster) -> None:
    run()
    memory = cluster.api.objects["v1", "configmaps", "project", f"{NAME}-served"]
    (owner,) = memory["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == (
        "InferenceService",
        NAME,
        cluster.service["metadata"]["uid"],
    )


def test_cpus_by_the_files_size() -> None:
    def cpus(size: int) -> str:
        found = manifest() | {"files": [{"path": "gguf/model-Q4_K_M.gguf", "size": size, "sha256": "x"}]}
        predictor = describe(found, PATH, "llama.cpp", PLACING, POD)["spec"]["predictor"]
        return str(predictor["model"]["resources"]["limits"]["cpu"])

    assert [cpus(size) for size in (400_000, 1 << 30, 4 << 30)] == ["1", "2", "4"]


def test_where_a_service_without_a_port_may_answer() -> None:
    from components.playground.client import Endpoint

    urls = [found.url for found in Endpoint("http://x-predictor.ns.svc").candidates()]
    assert urls == ["http://x-predictor.ns.svc", "http://x-predictor.ns.svc:8080", "https://x-predictor.ns.svc:8443"]
    assert [found.url for found in Endpoint("http://x:80").candidates()] == ["http://x:80"]
    assert [found.url for found in Endpoint("https://x").candidates()] == ["https://x"]
