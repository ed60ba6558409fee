"""Secrets taken out of every text that leaves this process: logs, messages, tracebacks, reports.

Records that programs read back are written as they are: nothing puts a secret into one.

What counts as a secret are the values of the environment's variables with names such as ``HF_TOKEN`` or
``AWS_SECRET_ACCESS_KEY``, as they are and as URLs, JSON, HTML and base64 write them, and whatever stands where only
secrets stand: a password in a URL, the signature of a presigned one, an Authorization header.
"""

import base64
import functools
import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TextIO
from urllib.parse import quote, quote_plus

_SECRET_NAME = re.compile(r"(^|_)(TOKEN|CREDENTIALS?|KEY|KEY_ID)$|SECRET|PASSWORD|PASSWD", re.IGNORECASE)
_PATHS = {"TUNE16_SIGNING_KEY", "TUNE16_VERIFY_KEY"}  # files with keys
_SHORTEST = 8  # characters; shorter values are parts of ordinary words and numbers
_NO_SECRETS = {"password", "minioadmin", "changeme", "changeit"}  # which also occur as ordinary words
_PLACES = re.compile(
    r"(?P<head>://[^\s/:@\"'<>]*:)(?P<password>[^\s/@\"'<>]+)(?=@)"
    r"|(?P<parameter>X-Amz-(?:Signature|Security-Token|Credential)=)[^&\s\"'<>\\]+"
    r"|(?P<header>\bAuthorization\b[\"']?\s*[:=]\s*[\"']?)(?!\[redacted)[^\s\"'<>\\]+(?:[ ][^\s\"'<>\\]+)?"
    r"|(?P<bearer>\bBearer )(?!\[redacted)[\w.~+/=-]{8,}",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """`text` with ``[redacted: NAME]`` in place of every secret."""
    pattern, names = _pattern(_secrets())
    if pattern:
        text = pattern.sub(lambda found: f"[redacted: {names[found[0]]}]", text)
    return _PLACES.sub(_without_secret, text)


def protect_output() -> None:
    """From now on, let nothing secret out of this process by stdout and stderr: prints, warnings, logs, tracebacks.

    The streams themselves are changed, since the handlers of loggers hold on to them.
    """
    for stream in (sys.stdout, sys.stderr):
        if "write" not in vars(stream):
            stream.write = _redacting(stream)  # type: ignore[method-assign]


def _redacting(stream: TextIO) -> Callable[[str], int]:
    write = stream.write

    def write_redacted(text: str) -> int:
        write(redacted(text))
        return len(text)

    return write_redacted


def _without_secret(found: re.Match[str]) -> str:
    head = found["head"] or found["parameter"] or found["header"] or found["bearer"]
    return f"{head}[redacted]"


def _secrets() -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in os.environ.items() if _is_secret(name, value))


@functools.lru_cache(maxsize=4096)
def _is_secret(name: str, value: str) -> bool:
    is_path = name in _PATHS and "\n" not in value
    return (
        len(value) >= _SHORTEST and value not in _NO_SECRETS and not is_path and _SECRET_NAME.search(name) is not None
    )


@functools.lru_cache(maxsize=4)
def _pattern(secrets: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str] | None, dict[str, str]]:
    """One pattern for all secrets, the longest first, since one may be part of another; and whose each text is."""
    names = {form: name for name, value in secrets for form in _forms(value)}
    forms = sorted(names, key=len, reverse=True)
    return (re.compile("|".join(map(re.escape, forms))) if forms else None), names


def _forms(value: str) -> Iterator[str]:
    """How a secret is written; one of several lines, such as a private key, is printed line by line."""
    for part in {value, value.strip(), *value.splitlines()}:
        if len(part) >= _SHORTEST:
            as_bytes = os.fsencode(part)
            yield from (part, quote(as_bytes), quote(as_bytes, safe=""), quote_plus(as_bytes))
            yield from (html.escape(part), json.dumps(part)[1:-1], repr(part)[1:-1])
            yield base64.b64encode(as_bytes).decode().rstrip("=")
