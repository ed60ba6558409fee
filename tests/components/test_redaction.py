"""Secrets stay in, wherever a text goes out."""

import base64
import html
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from urllib.parse import quote

import pytest

from components.runtime import report
from components.runtime.errors import Tune16Error, user_errors
from components.runtime.redaction import redacted
from components.runtime.steps import say, step

SECRET = 'Zx9/+q"T<7&canary'


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return SECRET


WAYS: list[Callable[[str], str]] = [
    str,
    repr,
    json.dumps,
    html.escape,
    quote,
    lambda value: quote(value, safe=""),
    lambda value: base64.b64encode(value.encode()).decode(),
    lambda value: str({"token": value}),
]


@pytest.mark.parametrize("write", WAYS)
def test_a_secret_is_found_however_it_is_written(secret: str, write: Callable[[str], str]) -> None:
    text = redacted(f"before {write(secret)} after")
    assert "[redacted: HF_TOKEN]" in text and text.startswith("before ") and text.endswith(" after")
    assert "canary" not in text and base64.b64encode(secret.encode()).decode()[:12] not in text


@pytest.mark.parametrize(
    ("name", "value", "is_secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG", True),
        ("AWS_SESSION_TOKEN", "FwoGZXIvYXdzEB4a", True),
        ("WANDB_API_KEY", "0123456789abcdef", True),
        ("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2", True),
        ("TUNE16_TOKEN", "sha256~abcdefgh", True),
        ("MY_SECRET_THING", "swordfish-42", True),
        ("HF_TOKEN", "hf_1234", False),  # too short: it would be part of other words
        ("AWS_SECRET_ACCESS_KEY", "password", False),  # a word
        ("AWS_S3_ENDPOINT", "https://s3.example.com", False),
        ("AWS_S3_BUCKET", "bucket-of-models", False),
        ("TOKENIZERS_PARALLELISM", "false-or-true", False),
        ("HF_TOKEN_PATH", "/home/user/token", False),
    ],
)
def test_secrets_are_known_by_their_names(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, is_secret: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert redacted(f"a {value} b") == (f"a [redacted: {name}] b" if is_secret else f"a {value} b")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("proxy http://me:pa55@host:80/x", "proxy http://me:[redacted]@host:80/x"),
        ("GET /a?X-Amz-Signature=abc123&x=1", "GET /a?X-Amz-Signature=[redacted]&x=1"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: [redacted]"),
        ("{'authorization': 'Bearer abc.def-ghi'}", "{'authorization': '[redacted]'}"),
        ("sent Bearer abc.def-ghijkl, refused", "sent Bearer [redacted], refused"),
        ("https://host:8443/a@b and a: b", "https://host:8443/a@b and a: b"),
        ("a token of Bearer kind", "a token of Bearer kind"),
    ],
)
def test_places_where_only_secrets_stand(text: str, wanted: str) -> None:
    assert redacted(text) == wanted
    assert redacted(wanted) == wanted


def test_a_renewed_secret_is_known_at_once(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert redacted(secret) == "[redacted: HF_TOKEN]"
    monkeypatch.setenv("HF_TOKEN", "another-canary")
    assert redacted("another-canary") == "[redacted: HF_TOKEN]"


def test_a_key_of_several_lines_is_found_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNING_KEY", "-----BEGIN KEY-----\nMIIEvQIBADANBgkqh\nkiG9w0BAQ\n")
    assert redacted("x MIIEvQIBADANBgkqh\n") == "x [redacted: SIGNING_KEY]\n"


def test_everything_that_is_printed(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()  # holds the stream as it is before the step begins
    with pytest.raises(SystemExit) as stopped, step("merge"):
        say("merge", f"token {secret}")
        print("printed", secret, sep=",")
        print(secret, file=sys.stderr)
        handler.emit(logging.makeLogRecord({"msg": f"logged {secret}"}))
        raise Tune16Error(f"wrong: {secret}")
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert "canary" not in out + err
    assert "printed,[redacted: HF_TOKEN]\n" in out and "error: wrong: [redacted: HF_TOKEN]\n" in err


def test_the_traceback_of_our_own_bugs(secret: str) -> None:
    code = (
        "import os\nfrom components.runtime.steps import step\n"
        "with step('merge'):\n    raise ZeroDivisionError(os.environ['HF_TOKEN'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr and "ZeroDivisionError: [redacted: HF_TOKEN]" in ended.stderr
    assert "canary" not in ended.stdout + ended.stderr


def test_reports(secret: str) -> None:
    page = report.page(f"t {secret}", f"l {secret}", report.paragraph(f"p {secret}"))
    assert page.count("[redacted: HF_TOKEN]") == 4 and "canary" not in page


def test_bugs_are_not_swallowed(secret: str) -> None:
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError
