"""submit, runs and schedule against a server that speaks the KFP v2beta1 API, with the faults of real ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.kubernetes import account
from components.runtime.errors import Tune16Error
from pipelines.naming import version_name
from pipelines.schedules import Trigger, read_cron, read_interval
from tests.pipelines.conftest import Call, add_step_pod, furnish
from tests.servers import KubernetesApi, PipelineApi, make_certificate

RECIPE = "llama2-7b-16gb"
CREATED = ("pipelines", "versions", "runs", "recurring_runs")


def left(api: PipelineApi) -> dict[str, int]:
    """How many objects are on the server; the experiment that every server has does not count."""
    return {kind: len(getattr(api, kind)) for kind in CREATED} | {"experiments": len(api.experiments) - 1}


NOTHING = {**dict.fromkeys(CREATED, 0), "experiments": 0}


def only(entries: dict[str, Any]) -> Any:
    (entry,) = entries.values()
    return entry


def test_submit_uploads_once_and_prints_the_runs_page(call: Call, pipelines_api: PipelineApi) -> None:
    code, out, err = call("submit", RECIPE, "--set", "train.rank=8", "--set", "train.packing=false")
    assert (code, err) == (0, "")
    run = only(pipelines_api.runs)
    assert f"https://dashboard.example.com/experiments/tune16/{run['experiment_id']}/runs/{run['run_id']}" in out
    assert only(pipelines_api.versions)["display_name"] == version_name()
    parameters = run["runtime_config"]["parameters"]
    assert parameters["lora_rank"] == 8 and parameters["more_train_options"] == {"packing": False}
    assert "with_connection_secret" not in parameters  # the form's own default on the server stays in force
    assert run["display_name"].startswith(f"{RECIPE}-")
    call("submit", RECIPE)
    assert left(pipelines_api) == {"pipelines": 1, "versions": 1, "experiments": 1, "runs": 2, "recurring_runs": 0}


def test_a_server_with_older_content_gets_a_version_and_uploaded_takes_what_is_there(
    call: Call, pipelines_api: PipelineApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("submit", RECIPE)
    monkeypatch.setattr("components.images.VERSION", "9.9.9")
    call("submit", RECIPE, "--uploaded")
    assert len(pipelines_api.versions) == 1
    call("submit", RECIPE)
    assert len(pipelines_api.pipelines) == 1
    assert sorted(entry["display_name"][:12] for entry in pipelines_api.versions.values())[1] == "tune16-9.9.9"


def test_wait_follows_to_the_end(call: Call, pipelines_api: PipelineApi) -> None:
    pipelines_api.script = [
        ("RUNNING", {"preflight": "RUNNING"}),
        ("RUNNING", {"preflight": "SUCCEEDED", "train": "RUNNING"}),
        ("SUCCEEDED", {"train": "SUCCEEDED"}),
    ]
    code, out, _ = call("submit", RECIPE, "--wait")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()[1:]]
    assert lines == [
        "preflight running",
        "run running",
        "preflight succeeded after 0 s",
        "train running",
        "train succeeded after 0 s",
        "run succeeded",
        "the verdict is not available: the bucket's endpoint http://s3.svc is reachable only inside the cluster.",
    ]


def test_wait_shows_the_log_of_a_failed_step(
    call: Call, pipelines_api: PipelineApi, kubernetes_api: KubernetesApi
) -> None:
    def fail(run: dict[str, Any]) -> None:
        add_step_pod(kubernetes_api, run, "train", "train: started\nerror: no [luck] \\[/x]\n")
        add_step_pod(kubernetes_api, run, "prepare", "prepare: started\n")
        pipelines_api.set_tasks(run["run_id"], {"prepare": "SUCCEEDED", "train": "FAILED"}, "FAILED")

    pipelines_api.script = [fail]
    code, out, err = call("submit", RECIPE, "--wait", "--json")
    assert code == 1
    assert json.loads(out)["state"] == "FAILED"
    assert "error: no [luck] \\[/x]" in err and "Traceback" not in err and "prepare: started" not in err


def test_runs_are_listed_shown_stopped_and_retried(
    call: Call, pipelines_api: PipelineApi, kubernetes_api: KubernetesApi
) -> None:
    call("submit", RECIPE)
    run = only(pipelines_api.runs)
    pipelines_api.set_tasks(run["run_id"], {"preflight": "SUCCEEDED", "prepare": "RUNNING"}, "RUNNING")
    assert run["run_id"] in call("runs")[1]
    assert json.loads(call("runs", "list", "--json", "--limit", "1")[1])[0]["run_id"] == run["run_id"]
    assert "running" in call("runs", "show", run["display_name"])[1]
    add_step_pod(kubernetes_api, run, "preflight", "preflight: started\n")
    add_step_pod(kubernetes_api, run, "prepare")
    log = call("runs", "logs", run["run_id"])[1]
    assert "preflight: started" in log and "has not started yet" in log
    assert "These have: preflight, prepare." in call("runs", "logs", run["run_id"], "--step", "train")[2]
    assert call("runs", "retry", run["run_id"])[0] == 2
    assert call("runs", "stop", run["run_id"])[0] == 0
    call("runs", "show", run["run_id"])  # the server stops it between two looks
    assert run["state"] == "FAILED"
    assert call("runs", "retry", run["run_id"])[0] == 0
    code, _, err = call("runs", "show", "nothing")
    assert code == 2 and "not found" in err


def test_a_schedule_is_made_once_changed_paused_and_deleted(call: Call, pipelines_api: PipelineApi) -> None:
    weekly = ("schedule", RECIPE, "--cron", "0 3 * * 1", "--name", "weekly")
    assert "weekly: created, cron 0 0 3 * * 1 (UTC)" in call(*weekly)[1]
    made = only(pipelines_api.recurring_runs)
    assert made["max_concurrency"] == "1" and made["no_catchup"] is True
    assert not made["pipeline_version_reference"].get("pipeline_version_id")  # always the newest
    assert "weekly: unchanged" in call(*weekly)[1]
    assert only(pipelines_api.recurring_runs) is made
    assert call("schedule", "pause", "weekly")[0] == 0
    assert made["status"] == "DISABLED"
    assert "weekly: updated" in call(*weekly, "--set", "train.rank=4")[1]
    changed = only(pipelines_api.recurring_runs)
    assert changed["runtime_config"]["parameters"]["lora_rank"] == 4 and changed["status"] == "DISABLED"
    assert "weekly: updated, every 1 week" in call("schedule", RECIPE, "--every", "7d", "--name", "weekly")[1]
    assert call("schedule", "resume", "weekly")[0] == 0
    assert " on " in call("schedule", "list")[1]
    assert call("schedule", "delete", "weekly")[0] == 0
    assert pipelines_api.recurring_runs == {}
    code, _, err = call("schedule", "pause", "weekly")
    assert code == 2 and "There is no schedule 'weekly'. Schedules: none." in err


@pytest.mark.parametrize("path", ["/runs", "/recurringruns"])
@pytest.mark.parametrize("status", [403, 404, 409, 500])
def test_a_failed_submission_leaves_nothing_behind(
    call: Call, pipelines_api: PipelineApi, path: str, status: int
) -> None:
    pipelines_api.fail("POST", path, status, times=100)
    command = ("submit", RECIPE) if path == "/runs" else ("schedule", RECIPE, "--every", "1d")
    code, _, err = call(*command)
    assert code == 2 and "Traceback" not in err and len(err.splitlines()) == 1, err
    assert left(pipelines_api) == NOTHING


@pytest.mark.parametrize("part", ["/healthz", "/pipelines", "upload_version", "/experiments", "/runs"])
@pytest.mark.parametrize("fault", ["500 once", "lost request", "lost answer", "slow once"])
def test_one_fault_on_the_way_changes_nothing(call: Call, pipelines_api: PipelineApi, part: str, fault: str) -> None:
    if fault == "500 once":
        pipelines_api.fail("*", part, 500)
    elif fault == "slow once":
        pipelines_api.hang(part, 1.0)
    else:
        pipelines_api.drop(part, after=fault == "lost answer")
    code, _, err = call("submit", RECIPE, "--timeout", "0.3")
    assert (code, err) == (0, "")
    assert left(pipelines_api) == {"pipelines": 1, "versions": 1, "experiments": 1, "runs": 1, "recurring_runs": 0}


def test_a_lost_answer_makes_no_second_schedule(call: Call, pipelines_api: PipelineApi) -> None:
    pipelines_api.drop("/recurringruns", after=True, method="POST")
    assert call("schedule", RECIPE, "--every", "1d")[0] == 0
    assert len(pipelines_api.recurring_runs) == 1


def test_wrong_token_no_rights_and_no_answer(
    call: Call, pipelines_api: PipelineApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines_api.forbidden = True
    code, _, err = call("submit", RECIPE)
    assert code == 2 and "may not use the pipeline server" in err
    pipelines_api.forbidden = False
    monkeypatch.setenv("TUNE16_TOKEN", "expired")
    code, _, err = call("submit", RECIPE)
    assert code == 2 and "the token is wrong or has expired. Log in again" in err and "expired\n" not in err
    monkeypatch.delenv("TUNE16_TOKEN")
    pipelines_api.hang("/healthz", 5, times=10)
    code, _, err = call("submit", RECIPE, "--timeout", "0.1")
    assert code == 2 and "no answer in time" in err
    monkeypatch.setenv("TUNE16_HOST", "http://127.0.0.1:9")
    code, _, err = call("submit", RECIPE)
    assert code == 2 and "cannot be reached" in err
    assert left(pipelines_api) == NOTHING


def test_a_custom_ca(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca, *tls = make_certificate(tmp_path)
    with PipelineApi(tls=(tls[0], tls[1])) as api:
        code, _, err = call("submit", RECIPE, "--host", api.url)
        assert code == 2 and "its certificate is not trusted" in err and "--ca" in err and len(err.splitlines()) == 1
        assert left(api) == NOTHING
        assert call("submit", RECIPE, "--host", api.url, "--ca", str(ca))[0] == 0
        monkeypatch.setenv("TUNE16_CA", str(ca))
        assert call("runs", "--host", api.url)[0] == 0
        monkeypatch.setenv("TUNE16_CA", str(tmp_path / "none"))
        assert "the CA file does not exist" in call("runs", "--host", api.url)[2]


def test_the_server_is_found_by_its_route(
    call: Call, pipelines_api: PipelineApi, kubernetes_api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNE16_HOST")
    code, _, err = call("runs")
    assert code == 2 and "has no Route" in err and "enableOauth: true" in err
    route = {
        "kind": "Route",
        "metadata": {"name": "ds-pipeline-dspa", "namespace": "tune16"},
        "spec": {"host": pipelines_api.url},
    }
    kubernetes_api.add("route.openshift.io/v1", "routes", route)
    from pipelines.cluster import find_cluster, find_server

    address = find_server(find_cluster())
    assert address.url == f"https://{pipelines_api.url}" and address.token == "good"
    server = next(iter(kubernetes_api.objects[key] for key in kubernetes_api.objects if "datascience" in key[1]))
    server["status"]["components"] = {"apiServer": {"externalUrl": "https://public.example.com"}}
    assert find_server(find_cluster()).url == "https://public.example.com"  # before any Route
    server["status"]["conditions"] = [{"type": "Ready", "status": "False", "message": "no bucket \n \n \n"}]
    assert "dspa in tune16 is not ready: no bucket. Try again" in call("runs")[2]
    blank = [{"type": "Ready", "status": "False", "message": " \n"}, {"type": "DatabaseAvailable", "status": "False"}]
    server["status"]["conditions"] = [blank[0], blank[1] | {"message": "dial tcp \n", "reason": "x"}]
    assert "is not ready: DatabaseAvailable: dial tcp. Try again" in call("runs")[2]
    code, _, err = call("runs", "--namespace", "elsewhere")
    assert code == 2 and "The namespace elsewhere has no pipeline server" in err
    monkeypatch.setenv("TUNE16_TOKEN", "mine")
    assert "the login (TUNE16_TOKEN, the kubeconfig's context stand-in) is invalid" in call("runs")[2]
    assert find_server(find_cluster(), "http://elsewhere").token == "mine"
    monkeypatch.delenv("TUNE16_TOKEN")
    assert find_server(find_cluster(), "http://elsewhere").token == ""  # a login's token goes over TLS only
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    assert "Not logged in to a cluster" in call("runs")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "nothing"], "There is no recipe 'nothing'"),
        (["submit", RECIPE, "--set", "train.rnk=3"], "Did you mean 'rank'?"),
        (["submit", RECIPE, "--set", "prepare.max_tokens=131072"], "does not fit the GPU"),
        (["submit", "demo"], "of the Secret tune16-connection is reachable only inside the cluster. Export"),
        (["schedule", RECIPE], "Give either --cron"),
        (["schedule", RECIPE, "--cron", "0 25 * * *"], "the hour '25' is wrong. It takes 0 to 23"),
        (["schedule", RECIPE, "--cron", "0 3 * * *", "--every", "7d"], "Give either --cron"),
        (["schedule", RECIPE, "--every", "5m"], "at least 10m"),
        (["submit", RECIPE, "--uploaded"], "has no pipeline 'tune16' yet"),
    ],
)
def test_mistakes_are_told_in_one_line_and_create_nothing(
    call: Call, pipelines_api: PipelineApi, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_S3_ENDPOINT", raising=False)
    code, _, err = call(*arguments)
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert left(pipelines_api) == NOTHING


@pytest.mark.parametrize("command", [["submit", RECIPE], ["schedule", RECIPE, "--every", "7d"]])
def test_what_the_cluster_cannot_run_is_not_started(
    call: Call, pipelines_api: PipelineApi, kubernetes_api: KubernetesApi, command: list[str]
) -> None:
    for key in [key for key in kubernetes_api.objects if key[1] in ("nodes", "secrets")]:
        del kubernetes_api.objects[key]
    code, _, err = call(*command)
    assert code == 2 and left(pipelines_api) == NOTHING
    lines = err.splitlines()
    assert lines[0].startswith("error: connection: there is no Secret tune16-connection")
    assert lines[1].startswith("GPU: no node offers 1 nvidia.com/gpu")
    assert call(*command, "--unchecked")[0] == 0
    kubernetes_api.forbid("GET", "nodes")
    kubernetes_api.forbid("GET", "secrets")
    assert call(*command)[0] == 0  # what it may not see is no reason


def test_in_a_pod_the_account_is_used(
    pipelines_api: PipelineApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import cluster

    ca, *tls = make_certificate(tmp_path)
    with KubernetesApi(tls=(tls[0], tls[1])) as api:
        furnish(api)
        host, _, port = api.url.removeprefix("https://").rpartition(":")
        for name, content in {"token": "good", "namespace": "tune16", "service-ca.crt": "x"}.items():
            (tmp_path / name).write_text(content)
        Path(ca).rename(tmp_path / "ca.crt")
        monkeypatch.setattr(account, "FOLDER", tmp_path)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        for name in ("SSL_CERT_FILE", "TUNE16_CA", "TUNE16_HOST"):
            monkeypatch.delenv(name, raising=False)
        found = cluster.find_cluster()
        assert (found.namespace, found.token, found.inside) == ("tune16", "good", True)
        address = cluster.find_server(found)
    assert address.url == "https://ds-pipeline-dspa.tune16.svc.cluster.local:8443"
    assert address.ca == str(tmp_path / "service-ca.crt") and address.token == "good"


@pytest.mark.parametrize(
    ("text", "cron"),
    [
        ("0 3 * * 1", "0 0 3 * * 1"),
        ("*/15 0-6,18 1,15 jan-jun mon-fri", "0 */15 0-6,18 1,15 jan-jun mon-fri"),
        ("30 0 3 ? * SUN", "30 0 3 ? * SUN"),
        ("@weekly", "@weekly"),
    ],
)
def test_cron_expressions(text: str, cron: str) -> None:
    assert read_cron(text) == Trigger(cron=cron)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("60 * * * *", "minute '60'"),
        ("0 0 0 * *", "day of month '0'"),
        ("0 0 * 13 *", "month '13'"),
        ("0 0 * * fun", "day of week 'fun'"),
        ("0 5-3 * * *", "hour '5-3'"),
        ("*/0 * * * *", "minute '*/0'"),
        ("99 0 3 * * 1", "second '99'"),
        ("3 1", "write minute, hour"),
        ("@often", "write minute, hour"),
    ],
)
def test_a_wrong_cron_field_is_named(text: str, field: str) -> None:
    with pytest.raises(Tune16Error) as error:
        read_cron(text)
    assert field in str(error.value)


def test_intervals() -> None:
    assert read_interval("12h").seconds == 43200 and read_interval("2w").seconds == 1209600
