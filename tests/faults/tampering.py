"""Tampering with a published model, in S3 and on disk, signed and not: every reader refuses it, and says why."""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from components.config import UploadConfig
from components.runtime.errors import Tune16Error
from components.storage import s3, signing, versions
from components.upload.publisher import publish
from pipelines.s3server import S3Server
from tests.faults.harness import report
from tests.faults.outputs import write_outputs

BUCKET = "tune16"
WEIGHTS, ADAPTER, CARD = "merged/model.safetensors", "adapter/adapter_model.safetensors", "README.md"
Act = Callable[["Published"], object]


@dataclass
class Published:
    """A version that is tampered with, a copy of it on disk, and another version and another model."""

    path: str
    version: str
    copy: Path
    older: tuple[str, str]
    foreign: tuple[str, str]

    def key(self, name: str) -> str:
        return f"{self.path}/{self.version}/{name}"

    def read(self, name: str, of: tuple[str, str] | None = None) -> bytes:
        path, version = of or (self.path, self.version)
        return s3.read(BUCKET, f"{path}/{version}/{name}") or b""

    def write(self, name: str, content: bytes) -> None:
        s3.write(BUCKET, self.key(name), content)

    def edit_manifest(self, change: Callable[[Any], object]) -> None:
        manifest = json.loads(self.read(versions.MANIFEST))
        change(manifest)
        self.write(versions.MANIFEST, json.dumps(manifest).encode())

    def rename_listed(self, name: str) -> None:
        self.edit_manifest(lambda manifest: manifest["files"][0].update(path=name))


def _flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def _swap(it: Published) -> None:
    weights, adapter = it.read(WEIGHTS), it.read(ADAPTER)
    it.write(WEIGHTS, adapter)
    it.write(ADAPTER, weights)


def _rename(it: Published) -> None:
    it.write(f"{CARD}.old", it.read(CARD))
    s3.delete(BUCKET, it.key(CARD))


def _take(it: Published, of: tuple[str, str], with_signature: bool) -> None:
    it.write(versions.MANIFEST, it.read(versions.MANIFEST, of))
    if with_signature:
        it.write(versions.SIGNATURE, it.read(versions.SIGNATURE, of))


def _forge(it: Published) -> None:
    """Edit a file and make the manifest fit."""
    content = _flipped(it.read(CARD))
    it.write(CARD, content)
    digest = hashlib.sha256(content).hexdigest()
    it.edit_manifest(
        lambda manifest: next(file for file in manifest["files"] if file["path"] == CARD).update(sha256=digest)
    )


def _sign_anew(it: Published) -> None:
    with tempfile.TemporaryDirectory() as scratch, _keys(Path(scratch)):
        it.write(versions.SIGNATURE, signing.sign(it.read(versions.MANIFEST)) or b"")


IN_S3: dict[str, Act] = {
    "a byte edited": lambda it: it.write(WEIGHTS, _flipped(it.read(WEIGHTS))),
    "a file cut": lambda it: it.write(WEIGHTS, it.read(WEIGHTS)[:-1]),
    "a file emptied": lambda it: it.write(CARD, b""),
    "a file added": lambda it: it.write("merged/extra.py", b"print()"),
    "a file deleted": lambda it: s3.delete(BUCKET, it.key(CARD)),
    "a file renamed": _rename,
    "two files swapped": _swap,
    "the settings edited": lambda it: it.write(versions.SETTINGS, b"{}"),
    "no manifest": lambda it: s3.delete(BUCKET, it.key(versions.MANIFEST)),
    "a cut manifest": lambda it: it.write(versions.MANIFEST, it.read(versions.MANIFEST)[:-9]),
    "an older version's manifest": lambda it: _take(it, it.older, False),
    "another model's manifest": lambda it: _take(it, it.foreign, False),
    "manifest: a path outside": lambda it: it.rename_listed("../../evil"),
    "manifest: an absolute path": lambda it: it.rename_listed("/etc/evil"),
    "manifest: a backslash": lambda it: it.rename_listed("..\\evil"),
    "manifest: no plain path": lambda it: it.rename_listed("merged//./model.safetensors"),
    "manifest: a file twice": lambda it: it.edit_manifest(lambda content: content["files"].append(content["files"][0])),
    "manifest: a file as folder": lambda it: it.rename_listed(f"{CARD}/inner"),
    "manifest: a file unlisted": lambda it: it.edit_manifest(lambda content: content["files"].pop()),
}
SIGNED_ONLY: dict[str, Act] = {
    "a file and the manifest edited": _forge,
    "the scores edited": lambda it: it.edit_manifest(lambda content: content.update(scores={})),
    "the signature removed": lambda it: s3.delete(BUCKET, it.key(versions.SIGNATURE)),
    "the signature cut": lambda it: it.write(versions.SIGNATURE, it.read(versions.SIGNATURE)[:-9]),
    "an older version's signature": lambda it: it.write(versions.SIGNATURE, it.read(versions.SIGNATURE, it.older)),
    "an older version's manifest and signature": lambda it: _take(it, it.older, True),
    "another model's manifest and signature": lambda it: _take(it, it.foreign, True),
    "signed by another key": _sign_anew,
}
ON_DISK: dict[str, Act] = {
    "a byte edited": lambda it: (it.copy / WEIGHTS).write_bytes(_flipped((it.copy / WEIGHTS).read_bytes())),
    "a file cut": lambda it: os.truncate(it.copy / WEIGHTS, 9),
    "a file added": lambda it: (it.copy / "extra.py").write_text("print()"),
    "a file deleted": lambda it: (it.copy / CARD).unlink(),
    "a file renamed": lambda it: (it.copy / CARD).rename(it.copy / "other"),
    "a link to the same content": lambda it: (
        shutil.move(it.copy / CARD, it.copy.parent / "moved"),
        (it.copy / CARD).symlink_to(it.copy.parent / "moved"),
    ),
    "a folder that is a link": lambda it: (
        shutil.move(it.copy / "adapter", it.copy.parent / "moved-adapter"),
        (it.copy / "adapter").symlink_to(it.copy.parent / "moved-adapter"),
    ),
    "two files swapped": lambda it: (
        (it.copy / WEIGHTS).rename(it.copy / "x"),
        (it.copy / ADAPTER).rename(it.copy / WEIGHTS),
        (it.copy / "x").rename(it.copy / ADAPTER),
    ),
}


