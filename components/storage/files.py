"""Files on this disk: their SHA-256, lists of them, and which names are safe to write.

One place for each of these: manifests of versions, records of checkpoints and fetched models are checked by the same
functions.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> list[dict[str, Any]]:
    """Path, size in bytes and SHA-256 of every file below `folder`, sorted, as manifests list them."""
    return [
        {"path": str(file.relative_to(folder)), "size": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]


def first_difference(folder: Path, files: Iterable[dict[str, Any]]) -> tuple[str, str] | None:
    """The first file that is not as :func:`describe_files` found it: its name, and ``missing`` or ``changed``."""
    for file in files:
        path = folder / file["path"]
        if not path.is_file():
            return file["path"], "missing"
        if path.stat().st_size != file["size"] or file_digest(path) != file["sha256"]:
            return file["path"], "changed"
    return None


def is_safe_name(name: str) -> bool:
    """Whether ``folder / name`` lies below the folder on every system, and is one plain name for one file."""
    parts = PurePosixPath(name).parts
    is_plain = bool(parts) and name == "/".join(parts) and not {"..", "."} & set(parts)
    return is_plain and not name.startswith("/") and "\\" not in name and not any(ord(letter) < 32 for letter in name)
