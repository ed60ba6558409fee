"""Models and data sets at plain ``https://`` addresses: no listing, so a model's files are tried by their names."""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx

from components.models.references import Reference
from components.runtime.errors import Tune16Error
from components.runtime.retry import Answer, retry
from components.runtime.timeouts import at_most
from components.storage.files import is_safe_name

_PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be others a little later
_MODEL_FILES = (
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


def names(reference: Reference) -> list[str]:
    """The files behind a reference: a data set is one file, without a name; a model is a folder.

    Raises:
        Tune16Error: the server cannot be reached, refuses, or its index of weights cannot be used.
    """
    if reference.kind == "data":
        return [""]
    found = [name for name in _MODEL_FILES if _exists(url(reference, name))]
    if "model.safetensors.index.json" in found:
        found += _weights(url(reference, "model.safetensors.index.json"))
    return found


def url(reference: Reference, name: str = "") -> str:
    """The address of a file behind a reference."""
    return f"{reference.scheme}://{reference.address}" + (f"/{name}" if name else "")


def mark(address: str) -> str:
    """What tells a content from others: a strong ETag where the server gives one, else the SHA-256 of what it sends.

    Raises:
        Tune16Error: the server cannot be reached or refuses.
    """
    return _strong_etag(_ask("HEAD", address)) or _attempt(address, lambda: _digest(address), math.inf)


def download(address: str, target: Path) -> None:
    """Download one file; where the connection breaks, the rest is asked for, if the server knows the content by a mark.

    Raises:
        Tune16Error: the server cannot be reached or refuses.
    """
    etag = ""  # of what is there already; empty begins anew

    def fetch() -> None:
        nonlocal etag
        size = target.stat().st_size if target.is_file() and etag else 0
        known, etag = etag, ""
        rest = {"Range": f"bytes={size}-", "If-Range": known} if size else {}
        with _stream(address, rest) as response:
            is_rest = response.status_code == httpx.codes.PARTIAL_CONTENT
            begins = response.headers.get("content-range", "").startswith(f"bytes {size}-")
            if is_rest and not (begins and _strong_etag(response) == known):
                raise httpx.RemoteProtocolError("the server sent another part than the one asked for")
            etag = _strong_etag(response)
            with target.open("ab" if is_rest else "wb") as file:
                for block in response.iter_raw(1 << 20):
                    file.write(block)

    _attempt(address, fetch, math.inf)


def _digest(address: str) -> str:
    digest = hashlib.sha256()
    with _stream(address, {}) as response:
        for block in response.iter_raw(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _stream(address: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
    """The file as it lies on the server: unpacked on the way, a small one could fill the disk."""
    plain = {"Accept-Encoding": "identity", **headers}
    with httpx.stream("GET", address, headers=plain, follow_redirects=True, timeout=at_most(60)) as response:
        yield _answered(response)


def _exists(address: str) -> bool:
    return _ask("HEAD", address, missing_is_fine=True).status_code != httpx.codes.NOT_FOUND


def _weights(address: str) -> list[str]:
    """The weight files that the index at `address` names."""
    try:
        found = sorted({str(name) for name in _ask("GET", address).json()["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Tune16Error(f"{address}: is not an index of safetensors files. Check the address.") from None
    for name in found:
        if not is_safe_name(name):
            raise Tune16Error(f"{address}: names {name!r}, which would be written outside its folder. Refused.")
    return found


def _ask(method: str, address: str, missing_is_fine: bool = False) -> httpx.Response:
    def ask() -> httpx.Response:
        response = httpx.request(method, address, follow_redirects=True, timeout=at_most(30))
        if missing_is_fine and response.status_code == httpx.codes.NOT_FOUND:
            return response
        return _answered(response)

    return _attempt(address, ask)


def _strong_etag(response: httpx.Response) -> str:
    etag = str(response.headers.get("etag", ""))
    return "" if etag.startswith("W/") else etag


def _answered(response: httpx.Response) -> httpx.Response:
    """A good answer that came over TLS if it was asked for over TLS.

    Raises:
        httpx.HTTPStatusError: the server refuses.
        Tune16Error: it has sent us on to where anybody could change the content.
    """
    if response.url.scheme == "http" and any(earlier.url.scheme == "https" for earlier in response.history):
        raise Tune16Error(
            f"{response.history[0].url}: redirects to {response.url}, without encryption. "
            "Use an address that stays https."
        )
    return response.raise_for_status()


def _attempt(address: str, call: Callable[[], Answer], seconds: float = 0) -> Answer:
    """Ask, again where a fault may pass; what stays becomes a message.

    `seconds` after which there is no new try are a minute by default; a large file takes longer than that.

    Raises:
        Tune16Error: the server cannot be reached or refuses.
    """
    try:
        return retry(call, _may_pass, seconds=seconds)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        raise Tune16Error(f"{address}: the server answers {status}. Check the address and its access rights.") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Tune16Error(f"{address}: cannot be reached ({error}). Check the address and the network.") from None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):  # 416: what is there is no part of what the server has
        return error.response.status_code in _PASSING or error.response.status_code == 416
    return isinstance(error, httpx.TransportError) and "CERTIFICATE_VERIFY_FAILED" not in str(error)