def main() -> int:
    """Publish, tamper, read; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1000, help="kinds of each sort, at most")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with S3Server(folder / "s3") as server, s3.environment(server.environment(BUCKET)):
            s3.client().create_bucket(Bucket=BUCKET)
            lines = _tamper(folder / "plain", False, options.num)
            with _keys(folder):
                lines += _tamper(folder / "signed", True, options.num)
    for line in lines:
        print(" | ".join(line))
    refused = sum(line[3].startswith("refused: ") for line in lines)
    kinds = {line[1:3] for line in lines}
    figures = {"kinds": len(kinds), "cases": len(lines), "refused": refused}
    return report(
        "tampering", figures, refused == len(lines) and len(kinds) >= min(12, 2 * options.num), options.output
    )


def _tamper(folder: Path, is_signed: bool, num: int) -> list[tuple[str, str, str, str]]:
    name = "signed" if is_signed else "manifested"
    sorts = {"S3": {**IN_S3, **(SIGNED_ONLY if is_signed else {})}, "disk": ON_DISK}
    published = _publish(folder, name)
    contents = {key: s3.read(BUCKET, key) or b"" for key in _etags(published)}
    lines = []
    for place, acts in sorts.items():
        for number, (kind, act) in enumerate(list(acts.items())[:num]):
            copy = folder / f"{place}-{number}" / "copy"
            shutil.copytree(published.copy, copy)
            it = replace(published, copy=copy)
            _read(it, place)  # what nobody has touched is accepted
            before = _etags(it)
            act(it)
            try:
                _read(it, place)
                ending = "ACCEPTED"
            except Tune16Error as error:
                ending = f"refused: {error}"
            lines.append((name, place, kind, ending))
            _restore(it, before, contents)
    return lines


def _etags(it: Published) -> dict[str, str]:
    return {stored.key: stored.etag for stored in s3.list_objects(BUCKET, it.key(""))}


def _restore(it: Published, before: dict[str, str], contents: dict[str, bytes]) -> None:
    now = _etags(it)
    for key in now.keys() - before.keys():
        s3.delete(BUCKET, key)
    for key, etag in before.items():
        if now.get(key) != etag:
            s3.write(BUCKET, key, contents[key])


def _publish(work: Path, name: str) -> Published:
    """Two versions of a model and one of another."""
    places = []
    before = ""
    for path, data in ((f"team/{name}-other", "x"), (f"team/{name}", "y"), (f"team/{name}", "z")):
        outputs = write_outputs(work / f"outputs-{data}", data=data)
        scores = outputs[2] / "evaluation.json"
        if data == "z":
            scores.write_text(json.dumps(json.loads(scores.read_text()) | {"champion": {"version": before}}))
        before = publish(*outputs, UploadConfig(path=path))["version"]
        places.append((path, before))
    path, version = places[-1]
    copy = versions.download(path, version, work / "copy")
    return Published(path, version, copy, older=places[1], foreign=places[0])


def _read(it: Published, place: str) -> None:
    if place == "disk":
        versions.check_copy(it.path, it.version, it.copy)
    else:
        versions.download(it.path, it.version, it.copy.with_name("again"))
        versions.read_settings(it.path, versions.read_manifest(it.path, it.version))


@contextmanager
def _keys(folder: Path) -> Iterator[None]:
    """A new pair of keys for a while."""
    private = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "private.pem").write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    names = {signing.SIGNING_VARIABLE: "private.pem", signing.VERIFY_VARIABLE: "public.pem"}
    with s3.environment({name: str(folder / file) for name, file in names.items()}):
        yield


if __name__ == "__main__":
    raise SystemExit(main())
