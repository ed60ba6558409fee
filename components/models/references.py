"""Names of models and data sets: parsed, turned into fixed references, fetched.

A name is what a person types: ``org/name``, ``org/name@revision``, ``s3://bucket/folder``, ``https://…``, a path. A
fixed reference says the content too, so that the pipeline cache can trust it: ``hf://org/name@<commit>`` (data sets
``hf://datasets/org/name@<commit>``, as Hugging Face writes it), and ``<address>#<digest>`` for all others.
"""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import httpx2 as httpx
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from components.runtime.errors import Tune16Error
from components.runtime.timeouts import at_most
from components.storage import s3

Kind = Literal["model", "data"]

TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
DATA_FILES = tuple(f"*{suffix}{compression}" for suffix in DATA_SUFFIXES for compression in COMPRESSIONS)

_UNKNOWN_QUESTION = {404, 405, 501}  # mirrors of the Hub do not answer all that it does
_PINNED = re.compile(r"(.*)#([0-9a-f]{32})", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
_LARGEST_DOCUMENT = 64 << 20  # bytes of a model's JSON file; the index of the largest models has some megabytes
_TOKENIZER = "tokenizer.json"  # larger than the others, and read by a library that sets limits itself
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HTTPS_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "model.safetensors",
)


@dataclass(frozen=True)
class Reference:
    """A model or data set: its scheme, its address without scheme, and the digest or commit (empty: not fixed)."""

    kind: Kind
    scheme: Literal["hf", "s3", "https", "http", "file"]
    address: str
    pin: str = ""

    def __str__(self) -> str:
        if self.scheme == "hf":
            folder = "datasets/" if self.kind == "data" else ""
            return f"hf://{folder}{self.address}" + (f"@{self.pin}" if self.pin else "")
        return f"{self.scheme}://{self.address}" + (f"#{self.pin}" if self.pin else "")


def parse(name: str, kind: Kind) -> Reference:
    """Read a name as a person types it, or a fixed reference.

    Raises:
        Tune16Error: the scheme is not supported, or the name is none of the known forms.
    """
    scheme, separator, rest = name.partition("://")
    if not separator:
        if name.startswith((".", "/", "~")) or Path(name).exists():
            return Reference(kind, "file", str(Path(name).expanduser().absolute()))
        if kind == "data" and name.lower().endswith(tuple(pattern[1:] for pattern in DATA_FILES)):
            raise Tune16Error(f"{name}: there is no such file. Check the path, from {Path.cwd()}.")
        if not _HUB_ID.fullmatch(name):
            raise Tune16Error(f"{name!r} is no {kind}: use a Hugging Face id (org/name), s3://, https:// or a path.")
        scheme, rest = "hf", name
    if scheme == "hf":
        address, _, revision = rest.removeprefix("datasets/").partition("@")
        return Reference(kind, "hf", address, revision)
    address, pin = _without_pin(rest)
    if scheme == "s3":
        bucket, _, key = address.partition("/")
        return Reference(kind, "s3", f"{bucket or s3.default_bucket()}/{key.strip('/')}", pin)
    if scheme in ("https", "http"):
        _check_address(scheme, address)
        return Reference(kind, scheme, address.replace("#", "%23").rstrip("/"), pin)  # type: ignore[arg-type]
    if scheme == "file":
        return Reference(kind, "file", address, pin)
    if scheme == "oci":
        raise Tune16Error(
            f"{name}: models in OCI images (modelcars) cannot be read yet. Copy the model to S3 and name it as "
            "s3://bucket/folder."
        )
    raise Tune16Error(f"{name}: '{scheme}://' is not supported. Use a Hugging Face id, s3://, https:// or a path.")


def _without_pin(rest: str) -> tuple[str, str]:
    """An address and its digest, if it has one; any other ``#`` is a part of a name."""
    found = _PINNED.fullmatch(rest)
    return (found[1], found[2]) if found else (rest, "")


def _check_address(scheme: str, address: str) -> None:
    """Refuse what is no URL, and one with a password; neither is quoted, since a password may stand in either."""
    try:
        url = httpx.URL(f"{scheme}://{address}")
    except httpx.InvalidURL:
        raise Tune16Error(f"The {scheme}:// address is not valid. Write it as {scheme}://host/folder.") from None
    if url.userinfo:
        raise Tune16Error(
            f"{scheme}://{url.host}: an address with a password would be shown in parameters and reports. Put the "
            "files into the connection's bucket and name them as s3:///folder."
        )


