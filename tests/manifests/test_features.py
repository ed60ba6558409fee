"""What single features and the accounts are for: each does what its README says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components import images
from components.config import load_recipe
from pipelines.compile import NAME
from tests.manifests.built import (
    ALONE,
    EVERYTHING,
    MANIFESTS,
    OUTPUTS,
    OVERLAYS,
    Object,
    build,
    build_with,
    one,
    output,
)

CONTAINERFILE = MANIFESTS.parent / "images" / "Containerfile"
RUNNERS = {"pipeline-runner-dspa", "pipeline-runner"}  # the platform's accounts for runs: OpenShift AI's and upstream's

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the overlays")


@pytest.mark.parametrize("name", OUTPUTS)
def test_roles_are_namespaced_and_name_what_they_allow(name: str) -> None:
    assert not any(found["kind"].startswith("Cluster") for found in output(name))
    for role in (found for found in output(name) if found["kind"] == "Role"):
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            assert "secrets" not in rule["resources"]


@pytest.mark.parametrize("name", [*OVERLAYS, EVERYTHING])
def test_bindings_reach_accounts_of_their_own_namespace(name: str) -> None:
    names = {(found["kind"], found["metadata"]["name"]) for found in output(name)}
    bindings = [found for found in output(name) if found["kind"] == "RoleBinding"]
    assert {binding["metadata"]["name"] for binding in bindings} == {"tune16-steps", "tune16-scheduler"}
    for binding in bindings:
        assert ("Role", binding["roleRef"]["name"]) in names
        (subject,) = binding["subjects"]
        assert subject.get("namespace", binding["metadata"]["namespace"]) == binding["metadata"]["namespace"]
        assert subject["name"] in RUNNERS or ("ServiceAccount", subject["name"]) in names
    runner = one(output(name), "RoleBinding", "tune16-steps")["subjects"][0]["name"]
    assert runner == ("pipeline-runner" if name == "dev" else "pipeline-runner-dspa")


def test_the_scheduler_may_call_the_server_that_the_overlay_makes() -> None:
    server = one(output("openshift-ai"), "DataSciencePipelinesApplication")
    rules = one(output("openshift-ai"), "Role", "tune16-scheduler")["rules"]
    named = {rule["resources"][0]: rule["resourceNames"] for rule in rules if "resourceNames" in rule}
    name = server["metadata"]["name"]
    assert named == {"datasciencepipelinesapplications/api": [name], "routes": [f"ds-pipeline-{name}"]}


def test_the_registry_binding_lies_in_the_registrys_namespace() -> None:
    (binding,) = output("model-registry")
    assert binding["metadata"]["namespace"] == "rhoai-model-registries"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "pipeline-runner-dspa", "namespace": "tune16"}]
    assert not any(
        "model-registry" in (MANIFESTS / "overlays" / name / "kustomization.yaml").read_text() for name in OVERLAYS
    )
    assert ALONE == ["model-registry"]


def test_the_schedule_command_takes_its_recipe(tmp_path: Path) -> None:
    """Run the Job's own command on the recipe that it mounts, up to the point where it needs a cluster."""
    (container,) = one(output(EVERYTHING), "Job")["spec"]["template"]["spec"]["containers"]
    recipe = MANIFESTS / "components/schedule/recipe.yaml"
    load_recipe(recipe)
    command = [*container["command"], *container["args"]]
    command = [{"python": sys.executable, "/recipe/recipe.yaml": str(recipe)}.get(part, part) for part in command]
    assert str(recipe) in command
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "none")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "oc login" in done.stderr, done.stderr


def test_another_recipe_is_another_config_map(tmp_path: Path) -> None:
    def mounted(objects: list[Object]) -> str:
        name = str(one(objects, "Job")["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"])
        assert one(objects, "ConfigMap", name)["data"]["recipe.yaml"]
        return name

    before = mounted(build_with(["schedule"], tmp_path))
    recipe = tmp_path / "manifests/components/schedule/recipe.yaml"
    recipe.write_text(recipe.read_text() + "train:\n  epochs: 2\n")
    assert mounted(build(tmp_path / "manifests/overlays/tried")) != before


def test_a_finished_schedule_job_makes_room_for_the_next() -> None:
    job = one(output(EVERYTHING), "Job")["spec"]
    minutes = job["ttlSecondsAfterFinished"] // 60
    assert minutes == 10 and "ten minutes" in (MANIFESTS / "components/schedule/README.md").read_text()
    pauses = sum(min(10 * 2**number, 360) for number in range(job["backoffLimit"]))
    assert 600 < pauses < job["activeDeadlineSeconds"]


