"""The step upload: a version of the model in S3, complete or invisible.

Files go first and the manifest last, by conditional write; then the champion log grows by one entry. One process at a
time publishes below a path, by a lease. So whatever is there without a manifest belongs to one that was killed: the
next one continues it if it publishes the same, and otherwise removes it.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.config import PROMOTED, UploadConfig
from components.models.shapes import read_shape
from components.runtime.build import build
from components.runtime.errors import Tune16Error
from components.runtime.outputs import EVALUATION, REPORT, read_json, read_record, write_json
from components.runtime.steps import say
from components.storage import s3, versions
from components.storage.artifacts import Artifact, copy_file, find_artifact
from components.storage.files import describe_files
from components.storage.lease import Lease, TakenOverError, held
from components.upload.retention import remove_old

_SAY_EVERY_SECONDS = 10
_LEAST_COPIED_BYTES = 8 << 20


def publish(
    merged: Path, gguf: Path, evaluation: Path, config: UploadConfig, uris: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    """Upload a merged model with its adapter, GGUF files and evaluation as a new version, and make it the champion.

    Args:
        merged: output of the step merge.
        gguf: output of the step convert.
        evaluation: output of the step evaluate, with the verdict ``promoted``.
        config: where to.
        uris: of the artifacts `merged` and `gguf`: what the same storage has already, it copies by itself.

    Returns:
        The manifest, with the version's name and address.

    Raises:
        Tune16Error: the model was not promoted, another process publishes there, another champion came in between, or
            the storage cannot be written.
    """
    if read_record(evaluation, "evaluate")["verdict"] != PROMOTED:
        raise Tune16Error(f"{evaluation}: this model was not promoted, so it is not published.")
    with held(config.path, f"upload: publishing to s3://{s3.default_bucket()}/{config.path}") as lease:
        sources = {"": find_artifact(uris[0], merged), "gguf/": find_artifact(uris[1], gguf)}
        return _publish(merged, gguf, evaluation, config.path, lease, sources)


def _publish(
    merged: Path, gguf: Path, evaluation: Path, path: str, lease: Lease, sources: dict[str, Artifact | None]
) -> dict[str, Any]:
    lineage, settings = _lineage(merged, evaluation), _settings(merged, gguf, evaluation)
    before = versions.read_champion(path)
    published = _check_champion(path, before, lineage, settings)
    if published:
        remove_leftovers(path)
        remove_old(path)
        say("upload", f"{published['address']} is champion already, made from the same inputs")
        return published
    with tempfile.TemporaryDirectory(dir=merged.parent) as scratch:
        folder = _lay_out(merged, gguf, evaluation, settings, Path(scratch))
        files = describe_files(folder)
        _check_merged(merged, files)
        content = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        version = _unfinished(path, content) or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{content[:8]}"
        remove_leftovers(path, but=version)
        manifest = {
            "format": 1,
            "version": version,
            "address": versions.address(path, version),
            "content_sha256": content,
            "lineage": lineage,
            "scores": _scores(evaluation, gguf),
            "adapter_rank": settings["train"]["rank"],
            "trained_tokens": settings["prepare"]["max_tokens"],
            **_sizes(merged / "merged"),
            "gguf": [f"gguf/{name}" for name in _gguf_names(gguf)],
            "files": files,
        }
        champion = _complete(folder, path, manifest, before, lease, sources)
    say("upload", f"{manifest['address']} is champion {champion.number}")
    remove_old(path)
    return manifest


def _check_merged(merged: Path, files: list[dict[str, Any]]) -> None:
    """See that the merged model is still what the step merge wrote.

    Raises:
        Tune16Error: a file differs: it was damaged on its way.
    """
    arrived = {file["path"]: file for file in files}
    for written in read_record(merged, "merge")["files"]:
        name = f"merged/{written['path']}"
        if arrived.get(name) != {**written, "path": name}:
            raise Tune16Error(
                f"{merged / name}: is not the file that the step merge wrote (its SHA-256 differs). Start the run "
                "again."
            )


def _complete(
    folder: Path,
    path: str,
    manifest: dict[str, Any],
    before: versions.Champion | None,
    lease: Lease,
    sources: dict[str, Artifact | None],
) -> versions.Champion:
    """Upload the files, then the manifest, then the entry in the log; after a failure in between they are removed.

    A process that is asked to end leaves the files for the next one, and so does one that has lost the lease.
    """
    version = manifest["version"]
    try:
        if version not in _names(path)[1]:
            _upload_files(folder, manifest["files"], f"{path}/{version}", sources)
            lease.check()
            versions.write_manifest(path, version, manifest)
        lease.check()
        return versions.append_champion(path, version, before)
    except TakenOverError:
        raise
    except Exception:
        _take_back(path, version, lease)
        raise


def _take_back(path: str, version: str, lease: Lease) -> None:
    """Remove a version that could not be completed, where it is certain that it is still ours and no champion."""
    with suppress(Tune16Error):
        lease.check()
        if version not in {champion.version for champion in versions.read_log(path)}:
            versions.remove(path, version)


def _unfinished(path: str, content: str) -> str | None:
    """The version of the very same files that a killed publisher has begun and not made champion."""
    names, _ = _names(path)
    same = sorted(name for name in names if name.endswith(f"-{content[:8]}"))
    if not same or same[-1] in {champion.version for champion in versions.read_log(path)}:
        return None
    say("upload", f"continuing with {same[-1]}, which a killed run began")
    return same[-1]


def _check_champion(
    path: str, champion: versions.Champion | None, lineage: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any] | None:
    """The champion's manifest, where the champion was made from the same as this model; None for a new champion.

    Raises:
        Tune16Error: the champion is another than the one that this model was compared with.
    """
    if champion is None:
        return None
    current = versions.read_manifest(path, champion.version)
    inputs = {name: value for name, value in lineage.items() if name != "champion"}
    if versions.is_made_of(path, current, inputs, settings):
        return current
    if champion.version != lineage["champion"]:
        raise Tune16Error(
            f"{current['address']} became champion during this run, and this model was not compared with it. Start the "
            "run again: finished steps come from the cache, and only the comparison is repeated."
        )
    return None


def _lay_out(merged: Path, gguf: Path, evaluation: Path, settings: dict[str, Any], folder: Path) -> Path:
    """Collect the version's files under the names they have in S3; links, so that nothing is copied."""
    for part in ("merged", "adapter"):
        shutil.copytree(merged / part, folder / part, copy_function=_link)
    (folder / "report").mkdir()
    for file in sorted(gguf.glob("*.gguf")):
        (folder / "gguf").mkdir(exist_ok=True)
        _link(file, folder / "gguf" / file.name)
    for name, source in (
        ("report/evaluation.html", evaluation / REPORT),
        ("report/training.html", merged / "adapter" / REPORT),
        ("report/gguf.html", gguf / REPORT),
        (EVALUATION, evaluation / EVALUATION),
        ("README.md", evaluation / "README.md"),
    ):
        _link(source, folder / name)
    write_json(folder / versions.SETTINGS, settings)
    return folder


