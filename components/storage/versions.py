"""Versions of a model in S3: their layout, manifests, and the log of champions.

    <path>/<version>/                  version = UTC time and a short content hash; sorts by time
        adapter/ merged/ report/ …     the files
        config.json                    the settings of every step that made it
        manifest.json                  written last: every file with size and SHA-256, scores, lineage
        manifest.json.sig              the manifest's signature, written before it, if a key is set
    <path>/champions/000007.json       an append-only log; the highest number is the champion

A version without a manifest does not exist for any reader, and every reader checks what it reads against the manifest.
``<path>`` is ``prefix/model-name`` in the connection's bucket, the field ``destination_path``.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from components.runtime.errors import Tune16Error
from components.runtime.outputs import new_folder
from components.runtime.steps import say
from components.storage import s3, signing
from components.storage.files import first_difference, is_safe_name
from components.storage.lease import own_name

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
SETTINGS = "config.json"
_CHAMPIONS = "champions"
_ENTRY = re.compile(r"\d{6,}\.json")
_VERSION = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


@dataclass(frozen=True)
class Champion:
    """One entry of the champion log: its number and the version that it names."""

    number: int
    version: str


def is_version(name: str) -> bool:
    """Whether a folder's name is one that only the step upload makes: nothing else below a path is ever removed."""
    return bool(_VERSION.fullmatch(name))


def read_champion(path: str) -> Champion | None:
    """The current champion of the model at `path`, or None before the first."""
    log = read_log(path, newest=1)
    return log[0] if log else None


def read_log(path: str, newest: int | None = None) -> list[Champion]:
    """The champion and those before it, the newest first; at most so many, or all.

    Raises:
        Tune16Error: the log contains something other than entries.
    """
    bucket, prefix = s3.default_bucket(), f"{path}/{_CHAMPIONS}/"
    names = [stored.key.removeprefix(prefix) for stored in s3.list_objects(bucket, prefix)]
    if strange := [name for name in names if not _ENTRY.fullmatch(name)]:
        raise Tune16Error(f"s3://{bucket}/{prefix}{strange[0]}: is not an entry of the champion log. Remove it.")
    numbers = sorted((int(Path(name).stem) for name in names), reverse=True)
    return [Champion(number, _read_entry(path, number)["version"]) for number in numbers[:newest]]


def _entry(path: str, number: int) -> str:
    return f"{path}/{_CHAMPIONS}/{number:06d}.json"


def _read_entry(path: str, number: int) -> dict[str, str]:
    content = s3.read(s3.default_bucket(), _entry(path, number))
    where = f"s3://{s3.default_bucket()}/{_entry(path, number)}"
    try:
        entry: dict[str, str] = json.loads(content or b"")
        entry["version"].split("/")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Tune16Error(f"{where}: is not an entry of the champion log. Find out who wrote it.") from None
    return entry


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
    """Whether `version` is still champion; `step` reports where another run has come in between."""
    champion = champion_version(path)
    if champion != version:
        say(step, f"{version} is no longer champion, {champion} is: nothing done")
    return champion == version


def other_base(version: str, model: str) -> str:
    """Why a champion is not replaced, and what to do."""
    return (
        f"champion {version} is made of another base model, {model}, so the two cannot be compared. Choose another "
        "destination_path, or set evaluate.replace_other_base to true."
    )


def append_champion(path: str, version: str, before: Champion | None = None) -> Champion:
    """Make `version` the champion after `before`, which it was compared with; None: after no other.

    Raises:
        Tune16Error: another publisher has won the number, the storage refuses conditional writes, or the version is not
            complete.
    """
    read_manifest(path, version)
    number = before.number + 1 if before else 1
    content = json.dumps({"version": version, "publisher": own_name()}, indent=2).encode() + b"\n"
    if not s3.claim(s3.default_bucket(), _entry(path, number), content):
        winner = _read_entry(path, number)
        raise Tune16Error(
            f"{address(path, version)}: {winner.get('publisher', 'another run')} has made {winner['version']} champion "
            f"{number} first, and this model was not compared with it. Start the run again."
        )
    return Champion(number, version)


def write_manifest(path: str, version: str, manifest: dict[str, Any]) -> None:
    """Complete a version: from now on readers see it. Its signature goes first, where a key is set.

    Raises:
        Tune16Error: the version has a manifest already, or the key cannot be used.
    """
    content = json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n"
    if signature := signing.sign(content):
        s3.write(s3.default_bucket(), f"{path}/{version}/{SIGNATURE}", signature)
    if not s3.create(s3.default_bucket(), f"{path}/{version}/{MANIFEST}", content):
        raise Tune16Error(f"{address(path, version)}: this version has been published already.")


def read_manifest(path: str, version: str) -> dict[str, Any]:
    """The manifest of a version, which is checked: its signature where a key is set, its place, and its list of files.

    Raises:
        Tune16Error: the version does not exist, its upload never ended, or its manifest is not its own.
    """
    where = address(path, version)
    content = s3.read(s3.default_bucket(), f"{path}/{version}/{MANIFEST}")
    if content is None:
        raise Tune16Error(f"{where}: no such version, or its upload never ended.")
    if signing.is_demanded():
        signing.verify(content, s3.read(s3.default_bucket(), f"{path}/{version}/{SIGNATURE}"), where)
    try:
        manifest: dict[str, Any] = json.loads(content)
        place, files = (manifest["version"], manifest["address"].split("/", 3)[3]), manifest["files"]
        _check_names([file["path"] for file in files], where)
        whole = all(isinstance(file["size"], int) and isinstance(file["sha256"], str) for file in files)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Tune16Error(f"{where}: its manifest is damaged ({type(error).__name__}). Publish it again.") from None
    if not whole:
        raise Tune16Error(f"{where}: its manifest is damaged (sizes and SHA-256). Publish it again.")
    if place != (version, f"{path}/{version}"):
        raise Tune16Error(
            f"{where}: its manifest is that of {manifest['address']}. Do not use it; find out who wrote there."
        )
    return manifest


