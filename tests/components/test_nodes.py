"""Training on several nodes: a Kubernetes API stand-in whose training jobs are real processes, and a real S3 server."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from components.config import PrepareConfig, QuantizeConfig, TrainConfig
from components.kubernetes import api as kubeapi
from components.merge.merger import read_deltas
from components.prepare.dataset import prepare_dataset
from components.quantize.checkpoint import quantize_checkpoint
from components.runtime import retry as again
from components.runtime.errors import Tune16Error
from components.storage import retry, s3
from components.train.distributed import nodes
from components.train.distributed import scratch as scratch_module
from components.train.distributed.jobs import PYTORCH_JOB
from components.train.distributed.scratch import JobEndedError, Scratch, new_job
from components.train.launch import train
from tests.manifests.test_manifests import CRDS, custom_schemas
from tests.servers import KubernetesApi

Json = dict[str, Any]
NAMESPACE = "tune16"
PATH = "team/llm"
SELECTOR = {"nvidia.com/gpu.product": "Tesla-T4"}
TOLERATIONS = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
TRAINER = "trainer.kubeflow.org/v1alpha1"
SETTINGS: Json = {
    "epochs": 0.25, "learning_rate": 5e-3, "rank": 8, "dropout": 0, "micro_batch": 2, "num_evaluations": 1
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # PEFT looks on the Hub for a local base
]


class Nodes:
    """Starts a job's pods as processes, as a training operator would, and reports how they end."""

    def __init__(self, api: KubernetesApi, told_to_end: int | None = None) -> None:
        self.api = api
        self.told_to_end = told_to_end
        self.codes: list[int] = []
        self.jobs: list[Json] = []
        api.on_create["trainjobs"] = lambda job: self._start(job, "Complete")
        api.on_create["pytorchjobs"] = lambda job: self._start(job, "Succeeded")

    def _start(self, job: Json, success: str) -> None:
        self.jobs.append(job)
        job["status"] = {"conditions": [{"type": "Suspended", "status": "True", "message": "in the queue"}]}
        self.thread = threading.Thread(target=self._run, args=(job, success))
        self.thread.start()

    def _run(self, job: Json, success: str) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        if success == "Complete":
            container, num_nodes = spec["trainer"], spec["trainer"]["numNodes"]
            labels = {"jobset.sigs.k8s.io/jobset-name": name, "batch.kubernetes.io/job-completion-index": "0"}
        else:
            replicas = spec["pytorchReplicaSpecs"]
            (container,) = replicas["Master"]["template"]["spec"]["containers"]
            num_nodes = 1 + replicas["Worker"]["replicas"]
            labels = {"training.kubeflow.org/job-name": name, "training.kubeflow.org/replica-type": "master"}
        metadata = {"name": f"{name}-0", "namespace": NAMESPACE, "labels": labels}
        names = [{"name": "sidecar"}, {"name": "node" if success == "Complete" else "pytorch"}]
        pod = {"kind": "Pod", "metadata": metadata, "spec": {"containers": names}}
        self.api.add("v1", "pods", pod)
        time.sleep(1)  # in the queue
        job["status"]["conditions"] = []
        assert container["command"][0] == "python3"
        command = [sys.executable, *container["command"][1:]]
        own = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"].startswith("TUNE16_")}
        processes = [self._node(command, rank, num_nodes, own) for rank in range(num_nodes)]
        for line in processes[0].stdout or ():
            if self.told_to_end is not None and '"event": "progress"' in line:
                processes[self.told_to_end].terminate()
            self.api.logs[NAMESPACE, f"{name}-0"] = self.api.logs.get((NAMESPACE, f"{name}-0"), "") + line
        for process in processes:
            with process:  # closes its pipe
                self.codes.append(process.wait())
        kind, message = ("Failed", f"exit codes {self.codes}") if any(self.codes) else (success, "done")
        job["status"]["conditions"] = [{"type": kind, "status": "True", "message": message}]

    @staticmethod
    def _node(command: list[str], rank: int, num_nodes: int, own: dict[str, str]) -> "subprocess.Popen[str]":
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("KFP_")},
            "PET_NODE_RANK": str(rank),
            "PET_NNODES": str(num_nodes),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": "29533",
            **own,
        }
        pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        server.add("v1", "pods", step_pod())
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig", NAMESPACE)))
        monkeypatch.setenv("KFP_POD_NAME", "tune16-abc-train")
        monkeypatch.setenv("KFP_NAMESPACE", NAMESPACE)
        monkeypatch.setattr(nodes, "POLL_SECONDS", 0.2)
        yield server