def _link(source: str | Path, target: str | Path) -> None:
    Path(target).symlink_to(Path(source).absolute())


def _settings(merged: Path, gguf: Path, evaluation: Path) -> dict[str, Any]:
    """The settings of every step that made this version, as the steps recorded them."""
    trained = read_record(merged / "adapter", "train")
    return {
        "prepare": trained["prepare"],
        "quantize": {"bits": trained["bits"]},
        "train": trained["config"],
        "evaluate": read_record(evaluation, "evaluate")["config"],
        "merge": read_record(merged, "merge")["config"],
        "convert": read_record(gguf, "convert")["config"],
    }


def _lineage(merged: Path, evaluation: Path) -> dict[str, Any]:
    """What this version was made of, and the champion that it had to beat (empty: none)."""
    trained = read_record(merged / "adapter", "train")
    champion = read_json(evaluation / EVALUATION)["champion"] or {}
    return {
        "model": trained["model"],
        "teacher": trained["teacher"],
        "data": trained["data"],
        "held_out": trained["held_out_sha256"],
        "champion": champion.get("version", ""),
        "tune16": build(),
    }


def _scores(evaluation: Path, gguf: Path) -> dict[str, Any]:
    scores = read_json(evaluation / EVALUATION)
    files = read_json(gguf / "gguf.json")["files"]
    return {**{name: scores[name] for name in ("base", "tuned", "loss_difference")}, "gguf": files}


