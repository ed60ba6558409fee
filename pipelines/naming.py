"""The name of this release's pipeline version, without compiling it, which takes seconds and is rarely needed."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from components import images

NAME = "tune16"
_ROOT = Path(__file__).parents[1]
_SOURCES = ("pipelines/finetune.py", "pipelines/resources.py", "components/config.py", "components/*/component.py")


def version_name() -> str:
    """Tune16's own version and a hash of everything that the compiled pipeline depends on.

    A version's spec cannot be changed on the cluster, so different content needs a different name.
    """
    content = hashlib.sha256(f"kfp {version('kfp')} {sorted(images.IMAGE_OF_STEP.items())}".encode())
    for pattern in _SOURCES:
        for path in sorted(_ROOT.glob(pattern)):
            content.update(path.read_bytes())
    return f"{NAME}-{images.VERSION}-{content.hexdigest()[:8]}"
