"""S3: uploads go on where a killed one ended, and each fault is told with its remedy."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from components import multipart, s3, s3errors
from components.errors import Tune16Error
from pipelines.s3server import S3Server
from tests.faults.proxy import Plan, proxy

PART = 5 * 2**20


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(multipart, "PART_BYTES", PART)
    path = tmp_path / "large"
    path.write_bytes(random.Random(1).randbytes(2 * PART + 1000))
    return path


@pytest.fixture
def between(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setattr(s3errors, "_FIRST_PAUSE_SECONDS", 0.01)
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
    monkeypatch.setattr(s3errors, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(multipart, "_md5", lambda _: "0" * 32)
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
def test_a_fault_that_stays_is_told(bucket: str, between: object, fault: str, said: str) -> None:
    between.plan = Plan(fault, 1.0, 1000)  # type: ignore[attr-defined]
    with pytest.raises(Tune16Error, match=said):
        s3.read(bucket, "k")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("NoSuchBucket", 404, "no such bucket. Create it"),
        ("AccessDenied", 403, "Ask for read and write rights"),
        ("RequestTimeTooSkewed", 403, "this machine's clock is off"),
        ("EntityTooLarge", 400, "takes no objects of this size"),
        ("Strange", 400, "Strange: made up"),
    ],
)
def test_refusals_have_a_remedy(code: str, status: int, said: str) -> None:
    def refuse() -> None:
        answer = {"Error": {"Code": code, "Message": "made up"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]

    with pytest.raises(Tune16Error, match=said):
        s3errors.attempt("s3://b/k", refuse)


def test_a_server_without_conditional_writes_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put, answer = s3.client().put_object, {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {}}
    answer["ResponseMetadata"] = {"HTTPStatusCode": 501}

    def refuse(**_: object) -> None:
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]

    monkeypatch.setattr(s3.client(), "put_object", refuse)
    with pytest.raises(Tune16Error, match="has no conditional writes"):
        s3.check_writable(bucket, "p")
    monkeypatch.setattr(s3.client(), "put_object", lambda IfNoneMatch="", **given: put(**given))  # noqa: N803
    with pytest.raises(Tune16Error, match="was overwritten by a write that was to do so in no case"):
        s3.check_writable(bucket, "p")


def test_a_missing_ca_file_is_told(bucket: str, between: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_S3_ENDPOINT", f"https://127.0.0.1:{between.server_port}")  # type: ignore[attr-defined]
    monkeypatch.setenv("AWS_CA_BUNDLE", "/absent/ca.pem")
    with pytest.raises(Tune16Error, match="/absent/ca.pem, which AWS_CA_BUNDLE names, is no file"):
        s3.read(bucket, "k")