def step_pod() -> Json:
    secret = {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "c", "key": "AWS_ACCESS_KEY_ID"}}}
    main = {
        "name": "main",
        "image": "registry/tune16/trainer:0.1.0",
        "env": [secret, {"name": "KFP_POD_NAME", "value": "x"}, {"name": "WANDB_MODE", "value": "offline"}],
        "resources": {"requests": {"cpu": "4", "memory": "24Gi"}, "limits": {"cpu": "4", "memory": "24Gi"}},
        "volumeMounts": [{"name": "ca", "mountPath": "/ca"}, {"name": "scratch", "mountPath": "/tmp"}],
    }
    template = json.dumps({"podSpecPatch": json.dumps({"nodeSelector": SELECTOR, "tolerations": TOLERATIONS})})
    metadata = {
        "name": "tune16-abc-train",
        "namespace": NAMESPACE,
        "labels": {"kueue.x-k8s.io/queue-name": "gpus", "other": "x"},
    }
    spec = {
        "serviceAccountName": "pipeline-runner-dspa",
        "containers": [{"name": "wait", "image": "argo", "env": [{"name": "ARGO_TEMPLATE", "value": template}]}, main],
        "nodeSelector": {"injected": "by the queue"},
        "tolerations": [*TOLERATIONS, {"key": "node.kubernetes.io/not-ready", "operator": "Exists"}],
        "volumes": [{"name": "ca", "configMap": {"name": "dsp-ca"}}, {"name": "scratch", "emptyDir": {}}],
    }
    return {"kind": "Pod", "metadata": metadata, "spec": spec}


def serve_train_jobs(api: KubernetesApi, *fields: str) -> None:
    api.served[TRAINER] = [("trainjobs", "TrainJob", True)]
    kinds = [{"group": "trainer.kubeflow.org", "version": "v1alpha1", "kind": "TrainJob"}]
    spec = {"properties": {field: {"type": "array"} for field in fields}}
    schema = {"x-kubernetes-group-version-kind": kinds, "properties": {"spec": spec}}
    api.schemas[TRAINER] = {"io.TrainJob": schema}


