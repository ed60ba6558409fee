"""Every overlay and feature builds, and every object is what its API accepts, unknown fields included."""

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from components.config import CONNECTION_VARIABLES, Recipe

MANIFESTS = Path(__file__).parents[2] / "manifests"
OVERLAYS = sorted(path.parent.name for path in MANIFESTS.glob("overlays/*/kustomization.yaml"))
FEATURES = sorted(path.parent.name for path in MANIFESTS.glob("components/*/kustomization.yaml"))
CRDS = MANIFESTS.parents[1] / "shared" / "crds"  # the platform's own, where they are at hand
KUBERNETES = "1.31"
APPLIED_IN_FULL = 200_000  # bytes that client-side apply takes well; it stops at 262,144

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the overlays")


def build(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@cache
def overlay(name: str) -> list[dict[str, Any]]:
    return build(MANIFESTS / "overlays" / name)


@cache
def custom_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    schemas = {}
    for path in CRDS.glob("*.yaml"):
        for definition in yaml.safe_load_all(path.read_text()):
            spec = definition["spec"]
            for version in spec["versions"]:
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                schemas[key] = strict(version["schema"]["openAPIV3Schema"], top=True)
    return schemas


def strict(schema: Any, top: bool = False) -> Any:
    """A CRD's schema as JSON schema that refuses unknown fields, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items() if key != "format"}
    if "properties" in schema and isinstance(schema.get("type"), str):
        result["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        if not is_open:
            result["additionalProperties"] = False
    if top:
        result["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {}}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    return result


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_is_valid(name: str) -> None:
    for found in overlay(name):
        key = (found["apiVersion"], found["kind"])
        if "." not in found["apiVersion"] or found["apiVersion"].split("/")[0].endswith(".k8s.io"):
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
        elif CRDS.is_dir():
            jsonschema.validate(found, custom_schemas()[key])
        assert len(yaml.safe_dump(found)) < APPLIED_IN_FULL


@pytest.mark.skipif(not CRDS.is_dir(), reason="the platform's definitions are not at hand")
def test_an_unknown_field_is_an_error() -> None:
    server = yaml.safe_load((MANIFESTS / "components/pipeline-server/pipeline-server.yaml").read_text())
    server["spec"]["objectStorage"]["externalStorage"]["hots"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="hots"):
        jsonschema.validate(server, custom_schemas()[server["apiVersion"], server["kind"]])


@needs_kubectl
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_builds_alone_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    shutil.copytree(MANIFESTS, tmp_path / "manifests")
    folder = tmp_path / "manifests" / "overlays" / "alone"
    folder.mkdir()
    kustomization = {"resources": ["../../base"], "components": [f"../../components/{name}"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    assert build(folder) != build(MANIFESTS / "base")
    readme = (MANIFESTS / "components" / name / "README.md").read_text()
    assert all(f"- {part}:" in readme for part in ("When", "Needs", "Use"))
    assert f"components/{name})" in (MANIFESTS / "README.md").read_text()


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_no_secret_values_and_the_steps_own_names(name: str) -> None:
    secrets = [found for found in overlay(name) if found["kind"] == "Secret"]
    assert [found["metadata"]["name"] for found in secrets] == [Recipe().cluster.connection]
    assert not any("data" in found or "stringData" in found for found in secrets)
    used = json.dumps([found for found in overlay(name) if found["kind"].startswith("DataScience")])
    assert "AWS_SECRET_ACCESS_KEY" in used or name == "dev"
    readme = (MANIFESTS / "components/connection/README.md").read_text()
    assert all(f"--from-literal={variable}=" in readme for variable in CONNECTION_VARIABLES)


@needs_kubectl
def test_another_registry_reaches_every_step() -> None:
    version = next(found for found in overlay("dev") if found["kind"] == "PipelineVersion")
    executors = version["spec"]["pipelineSpec"]["deploymentSpec"]["executors"]
    assert len(executors) >= 7
    assert all(executor["container"]["image"].startswith("localhost:5000/") for executor in executors.values())


@needs_kubectl
def test_an_overlay_is_a_list() -> None:
    for name in OVERLAYS:
        files = sorted(path.name for path in (MANIFESTS / "overlays" / name).iterdir())
        assert files in (["kustomization.yaml"], ["kustomization.yaml", "storage.yaml"])
