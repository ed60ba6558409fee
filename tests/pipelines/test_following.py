"""What a person sees of a run while it waits, fails and ends, as real servers and pods tell it."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from components.storage import records, s3
from pipelines.s3server import S3Server
from tests.conftest import BUCKET
from tests.pipelines.conftest import Call, add_step_pod, secret
from tests.servers import KubernetesApi, PipelineApi, Reply, Request

RECIPE = "llama2-7b-16gb"
KUEUE = "kueue.x-k8s.io/v1beta2"
LAUNCHER = """\
I1129 12:33:33.101 10 launcher_v2.go:198] launch context
I1129 12:33:33.102 10 main.go:41] Component spec:
{
  "executorLabel": "exec-preflight",
  "error: not the step's": true
}
"""
LAUNCHER_ENDS = """\
I1129 12:33:38.000 10 launcher_v2.go:151] Stopping...
F1129 12:33:38.001 10 main.go:57] Component failed to execute: exit status 2
"""
SCHEDULED = {"type": "PodScheduled", "status": "True"}


def since(minutes: float) -> str:
    return f"{datetime.now(UTC) - timedelta(minutes=minutes):%Y-%m-%dT%H:%M:%SZ}"


def unscheduled(message: str, reason: str = "Unschedulable", minutes: float = 3.1) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return {"phase": "Pending", "conditions": [{**condition, "lastTransitionTime": since(minutes)}]}


def container(state: dict[str, Any], phase: str = "Pending", **fields: Any) -> dict[str, Any]:
    status = {"name": "main", "image": IMAGE, "state": state, **fields}
    return {"phase": phase, "conditions": [SCHEDULED], "containerStatuses": [status]}


def waiting(reason: str, message: str = "", **fields: Any) -> dict[str, Any]:
    return container({"waiting": {"reason": reason, "message": message}}, **fields)


def ended(code: int, reason: str = "Error") -> dict[str, Any]:
    return container({"terminated": {"exitCode": code, "reason": reason}}, "Failed")


@pytest.fixture
def started(call: Call, pipelines_api: PipelineApi) -> dict[str, Any]:
    """A run of which train is running, as the server calls it whatever its pod does."""
    assert call("submit", RECIPE)[0] == 0
    (run,) = pipelines_api.runs.values()
    pipelines_api.set_tasks(run["run_id"], {"preflight": "SUCCEEDED", "train": "RUNNING"}, "RUNNING")
    return run


NO_GPU = (
    "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: 0/1 nodes are available: 1 No preemption "
    "victims found for incoming pod."
)
TAINTED = (
    "0/3 nodes are available: 1 Insufficient memory, 2 node(s) had untolerated taint {a: b}. preemption: not helpful."
)
PULLED = 'Back-off pulling image "x": ErrImagePull: rpc error: code = NotFound desc = failed to resolve: x: not found'
IMAGE = "registry.example.com/tune16/gguf:0.1.0"
EVICTED = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (unscheduled(NO_GPU), "waiting: 0/1 nodes: Insufficient nvidia.com/gpu (3 min). All GPUs are in use"),
        (unscheduled(TAINTED), "waiting: 0/3 nodes: 1 Insufficient memory, 2 node(s) had untolerated taint {a: b}"),
        (waiting("ImagePullBackOff", PULLED), f"waiting: image {IMAGE} cannot be pulled: not found"),
        (waiting("ErrImagePull", "401 Unauthorized"), "cannot be pulled: access denied (3 min). Link a pull"),
        (waiting("ErrImagePull", "dial tcp: no such host"), "its registry cannot be reached (3 min). Check that"),
        (waiting("CreateContainerConfigError", "no secret"), "container main: CreateContainerConfigError no secret"),
        (
            waiting(
                "CrashLoopBackOff",
                phase="Running",
                restartCount=4,
                lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            ),
            "started 4 times again, and last time it was killed because it ran out of memory (OOMKilled)",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("node", ["wf.root.train.executor", "wf(0).root(0).train(0).executor(0)"])
def test_a_pod_says_why_its_step_waits(
    call: Call, started: dict[str, Any], kubernetes_api: KubernetesApi, status: dict[str, Any], told: str, node: str
) -> None:
    conditions = [{**condition, "lastTransitionTime": since(3.1)} for condition in status["conditions"]]
    add_step_pod(kubernetes_api, started, "train", status={**status, "conditions": conditions}, node=node)
    out = call("runs", "show", started["run_id"], "--json")[1]
    row = next(row for row in json.loads(out)["steps"] if row["step"] == "train")
    assert told in f"{row['state']}: {row['note']}"


def test_a_step_that_waits_is_told_once_while_one_follows_it(
    call: Call, started: dict[str, Any], pipelines_api: PipelineApi, kubernetes_api: KubernetesApi
) -> None:
    add_step_pod(kubernetes_api, started, "train", status=unscheduled(NO_GPU))
    pipelines_api.script = [("RUNNING", {})] * 4 + [("SUCCEEDED", {"train": "SUCCEEDED"})]
    out = call("runs", "show", started["run_id"], "--wait")[1]
    lines = [line for line in out.splitlines() if "train waiting" in line]
    assert len(lines) == 1 and "0/1 nodes: Insufficient nvidia.com/gpu (3 min)" in lines[0]


def test_a_volume_that_does_not_come_and_a_driver_that_waits(
    call: Call, started: dict[str, Any], kubernetes_api: KubernetesApi
) -> None:
    pod = add_step_pod(kubernetes_api, started, "train", status=waiting("ContainerCreating"))
    event = {"kind": "Event", "metadata": {"name": "e", "namespace": "tune16"}, "type": "Warning"}
    event |= {
        "involvedObject": {"name": pod["metadata"]["name"]},
        "reason": "FailedMount",
        "message": 'secret "y" gone.',
    }
    kubernetes_api.add("v1", "events", event)
    add_step_pod(kubernetes_api, started, "evaluate", status=unscheduled(TAINTED), node="wf.root.evaluate-driver")
    out = call("runs", "show", started["run_id"])[1]
    assert 'FailedMount: secret "y" gone' in out and "0/3 nodes: 1 Insufficient memory" in out


def test_a_queue_tells_its_reason_and_the_place_in_it(
    call: Call, started: dict[str, Any], kubernetes_api: KubernetesApi
) -> None:
    gated = unscheduled("Scheduling is blocked due to non-empty scheduling gates", "SchedulingGated")
    gates = {"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}], "labels": {"kueue.x-k8s.io/queue-name": "gpus"}}
    pod = add_step_pod(kubernetes_api, started, "train", status=gated, **gates)
    assert "waiting" in (out := call("runs", "show", started["run_id"])[1]) and "in the queue gpus" in out
    why = "couldn't assign flavors: insufficient quota for nvidia.com/gpu in flavor t4, 1 more needed."
    workload = {
        "kind": "Workload",
        "metadata": {"name": "pod-x", "namespace": "tune16", "ownerReferences": [{"uid": pod["metadata"]["uid"]}]},
        "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": why}]},
    }
    kubernetes_api.add(KUEUE, "workloads", workload)
    path = r"/apis/visibility\.kueue\.x-k8s\.io/v1beta1/namespaces/tune16/localqueues/gpus/pendingworkloads"
    place = {"items": [{"metadata": {"name": "pod-x"}, "positionInLocalQueue": 1}]}

    def tell(request: Request) -> Reply:
        return Reply.json(place)

    kubernetes_api._place = tell  # type: ignore[attr-defined]
    kubernetes_api.routes = [("GET", path, "_place"), *kubernetes_api.routes]  # type: ignore[misc]
    out = call("runs", "show", started["run_id"], "--json")[1]
    note = next(row for row in json.loads(out)["steps"] if row["step"] == "train")["note"]
    assert note == f"in the queue gpus, place 2: {why.rstrip('.')} (3 min)"


def test_what_keeps_a_step_from_getting_a_pod_is_told_by_the_workflow(
    call: Call, started: dict[str, Any], kubernetes_api: KubernetesApi
) -> None:
    message = (
        'pods "wf-train" is forbidden: exceeded quota: gpu, requested: requests.nvidia.com/gpu=1, used: 1, limited: 1'
    )
    node = {"name": "wf.root.train.executor", "type": "Pod", "phase": "Pending", "message": message}
    add_workflow(kubernetes_api, started, {"a": node})
    add_driver(kubernetes_api, started, "train")
    assert "exceeded quota: gpu" in call("runs", "show", started["run_id"])[1]


def add_driver(api: KubernetesApi, run: dict[str, Any], step: str) -> None:
    """The pod that decided whether the step runs; it stays, and knows nothing of the step."""
    add_step_pod(api, run, step, LAUNCHER, {"phase": "Succeeded"}, node=f"wf.root.{step}-driver")


def add_workflow(api: KubernetesApi, run: dict[str, Any], nodes: dict[str, Any], **spec: Any) -> None:
    metadata = {"name": "wf", "namespace": "tune16", "labels": {"pipeline/runid": run["run_id"]}}
    workflow = {"kind": "Workflow", "metadata": metadata, "spec": spec, "status": {"nodes": nodes}}
    api.add("argoproj.io/v1alpha1", "workflows", workflow)


def test_progress_of_training_is_told_by_tens_of_percent(
    call: Call, started: dict[str, Any], pipelines_api: PipelineApi, kubernetes_api: KubernetesApi
) -> None:
    add_step_pod(kubernetes_api, started, "train", "train: started\n")

    def reach(step: int) -> Callable[[dict[str, Any]], None]:
        def write(run: dict[str, Any]) -> None:
            kubernetes_api.logs["tune16", "wf-root-train-executor"] += (
                f"train: step {step}/1,000  held-out loss 1.2345\n"
                f"train: step {step}/1,000  loss 1.5000  2,000 tokens/s  12.0 min left  9.1 GiB\n"
            )

        return write

    pipelines_api.script = [reach(100), reach(105), reach(250), ("SUCCEEDED", {"train": "SUCCEEDED"})]
    out = call("runs", "show", started["run_id"], "--wait")[1]
    lines = [" ".join(line.split()) for line in out.splitlines() if "train running" in line]
    assert lines == [
        "train running: 10%, loss 1.5000, held-out loss 1.2345, 12 min left",
        "train running: 25%, loss 1.5000, held-out loss 1.2345, 12 min left",
    ]


@pytest.mark.parametrize("node", ["wf.root.train.executor", "wf(0).root(0).train(0).executor(1)"])
def test_a_failed_step_ends_with_its_own_error(
    call: Call, pipelines_api: PipelineApi, kubernetes_api: KubernetesApi, node: str
) -> None:
    own = (
        "train: started\ntrain: model x\n50%|###\r100%|#####\nerror: s3://b/no: nothing is there. [Check] the \\[/x].\n"
    )

    def fail(run: dict[str, Any]) -> None:
        if "(1)" in node:  # the attempt before it
            add_step_pod(
                kubernetes_api, run, "train", "train: started\nearlier\n", node="wf(0).root(0).train(0).executor(0)"
            )
        add_step_pod(kubernetes_api, run, "train", LAUNCHER + own + LAUNCHER_ENDS, ended(2), node=node)
        add_step_pod(kubernetes_api, run, "prepare", "prepare: started\n")
        pipelines_api.set_tasks(run["run_id"], {"prepare": "SUCCEEDED", "train": "FAILED"}, "FAILED")

    pipelines_api.script = [fail]
    code, out, err = call("submit", RECIPE, "--wait", "--json")
    assert code == 1 and json.loads(out)["state"] == "FAILED"
    lines = [" ".join(line.split()[1:]) for line in err.splitlines() if " train " in line]
    assert lines[-4:] == [
        "train: started",
        "train: model x",
        "100%|#####",
        "error: s3://b/no: nothing is there. [Check] the \\[/x].",
    ]
    assert "executorLabel" not in err and "prepare: started" not in err and "Traceback" not in err
    (run,) = pipelines_api.runs.values()
    out = call("runs", "logs", run["run_id"], "--step", "train")[1]
    assert "error: s3://b/no" in out and "executorLabel" not in out and "main.go" not in out and "earlier" not in out
    assert "executorLabel" in call("runs", "logs", run["run_id"], "--step", "train", "--all")[1]


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (EVICTED, "Evicted (The node was low on resource: memory)"),
        (ended(137, "OOMKilled"), "it was killed because it ran out of memory (OOMKilled)"),
        (ended(137), "it was killed (exit code 137)"),
        (ended(1, "OOMKilled"), "it was killed because it ran out of memory (OOMKilled)"),
        (None, "its pod was deleted"),
    ],
)  # fmt: skip
def test_a_pod_that_left_no_word(
    call: Call,
    started: dict[str, Any],
    pipelines_api: PipelineApi,
    kubernetes_api: KubernetesApi,
    status: dict[str, Any] | None,
    told: str,
) -> None:
    if status:
        add_step_pod(kubernetes_api, started, "train", LAUNCHER + "train: started\ntrain: step 3/9\n", status)
    node = {"name": "wf.root.train.executor", "type": "Pod", "phase": "Error", "message": "pod deleted"}
    add_workflow(kubernetes_api, started, {"a": node})
    add_driver(kubernetes_api, started, "train")
    pipelines_api.set_tasks(started["run_id"], {"train": "FAILED"}, "FAILED")
    code, _, err = call("runs", "show", started["run_id"], "--wait")
    assert code == 1 and told in err
    assert f"`tune16 runs retry {started['display_name']}` continues" in err and "newest checkpoint" in err
    assert bool(status) == ("train: step 3/9" in err)


@pytest.mark.parametrize("is_2_17", [False, True])
def test_logs_of_pods_that_are_gone(
    call: Call, started: dict[str, Any], pipelines_api: PipelineApi, kubernetes_api: KubernetesApi, is_2_17: bool
) -> None:
    pipelines_api.is_2_17 = is_2_17
    run_id = started["run_id"]
    add_driver(kubernetes_api, started, "train")
    assert "(its pod is gone, and the pipeline server has kept no log of it)" in call("runs", "logs", run_id)[1]
    node = "wf-train-executor-0" if is_2_17 else "wf-train-executor"
    pipelines_api.kept_logs[run_id, node] = LAUNCHER + "train: started\ntrain: all is well\n"
    assert "train: all is well" in call("runs", "logs", run_id, "--step", "train")[1]
    pipelines_api.kept_logs[run_id, node] = "prepare: started\n"  # another step's is never taken for it
    assert "kept no log" in call("runs", "logs", run_id, "--step", "train")[1]


def test_a_pod_that_was_removed_long_after_its_end_is_not_called_deleted(
    call: Call, started: dict[str, Any], pipelines_api: PipelineApi
) -> None:
    log = LAUNCHER + "train: started\nTraceback (most recent call last):\nRuntimeError: a bug\n" + LAUNCHER_ENDS
    pipelines_api.kept_logs[started["run_id"], "wf-train-executor"] = log
    pipelines_api.set_tasks(started["run_id"], {"train": "FAILED"}, "FAILED")
    code, _, err = call("runs", "show", started["run_id"], "--wait")
    assert code == 1 and "RuntimeError: a bug" in err and "its pod is gone" not in err
    assert err.splitlines()[-1].endswith("error: Component failed to execute: exit status 2")


def test_a_log_among_the_artifacts(
    call: Call, started: dict[str, Any], pipelines_api: PipelineApi, s3_server: S3Server, bucket: str
) -> None:
    key = f"tune16/{started['run_id']}/train/35808067/executor-logs-0"
    s3.write(bucket, key, b"train: started\ntrain: from the artifact\n")
    url = s3.client().generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
    pipelines_api.artifacts = [{"uri": f"s3://{bucket}/{key}", "created_at": since(1), "download_url": url}]
    assert "train: from the artifact" in call("runs", "logs", started["run_id"], "--step", "train")[1]


EVALUATION: dict[str, Any] = {
    "verdict": "promoted",
    "reason": "the held-out loss is 60.0% below the base model's, and there is no champion yet.",
    "base": {"loss": {"value": 3.0}, "exact_match": {"value": 0.0}, "chrf": {"value": 0.11}},
    "tuned": {"loss": {"value": 1.2}, "exact_match": {"value": 0.5}, "chrf": {"value": 0.81}},
    "loss_difference": {"value": -1.8},
    "champion": None,
}


@pytest.fixture
def leave(
    kubernetes_api: KubernetesApi, s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Leave in the bucket what the steps of a run leave; this login has the Secret only."""
    kubernetes_api.add("v1", "secrets", secret("tune16-connection", s3_server.environment(BUCKET)))

    def write(run: dict[str, Any], verdict: str = "promoted", key: str = "k", made_here: bool = True) -> None:
        path = run["runtime_config"]["parameters"]["destination_path"]
        (tmp_path / "evaluation.json").write_text(json.dumps({**EVALUATION, "verdict": verdict, "samples": []}))
        (tmp_path / "report.html").write_text("<p>the report</p>")
        with s3.environment(s3_server.environment(BUCKET)):
            records.begin(path, run["run_id"], key)
            if made_here:
                records.keep_evaluation(path, key, tmp_path)
            if verdict == "promoted":
                records.keep_publication(path, run["run_id"], {"version": "v1", "address": f"s3://{BUCKET}/{path}/v1"})

    return write


