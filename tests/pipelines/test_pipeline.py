"""The compiled pipeline, the form, the recipes and the import rules."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import config, images
from pipelines.compile import MANIFEST, compile_ir, compile_manifest
from pipelines.finetune import finetune

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_manifest(path)
    return path


@pytest.fixture(scope="module")
def version(manifest: Path) -> dict[str, Any]:
    objects = list(yaml.safe_load_all(manifest.read_text()))
    assert [found["kind"] for found in objects] == ["Pipeline", "PipelineVersion"]
    content: dict[str, Any] = objects[1]
    return content


def test_the_compiled_file_is_up_to_date_stable_and_small(manifest: Path, tmp_path: Path) -> None:
    compile_manifest(tmp_path / "again.yaml")
    assert manifest.read_bytes() == (tmp_path / "again.yaml").read_bytes() == (ROOT / MANIFEST).read_bytes()
    assert manifest.stat().st_size < 100_000


def test_the_version_carries_its_content(version: dict[str, Any]) -> None:
    assert version["metadata"]["name"].startswith(f"tune16-{images.VERSION}-")
    assert version["spec"]["pipelineName"] == "tune16"


def test_tasks_and_edges(version: dict[str, Any]) -> None:
    spec = version["spec"]["pipelineSpec"]
    tasks = spec["root"]["dag"]["tasks"]
    edges = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    assert edges == {
        "preflight": set(),
        "prepare": {"preflight"},
        "quantize": {"preflight"},
        "train": {"preflight", "prepare", "quantize"},
        "evaluate": {"preflight", "prepare", "quantize", "train"},
        "condition-1": {"evaluate", "preflight", "prepare", "train"},
    }
    inner = spec["components"]["comp-condition-1"]["dag"]["tasks"]
    assert {name: set(task.get("dependentTasks", [])) for name, task in inner.items()} == {
        "merge": set(),
        "convert": {"merge"},
        "upload": {"merge", "convert"},
        "register": {"upload"},
        "deploy": {"register", "upload"},
    }
    cached = {name for name, task in {**tasks, **inner}.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached == {"prepare", "quantize", "train", "evaluate", "merge", "convert"}


def test_resources_images_and_secrets(version: dict[str, Any]) -> None:
    spec = version["spec"]["pipelineSpec"]
    platform = version["spec"]["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    executors = spec["deploymentSpec"]["executors"]
    assert {name.removeprefix("exec-") for name in executors} == set(images.IMAGE_OF_STEP)
    for name, executor in executors.items():
        container, step = executor["container"], name.removeprefix("exec-")
        assert container["image"] == images.IMAGE_OF_STEP[step]
        assert container["resources"]["resourceMemoryLimit"] and container["resources"]["resourceCpuRequest"]
        assert ("accelerator" in container["resources"]) == (step in ("train", "evaluate"))
        assert (
            ("tolerations" in platform[name]) == ("nodeSelector" in platform[name]) == (step in ("train", "evaluate"))
        )
        assert [secret["optional"] for secret in platform[name]["secretAsEnv"]] == [False, True, True]


def test_nothing_is_installed_mutable_or_secret(manifest: Path) -> None:
    text = manifest.read_text()
    assert "pip install" not in text and "pip3" not in text
    assert ":latest" not in text
    assert "AKIA" not in text and "password" not in text.lower()


def test_the_form_is_the_config() -> None:
    parameters = finetune.component_spec.inputs
    assert list(config.FORM) == sorted(parameters) and len(parameters) <= 20  # as the pages show them
    types = {"String": str, "Float": float, "Integer": int, "Dict": dict, "List": list}
    for name, parameter in parameters.items():
        step, _, field = config.FORM[name].partition(".")
        assert parameter.description == config.form_help(name)
        if field == "options":
            assert parameter.default == {}
            continue
        knob = config.CONFIG_OF_STEP[step].model_fields[field]
        assert parameter.default == (None if knob.is_required() else knob.default)
        assert parameter.optional != knob.is_required()
        assert knob.annotation is str or isinstance(knob.default, types[parameter.type.partition("[")[0]])


def test_the_plain_form_is_written(tmp_path: Path) -> None:
    compile_ir(tmp_path / "tune16.yaml")
    spec = next(iter(yaml.safe_load_all((tmp_path / "tune16.yaml").read_text())))
    assert spec["pipelineInfo"]["name"] == "tune16"


def test_the_number_of_gpus_is_text(tmp_path: Path) -> None:
    """KFP's driver reads a resource limit as a string; of a number it makes no limit, and the step gets no GPU."""
    compile_ir(tmp_path / "tune16.yaml")
    spec = next(iter(yaml.safe_load_all((tmp_path / "tune16.yaml").read_text())))
    limit = spec["deploymentSpec"]["executors"]["exec-train"]["container"]["resources"]["accelerator"]
    assert limit["resourceCount"] == "{{$.inputs.parameters['pipelinechannel--preflight-train_gpus']}}"
    assert (
        spec["components"]["comp-preflight"]["outputDefinitions"]["parameters"]["train_gpus"]["parameterType"]
        == "STRING"
    )


