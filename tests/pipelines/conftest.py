"""A namespace as the tests find it: a pipeline server, a Kubernetes API that knows it, and a login for both."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.config import CONNECTION_VARIABLES
from components.runtime import retry
from pipelines import applied, cli, cli_runs, cli_where, server
from tests.servers import KubernetesApi, PipelineApi

NAMESPACE = "tune16"
DSPA = ("datasciencepipelinesapplications.opendatahub.io/v1", "datasciencepipelinesapplications")
GPU_NODE: dict[str, Any] = {
    "kind": "Node",
    "metadata": {"name": "gpu-1", "labels": {"nvidia.com/gpu.memory": "15360", "nvidia.com/gpu.product": "Tesla-T4"}},
    "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "", "effect": "NoSchedule"}]},
    "status": {"allocatable": {"nvidia.com/gpu": "1", "ephemeral-storage": "107374182400"}},
}

Call = Callable[..., tuple[int, str, str]]


def secret(name: str, values: dict[str, str]) -> dict[str, Any]:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"kind": "Secret", "metadata": {"name": name, "namespace": NAMESPACE}, "data": data}


def furnish(api: KubernetesApi) -> None:
    """A namespace in which everything is right."""
    ready = [{"type": "Ready", "status": "True"}]
    api.add("v1", "namespaces", {"kind": "Namespace", "metadata": {"name": NAMESPACE}})
    server_object = {
        "kind": "DataSciencePipelinesApplication",
        "metadata": {"name": "dspa", "namespace": NAMESPACE},
        "spec": {"apiServer": {"pipelineStore": "kubernetes"}},
        "status": {"conditions": ready},
    }
    api.add(*DSPA, server_object)
    values = dict.fromkeys(CONNECTION_VARIABLES, "x") | {"AWS_S3_ENDPOINT": "http://s3.svc"}
    api.add("v1", "secrets", secret("tune16-connection", values))
    api.add("v1", "nodes", GPU_NODE)
    for name in ("tools", "trainer", "gguf"):
        stream_tag = {"kind": "ImageStreamTag", "metadata": {"name": f"{name}:0.1.0", "namespace": NAMESPACE}}
        api.add("image.openshift.io/v1", "imagestreamtags", stream_tag)
    link = {
        "kind": "ConsoleLink",
        "metadata": {"name": "rhodslink"},
        "spec": {"href": "https://dashboard.example.com/"},
    }
    api.add("console.openshift.io/v1", "consolelinks", link)


def add_step_pod(
    api: KubernetesApi,
    run: dict[str, Any],
    step: str,
    log: str = "",
    status: dict[str, Any] | None = None,
    node: str = "",
    **fields: Any,
) -> dict[str, Any]:
    """A step's pod as the workflow controller makes it; without a log it has not started."""
    node = node or f"wf.root.{step}.executor"
    name = f"{node.replace('(', '-').replace(')', '').replace('.', '-')}"
    metadata = {
        "name": name,
        "namespace": NAMESPACE,
        "labels": {"pipeline/runid": run["run_id"], **fields.pop("labels", {})},
        "annotations": {"workflows.argoproj.io/node-name": node},
    }
    spec = {"containers": [{"name": "main"}], **fields}
    body = {"kind": "Pod", "metadata": metadata, "spec": spec, "status": status or {"phase": "Running"}}
    if log:
        api.logs[NAMESPACE, name] = log
    return api.add("v1", "pods", body)


@pytest.fixture
def pipelines_api() -> Iterator[PipelineApi]:
    with PipelineApi() as api:
        yield api


@pytest.fixture
def kubernetes_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    with KubernetesApi() as api:
        furnish(api)
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig", NAMESPACE)))
        yield api


@pytest.fixture
def call(
    pipelines_api: PipelineApi,
    kubernetes_api: KubernetesApi,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    """Call `tune16` in this process; the stand-ins are its cluster. Returns exit code, stdout and stderr."""
    monkeypatch.setenv("TUNE16_HOST", pipelines_api.url)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(server, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(cli_runs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(applied, "PAUSE_SECONDS", 0.01)
    for console in (cli.console, cli_where.console, cli_where.notes):
        monkeypatch.setattr(console, "_width", 200, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tune16", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