def _check_names(names: list[str], where: str) -> None:
    """Refuse names that would be written elsewhere, or over each other.

    Raises:
        Tune16Error: one is absolute, leads out of the folder, is not a plain name, or occurs twice.
    """
    seen: set[str] = set()
    for name in names:
        if not is_safe_name(name):
            raise Tune16Error(f"{where}: its manifest names {name!r}, outside the folder or not a plain name.")
        if PurePosixPath(name).parts[0] in (MANIFEST, SIGNATURE):
            raise Tune16Error(f"{where}: its manifest names {name!r}, which is not a file of the model.")
        if name in seen or any(str(folder) in seen for folder in PurePosixPath(name).parents):
            raise Tune16Error(f"{where}: its manifest names {name!r} twice, or something inside of a file.")
        seen.add(name)
    if folders := seen & {str(folder) for name in names for folder in PurePosixPath(name).parents}:
        raise Tune16Error(f"{where}: its manifest names {min(folders)!r} as a file and as a folder.")


def read_settings(path: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The settings of the steps that made a version.

    Raises:
        Tune16Error: they are not those that were published.
    """
    content = s3.read(s3.default_bucket(), f"{path}/{manifest['version']}/{SETTINGS}") or b""
    listed = [file["sha256"] for file in manifest["files"] if file["path"] == SETTINGS]
    if listed != [hashlib.sha256(content).hexdigest()]:
        raise _changed(f"{address(path, manifest['version'])}/{SETTINGS}")
    return dict(json.loads(content))


def is_made_of(path: str, manifest: dict[str, Any], lineage: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether the version of `manifest` was made of these inputs with these settings."""
    return lineage.items() <= manifest["lineage"].items() and read_settings(path, manifest) == settings


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
        Tune16Error: the version does not exist, or it is not what the manifest says.
    """
    manifest = read_manifest(path, version)
    _check_listing(path, manifest)
    with new_folder(folder) as partial:
        for name, file in _files_of(path, manifest, part).items():
            s3.download(s3.default_bucket(), f"{path}/{version}/{file['path']}", partial / name)
        _check_copy(partial, path, manifest, part)
    return folder


def check_copy(path: str, version: str, folder: Path, part: str = "") -> None:
    """Check that a folder still is the version, or the `part` of it, that was downloaded into it.

    Raises:
        Tune16Error: a file differs, is missing, is a link, or was added.
    """
    _check_copy(folder, path, read_manifest(path, version), part)


def _files_of(path: str, manifest: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    """The files of a part, by their names in it."""
    prefix = f"{part}/" if part else ""
    files = {file["path"].removeprefix(prefix): file for file in manifest["files"] if file["path"].startswith(prefix)}
    if not files:
        raise Tune16Error(f"{address(path, manifest['version'])}: has no {part}.")
    return files


def _check_listing(path: str, manifest: dict[str, Any]) -> None:
    """Check that exactly the files of the manifest are in S3."""
    where, prefix = address(path, manifest["version"]), f"{path}/{manifest['version']}/"
    stored = {found.key.removeprefix(prefix) for found in s3.list_objects(s3.default_bucket(), prefix)}
    listed = {file["path"] for file in manifest["files"]}
    if missing := listed - stored:
        raise Tune16Error(f"{where}/{min(missing)}: there is no such object. Publish the version again.")
    if added := stored - listed - {MANIFEST, SIGNATURE}:
        raise Tune16Error(f"{where}/{min(added)}: was not published with this version. Find out who wrote it.")


def _check_copy(folder: Path, path: str, manifest: dict[str, Any], part: str) -> None:
    where, files = address(path, manifest["version"]), _files_of(path, manifest, part)
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*")}
    if links := [name for name, file in found.items() if file.is_symlink()]:
        raise Tune16Error(f"{folder / min(links)}: is a link, and {where} has none. Download it again.")
    if added := {name for name, file in found.items() if not file.is_dir()} - files.keys():
        raise Tune16Error(f"{folder / min(added)}: was not published with {where}. Download it again.")
    match first_difference(folder, [{**file, "path": name} for name, file in files.items()]):
        case name, "missing":
            raise Tune16Error(f"{folder / name}: is missing. Download {where} again.")
        case name, _:
            raise _changed(f"{where}/{files[name]['path']}")


def _changed(address: str) -> Tune16Error:
    return Tune16Error(
        f"{address}: is not the file that was published (its SHA-256 differs). Download it again; if that does not "
        "help, publish the version again."
    )


def remove(path: str, version: str) -> int:
    """Remove a version, its manifest first, so that no reader takes the rest for one; returns the number of files."""
    assert is_version(version), version
    return s3.delete_folder(s3.default_bucket(), f"{path}/{version}/", first=MANIFEST)
