"""Versions of a model in S3: their layout, manifests, and the log of champions.

    <path>/<version>/                  version = UTC time and a short content hash; sorts by time
        adapter/ merged/ report/ …     the files
        config.json                    the settings of every step that made it
        manifest.json                  written last: every file with size and SHA-256, scores, lineage
    <path>/champions/000007.json       an append-only log; the highest number is the champion

A version without a manifest does not exist for any reader. ``<path>`` is ``prefix/model-name`` in the connection's
bucket, the field ``upload_path``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components import s3
from components.errors import Tune16Error
from components.outputs import new_folder
from components.references import file_digest
from components.steps import say

MANIFEST = "manifest.json"
SETTINGS = "config.json"
_CHAMPIONS = "champions"


@dataclass(frozen=True)
class Champion:
    """One entry of the champion log: its number and the version that it names."""

    number: int
    version: str


def read_champion(path: str) -> Champion | None:
    """The current champion of the model at `path`, or None before the first."""
    keys = [stored.key for stored in s3.list_objects(s3.default_bucket(), f"{path}/{_CHAMPIONS}/")]
    if not keys:
        return None
    content = s3.read(s3.default_bucket(), keys[-1])
    assert content is not None, "the log is append-only"
    return Champion(int(Path(keys[-1]).stem), json.loads(content)["version"])


def champion_version(path: str) -> str:
    """The version that is champion now.

    Raises:
        Tune16Error: there is none yet.
    """
    champion = read_champion(path)
    if champion is None:
        raise Tune16Error(f"s3://{s3.default_bucket()}/{path}: has no champion yet. Publish a version first.")
    return champion.version


def still_champion(path: str, version: str, step: str) -> bool:
    """Whether `version` is what the world should know and use; `step` says so where another run has come in between."""
    champion = champion_version(path)
    if champion != version:
        say(step, f"{version} is no longer champion, {champion} is: nothing done")
    return champion == version


def append_champion(path: str, version: str) -> Champion:
    """Make `version` the champion. Of two publishers one wins a number, and the other takes the next.

    Raises:
        Tune16Error: the storage refuses conditional writes or the version is not complete.
    """
    read_manifest(path, version)
    content = json.dumps({"version": version}, indent=2).encode() + b"\n"
    while True:
        current = read_champion(path)
        number = 1 if current is None else current.number + 1
        if s3.create(s3.default_bucket(), f"{path}/{_CHAMPIONS}/{number:06d}.json", content):
            return Champion(number, version)


def write_manifest(path: str, version: str, manifest: dict[str, Any]) -> None:
    """Complete a version: from now on readers see it.

    Raises:
        Tune16Error: the version has a manifest already.
    """
    content = json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n"
    if not s3.create(s3.default_bucket(), f"{path}/{version}/{MANIFEST}", content):
        raise Tune16Error(f"{address(path, version)}: this version has been published already.")


def read_manifest(path: str, version: str) -> dict[str, Any]:
    """The manifest of a version.

    Raises:
        Tune16Error: the version does not exist, or its upload never ended.
    """
    content = s3.read(s3.default_bucket(), f"{path}/{version}/{MANIFEST}")
    if content is None:
        raise Tune16Error(f"{address(path, version)}: no such version, or its upload never ended.")
    manifest: dict[str, Any] = json.loads(content)
    return manifest


def read_settings(path: str, version: str) -> dict[str, Any]:
    """The settings of the steps that made a version."""
    content = s3.read(s3.default_bucket(), f"{path}/{version}/{SETTINGS}")
    return {} if content is None else dict(json.loads(content))


def is_made_of(path: str, manifest: dict[str, Any], lineage: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether the version of `manifest` was made of these inputs with these settings."""
    return lineage.items() <= manifest["lineage"].items() and read_settings(path, manifest["version"]) == settings


def address(path: str, version: str) -> str:
    """The version's s3:// address."""
    return f"s3://{s3.default_bucket()}/{path}/{version}"


def download(path: str, version: str, folder: Path, part: str = "") -> Path:
    """Download a version, or one `part` of it such as ``adapter``, and check every file against the manifest.

    Args:
        path: ``prefix/model-name`` in the connection's bucket.
        version: the version's name.
        folder: takes the files; it appears whole or not at all.
        part: name of a folder in the version; empty is all of it.

    Raises:
        Tune16Error: the version does not exist, or a file is not what the manifest says.
    """
    prefix = f"{part}/" if part else ""
    files = [file for file in read_manifest(path, version)["files"] if file["path"].startswith(prefix)]
    if not files:
        raise Tune16Error(f"{address(path, version)}: has no {part}.")
    with new_folder(folder) as partial:
        for file in files:
            target = partial / file["path"].removeprefix(prefix)
            if not target.resolve().is_relative_to(partial.resolve()):
                raise Tune16Error(f"{address(path, version)}: its manifest names {file['path']!r}, outside the folder.")
            s3.download(s3.default_bucket(), f"{path}/{version}/{file['path']}", target)
            if target.stat().st_size != file["size"] or file_digest(target) != file["sha256"]:
                raise Tune16Error(
                    f"{address(path, version)}/{file['path']}: is not the file that was published (its SHA-256 "
                    "differs). Download it again; if that does not help, publish the version again."
                )
    return folder


def describe_files(folder: Path) -> list[dict[str, Any]]:
    """Path, size in bytes and SHA-256 of every file below `folder`, as the manifest lists them."""
    return [
        {"path": str(file.relative_to(folder)), "size": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
