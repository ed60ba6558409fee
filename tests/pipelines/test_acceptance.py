"""`tune16 doctor --run` against stand-ins that do with each run what a cluster would; the S3 server is a real one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.storage import records, s3
from pipelines import acceptance
from pipelines.s3server import S3Server
from tests.conftest import BUCKET
from tests.pipelines.conftest import Call, add_step_pod, secret
from tests.pipelines.test_following import EVALUATION
from tests.servers import KubernetesApi, PipelineApi, Request

Run = dict[str, Any]
ALL = ("preflight", "prepare", "quantize", "train", "evaluate", "merge", "convert", "upload", "register", "deploy")
RUNTIMES = ("serving.kserve.io/v1alpha1", "servingruntimes")
SERVICES = ("serving.kserve.io/v1beta1", "inferenceservices")


class World:
    """What the pods would do: runs end at once, but for the one whose pod is to be killed."""

    def __init__(self, server: PipelineApi, cluster: KubernetesApi, values: dict[str, str], folder: Path) -> None:
        self.server, self.cluster, self.values, self.folder = server, cluster, values, folder
        self.ends_well = True
        self._create, self._retry, self._get = server._create_run, server._retry_run, server._get_run
        self._delete = cluster._delete
        server._create_run, server._retry_run = self.create, self.retry  # type: ignore[method-assign]
        cluster._delete = self.delete  # type: ignore[method-assign]
        self.killed: Run = {}
        self.seen: set[str] = set()

    def create(self, request: Request) -> Run:
        run = self._create(request)
        parameters = run["runtime_config"]["parameters"]
        if "nothing-here" in parameters["dataset"]:
            add_step_pod(self.cluster, run, "preflight", "preflight: started\nerror: s3://…: nothing is there.\n")
            self.server.set_tasks(run["run_id"], {"preflight": "FAILED"}, "FAILED")
        elif parameters["epochs"] == 20:
            log = "train: started\ntrain: checkpoint of step 4 kept, 1 MiB\ntrain: step 5/99  held-out loss 1.0\n"
            add_step_pod(self.cluster, run, "train", log)
            self.server.set_tasks(run["run_id"], {"preflight": "SUCCEEDED", "train": "RUNNING"}, "RUNNING")
            self.killed = run
        else:
            self.succeed(run)
        return run

    def succeed(self, run: Run) -> None:
        parameters = run["runtime_config"]["parameters"]
        path, key = parameters["destination_path"], json.dumps(parameters, sort_keys=True)
        verdict = "promoted" if self.ends_well else "kept"
        states = dict.fromkeys(ALL, "SUCCEEDED")
        if key in self.seen:
            states |= dict.fromkeys(("prepare", "quantize", "train", "evaluate"), "CACHED")
        self.seen.add(key)
        (self.folder / "evaluation.json").write_text(json.dumps({**EVALUATION, "verdict": verdict}))
        (self.folder / "report.html").write_text("report")
        with s3.environment(self.values):
            records.begin(path, run["run_id"], "k")
            records.keep_evaluation(path, "k", self.folder)
            records.keep_publication(path, run["run_id"], {"version": "v", "address": f"s3://{BUCKET}/{path}/v"})
            s3.write(BUCKET, f"tune16/{run['run_id']}/train/x/adapter", b"of KFP")
        if parameters["serving_runtime"]:
            add_step_pod(self.cluster, run, "deploy", "deploy: started\ndeploy: http://x serves m; it says: Hello.\n")
            name = path.rpartition("/")[2]
            body = {"kind": "InferenceService", "metadata": {"name": name, "namespace": "tune16"}}
            self.cluster.add(*SERVICES, body)
        self.server.set_tasks(run["run_id"], states, "SUCCEEDED")
        run["finished_at"] = "2999-01-01T00:00:00Z"

    def delete(self, key: Any) -> Any:
        if key[1] == "pods" and self.killed:
            self.server.set_tasks(self.killed["run_id"], {"train": "FAILED"}, "FAILED")
        return self._delete(key)

    def retry(self, request: Request, key: str) -> Any:
        answer = self._retry(request, key)
        log = "train: started\ntrain: continuing from the checkpoint of step 4\n"
        add_step_pod(self.cluster, self.killed, "train", log)
        self.succeed(self.server.runs[key])
        return answer


@pytest.fixture
def world(
    call: Call,
    pipelines_api: PipelineApi,
    kubernetes_api: KubernetesApi,
    s3_server: S3Server,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    values = s3_server.environment(BUCKET)
    kubernetes_api.add("v1", "secrets", secret("tune16-connection", values))
    for name in values:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(acceptance, "POLL_SECONDS", 0.01)

    def put(folder: Path, prefix: str = "demo") -> None:
        s3.write(BUCKET, f"{prefix}/model/config.json", b"{}")

    monkeypatch.setattr("pipelines.local.put_demo", put)
    yield World(pipelines_api, kubernetes_api, values, tmp_path)


def outcomes(out: str) -> dict[str, tuple[str, str]]:
    return {found["check"]: (found["outcome"], found["text"]) for found in json.loads(out)["results"]}


def accept(call: Call, *options: str) -> tuple[int, str]:
    code, out, _ = call("doctor", "--run", "--json", *options)
    return code, out


def test_everything_is_tried_and_nothing_is_left(
    call: Call, world: World, pipelines_api: PipelineApi, kubernetes_api: KubernetesApi, tmp_path: Path
) -> None:
    runtime = {"kind": "ServingRuntime", "metadata": {"name": "tune16-llama-cpp", "namespace": "tune16"}}
    kubernetes_api.add(*RUNTIMES, runtime)
    code, out = accept(call, "--output", str(tmp_path / "build/check.json"))
    found = outcomes(out)
    assert code == 0, found
    assert {name: outcome for name, (outcome, _) in found.items()} == {
        "pipeline": "ok",
        "first run": "ok",
        "second run from the cache": "ok",
        "failing step": "ok",
        "killed pod and retry": "ok",
        "schedule": "ok",
        "two nodes": "skipped",
        "endpoint": "ok",
        "model registry": "skipped",
        "removal": "ok",
    }
    assert found["failing step"][1] == "it reported: s3://…: nothing is there."
    assert found["killed pod and retry"][1] == "training resumed from its checkpoint after the retry"
    assert "Hello." in found["endpoint"][1]
    assert pipelines_api.runs == {} and pipelines_api.recurring_runs == {} and pipelines_api.versions == {}
    assert not [key for key in kubernetes_api.objects if key[1] == "inferenceservices"]
    with s3.environment(world.values):
        assert s3.list_objects(BUCKET, "") == []
    content = json.loads((tmp_path / "build/check.json").read_text())
    assert content["pipeline_server"]["pipeline_store"] == "kubernetes" and content["kubernetes"]


def test_what_fails_is_told_and_all_is_removed_all_the_same(
    call: Call, world: World, pipelines_api: PipelineApi, kubernetes_api: KubernetesApi
) -> None:
    world.ends_well = False
    kubernetes_api.forbid("DELETE", "pods")
    code, out = accept(call)
    found = outcomes(out)
    assert code == 1
    assert found["first run"][0] == "failed" and "was not promoted: kept" in found["first run"][1]
    assert found["killed pod and retry"] == ("skipped", "this account may not delete pods.")
    assert found["removal"][0] == "ok" and pipelines_api.runs == {}
    with s3.environment(world.values):
        assert s3.list_objects(BUCKET, "") == []


def test_a_step_that_waits_for_ever_is_given_up(
    call: Call,
    world: World,
    pipelines_api: PipelineApi,
    kubernetes_api: KubernetesApi,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptance, "STUCK_SECONDS", -1)
    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."

    def wait(run: Run) -> None:
        condition = {"type": "PodScheduled", "status": "False", "message": message}
        add_step_pod(kubernetes_api, run, "train", status={"phase": "Pending", "conditions": [condition]})
        pipelines_api.set_tasks(run["run_id"], {"train": "RUNNING"}, "RUNNING")

    monkeypatch.setattr(world, "succeed", wait)
    code, out = accept(call)
    outcome, text = outcomes(out)["first run"]
    assert code == 1 and outcome == "failed"
    assert text.startswith("train waits: 0/1 nodes: Insufficient nvidia.com/gpu") and "The run was stopped." in text


def test_without_a_gpu_the_gpu_steps_use_the_cpu(
    call: Call, world: World, pipelines_api: PipelineApi, kubernetes_api: KubernetesApi
) -> None:
    for key in [key for key in kubernetes_api.objects if key[1] == "nodes"]:
        del kubernetes_api.objects[key]
    code, out, _ = call("doctor", "--run", "--json")
    assert code == 2 and "no node offers 1 nvidia.com/gpu" in out and pipelines_api.runs == {}
    asked: list[Any] = []
    create = pipelines_api._create_run

    def note(request: Request) -> Run:
        asked.append(request.json()["runtime_config"]["parameters"]["more_train_options"].get("num_gpus"))
        return create(request)

    pipelines_api._create_run = note  # type: ignore[method-assign]
    code, out = accept(call, "--cpu")
    assert code == 0 and set(asked) == {0}
