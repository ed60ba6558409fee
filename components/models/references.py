"""Names of models and data sets, as a person types them and as fixed references.

A name is what a user types: ``org/name``, ``org/name@revision``, ``s3://bucket/folder``, ``https://…``, a path. A
fixed reference also pins the content, so that the pipeline cache can trust it: ``hf://org/name@<commit>`` (data sets
``hf://datasets/org/name@<commit>``, as Hugging Face writes it), and ``<address>#<digest>`` for all others.
:mod:`components.models.fetching` fixes and fetches them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx2 as httpx

from components.runtime.errors import Tune16Error
from components.storage import s3

Kind = Literal["model", "data"]

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
DATA_FILES = tuple(f"*{suffix}{compression}" for suffix in DATA_SUFFIXES for compression in COMPRESSIONS)

_PINNED = re.compile(r"(.*)#([0-9a-f]{32})", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


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
            raise Tune16Error(
                f"{name!r} is not a valid {kind} name: use a Hugging Face id (org/name), s3://, https:// or a path."
            )
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
    """Refuse invalid URLs, and one with a password; neither is quoted, since a password may stand in either."""
    try:
        url = httpx.URL(f"{scheme}://{address}")
    except httpx.InvalidURL:
        raise Tune16Error(f"The {scheme}:// address is not valid. Write it as {scheme}://host/folder.") from None
    if url.userinfo:
        raise Tune16Error(
            f"{scheme}://{url.host}: an address with a password would be shown in parameters and reports. Put the "
            "files into the connection's bucket and name them as s3:///folder."
        )