def test_compiling_needs_no_model_library() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'trl', 'bitsandbytes', 'datasets', 'boto3', 'matplotlib'}"
    code = f"import sys, pipelines.compile; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _imports(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


STEP_NAMES = tuple(images.IMAGE_OF_STEP)


@pytest.mark.parametrize("path", sorted((ROOT / "components").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rules_of_components(path: Path) -> None:
    everything, top = _imports(path, False), _imports(path, True)
    step = path.relative_to(ROOT / "components").parts[0]
    assert not any(name.split(".")[0] == "pipelines" for name in everything)
    if path.name == "component.py":
        assert {name for name in top if name.startswith("components")} <= {"components", "components.images"}
        assert "from __future__" not in path.read_text()
        body = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)).body
        assert len(body) <= 10
        return
    assert not any(name.split(".")[0] == "kfp" for name in everything)
    if path.name != "__main__.py":
        others = {f"components.{other}" for other in STEP_NAMES if other != step}
        assert not {name for name in everything if any(name == o or name.startswith(f"{o}.") for o in others)}


@pytest.mark.parametrize("path", [ROOT / "pipelines" / "finetune.py", ROOT / "pipelines" / "compile.py"])
def test_import_rules_of_pipelines(path: Path) -> None:
    allowed = {"components", "components.config", "components.images"}
    for name in {name for name in _imports(path, False) if name.startswith("components.")}:
        module = name if name.endswith(".component") else name.rpartition(".")[0]
        assert name in allowed or module in allowed or module.endswith(".component"), name


RECIPES = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_fills_the_form_and_fits(path: Path) -> None:
    from components.models.shapes import known_shape
    from components.planning.memory import plan

    recipe = config.load_recipe(path)
    values = config.form_values(recipe)
    assert set(values) == set(finetune.component_spec.inputs)
    assert recipe.description.endswith(".")
    shape = known_shape(recipe.preflight.model)
    if recipe.setup != "demo":
        assert shape is not None
        teacher = known_shape(recipe.train.teacher) if recipe.train.teacher else None
        assert plan(shape, recipe, teacher=teacher).fits


SHARED = ("runtime", "storage", "models", "planning", "engine", "kubernetes", "playground")


def _packages_used(package: str) -> set[str]:
    """The packages and modules of components that a package's files import."""
    names = [name for path in (ROOT / "components" / package).rglob("*.py") for name in _imports(path, False)]
    return {name.split(".")[1] for name in names if name.startswith("components.")} - {package}


@pytest.mark.parametrize("package", SHARED)
def test_what_is_shared_knows_no_step(package: str) -> None:
    assert not _packages_used(package) & {*STEP_NAMES}
    assert (ROOT / "components" / package / "__init__.py").read_text().startswith('"""')


def test_the_engine_is_below_plan_and_training_and_prints_nothing() -> None:
    assert _packages_used("engine") <= {"models", "runtime"}
    engine = {name for path in (ROOT / "components/engine").rglob("*.py") for name in _imports(path, False)}
    assert not any(name.split(".")[0] == "trl" for name in engine)
    assert not any(name.startswith(("components.runtime.steps", "components.runtime.lines")) for name in engine)


def _users(name: str) -> set[str]:
    """The modules of components that import this name."""
    root = ROOT / "components"
    return {str(path.relative_to(root)) for path in root.rglob("*.py") if name in _imports(path, False)}


def test_configuration_stops_at_the_door() -> None:
    """Whoever plans a recipe has one; all else takes values, or the settings of its own step."""
    assert _users("components.config.Recipe") <= {"planning/memory.py", "planning/disk.py", "preflight/checks.py"}


def test_the_hub_has_one_place() -> None:
    assert _users("huggingface_hub") == {"models/hub.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "components" / "train").rglob("*.py")), ids=lambda path: path.name)
def test_training_uses_only_public_names_of_libraries(path: Path) -> None:
    """A private name moves with any release: what stands in the way of one belongs into the loop, which is ours."""
    tree = ast.parse(path.read_text())
    private = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    assert private <= {"_exit", "_n_gpu"}, "os._exit is public, and of _n_gpu there is a test"
    names = {
        name for name in _imports(path, False) if name.split(".")[0] in ("trl", "transformers", "peft", "accelerate")
    }
    assert not any(part.startswith("_") for name in names for part in name.split("."))