def test_builds_make_the_images_that_the_steps_run_in() -> None:
    text = CONTAINERFILE.read_text()
    stages = {name.removesuffix("-packages") for name in re.findall(r"^FROM packages AS (\S+)$", text, re.MULTILINE)}
    assert "\nFROM ${TARGET}-packages AS chosen\n" in text
    assert re.search(r"^ARG TARGET=\w+$", text.split("\nFROM ")[0], re.MULTILINE)
    streams = {found["metadata"]["name"] for found in output(EVERYTHING) if found["kind"] == "ImageStream"}
    builds = [found for found in output(EVERYTHING) if found["kind"] == "BuildConfig"]
    assert {entry["metadata"]["name"] for entry in builds} == streams <= stages
    assert {image.rsplit("/", 1)[1] for image in (images.TOOLS, images.TRAINER, images.GGUF)} <= {
        f"{name}:{images.VERSION}" for name in streams
    }
    for entry in builds:
        spec, name = entry["spec"], entry["metadata"]["name"]
        assert set(spec) == {
            "source", "strategy", "output", "triggers", "resources",
            "completionDeadlineSeconds", "successfulBuildsHistoryLimit", "failedBuildsHistoryLimit",
        }  # fmt: skip
        assert spec["output"] == {"to": {"kind": "ImageStreamTag", "name": f"{name}:{images.VERSION}"}}
        docker = spec["strategy"]["dockerStrategy"]
        assert docker["dockerfilePath"] == str(CONTAINERFILE.relative_to(MANIFESTS.parent))
        assert {entry["name"]: entry["value"] for entry in docker["buildArgs"]} == {
            "TARGET": name,
            "VERSION": images.VERSION,
        }
        assert set(spec["resources"]) == {"requests", "limits"}


def test_the_steps_that_ask_for_a_gpu_stand_in_the_queue() -> None:
    version = one(output(EVERYTHING), "PipelineVersion")["spec"]
    executors = version["pipelineSpec"]["deploymentSpec"]["executors"]
    settings = version["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    queues = {name: found["podMetadata"]["labels"] for name, found in settings.items() if "podMetadata" in found}
    on_gpu = {name for name, found in executors.items() if "accelerator" in found["container"].get("resources", {})}
    queue = one(output(EVERYTHING), "LocalQueue")["metadata"]["name"]
    assert queues == {name: {"kueue.x-k8s.io/queue-name": queue} for name in on_gpu} != {}


def test_a_disconnected_cluster_reads_from_s3() -> None:
    form = one(output("openshift-ai-disconnected"), "PipelineVersion")["spec"]["pipelineSpec"]["root"]
    parameters = form["inputDefinitions"]["parameters"]
    assert all(parameters[name]["defaultValue"].startswith("s3:///") for name in ("base_model", "dataset"))


def test_the_clusters_own_ca_reaches_the_steps_where_it_is_asked_for(tmp_path: Path) -> None:
    objects = build_with(["pipeline-server", "ca"], tmp_path)
    bundle = one(objects, "DataSciencePipelinesApplication")["spec"]["apiServer"]["cABundle"]
    config_map = one(objects, "ConfigMap", bundle["configMapName"])
    assert bundle["configMapKey"] == "ca-bundle.crt"  # the key that OpenShift fills in
    assert config_map["metadata"]["labels"]["config.openshift.io/inject-trusted-cabundle"] == "true"
    assert "data" not in config_map  # else every `oc apply` would empty it


def test_the_alerts_know_the_pods_of_steps() -> None:
    rule = one(output(EVERYTHING), "PrometheusRule")
    alerts = [alert for group in rule["spec"]["groups"] for alert in group["rules"]]
    assert {alert["labels"]["severity"] for alert in alerts} == {"warning"}
    patterns = {pattern for alert in alerts for pattern in re.findall(r'pod=~"([^"]+)"', alert["expr"])}
    (pattern,) = patterns
    assert re.fullmatch(pattern, f"{NAME}-8xfss-system-container-impl-2277833670")
    assert not re.fullmatch(pattern, f"{NAME}-8xfss-system-container-driver-2157042636")
    assert not re.fullmatch(pattern, "other-8xfss-system-container-impl-2277833670")