def end(api: PipelineApi, run: dict[str, Any], verdict: str) -> None:
    """The server's own view of a run with this verdict."""
    steps = dict.fromkeys(("preflight", "prepare", "quantize", "train", "evaluate"), "SUCCEEDED")
    more = dict.fromkeys(("merge", "convert", "upload", "register", "deploy"), "SUCCEEDED")
    api.set_tasks(run["run_id"], {**steps, **(more if verdict == "promoted" else {})}, "SUCCEEDED")
    run["finished_at"] = f"{datetime.now(UTC) + timedelta(seconds=2):%Y-%m-%dT%H:%M:%SZ}"


@pytest.mark.parametrize("verdict", ["promoted", "kept", "inconclusive"])
def test_the_end_tells_verdict_scores_address_and_what_to_do(
    call: Call,
    started: dict[str, Any],
    pipelines_api: PipelineApi,
    leave: Callable[..., None],
    verdict: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    leave(started, verdict)
    end(pipelines_api, started, verdict)
    code, out, _ = call("runs", "show", started["run_id"], "--wait")
    assert code == 0 and f"{verdict}: the held-out loss is 60.0% below" in out
    assert "loss" in out and "3" in out and "1.2" in out
    assert ("published s3://" in out) == (verdict == "promoted")
    assert ("nothing was published" in out) == (verdict != "promoted")
    assert f"next: tune16 runs report {started['display_name']}" in out
    assert verdict in call("runs")[1]
    content = json.loads(call("runs", "show", started["run_id"], "--json")[1])
    assert content["outcome"]["verdict"] == verdict and content["outcome"]["scores"]["loss"]["tuned"] == 1.2
    assert call("runs", "report", started["run_id"])[0] == 0
    assert (tmp_path / f"{started['display_name']}.html").read_text() == "<p>the report</p>"


def test_an_evaluation_from_the_cache_is_found_and_a_later_one_is_not_taken_for_it(
    call: Call, started: dict[str, Any], pipelines_api: PipelineApi, leave: Callable[..., None]
) -> None:
    assert call("submit", RECIPE)[0] == 0
    first, second = pipelines_api.runs.values()
    leave(first, "kept")
    end(pipelines_api, first, "kept")
    first["finished_at"] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    leave(second, "kept", made_here=False)
    pipelines_api.set_tasks(second["run_id"], {"preflight": "SUCCEEDED", "evaluate": "CACHED"}, "SUCCEEDED")
    second["finished_at"] = first["finished_at"]
    out = call("runs", "show", second["run_id"])[1]
    assert "from the cache" in out and "kept: the held-out loss" in out
    second["finished_at"] = since(5)  # before that evaluation was made
    assert "the verdict is not available" in call("runs", "show", second["run_id"])[1]


def test_without_the_bucket_the_logs_tell_the_verdict(
    call: Call, started: dict[str, Any], pipelines_api: PipelineApi, kubernetes_api: KubernetesApi
) -> None:
    add_step_pod(kubernetes_api, started, "evaluate", "evaluate: started\nevaluate: promoted: better.\n")
    add_step_pod(kubernetes_api, started, "upload", "upload: started\nupload: s3://b/m/v1 is champion 1\n")
    end(pipelines_api, started, "promoted")
    out = call("runs", "show", started["run_id"])[1]
    assert "promoted: better." in out and "published s3://b/m/v1" in out and "the scores are not available" in out
    assert " promoted " in call("runs")[1]  # as its steps tell
    kubernetes_api.forbid("GET", "secrets")
    assert "may not read the Secret" in call("runs", "show", started["run_id"])[1]
    kubernetes_api.fail("GET", "/log", 500, times=9)
    assert "the verdict is not available" in call("runs", "show", started["run_id"])[1]
    kubernetes_api.fail("GET", "/log", 500, times=9)
    assert "cannot read logs: 500" in call("runs", "logs", started["run_id"])[1]


def test_a_pod_that_pulls_its_image_does_not_wait_for_a_node_any_more(
    call: Call, started: dict[str, Any], kubernetes_api: KubernetesApi
) -> None:
    pod = add_step_pod(kubernetes_api, started, "train", status=waiting("ContainerCreating"))
    for number, (kind, reason) in enumerate((("Warning", "FailedScheduling"), ("Normal", "Pulling"))):
        event = {"kind": "Event", "metadata": {"name": reason.lower(), "namespace": "tune16"}, "type": kind}
        event |= {"involvedObject": {"name": pod["metadata"]["name"]}, "reason": reason, "message": "0/3 nodes"}
        kubernetes_api.add("v1", "events", {**event, "lastTimestamp": f"2026-01-01T00:00:0{number}Z"})
    out = call("runs", "show", started["run_id"], "--json")[1]
    row = next(row for row in json.loads(out)["steps"] if row["step"] == "train")
    assert (row["state"], row["note"]) == ("running", "")


def test_a_number_in_a_digest_is_no_status() -> None:
    from components.kubernetes.pods import pull_fault

    message = f'failed to pull "quay.io/x@sha256:{"a4039" * 12}": dial tcp 10.0.0.1:443: i/o timeout'
    assert pull_fault(message)[0] == "its registry cannot be reached"


@pytest.mark.parametrize("is_2_17", [False, True])
def test_a_stopped_run_is_called_stopped(
    call: Call, started: dict[str, Any], pipelines_api: PipelineApi, kubernetes_api: KubernetesApi, is_2_17: bool
) -> None:
    pipelines_api.is_2_17 = is_2_17
    if not is_2_17:  # this server forgets it; the workflow does not
        add_workflow(kubernetes_api, started, {}, activeDeadlineSeconds=0)
    assert call("runs", "stop", started["run_id"])[0] == 0
    code, out, err = call("runs", "show", started["run_id"], "--wait")
    assert code == 1 and started["state"] == "FAILED"
    assert "run stopped" in out and err.startswith("stopped") and "runs retry" in err
    assert "stopped" in call("runs")[1]
    assert call("runs", "retry", started["run_id"])[0] == 0


def test_times_are_in_the_viewers_zone(call: Call, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    started["created_at"] = "2026-11-29T12:00:00Z"
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert "2026-11-29 17:30" in call("runs")[1]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_deleting_a_schedule_leaves_the_run_that_goes_on(call: Call, pipelines_api: PipelineApi) -> None:
    weekly = ("schedule", RECIPE, "--every", "7d", "--name", "weekly")
    call(*weekly)
    call("submit", RECIPE)
    (run,) = pipelines_api.runs.values()
    (made,) = pipelines_api.recurring_runs.values()
    run["recurring_run_id"] = made["recurring_run_id"]
    pipelines_api.set_tasks(run["run_id"], {"train": "RUNNING"}, "RUNNING")
    call(*weekly, "--set", "train.rank=4")  # replaced
    call("schedule", "delete", "weekly")
    assert pipelines_api.recurring_runs == {} and not run.get("is_destroyed")


def test_the_list_of_schedules_tells_the_next_and_the_last_run(
    call: Call, pipelines_api: PipelineApi, started: dict[str, Any]
) -> None:
    call("schedule", RECIPE, "--every", "12h", "--name", "often")
    call("schedule", RECIPE, "--cron", "0 3 * * 1", "--name", "mondays")
    jobs = {job["display_name"]: job for job in pipelines_api.recurring_runs.values()}
    started |= {"recurring_run_id": jobs["often"]["recurring_run_id"], "created_at": "2026-11-29T12:00:00Z"}
    pipelines_api.set_tasks(started["run_id"], {"train": "FAILED"}, "FAILED")
    listed = {entry["display_name"]: entry for entry in json.loads(call("schedule", "list", "--json")[1])}
    assert listed["often"]["last_run"] == {"name": started["display_name"], "outcome": "failed"}
    monday = datetime.fromisoformat(listed["mondays"]["next_run_at"])
    assert (monday.weekday(), monday.hour, monday.minute) == (0, 3, 0) and monday > datetime.now(UTC)
    out = call("schedule", "list")[1]
    assert "every 12 h" in out and "cron 0 0 3 * * 1 (UTC)" in out and "failed" in out
    call("schedule", "pause", "often")
    listed = {entry["display_name"]: entry for entry in json.loads(call("schedule", "list", "--json")[1])}
    assert listed["often"]["next_run_at"] == ""


@pytest.mark.parametrize(
    ("cron", "after", "due"),
    [
        ("0 0 3 * * 1", "2026-11-29T12:00:00", "2026-11-30T03:00:00"),
        ("0 */15 * * * *", "2026-11-29T12:14:59", "2026-11-29T12:15:00"),
        ("30 59 23 31 12 *", "2026-12-31T23:59:30", "2027-12-31T23:59:30"),
        ("0 0 0 29 2 *", "2026-01-01T00:00:00", "2028-02-29T00:00:00"),
        ("0 0 0 13 * fri", "2026-11-01T00:00:00", "2026-11-06T00:00:00"),
        ("@weekly", "2026-11-29T00:00:00", "2026-12-06T00:00:00"),
    ],
)
def test_the_next_time_of_a_cron_expression(cron: str, after: str, due: str) -> None:
    from pipelines.schedules import next_time

    found = next_time(cron, datetime.fromisoformat(after).replace(tzinfo=UTC))
    assert found and found.replace(tzinfo=None).isoformat() == due


VERSIONS = "pipelines.kubeflow.org/v2beta1"


def apply_version(kubernetes_api: KubernetesApi, name: str, content: str = "") -> dict[str, Any]:
    body = {"kind": "PipelineVersion", "metadata": {"name": name, "namespace": "tune16"}}
    return kubernetes_api.add(
        VERSIONS, "pipelineversions", {**body, "spec": {"description": f"Fine-tunes. [{content}]"}}
    )


def test_a_version_that_was_applied_before_the_webhook_ran_is_healed(
    call: Call, pipelines_api: PipelineApi, kubernetes_api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("submit", RECIPE)  # uploads, and so tells what the applied object would hold
    (version,) = pipelines_api.versions.values()
    (pipeline,) = pipelines_api.pipelines.values()
    del pipelines_api.versions[version["pipeline_version_id"]]
    name = "tune16-0123456789"  # as the overlay calls it
    apply_version(kubernetes_api, name, version["name"])
    apply_version(kubernetes_api, "tune16-0.0.1-old")
    patch, told = kubernetes_api._patch, {"description": f"Fine-tunes. [{version['name']}]"}

    def webhook(request: Request, key: Any) -> Any:
        answer = patch(request, key)
        kubernetes_api.objects[key]["metadata"]["labels"]["pipelines.kubeflow.org/pipeline-id"] = "p"
        pipelines_api.versions["v"] = {**version, "pipeline_version_id": "v", "name": name, **told}
        return answer

    monkeypatch.setattr(kubernetes_api, "_patch", webhook)
    assert call("submit", RECIPE)[0] == 0
    assert [found["name"] for found in pipelines_api.versions.values()] == [name]  # nothing was uploaded beside it
    old = kubernetes_api.objects[VERSIONS, "pipelineversions", "tune16", "tune16-0.0.1-old"]
    assert "labels" not in old["metadata"] and pipeline
    del pipelines_api.versions["v"]
    del kubernetes_api.objects[VERSIONS, "pipelineversions", "tune16", name]
    apply_version(kubernetes_api, name, version["name"])
    kubernetes_api.forbid("PATCH", "pipelineversions")
    code, _, err = call("submit", RECIPE)
    assert code == 2 and f"oc label pipelineversion {name} tune16.dev/touched=again --overwrite -n tune16" in err


def test_the_demo_goes_into_the_bucket_of_the_namespaces_connection(
    call: Call,
    kubernetes_api: KubernetesApi,
    s3_server: S3Server,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = s3_server.environment(BUCKET)
    kubernetes_api.add("v1", "secrets", secret("tune16-connection", environment))
    for name in environment:
        monkeypatch.delenv(name, raising=False)

    def put(folder: Path) -> None:
        s3.write(os.environ["AWS_S3_BUCKET"], "demo/here", b"x")

    monkeypatch.setattr("pipelines.local.put_demo", put)
    assert call("submit", "demo")[0] == 0
    with s3.environment(environment):
        assert s3.read(BUCKET, "demo/here") == b"x"


@pytest.mark.parametrize("cron", ["@every 1h", "CRON_TZ=Asia/Tokyo 0 0 3 * * *", "0 0 3", "x y z a b c", ""])
def test_a_schedule_that_others_wrote_does_not_break_the_list(
    call: Call, pipelines_api: PipelineApi, started: dict[str, Any], cron: str
) -> None:
    call("schedule", RECIPE, "--every", "12h", "--name", "theirs")
    job = next(job for job in pipelines_api.recurring_runs.values() if job["display_name"] == "theirs")
    job["trigger"] = {"cron_schedule": {"cron": cron}}
    code, out, _ = call("schedule", "list", "--json")
    assert (
        code == 0 and next(found for found in json.loads(out) if found["display_name"] == "theirs")["next_run_at"] == ""
    )