def _sizes(model: Path) -> dict[str, int]:
    """What a server has to know: the longest conversation, and the bytes of keys and values (16 bits) per token."""
    config = read_json(model / "config.json")
    shape = read_shape(config, str(model))
    return {
        "context": config.get("max_position_embeddings", 4096),
        "cache_bytes_per_token": 2 * 2 * shape.num_layers * shape.key,
    }


def _gguf_names(gguf: Path) -> list[str]:
    """The model files that were made, in the order that they were asked for."""
    asked = read_record(gguf, "convert")["config"]["quantizations"].split(",")
    return [f"model-{name}.gguf" for name in asked if (gguf / f"model-{name}.gguf").is_file()]


def _upload_files(folder: Path, files: list[dict[str, Any]], prefix: str, sources: dict[str, Artifact | None]) -> None:
    """Bring the version's files there: weights that lie in the same storage are copied by it, the others are sent."""
    copied = {file["path"] for file in files if _copy(file, f"{prefix}/{file['path']}", sources)}
    if copied:
        num_bytes = sum(file["size"] for file in files if file["path"] in copied)
        say("upload", f"{len(copied)} files, {num_bytes / 2**20:,.0f} MiB, copied within the storage")
    rest = [file for file in files if file["path"] not in copied]
    advance = _progress(sum(file["size"] for file in rest))
    for file in rest:
        s3.upload(folder / file["path"], s3.default_bucket(), f"{prefix}/{file['path']}", advance, file["sha256"])
    s3.abort_uploads(s3.default_bucket(), f"{prefix}/", lambda _: True)  # parts of copies that were killed


def _copy(file: dict[str, Any], key: str, sources: dict[str, Artifact | None]) -> bool:
    """Whether the storage has copied a file of the weights; small files are sent as quickly."""
    part = "gguf/" if file["path"].startswith("gguf/") else ""
    is_worth_it = file["size"] >= _LEAST_COPIED_BYTES and file["path"].startswith(("merged/", "gguf/"))
    source = sources[part] if is_worth_it else None
    return source is not None and copy_file(
        source, file["path"].removeprefix(part), s3.default_bucket(), key, file["sha256"]
    )


def _progress(total: int) -> Callable[[int], None]:
    """A callback that reports now and then how much has been sent; parts of a file report from several threads."""
    sent, started, said = 0, time.monotonic(), time.monotonic()

    def advance(count: int) -> None:
        nonlocal sent, said
        sent += count
        now = time.monotonic()
        if sent >= total or now - said >= _SAY_EVERY_SECONDS:
            said = now
            rate = sent / 2**20 / max(now - started, 1e-3)
            say("upload", f"{sent / 2**20:,.0f} of {total / 2**20:,.0f} MiB, {rate:,.0f} MiB/s")

    return advance


def remove_leftovers(path: str, but: str = "") -> int:
    """Remove what killed publishers left under `path`: versions without manifest and unfinished multipart uploads.

    Args:
        path: ``prefix/model-name`` in the connection's bucket, whose lease is held.
        but: a version that stays, since it is being continued.

    Returns:
        The number of objects and uploads removed.
    """
    names, complete = _names(path)

    def is_stale(key: str) -> bool:
        version = key.partition("/")[0]
        return versions.is_version(version) and version != but

    num_uploads = s3.abort_uploads(s3.default_bucket(), f"{path}/", is_stale)
    num_files = sum(versions.remove(path, version) for version in names - complete - {but})
    if num_files or num_uploads:
        say("upload", f"removed {num_files} files and {num_uploads} unfinished uploads of earlier, killed runs")
    return num_files + num_uploads


def _names(path: str) -> tuple[set[str], set[str]]:
    """The versions of which there is anything, finished or not, and those that have a manifest."""
    bucket = s3.default_bucket()
    keys = [stored.key.removeprefix(f"{path}/") for stored in s3.list_objects(bucket, f"{path}/")]
    keys += [key.removeprefix(f"{path}/") for key in s3.unfinished_keys(bucket, f"{path}/")]
    parts = [key.split("/", 1) for key in keys if versions.is_version(key.split("/", 1)[0])]
    return {version for version, _ in parts}, {version for version, rest in parts if rest == versions.MANIFEST}
