"""References fixed to the content they have now, and fetched: from the Hub, S3, https:// or this disk.

Whatever is fetched was written by anybody: names and links that lead out of their folder, pickles, and JSON files
without end are refused here.
"""

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from components.models import https, hub
from components.models.references import Reference
from components.runtime.errors import Tune16Error
from components.storage import s3
from components.storage.files import file_digest, is_safe_name

TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "*.txt")

_LARGEST_DOCUMENT = 64 << 20  # bytes of a model's JSON file; the index of the largest models has some megabytes
_TOKENIZER = "tokenizer.json"  # larger than the others, and read by a library that sets limits itself
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def pin(reference: Reference) -> Reference:
    """Fix a reference to the content it has now.

    Raises:
        Tune16Error: it is missing, gated, unreachable, or a model without safetensors; the message says what to do.
    """
    if reference.scheme == "hf":
        names, commit = hub.pin(reference)
        fixed = replace(reference, pin=commit)
    else:
        entries = dict(_entries(reference))
        names = list(entries)
        listing = json.dumps(sorted(entries.items())).encode()
        fixed = replace(reference, pin=hashlib.sha256(listing).hexdigest()[:32])
    _check_names(reference, names)
    return fixed


def fetch(reference: Reference, folder: Path, patterns: Iterable[str]) -> Path:
    """Bring the files that match `patterns` onto this disk; a fixed reference is checked against its digest.

    Args:
        reference: what to fetch.
        folder: where downloads go; a Hugging Face snapshot stays in its cache and a local path where it is.
        patterns: shell patterns of file names.

    Returns:
        The folder with the files, or the file where the reference is a single one.

    Raises:
        Tune16Error: it is missing or unreachable, its content is no longer what the reference says, or it has files
            that are unsafe: names or links that lead out of its folder, a JSON file without end.
    """
    path = _fetch(reference, folder, tuple(patterns))
    if reference.kind == "model":
        for file in path.glob("*"):
            _check_is_no_pointer(file)
        for document in path.glob("*.json"):
            if document.name != _TOKENIZER:
                read_document(document)
    return path


def _check_is_no_pointer(file: Path) -> None:
    """Refuse what `git clone` without Git LFS leaves in the place of a large file."""
    if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_LFS_POINTER):
        raise Tune16Error(f"{file}: is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder.")


def fetch_more(reference: Reference, folder: Path, names: Iterable[str]) -> Path:
    """Bring further files of these names, of a reference that :func:`fetch` has checked just now; returns their folder.

    Raises:
        Tune16Error: as there.
    """
    return _bring(reference, folder, tuple(names))


def _fetch(reference: Reference, folder: Path, patterns: tuple[str, ...]) -> Path:
    is_pinned_by_us = reference.pin and reference.scheme != "hf"
    if is_pinned_by_us and pin(replace(reference, pin="")) != reference:
        raise Tune16Error(f"{reference}: its content changed since the run began. Start the run again.")
    return _bring(reference, folder, patterns)


def _bring(reference: Reference, folder: Path, patterns: tuple[str, ...]) -> Path:
    if reference.scheme == "hf":
        return hub.fetch(reference, patterns)
    if reference.scheme == "file":
        _check_names(reference, [name for name, _ in _files(reference)])
        return Path(reference.address)
    if reference.scheme == "s3":
        return _fetch_s3(reference, folder, patterns)
    return _fetch_https(reference, folder, patterns)