def pin(reference: Reference) -> Reference:
    """Fix a reference to the content it has now.

    Raises:
        Tune16Error: it is missing, gated, unreachable, or a model without safetensors; the message says what to do.
    """
    if reference.scheme == "hf":
        names, commit = _pin_on_hub(reference)
        fixed = replace(reference, pin=commit)
    else:
        entries = dict(_entries(reference))
        names = list(entries)
        listing = json.dumps(sorted(entries.items())).encode()
        fixed = replace(reference, pin=hashlib.sha256(listing).hexdigest()[:32])
    _check_names(reference, names)
    return fixed


def _pin_on_hub(reference: Reference) -> tuple[list[str], str]:
    """The files of a repository of the Hub, of a mirror, or, offline, of the cache; and the commit."""
    repo_type = _repo_type(reference)
    with _hub_errors(reference):
        if constants.HF_HUB_OFFLINE:
            path = _cached(reference)
            return [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()], path.name
        api = HfApi()
        info = api.repo_info(
            reference.address, revision=reference.pin or None, repo_type=repo_type, timeout=at_most(30)
        )
        try:
            api.auth_check(reference.address, repo_type=repo_type)
        except GatedRepoError:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code not in _UNKNOWN_QUESTION:
                raise
    return [sibling.rfilename for sibling in getattr(info, "siblings", None) or []], str(info.sha)