@pytest.fixture(scope="module")
def inputs(
    make_model: Callable[..., Path], orders: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    folder, base = tmp_path_factory.mktemp("inputs"), str(make_model("llama", dtype=torch.float16))
    prepare_dataset(str(orders), base, folder / "rows", PrepareConfig(max_tokens=128, held_out_share=0.1))
    quantize_checkpoint(base, folder / "weights", QuantizeConfig())
    return folder / "weights", folder / "rows"


def test_two_nodes_equal_one_process_with_twice_the_batch(
    api: KubernetesApi,
    inputs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve_train_jobs(api, "runtimePatches")
    started = Nodes(api)
    two = train(*inputs, tmp_path / "two", TrainConfig(**{**SETTINGS, "micro_batch": 1, "num_nodes": 2}), path=PATH)
    said = capsys.readouterr().out
    monkeypatch.delenv("KFP_POD_NAME")  # a pod without a GPU would be refused
    one = train(*inputs, tmp_path / "one", TrainConfig(**{**SETTINGS, "micro_batch": 1, "gradient_accumulation": 2}))
    assert two["train_loss_last"] == pytest.approx(one["train_loss_last"], rel=2e-4)
    left, right = read_deltas(tmp_path / "one"), read_deltas(tmp_path / "two")
    for name, delta in left.items():
        assert torch.allclose(delta.b @ delta.a, right[name].b @ right[name].a, atol=2e-3), name
    assert "is queued: in the queue gpus" in said and "is running" in said and "is complete" in said
    assert "train: started" not in said  # the step says it, once
    assert "train: step 1/" in said and "train: train:" not in said and "warnings.warn" not in said
    (job,) = started.jobs
    uid = api.objects["v1", "pods", NAMESPACE, "tune16-abc-train"]["metadata"]["uid"]
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "tune16-abc-train", "uid": uid}
    assert job["metadata"]["ownerReferences"] == [owner]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    assert not [key for key in api.objects if key[1] == "trainjobs"]
    assert s3.list_objects(s3.default_bucket(), f"{PATH}/scratch/") == []


@pytest.mark.parametrize("field", ["runtimePatches", "podTemplateOverrides"])
def test_the_train_job_is_what_the_cluster_takes(
    api: KubernetesApi, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", "/ca/ca.crt")
    serve_train_jobs(api, field)
    pod, kind = kubeapi.own_pod(kubeapi.connect("")), nodes._served_kind()
    body = nodes.describe(kind, "job", pod, "s3://b/x", TrainConfig(num_nodes=3, num_gpus=2), nodes._has_patches())
    trainer = body["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 2)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "4", "memory": "24Gi", "nvidia.com/gpu": "2"}
    assert [entry["name"] for entry in trainer["env"]] == [
        "AWS_ACCESS_KEY_ID",
        "WANDB_MODE",
        "SSL_CERT_FILE",
        "TUNE16_LINES",
    ]
    (patch,) = body["spec"][field]
    if field == "runtimePatches":
        if CRDS.is_dir():
            jsonschema.validate(body, custom_schemas()[body["apiVersion"], "TrainJob"])
        (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        placed = job["template"]["spec"]["template"]["spec"]
        assert placed["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    else:
        placed = patch["spec"]
    assert placed["serviceAccountName"] == "pipeline-runner-dspa"
    assert (placed["tolerations"], placed["nodeSelector"]) == (TOLERATIONS, SELECTOR)
    del pod["spec"]["containers"][0]["env"]  # another version of Argo: then what the pod itself has
    placed = nodes.describe(PYTORCH_JOB, "job", pod, "s3://b/x", TrainConfig(num_nodes=2), False)["spec"]
    placed = placed["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert (placed["tolerations"], placed["nodeSelector"]) == (TOLERATIONS, {"injected": "by the queue"})
    assert [volume["name"] for volume in placed["volumes"]] == ["ca", "shm"]
    assert [mount["mountPath"] for mount in placed["containers"][0]["volumeMounts"]] == ["/ca", "/dev/shm"]


def test_a_failed_pytorch_job_tells_the_steps_own_message_and_leaves_nothing(
    api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    api.served["kubeflow.org/v1"] = [("pytorchjobs", "PyTorchJob", True)]
    started = Nodes(api)
    config = TrainConfig(**{**SETTINGS, "num_nodes": 2, "target_modules": "qkv"})
    with pytest.raises(Tune16Error, match="train.target_modules: this model has no linear layer 'qkv'"):
        train(*inputs, tmp_path / "out", config, path=PATH)
    started.thread.join()
    assert len(started.jobs) == 1 and not [key for key in api.objects if key[1] == "pytorchjobs"]
    assert s3.list_objects(s3.default_bucket(), f"{PATH}/scratch/") == [] and not (tmp_path / "out").exists()


def test_what_the_cluster_lacks_or_refuses(
    api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(num_nodes=2)
    with pytest.raises(Tune16Error, match="neither TrainJob nor PyTorchJob"):
        train(*inputs, tmp_path / "out", config, path=PATH)
    serve_train_jobs(api)
    api.forbid("POST", "trainjobs")
    with pytest.raises(Tune16Error, match="the cluster refuses: 403 .*cannot create resource.*Apply manifests/base"):
        train(*inputs, tmp_path / "out", config, path=PATH)
    assert s3.list_objects(s3.default_bucket(), f"{PATH}/scratch/") == []
    monkeypatch.delenv("KUBECONFIG")
    with pytest.raises(Tune16Error, match="training on several nodes needs a cluster"):
        train(*inputs, tmp_path / "out", config, path=PATH)


def test_a_pod_without_its_step_gives_up(bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "components", "train-node", "--source", "s3://tune16/scratch/gone"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "the step that started this job has ended" in done.stderr


def test_only_folders_of_this_models_old_jobs_are_removed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = f"{PATH}/scratch/tune16-train-00000001"
    strangers = {
        "scratch/notes/alive",
        "scratch/tune16-train-00000003/alive",
        "other/llm/scratch/tune16-train-00000002/alive",
        f"{PATH}/scratch/readme.txt",
        f"{PATH}/scratch/tune16-train-mine/weights",
        f"{PATH}/scratch/tune16-train-00000004",
    }
    for key in {f"{ours}/alive", f"{ours}/weights/x", f"{PATH}/scratch/tune16-train-00000005/error-1", *strangers}:
        s3.write(bucket, key, b"")
    with Scratch.of_job(new_job(), PATH).holding({}, TrainConfig()):
        assert f"{ours}/weights/x" in _keys(bucket), "they have been written just now"
    monkeypatch.setattr(scratch_module, "_LEFTOVER_SECONDS", -1)
    with Scratch.of_job(new_job(), PATH).holding({}, TrainConfig()):
        pass
    assert _keys(bucket) == strangers


def test_inputs_that_the_storage_has_are_not_sent_again(bucket: str, tmp_path: Path) -> None:
    inputs = {name: (tmp_path / name, f"s3://{bucket}/pipelines/run/{name}") for name in ("weights", "rows")}
    for folder, _ in inputs.values():
        folder.mkdir()
        (folder / "file").write_bytes(b"content")
    s3.upload_folder(tmp_path / "weights", bucket, "pipelines/run/weights")
    scratch = Scratch.of_job(new_job(), PATH)
    with scratch.holding(inputs, TrainConfig(rank=4)):
        assert {key.rpartition("/")[2] for key in _keys(bucket) if scratch.prefix in key} == {
            "alive",
            "config.json",
            "file",
        }
        weights, rows, config, path = scratch.fetch_inputs(tmp_path / "pod")
    assert (weights / "file").read_bytes() == (rows / "file").read_bytes() == b"content"
    assert (config.rank, path) == (4, PATH)
    assert _keys(bucket) == {"pipelines/run/weights/file"}


def _keys(bucket: str) -> set[str]:
    return {stored.key for stored in s3.list_objects(bucket, "")}


def test_a_storage_that_is_away_for_a_while_ends_nothing(
    api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage fails forty times in a row, where five tries would have to do, and the API drops some requests."""
    serve_train_jobs(api)
    for name in ("_FIRST_PAUSE_SECONDS", "_LONGEST_PAUSE_SECONDS"):
        monkeypatch.setattr(again, name, 0.05)
    monkeypatch.setattr(nodes, "ALIVE_SECONDS", 0)
    renew, faults = Scratch.renew, iter(range(40))

    def renew_later(self: Scratch) -> None:
        def ask() -> None:
            if api.on_create and next(faults, None) is not None:
                raise ConnectionResetError("away")

        retry.attempt("s3://", ask)
        renew(self)

    monkeypatch.setattr(Scratch, "renew", renew_later)
    api.drop("trainjobs", times=2)
    api.on_create["trainjobs"] = lambda job: job.update(
        status={"conditions": [{"type": "Failed", "status": "True", "message": "in the end"}]}
    )
    with pytest.raises(Tune16Error, match="failed: in the end"):
        train(*inputs, tmp_path / "out", TrainConfig(num_nodes=2), path=PATH)
    assert next(faults, None) is None


def test_a_pod_goes_on_while_the_storage_cannot_be_asked(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch.of_job(new_job(), PATH)
    with pytest.raises(JobEndedError, match="the step that started this job has ended"):
        scratch.check_alive()
    scratch.renew()
    scratch.check_alive()
    monkeypatch.setattr(scratch_module, "_ORPHANED_SECONDS", -10)
    with pytest.raises(JobEndedError, match="the step that started this job has ended"):
        scratch.check_alive()
    monkeypatch.setenv("AWS_S3_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(again, "_NUM_TRIES", 1)
    with pytest.raises(Tune16Error, match="cannot be reached") as error:
        scratch.check_alive()
    assert not isinstance(error.value, JobEndedError)


def test_a_node_that_is_told_to_end_leaves_no_result(
    api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path, bucket: str
) -> None:
    """SIGTERM reaches the second node alone, in the middle: the first one, which writes the result, must not."""
    serve_train_jobs(api, "runtimePatches")
    started = Nodes(api, told_to_end=1)
    config = TrainConfig(**{**SETTINGS, "epochs": 1, "micro_batch": 1, "num_nodes": 2, "checkpoint_minutes": 0.001})
    with pytest.raises(Tune16Error, match="stopped before the last step.*continues from its newest checkpoint"):
        train(*inputs, tmp_path / "out", config, path=PATH)
    started.thread.join()
    assert started.codes == [143, 143] and not (tmp_path / "out").exists()
    assert [key for key in _keys(bucket) if key.endswith("/checkpoint.json")]
    assert not [key for key in _keys(bucket) if key.startswith(f"{PATH}/scratch/")]


def test_a_message_that_comes_during_the_clean_up_does_not_stay(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, delete = Scratch.of_job("late", PATH), s3.delete

    def delete_while_a_pod_reports(bucket: str, key: str) -> None:
        if key == f"{scratch.prefix}/alive":
            scratch.report(0, Tune16Error("just before"))
            delete(bucket, key)
            scratch.report(1, Tune16Error("just after"))
        delete(bucket, key)

    with scratch.holding({}, TrainConfig()):
        monkeypatch.setattr(s3, "delete", delete_while_a_pod_reports)
    assert [stored.key for stored in s3.list_objects(scratch.bucket, f"{PATH}/scratch/")] == []


def test_passing_faults_of_the_api_do_not_end_a_job(
    api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    serve_train_jobs(api)
    api.fail("GET", "trainjobs/", 503, times=3)
    api.drop("trainjobs/", times=2)
    api.on_create["trainjobs"] = lambda job: job.update(
        status={"conditions": [{"type": "Failed", "status": "True", "message": "in the end"}]}
    )
    with pytest.raises(Tune16Error, match="failed: in the end"):
        train(*inputs, tmp_path / "out", TrainConfig(num_nodes=2), path=PATH)


def test_a_job_that_says_nothing_is_given_up_but_not_one_in_the_queue(
    api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_train_jobs(api)
    monkeypatch.setattr(nodes, "_SILENCE_SECONDS", 1)
    seen: list[Json] = []
    api.on_create["trainjobs"] = seen.append

    def queue(job: Json) -> None:
        seen.append(job)
        job["status"] = {"conditions": [{"type": "Suspended", "status": "True"}]}

        def fail() -> None:
            job["status"] = {"conditions": [{"type": "Failed", "status": "True", "message": "preempted"}]}

        threading.Timer(3, fail).start()

    with pytest.raises(Tune16Error, match="has reported nothing"):
        train(*inputs, tmp_path / "out", TrainConfig(num_nodes=2), path=PATH)
    api.on_create["trainjobs"] = queue
    with pytest.raises(Tune16Error, match="failed: preempted"):
        train(*inputs, tmp_path / "out", TrainConfig(num_nodes=2), path=PATH)
    assert len(seen) == 2 and not [key for key in api.objects if key[1] == "trainjobs"]


def end_with(message: str) -> Callable[[Json], None]:
    def end(job: Json) -> None:
        job["status"] = {"conditions": [{"type": "Failed", "status": "True", "message": message}]}

    return end


def add_node_pod(api: KubernetesApi, job: Json, rank: int, log: str = "", status: Json | None = None) -> None:
    name = job["metadata"]["name"]
    labels = {"jobset.sigs.k8s.io/jobset-name": name, "batch.kubernetes.io/job-completion-index": str(rank)}
    metadata = {"name": f"{name}-{rank}", "namespace": NAMESPACE, "labels": labels}
    spec = {"containers": [{"name": "node"}]}
    api.add("v1", "pods", {"kind": "Pod", "metadata": metadata, "spec": spec, "status": status or {"phase": "Running"}})
    if log:
        api.logs[NAMESPACE, f"{name}-{rank}"] = log


def test_a_crash_of_a_pod_leaves_its_last_lines(
    api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_train_jobs(api)

    def crash(job: Json) -> None:
        killed = {"name": "node", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
        add_node_pod(api, job, 0, "NCCL WARN Cuda failure\nterminate called\n")
        add_node_pod(api, job, 1, status={"phase": "Failed", "containerStatuses": [killed]})
        end_with("jobset failed due to one or more job failures.")(job)

    api.on_create["trainjobs"] = crash
    with pytest.raises(
        Tune16Error, match="failed: jobset failed due to one or more job failures. The last lines of its pods"
    ):
        train(*inputs, tmp_path / "out", TrainConfig(num_nodes=2), path=PATH)
    said = capsys.readouterr().out
    assert "-0: NCCL WARN Cuda failure" in said and "-0: terminate called" in said
    assert "-1: it was killed because it ran out of memory (OOMKilled)" in said


def test_pods_that_wait_are_not_running(
    api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_train_jobs(api)

    def wait(job: Json) -> None:
        message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: none"
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        job["status"] = {"jobsStatus": [{"name": "node", "ready": 0, "active": 1}]}
        add_node_pod(api, job, 1, status={"phase": "Pending", "conditions": [condition]})
        threading.Timer(1, end_with("in the end"), (job,)).start()

    api.on_create["trainjobs"] = wait
    with pytest.raises(Tune16Error, match="in the end"):
        train(*inputs, tmp_path / "out", TrainConfig(num_nodes=2), path=PATH)
    assert "is waiting: 0/3 nodes: Insufficient nvidia.com/gpu" in capsys.readouterr().out


def test_a_job_that_somebody_deleted(api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    serve_train_jobs(api)

    def forget(job: Json) -> None:
        del api.objects[TRAINER, "trainjobs", NAMESPACE, job["metadata"]["name"]]

    api.on_create["trainjobs"] = forget
    with pytest.raises(Tune16Error, match="was deleted while it ran. Retry the run"):
        train(*inputs, tmp_path / "out", TrainConfig(num_nodes=2), path=PATH)


def test_what_the_queue_can_never_admit_is_not_asked_for(
    api: KubernetesApi, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    serve_train_jobs(api)
    queue = {"kind": "LocalQueue", "metadata": {"name": "other", "namespace": NAMESPACE}, "spec": {"clusterQueue": "c"}}
    api.add("kueue.x-k8s.io/v1beta1", "localqueues", queue)
    with pytest.raises(Tune16Error, match="there is no LocalQueue gpus in tune16. There are: other. Ask"):
        train(*inputs, tmp_path / "out", TrainConfig(num_nodes=2), path=PATH)
    amounts = [{"name": name, "nominalQuota": quota} for name, quota in (("cpu", 99), ("memory", "99Gi"))]
    flavors = [{"name": "f", "resources": [*amounts, {"name": "nvidia.com/gpu", "nominalQuota": 3}]}]
    cluster_queue = {
        "kind": "ClusterQueue",
        "metadata": {"name": "c"},
        "spec": {"resourceGroups": [{"flavors": flavors}]},
    }
    api.add("kueue.x-k8s.io/v1beta1", "clusterqueues", cluster_queue)
    metadata = {"name": "gpus", "namespace": NAMESPACE}
    api.add("kueue.x-k8s.io/v1beta1", "localqueues", {**queue, "metadata": metadata})
    with pytest.raises(Tune16Error, match="the ClusterQueue c has 3 nvidia.com/gpu in all, and 4 are requested"):
        train(*inputs, tmp_path / "out", TrainConfig(num_nodes=2, num_gpus=2), path=PATH)
    assert not [key for key in api.objects if key[1] == "trainjobs"]
