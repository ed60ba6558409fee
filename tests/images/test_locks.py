"""What an image's steps import is in its lock: everything else is made absent, and its modules are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ("tools", "chat")  # the others have all that the tests' own environment has of torch and llama.cpp
_CODE = """
import importlib, sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions

image, lock = sys.argv[1:]
plain = lambda name: name.lower().replace("_", "-").replace(".", "-")
there = {plain(line.partition("==")[0]) for line in open(lock) if "==" in line} | {"tune16", "kfp", "setuptools", "pip"}
found = packages_distributions()


class OnlyTheLock(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        makers = found.get(name.partition(".")[0], [])
        is_there = not makers or there & {plain(maker) for maker in makers}
        return super().find_spec(name, path, target) if is_there else None


sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyTheLock
from images.selfcheck import _MODULES

for module in _MODULES[image]:
    importlib.import_module(module)
"""


@pytest.mark.parametrize("image", IMAGES)
def test_an_images_modules_import_with_its_lock_alone(image: str) -> None:
    lock = ROOT / "images" / "locks" / f"{image}.txt"
    done = subprocess.run([sys.executable, "-c", _CODE, image, lock], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