def _cached(reference: Reference) -> Path:
    """The snapshot of a repository in the Hub's cache: of its revision, or the only one that is there."""
    repo_type = _repo_type(reference)
    snapshots = Path(
        constants.HF_HUB_CACHE, repo_folder_name(repo_id=reference.address, repo_type=repo_type), "snapshots"
    )
    if not reference.pin and len(only := list(snapshots.glob("*"))) == 1:
        return only[0]
    return Path(
        snapshot_download(reference.address, repo_type=repo_type, revision=reference.pin or None, local_files_only=True)
    )


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
            that no honest model has: names or links that lead out of its folder, a JSON file without end.
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
        with _hub_errors(reference):
            return Path(
                snapshot_download(
                    reference.address,
                    repo_type=_repo_type(reference),
                    revision=reference.pin or None,
                    allow_patterns=list(patterns),
                )
            )
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
        Tune16Error: the model has none, it is no JSON object, or its number format has another name.
    """
    path = fetch(reference, folder, ["config.json"]) / "config.json"
    if not path.is_file():
        raise Tune16Error(f"{reference}: no model folder, it has no config.json.")
    config = read_document(path)
    for name in ("dtype", "torch_dtype"):
        if str(config.get(name, "")).startswith("torch."):
            written = str(config[name]).removeprefix("torch.")
            raise Tune16Error(f"{reference}: its config.json has {name} {config[name]!r}. Write {written!r} there.")
    return config


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object out of a model's folder, where anybody may have written it.

    Raises:
        Tune16Error: it is something else, or larger or deeper than such a file ever is.
    """
    size = path.stat().st_size
    if size > _LARGEST_DOCUMENT:
        raise Tune16Error(
            f"{path}: has {size / 2**20:,.0f} MiB, far more than a model's {path.name} ever has. Refused."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise Tune16Error(f"{path}: is nested too deeply to be a model's {path.name}. Refused.") from None
    except ValueError as error:
        raise Tune16Error(f"{path}: is no JSON ({error}). Fetch the model again.") from None
    if not isinstance(content, dict):
        raise Tune16Error(f"{path}: is no JSON object. Fetch the model again.")
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
        raise Tune16Error(f"{reference}: no model folder, it has no .safetensors file.")


def _entries(reference: Reference) -> Iterator[tuple[str, str]]:
    """Name and content mark (ETag or SHA-256) of every file behind a reference that is not on Hugging Face."""
    if reference.scheme == "file":
        yield from _files(reference, digest=True)
    elif reference.scheme == "s3":
        key = _bucket_and_key(reference)[1]
        for stored in _s3_objects(reference):
            yield stored.key.removeprefix(key).lstrip("/") or Path(key).name, f"{stored.etag}:{stored.size}"
    else:
        for name in _https_names(reference):
            yield name, _https_mark(reference, name)


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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused where it would lie outside."""
    _check_name(name)
    return folder / name


def _check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise Tune16Error(f"{name!r}: a file of this name would be written outside its folder. Refused.")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in patterns)


def _https_names(reference: Reference) -> list[str]:
    """A data set at https:// is one file; a model is a folder whose known files are tried by name."""
    if reference.kind == "data":
        return [""]
    names = [name for name in _HTTPS_MODEL_FILES if _https_exists(f"{_url(reference)}/{name}")]
    if "model.safetensors.index.json" in names:
        names += _https_weights(f"{_url(reference)}/model.safetensors.index.json")
    return names


def _https_weights(url: str) -> list[str]:
    """The weight files that the index at `url` names."""
    try:
        names = sorted(set(_https_get(url).json()["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Tune16Error(f"{url}: is no index of safetensors files. Check the address.") from None
    for name in names:
        _check_name(str(name))
    return [str(name) for name in names]


def _url(reference: Reference, name: str = "") -> str:
    return f"{reference.scheme}://{reference.address}" + (f"/{name}" if name else "")


def _https_mark(reference: Reference, name: str) -> str:
    """A strong ETag where the server gives one, else the SHA-256 of what it sends."""
    url = _url(reference, name)
    with _http_errors(url):
        headers = _answered(httpx.head(url, follow_redirects=True, timeout=at_most(30))).headers
        etag = headers.get("etag", "")
        if etag and not etag.startswith("W/"):
            return str(etag)
        digest = hashlib.sha256()
        for block in _https_blocks(url):
            digest.update(block)
    return digest.hexdigest()


def _https_exists(url: str) -> bool:
    with _http_errors(url):
        response = httpx.head(url, follow_redirects=True, timeout=at_most(30))
        if response.status_code == httpx.codes.NOT_FOUND:
            return False
        _answered(response)
    return True


def _https_get(url: str) -> httpx.Response:
    with _http_errors(url):
        return _answered(httpx.get(url, follow_redirects=True, timeout=at_most(30)))


def _fetch_https(reference: Reference, folder: Path, patterns: tuple[str, ...]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if reference.kind == "data":
        target = folder / Path(httpx.URL(_url(reference)).path).name
        _https_download(_url(reference), target)
        return target
    for name in _https_names(reference):
        if _matches(name, patterns):
            _https_download(_url(reference, name), _inside(folder, name))
    return folder


def _https_download(url: str, target: Path) -> None:
    with _http_errors(url), target.open("wb") as file:
        for block in _https_blocks(url):
            file.write(block)


def _https_blocks(url: str) -> Iterator[bytes]:
    """The file as it lies on the server: unpacked on the way, a small one could fill the disk."""
    plain = {"Accept-Encoding": "identity"}
    with httpx.stream("GET", url, headers=plain, follow_redirects=True, timeout=at_most(60)) as response:
        yield from _answered(response).iter_raw(1 << 20)


def _answered(response: httpx.Response) -> httpx.Response:
    """A good answer that came over TLS if it was asked for over TLS.

    Raises:
        httpx.HTTPStatusError: the server refuses.
        Tune16Error: it has sent us on to where anybody could change the content.
    """
    if response.url.scheme == "http" and any(earlier.url.scheme == "https" for earlier in response.history):
        raise Tune16Error(
            f"{response.history[0].url}: leads to {response.url}, without encryption. Name an address that stays https."
        )
    return response.raise_for_status()


@contextmanager
def _http_errors(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        raise Tune16Error(f"{url}: the server answers {status}. Check the address and its access rights.") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Tune16Error(f"{url}: cannot be reached ({error}). Check the address and the network.") from None


def _repo_type(reference: Reference) -> Literal["model", "dataset"]:
    return "dataset" if reference.kind == "data" else "model"


@contextmanager
def _hub_errors(reference: Reference) -> Iterator[None]:
    """Turn the Hub's errors into messages that name the page to visit and the secret to set."""
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    page = f"{endpoint}/{'datasets/' if reference.kind == 'data' else ''}{reference.address}"
    secret = "put a token of that account into the key HF_TOKEN of the Secret that with_tokens_secret names"
    try:
        yield
    except GatedRepoError:
        raise Tune16Error(
            f"{reference}: is gated. Open {page}, accept its terms, and {secret} (on a laptop: export HF_TOKEN)."
        ) from None
    except RevisionNotFoundError:
        raise Tune16Error(f"{reference}: there is no such revision. See {page}/tree/main for what there is.") from None
    except RepositoryNotFoundError:
        raise Tune16Error(
            f"{reference}: not found. Check the spelling at {page}; if it is private, {secret} (on a laptop: export "
            "HF_TOKEN)."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, HfHubHTTPError) as error:
        first = str(error).strip().partition("\n")[0]
        raise Tune16Error(
            f"{reference}: {endpoint} cannot be reached ({first}). Without internet, name an s3:// folder or a path, "
            "or set HF_ENDPOINT to a mirror."
        ) from None