def companions(folder: Path) -> list[Path]:
    """What stands beside the weights in a model folder: settings and tokenizer, but neither pickles nor code."""
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def read_config(reference: Reference, folder: Path) -> dict[str, object]:
    """The model's config.json.

    Raises:
        Tune16Error: the model has none, it is not a JSON object, or its number format has another name.
    """
    path = fetch(reference, folder, ["config.json"]) / "config.json"
    if not path.is_file():
        raise Tune16Error(f"{reference}: not a model folder: config.json is missing.")
    config = read_document(path)
    for name in ("dtype", "torch_dtype"):
        if str(config.get(name, "")).startswith("torch."):
            written = str(config[name]).removeprefix("torch.")
            raise Tune16Error(f"{reference}: its config.json has {name} {config[name]!r}. Write {written!r} there.")
    return config


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object out of a model's folder, which is untrusted.

    Raises:
        Tune16Error: it is something else, or larger or deeper than such a file ever is.
    """
    size = path.stat().st_size
    if size > _LARGEST_DOCUMENT:
        raise Tune16Error(f"{path}: is {size / 2**20:,.0f} MiB, far too large for a model's {path.name}. Refused.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise Tune16Error(f"{path}: is nested too deeply to be a model's {path.name}. Refused.") from None
    except ValueError as error:
        raise Tune16Error(f"{path}: is not valid JSON ({error}). Fetch the model again.") from None
    if not isinstance(content, dict):
        raise Tune16Error(f"{path}: is not a JSON object. Fetch the model again.")
    return content


def _check_names(reference: Reference, names: list[str]) -> None:
    """Refuse an empty place, names that lead out of their folder, and a model without safetensors weights."""
    if not names:
        raise Tune16Error(f"{reference}: nothing is there. Check the address.")
    for name in names:
        _check_name(name)
    if reference.kind == "model" and not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        if pickles:
            raise Tune16Error(
                f"{reference}: has its weights as pickle only ({pickles[0]}), which can run code when it is loaded. "
                "Take a revision with safetensors, or convert it with save_pretrained(…) where you trust it."
            )
        raise Tune16Error(f"{reference}: not a model folder: it contains no .safetensors file.")


def _check_name(name: str) -> None:
    if name and not is_safe_name(name):  # the one file at an https:// address has none
        raise Tune16Error(
            f"{name!r}: a file of this name would be written outside its folder, or under another name. Refused."
        )


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused where it would lie outside."""
    _check_name(name)
    return folder / name


def _entries(reference: Reference) -> Iterator[tuple[str, str]]:
    """Name and content mark (ETag or SHA-256) of every file behind a reference that is not on Hugging Face."""
    if reference.scheme == "file":
        yield from _files(reference, digest=True)
    elif reference.scheme == "s3":
        key = _bucket_and_key(reference)[1]
        for stored in _s3_objects(reference):
            yield stored.key.removeprefix(key).lstrip("/") or Path(key).name, f"{stored.etag}:{stored.size}"
    else:
        for name in https.names(reference):
            yield name, https.mark(https.url(reference, name))


def _files(reference: Reference, digest: bool = False) -> Iterator[tuple[str, str]]:
    path = Path(reference.address)
    if path.is_file():
        yield path.name, file_digest(path) if digest else ""
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                if reference.kind == "model":
                    _check_link(file, path)
                yield str(file.relative_to(path)), file_digest(file) if digest else ""
    else:
        raise Tune16Error(f"{path}: there is no such file or folder.")


def _check_link(file: Path, folder: Path) -> None:
    """Refuse a link out of a folder, whose target would go into the model; the Hub's own cache links to its blobs."""
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if not file.resolve().is_relative_to(home.resolve()):
        raise Tune16Error(f"{file}: is a link to {file.resolve()}, outside the folder. Copy the file into the folder.")


def _bucket_and_key(reference: Reference) -> tuple[str, str]:
    bucket, _, key = reference.address.partition("/")
    return bucket, key


def _s3_objects(reference: Reference) -> list[s3.StoredObject]:
    """The object with this very key, or all objects in the folder of this name."""
    bucket, key = _bucket_and_key(reference)
    objects = s3.list_objects(bucket, key)
    inside = [stored for stored in objects if not key or stored.key == key or stored.key.startswith(f"{key}/")]
    return [stored for stored in inside if not stored.key.endswith("/")]


def _fetch_s3(reference: Reference, folder: Path, patterns: tuple[str, ...]) -> Path:
    bucket, key = _bucket_and_key(reference)
    objects = _s3_objects(reference)
    if [stored.key for stored in objects] == [key]:
        s3.download(bucket, key, folder / Path(key).name)
        return folder / Path(key).name
    for stored in objects:
        name = stored.key.removeprefix(key).lstrip("/")
        if _matches(name, patterns):
            s3.download(bucket, stored.key, _inside(folder, name))
    return folder


def _fetch_https(reference: Reference, folder: Path, patterns: tuple[str, ...]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if reference.kind == "data":
        target = folder / Path(urlsplit(https.url(reference)).path).name
        https.download(https.url(reference), target)
        return target
    for name in https.names(reference):
        if _matches(name, patterns):
            https.download(https.url(reference, name), _inside(folder, name))
    return folder


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in patterns)
