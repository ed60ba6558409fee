"""S3: uploads go on where a killed one ended, and each fault is told with its remedy."""

import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.request import proxy_bypass

import pytest
from botocore.exceptions import ClientError

from components.runtime import retry as again
from components.runtime.errors import Tune16Error
from components.runtime.proxies import spare_loopback
from components.runtime.timeouts import limited
from components.storage import retry, s3, transfer
from pipelines.s3server import S3Server
from tests.faults.proxy import Plan, proxy

PART = 5 * 2**20


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transfer, "PART_BYTES", PART)
    path = tmp_path / "large"
    path.write_bytes(random.Random(1).randbytes(2 * PART + 1000))
    return path


@pytest.fixture
def between(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setattr(again, "_FIRST_PAUSE_SECONDS", 0.01)
    with proxy(s3_server.endpoint) as server:
        monkeypatch.setenv("AWS_S3_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server


def _begin(bucket: str, parts: dict[int, bytes]) -> None:
    begun = s3.client().create_multipart_upload(Bucket=bucket, Key="k", Metadata={"sha256": "digest"})["UploadId"]
    for number, content in parts.items():
        s3.client().upload_part(Bucket=bucket, Key="k", UploadId=begun, PartNumber=number, Body=content)


def test_a_killed_upload_is_gone_on_with(
    bucket: str, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = large.read_bytes()
    _begin(bucket, {1: b"of another file" * PART})
    time.sleep(1.1)  # a listing tells whole seconds
    _begin(bucket, {1: content[:PART], 2: bytes(PART)})  # one part has arrived, and one that is damaged
    sent, told = [], []
    upload_part = s3.client().upload_part
    monkeypatch.setattr(
        s3.client(), "upload_part", lambda **given: (sent.append(given["PartNumber"]), upload_part(**given))[1]
    )
    s3.upload(large, bucket, "k", told.append)
    assert sorted(sent) == [2, 3] and sum(told) == len(content)
    assert s3.unfinished_keys(bucket, "") == []
    s3.client().put_object(Bucket=bucket, Key="k", Body=content)
    s3.download(bucket, "k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_what_is_there_whole_is_not_sent_again(bucket: str, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.upload(large, bucket, "k", sha256="digest")
    monkeypatch.setattr(s3.client(), "create_multipart_upload", None)
    told: list[int] = []
    s3.upload(large, bucket, "k", told.append, sha256="digest")
    assert told == [large.stat().st_size]


def test_a_failed_upload_leaves_no_parts(bucket: str, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(transfer, "_md5", lambda _: "0" * 32)
    with pytest.raises(Tune16Error, match="bytes were changed on the way"):
        s3.upload(large, bucket, "k")
    assert s3.unfinished_keys(bucket, "") == [] and s3.list_objects(bucket, "") == []


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut", "flip down"])
def test_a_fault_that_passes_is_not_seen(bucket: str, between: object, fault: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4)
    s3.upload(tmp_path / "file", bucket, "k")
    between.plan = Plan(fault, 1.0, 2)  # type: ignore[attr-defined]
    assert s3.read(bucket, "k") == (tmp_path / "file").read_bytes()
    between.plan = Plan(fault, 1.0, 2)  # type: ignore[attr-defined]
    s3.download(bucket, "k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_refusal_that_breaks_off_is_asked_for_again(bucket: str, between: object) -> None:
    between.plan = Plan("cut", 1.0, 2)  # type: ignore[attr-defined]
    assert s3.read(bucket, "absent") is None


def test_a_conditional_write_whose_answer_was_lost_is_ours(bucket: str, between: object) -> None:
    between.plan = Plan("cut", 1.0, 1)  # type: ignore[attr-defined]
    assert s3.create(bucket, "k", b"mine")
    assert not s3.create(bucket, "k", b"mine"), "of another writer, though it is the same"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "server fails"),
        pytest.param("503", "slow down", marks=pytest.mark.slow),  # whose pauses are the longest
        ("reset", "be reached"),
    ],
)
def test_a_fault_that_stays_is_told(
    bucket: str, between: object, fault: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(again, "_NUM_TRIES", 2)  # each of which is several of the client's own
    between.plan = Plan(fault, 1.0, 1000)  # type: ignore[attr-defined]
    with pytest.raises(Tune16Error, match=said):
        s3.read(bucket, "k")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("NoSuchBucket", 404, "no such bucket. Create it"),
        ("AccessDenied", 403, "Ask for read and write rights"),
        ("RequestTimeTooSkewed", 403, "this machine's clock is off"),
        ("EntityTooLarge", 400, "does not accept objects of this size"),
        ("Strange", 400, "Strange: made up"),
    ],
)
def test_refusals_have_a_remedy(code: str, status: int, said: str) -> None:
    def refuse() -> None:
        answer = {"Error": {"Code": code, "Message": "made up"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]

    with pytest.raises(Tune16Error, match=said):
        retry.attempt("s3://b/k", refuse)


def test_a_server_without_conditional_writes_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put, answer = s3.client().put_object, {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {}}
    answer["ResponseMetadata"] = {"HTTPStatusCode": 501}

    def refuse(**_: object) -> None:
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]

    monkeypatch.setattr(s3.client(), "put_object", refuse)
    with pytest.raises(Tune16Error, match="does not support conditional writes"):
        s3.check_writable(bucket, "p")
    monkeypatch.setattr(s3.client(), "put_object", lambda IfNoneMatch="", **given: put(**given))  # noqa: N803
    with pytest.raises(Tune16Error, match="was overwritten in spite of If-None-Match"):
        s3.check_writable(bucket, "p")


def test_a_missing_ca_file_is_told(bucket: str, between: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_S3_ENDPOINT", f"https://127.0.0.1:{between.server_port}")  # type: ignore[attr-defined]
    monkeypatch.setenv("AWS_CA_BUNDLE", "/absent/ca.pem")
    with pytest.raises(Tune16Error, match="/absent/ca.pem, which AWS_CA_BUNDLE names, is not a file"):
        s3.read(bucket, "k")


# What stands in the environment.


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("AWS_SECRET_ACCESS_KEY", "secret\n", "AWS_SECRET_ACCESS_KEY contains a line break or a space"),
        ("AWS_ACCESS_KEY_ID", " key", "AWS_ACCESS_KEY_ID contains a line break or a space"),
        ("AWS_S3_ENDPOINT", "http://127.0.0.1:1 ", "AWS_S3_ENDPOINT contains a line break or a space"),
        ("AWS_S3_ENDPOINT", "http://127.0.0.1:1/tune16", "has '/tune16' after the server's address"),
        ("AWS_S3_ENDPOINT", "https://tune16.s3.example.com", "begins with the bucket's name"),
        ("AWS_S3_ENDPOINT", "https://[your-endpoint]", "AWS_S3_ENDPOINT is not an address"),
        ("AWS_S3_BUCKET", "s3://tune16", "AWS_S3_BUCKET is 's3://tune16'; a bucket's bare name is needed"),
        ("AWS_S3_BUCKET", "tune16/folder", "a bucket's bare name is needed"),
        ("AWS_PROFILE", "nobody's", 'AWS_PROFILE is "nobody\'s", and there is no such profile. Unset it'),
    ],
)
def test_a_variable_that_cannot_be_meant_is_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    s3._client.cache_clear()
    monkeypatch.setenv(name, value)
    with pytest.raises(Tune16Error, match="S3 connection: ") as error:
        s3.check_writable("tune16", "prefix")
    assert told in str(error.value) and "secret" not in str(error.value).removeprefix("S3 connection: AWS_SECRET")
    s3._client.cache_clear()


@pytest.mark.parametrize(
    ("name", "endpoint"),
    [
        ("minio", "http://minio.minio.svc:9000"),
        ("storage", "https://storage.googleapis.com"),
        ("models", "https://project.supabase.co/storage/v1/s3"),
    ],
)
def test_an_address_that_only_resembles_a_bucket_is_taken(
    name: str, endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_S3_BUCKET", name)
    monkeypatch.setenv("AWS_S3_ENDPOINT", endpoint)
    assert s3.client().meta.endpoint_url == endpoint
    s3._client.cache_clear()


class _Server(BaseHTTPRequestHandler):
    """A small S3: objects by path, kept as they come. It knows no multipart uploads and no checksums in trailers."""

    protocol_version = "HTTP/1.1"
    store: ClassVar[dict[str, bytes]] = {}
    seen: ClassVar[list[dict[str, str]]] = []
    refusal: ClassVar[str] = ""  # of questions about parts

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append(dict(self.headers))
        if self.headers.get("If-None-Match") == "*" and self.path in self.store:
            self._send(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        self.store[self.path] = body
        self._send(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def do_DELETE(self) -> None:
        self.store.pop(self.path, None)
        self._send(204)

    def do_GET(self) -> None:
        if self.refusal and "uploads" in self.path:
            self._send(403, f"<Error><Code>{self.refusal}</Code></Error>".encode())
        else:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_POST = do_GET  # noqa: N815

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def small(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Server]]:
    handler: type[_Server] = type("Handler", (_Server,), {"store": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_S3_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def test_keys_that_expire_come_with_their_token_and_no_checksum_is_sent_unasked(
    small: type[_Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-this-session")
    s3.check_writable("tune16", "prefix")
    assert small.seen and not small.store
    for headers in small.seen:
        assert headers["X-Amz-Security-Token"] == "of-this-session"
        assert "aws-chunked" not in headers.get("Content-Encoding", "") and "X-Amz-Trailer" not in headers
    assert s3.list_objects("tune16", "prefix/") == []


def test_a_server_that_never_answers_costs_what_the_command_allows(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, limited(0.05):
        monkeypatch.setenv("AWS_S3_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Tune16Error, match="Read timeout on endpoint"):
            s3.list_objects(bucket, "prefix/")


def test_a_right_that_publishing_needs_is_missed_before_the_run(
    small: type[_Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "refusal", "AccessDenied")
    with pytest.raises(Tune16Error, match=r"publishing needs the permission s3:\w+"):
        s3.check_writable("tune16", "prefix")


def test_loopback_never_goes_through_a_proxy(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    spare_loopback()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "*"
    monkeypatch.setenv("NO_PROXY", "example.com")
    monkeypatch.delenv("no_proxy")
    spare_loopback()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "example.com,localhost,127.0.0.1,::1"
    assert proxy_bypass("example.com") and proxy_bypass("127.0.0.1") and not proxy_bypass("example.org")
    spare_loopback()
    assert os.environ["NO_PROXY"].count("localhost") == 1
    s3._client.cache_clear()
    s3.write(bucket, "k", b"x")
    assert s3.read(bucket, "k") == b"x"
    s3._client.cache_clear()


def test_the_storage_is_probed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.check_writable(bucket, "prefix/model")
    assert s3.list_objects(bucket, "") == []
    with pytest.raises(Tune16Error, match="there is no such bucket. Create it, or correct AWS_S3_BUCKET"):
        s3.check_writable("no-such-bucket", "prefix/model")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Tune16Error, match="the secret key is wrong. Check AWS_SECRET_ACCESS_KEY"):
        s3.check_writable(bucket, "prefix/model")
    monkeypatch.setenv("AWS_S3_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Tune16Error, match="cannot be reached"):
        s3.check_writable(bucket, "prefix/model")
    monkeypatch.delenv("AWS_S3_ENDPOINT")
    with pytest.raises(Tune16Error, match="AWS_S3_ENDPOINT not set"):
        s3.check_writable(bucket, "prefix/model")
