"""What kustomize makes of manifests/: the overlays, every feature at once, and what is applied by itself."""

import subprocess
import tempfile
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import yaml

Object = dict[str, Any]

MANIFESTS = Path(__file__).parents[2] / "manifests"
OVERLAYS = sorted(path.parent.name for path in MANIFESTS.glob("overlays/*/kustomization.yaml"))
FOLDERS = sorted(path.parent.name for path in MANIFESTS.glob("components/*/kustomization.yaml"))
ALONE = ["model-registry"]  # lies in another namespace, so it is applied by itself
LAST = ["ca", "disconnected", "images"]  # they change what other features add, so they stand below them in every list
FEATURES = [*sorted(set(FOLDERS) - set(ALONE) - set(LAST)), *LAST]
EVERYTHING = "every feature"
OUTPUTS = [*OVERLAYS, EVERYTHING, *ALONE]


def build(folder: Path) -> list[Object]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def build_with(features: list[str], folder: Path) -> list[Object]:
    """The base with some features, in the namespace tune16; `folder` is an empty one."""
    copytree(MANIFESTS, folder / "manifests")
    overlay = folder / "manifests" / "overlays" / "tried"
    overlay.mkdir()
    kustomization = {
        "namespace": "tune16",
        "resources": ["../../base"],
        "components": [f"../../components/{name}" for name in features],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return build(overlay)


@cache
def output(name: str) -> list[Object]:
    if name in OVERLAYS:
        return build(MANIFESTS / "overlays" / name)
    if name in ALONE:
        return build(MANIFESTS / "components" / name)
    with tempfile.TemporaryDirectory() as folder:
        return build_with(FEATURES, Path(folder))


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    """The only object of a kind, or of a kind and a name."""
    (found,) = (entry for entry in objects if entry["kind"] == kind and name in ("", entry["metadata"]["name"]))
    return found
