"""Pod Security `restricted` and OpenShift's restricted-v2 for all pods; checkov and hadolint leave no finding open."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests.built import EVERYTHING, MANIFESTS, OUTPUTS, Object, one, output

ROOT = MANIFESTS.parent
CONTAINERFILE = ROOT / "images" / "Containerfile"
CHECKOV = ROOT / ".venv/checkov/bin/checkov"  # in an environment of its own: it pins an old boto3
HADOLINT = ROOT / ".venv/bin/hadolint"
ACCEPTED = yaml.safe_load(Path(__file__).with_name("accepted.yaml").read_text())
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
ALLOWED_KEYS = {"runAsNonRoot", "seccompProfile", "allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the overlays")


def pods(content: Any) -> Iterator[Object]:
    """Every pod's spec inside an object, however deep."""
    if isinstance(content, dict):
        if isinstance(content.get("containers"), list):
            yield content
        for value in content.values():
            yield from pods(value)
    elif isinstance(content, list):
        for value in content:
            yield from pods(value)


def violations(pod: Object) -> list[str]:
    """What a pod's spec has against `restricted`, restricted-v2 and our own rules."""
    found = [f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers") if key in pod]
    found += [f"volume {volume['name']}" for volume in pod.get("volumes", []) if not VOLUMES & set(volume)]
    top = pod.get("securityContext", {})
    found += [f"pod sets {key}" for key in set(top) - ALLOWED_KEYS]  # runAsUser above all: restricted-v2 chooses it
    for container in pod["containers"] + pod.get("initContainers", []):
        context = top | container.get("securityContext", {})
        wanted = {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        found += [f"{key} is {context.get(key)}" for key, value in wanted.items() if context.get(key) != value]
        found += [f"container sets {key}" for key in set(context) - ALLOWED_KEYS]
        found += [
            f"no {key}"
            for key in ("requests", "limits")
            if set(container["resources"].get(key, ())) < {"cpu", "memory"}
        ]
        found += [f"port {port['hostPort']} of the host" for port in container.get("ports", []) if "hostPort" in port]
    return found


@needs_kubectl
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_pod_is_restricted(name: str) -> None:
    found = {entry["metadata"]["name"]: violations(pod) for entry in output(name) for pod in pods(entry)}
    assert not any(found.values()), found
    assert bool(found) == (name not in ("dev", "model-registry"))  # a Job, the chat page, the servers of models


@needs_kubectl
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"securityContext": {"runAsUser": 1001}}, "pod sets runAsUser"),
        ({"hostNetwork": True}, "hostNetwork is set"),
        ({"securityContext": {}}, "runAsNonRoot is None"),
        ({"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}, "volume host"),
    ],
)
def test_a_pod_that_is_not_restricted_is_found(change: Object, said: str) -> None:
    (pod,) = pods(deepcopy(one(output(EVERYTHING), "Job")))
    assert said in violations(pod | change)


@pytest.mark.slow
@needs_kubectl
@pytest.mark.skipif(not CHECKOV.is_file(), reason="`make manifests` installs checkov")
def test_checkov_finds_only_what_is_accepted(tmp_path: Path) -> None:
    for name in ("kubernetes", "dockerfile"):
        (tmp_path / name).mkdir()
    for name in OUTPUTS:
        (tmp_path / "kubernetes" / f"{name}.yaml").write_text(yaml.safe_dump_all(output(name)))
    shutil.copy(CONTAINERFILE, tmp_path / "dockerfile" / "Dockerfile")  # the only name that checkov knows
    reports = [run_checkov(tmp_path / name) for name in ("kubernetes", "dockerfile")]
    seen = {check["file_path"] for report in reports for check in report["results"]["passed_checks"]}
    assert seen == {"/Dockerfile"} | {f"/{name}.yaml" for name in OUTPUTS}
    assert not any(report["summary"]["parsing_errors"] for report in reports)
    failed = [check for report in reports for check in report["results"]["failed_checks"]]
    told = [f"{check['check_id']} {check['resource']}: {check['check_name']}" for check in failed]
    assert {check["check_id"] for check in failed} == set(ACCEPTED["checkov"]), "\n".join(told)


def run_checkov(folder: Path) -> Object:
    """The report on a folder that is named after its framework; nothing is downloaded, no user's settings are read."""
    command = [CHECKOV, "--directory", folder, "--framework", folder.name]
    command += ["--compact", "--skip-download", "--output", "json"]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("BC_", "CKV_", "PRISMA_"))}
    own |= {
        "HOME": str(folder.parent),
        "CKV_SKIP_PACKAGE_UPDATE_CHECK": "true",
    }  # else it asks PyPI for a newer checkov
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=own)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    report: Object = json.loads(done.stdout)
    return report


@pytest.mark.skipif(not HADOLINT.is_file(), reason="hadolint is not installed")
def test_hadolint_finds_only_what_is_accepted() -> None:
    done = subprocess.run(
        [HADOLINT, "--format", "json", "--no-fail", CONTAINERFILE], capture_output=True, text=True, cwd="/"
    )
    found = json.loads(done.stdout)
    assert {finding["code"] for finding in found} == set(ACCEPTED["hadolint"]), found


def test_no_image_runs_as_root() -> None:
    stages = re.split(r"^FROM ", CONTAINERFILE.read_text(), flags=re.MULTILINE)[1:]
    users = {stage.split()[2]: re.findall(r"^USER (\S+)$", stage, re.MULTILINE) for stage in stages}
    assert users["image"] == ["1001"] and list(users)[-1] == "image"


def test_every_accepted_finding_has_its_reason() -> None:
    assert all(len(reason) > 40 for findings in ACCEPTED.values() for reason in findings.values())
