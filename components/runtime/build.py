"""The name of this code: caches and run keys trust nothing that other code has made.

The name is taken from the content of what decides a result, so that it needs no upkeep. Pages and servers for
finished models are left out: they change no result.
"""

import hashlib
from functools import cache
from pathlib import Path

from components.images import VERSION

_FOLDER = Path(__file__).parents[1]
_NO_STEPS = {"playground"}


@cache
def build() -> str:
    """The version and a digest of the steps' code and templates, such as ``0.1.0+1a2b3c4d``."""
    digest = hashlib.sha256()
    for path in sorted(_FOLDER.rglob("*")):
        name = path.relative_to(_FOLDER)
        if path.suffix in (".py", ".jinja") and name.parts[0] not in _NO_STEPS:
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return f"{VERSION}+{digest.hexdigest()[:8]}"
