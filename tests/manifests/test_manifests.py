"""Every overlay and feature builds, and every object is what its API accepts, unknown fields included."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from components.config import CONNECTION_VARIABLES, Recipe
from components.images import VERSION
from tests.manifests.built import (
    ALONE,
    EVERYTHING,
    FEATURES,
    FOLDERS,
    MANIFESTS,
    OUTPUTS,
    OVERLAYS,
    build,
    build_with,
    one,
    output,
)

CRDS = MANIFESTS.parents[1] / "shared" / "crds"  # the platform's own, where they are at hand
KUBERNETES = "1.31"
LOGIN_PROXY = "image-registry.openshift-image-registry.svc:5000/openshift/oauth-proxy"  # every OpenShift has it there
APPLIED_IN_FULL = 200_000  # bytes that client-side apply takes well; it stops at 262,144

# Served by OpenShift itself or by its monitoring, without a CRD's schema: test_features.py looks at these.
WITHOUT_SCHEMA = {
    ("build.openshift.io/v1", "BuildConfig"),
    ("image.openshift.io/v1", "ImageStream"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the overlays")
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason="the platform's definitions are not at hand")


@cache
def custom_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    schemas = {}
    for path in CRDS.glob("*.yaml"):
        for definition in yaml.load_all(path.read_text(), yaml.CSafeLoader):
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
    left_out = ("format", "properties")
    result = {key: strict(value) for key, value in schema.items() if key not in left_out and value is not None}
    if "properties" in schema:
        result["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        if not is_open and "type" in schema:  # without a type it is one more condition on a schema that has all fields
            result["additionalProperties"] = False
    if top:
        result["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {}}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    return result


@needs_kubectl
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_object_is_valid(name: str) -> None:
    for found in output(name):
        key = (found["apiVersion"], found["kind"])
        if "." not in found["apiVersion"] or found["apiVersion"].split("/")[0].endswith(".k8s.io"):
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
        elif key not in WITHOUT_SCHEMA and CRDS.is_dir():
            jsonschema.validate(found, custom_schemas()[key])
        assert len(yaml.safe_dump(found)) < APPLIED_IN_FULL


@needs_crds
@needs_kubectl
def test_kinds_without_a_schema_are_few_and_known() -> None:
    used = {(found["apiVersion"], found["kind"]) for found in output(EVERYTHING)}
    assert used >= WITHOUT_SCHEMA
    for key in WITHOUT_SCHEMA:
        spec = custom_schemas().get(key, {}).get("properties", {}).get("spec", {})
        assert "properties" not in spec, f"{key} has a schema now: take it out of WITHOUT_SCHEMA"


@needs_crds
def test_an_unknown_field_is_an_error() -> None:
    server = yaml.safe_load((MANIFESTS / "components/pipeline-server/pipeline-server.yaml").read_text())
    server["spec"]["objectStorage"]["externalStorage"]["hots"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="hots"):
        jsonschema.validate(server, custom_schemas()[server["apiVersion"], server["kind"]])


@needs_kubectl
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_builds_alone(name: str, tmp_path: Path) -> None:
    assert build_with([name], tmp_path / "with") != build_with([], tmp_path / "without")


@pytest.mark.parametrize("name", FOLDERS)
def test_every_feature_says_what_it_is(name: str) -> None:
    folder = MANIFESTS / "components" / name
    kind = yaml.safe_load((folder / "kustomization.yaml").read_text())["kind"]
    assert kind == ("Kustomization" if name in ALONE else "Component")
    readme = (folder / "README.md").read_text()
    assert readme.startswith(f"# {name}\n")
    assert all(f"\n- {part}:" in readme for part in ("When", "Needs", "Use"))
    assert f"components/{name})" in (MANIFESTS / "README.md").read_text()


def test_one_object_per_file_named_after_it() -> None:
    for path in MANIFESTS.glob("*/**/*.yaml"):
        content = list(yaml.load_all(path.read_text(), yaml.CSafeLoader))
        if path.name == "pipeline.yaml":  # written by the compiler: the pipeline and its version
            assert [entry["kind"] for entry in content] == ["Pipeline", "PipelineVersion"]
            continue
        (only,) = content
        if path.parent.parent.name != "overlays" and "metadata" in only and path.stem not in ("connection", "ca"):
            kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", only["kind"]).lower()
            kind = "pipeline-server" if kind.startswith("data-science") else kind
            assert path.stem.endswith(kind), f"{path}: {only['kind']}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_a_list(name: str) -> None:
    folder = MANIFESTS / "overlays" / name
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization) <= {"apiVersion", "kind", "namespace", "resources", "components", "patches"}
    assert kustomization["resources"] == ["../../base"]
    patches = {patch["path"] for patch in kustomization.get("patches", [])}
    assert {path.name for path in folder.iterdir()} == {"kustomization.yaml", *patches}
    features = [path.removeprefix("../../components/") for path in kustomization["components"]]
    assert features == sorted(features, key=FEATURES.index)
    (row,) = (line for line in (MANIFESTS / "README.md").read_text().splitlines() if line.startswith(f"| {name} |"))
    assert row.split("|")[3].strip() == ", ".join(features)


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_no_secret_values_and_the_steps_own_names(name: str) -> None:
    assert not [found for found in output(name) if found["kind"] == "Secret"]  # nothing applied may empty it
    used = json.dumps([found for found in output(name) if found["kind"].startswith("DataScience")])
    assert "AWS_SECRET_ACCESS_KEY" in used or name == "dev"
    readme = (MANIFESTS / "components/connection/README.md").read_text()
    assert all(f"--from-literal={variable}=" in readme for variable in CONNECTION_VARIABLES)
    assert f"oc create secret generic {Recipe().cluster.connection} " in readme
    servers = [found for found in output(name) if found["kind"].startswith("DataScience")]
    assert all(found["spec"]["objectStorage"]["externalStorage"]["region"] for found in servers)


def version_of(features: list[str], folder: Path) -> str:
    return str(one(build_with(features, folder), "PipelineVersion")["metadata"]["name"])


PATCHED = ["disconnected", "gpu-t4", "images", "kueue", "signing"]  # what changes the version


@needs_kubectl
def test_the_versions_name_follows_what_is_applied(tmp_path: Path) -> None:
    patching = [
        name
        for name in FEATURES
        if "PipelineVersion" in "".join(path.read_text() for path in (MANIFESTS / "components" / name).glob("*.yaml"))
    ]
    assert sorted(patching) == PATCHED
    assert version_of([], tmp_path / "base").startswith(f"tune16-{VERSION}-")
    names = {name: version_of([name], tmp_path / name) for name in PATCHED}
    assert len({version_of([], tmp_path / "none"), *names.values()}) == len(PATCHED) + 1
    assert version_of(["serving"], tmp_path / "serving") == version_of([], tmp_path / "again")
    images = tmp_path / "images/manifests/components/images/kustomization.yaml"
    images.write_text(images.read_text().replace("localhost:5000/tune16/trainer", "localhost:5000/tune16/other"))
    assert (
        one(build(tmp_path / "images/manifests/overlays/tried"), "PipelineVersion")["metadata"]["name"]
        != names["images"]
    )


@needs_kubectl
@pytest.mark.parametrize("name", ["dev", "openshift-ai-disconnected", EVERYTHING])
def test_another_registry_reaches_every_image(name: str) -> None:
    executors = one(output(name), "PipelineVersion")["spec"]["pipelineSpec"]["deploymentSpec"]["executors"]
    assert len(executors) >= 7
    assert all(executor["container"]["image"].startswith("localhost:5000/") for executor in executors.values())
    left = json.dumps(output(name)).replace(LOGIN_PROXY, "")
    assert "image-registry.openshift-image-registry" not in left


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_no_value_is_left_to_patch(name: str) -> None:
    assert "patch-me" not in json.dumps(output(name))


@needs_kubectl
def test_the_base_alone_builds() -> None:
    assert one(build(MANIFESTS / "base"), "PipelineVersion")
