"""The images' locks and their code; the images themselves are built by `make images`."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from components import images

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "images" / "locks").glob("*.txt"))


def pins(path: Path) -> dict[str, str]:
    lines = re.findall(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==(\S+)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[._-]+", "-", name).lower(): version for name, version in lines}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_package_has_a_hash_and_the_tested_version(path: Path) -> None:
    entries = re.split(r"\n(?=\S)", path.read_text().strip())
    assert entries and all("--hash=sha256:" in entry for entry in entries)
    tested = pins(ROOT / "constraints.txt")
    for name, version in pins(path).items():
        assert version.partition("+")[0] == tested.get(name, version), name
    assert not re.search(r"https?://|file:", path.read_text())


def test_the_trainer_with_cuda_has_cuda_and_the_others_have_not() -> None:
    cuda = {path.stem: any(name.startswith("nvidia-") for name in pins(path)) for path in LOCKS}
    assert [name for name, has in cuda.items() if has] == ["trainer-cuda"]
    versions = {path.stem: pins(path).get("torch") for path in LOCKS}
    assert versions["trainer-cpu"] == f"{versions['trainer-cuda']}+cpu" == versions["gguf"]
    assert versions["tools"] is None


def test_the_selfcheck_covers_every_image_and_step() -> None:
    tree = ast.parse((ROOT / "images" / "selfcheck.py").read_text())
    modules: dict[str, list[str]] = ast.literal_eval(next(n for n in tree.body if isinstance(n, ast.Assign)).value)
    stages = re.findall(r"^FROM packages AS (\w+)-packages$", (ROOT / "images/Containerfile").read_text(), re.MULTILINE)
    assert set(modules) == set(stages)
    for step, image in images.IMAGE_OF_STEP.items():
        listed = modules[image.rpartition("/")[2].partition(":")[0]]
        assert any(name.startswith(f"components.{step}.") for name in listed), step
    for name in (name for names in modules.values() for name in names):
        if name.split(".")[0] in ("components", "pipelines"):
            importlib.import_module(name)
