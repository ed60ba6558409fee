"""One file into S3, in parts where it is large; what a killed upload has brought there is not sent again.

Every answer's ETag is compared with the MD5 of what was sent, wherever the server's ETags are MD5s: boto's own
checksums can be turned off, since some servers do not know them.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from components.runtime.errors import Tune16Error
from components.storage.retry import ChangedOnTheWayError, attempt, code_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 16 * 2**20
_MAX_PARTS = 10_000  # of S3
_NUM_THREADS = 4
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')

Advance = Callable[[int], None]


@dataclass(frozen=True)
class _Upload:
    """One file on its way."""

    client: "S3Client"
    path: Path
    bucket: str
    key: str
    metadata: dict[str, str]
    advance: Advance

    @property
    def address(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def place(self) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self.key}

    def abort(self, identity: str) -> None:
        attempt(self.address, lambda: abort(self.client, self.bucket, self.key, identity))


def send(client: "S3Client", path: Path, bucket: str, key: str, sha256: str, advance: Advance) -> None:
    """Upload one file.

    Args:
        client: for the connection.
        path: the file.
        bucket: where to.
        key: where to.
        sha256: of the file, if known: kept with the object, and a large one that is there with it is not sent again.
        advance: is called with the bytes that have arrived, from several threads.

    Raises:
        Tune16Error: the storage does not accept it; parts that are there are removed, as far as it still answers.
    """
    upload = _Upload(client, path, bucket, key, {"sha256": sha256} if sha256 else {}, advance)
    size = path.stat().st_size
    if size <= PART_BYTES:
        _put(upload)
    elif sha256 and attempt(upload.address, lambda: is_there(client, bucket, key, size, sha256)):
        advance(size)
    else:
        _send_parts(upload, size)


def check_etag(content: bytes, answer: Mapping[str, Any]) -> None:
    """Compare a content with the ETag of the answer that came with it.

    Raises:
        ChangedOnTheWayError: it is an MD5, and another one.
    """
    expected = _md5_of(answer)
    if expected and expected != _md5(content):
        raise ChangedOnTheWayError(f"MD5 {_md5(content)} here, {expected} there")


def check_file(path: Path, answer: Mapping[str, Any]) -> None:
    """Compare a downloaded file with what the server says of it: the SHA-256 that was kept with it, or the ETag.

    Raises:
        ChangedOnTheWayError: it is another.
    """
    name, expected = "sha256", answer["Metadata"].get("sha256", "")
    if not expected:
        name, expected = "md5", _md5_of(answer)
    if expected:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()
        if found != expected:
            raise ChangedOnTheWayError(f"{name.upper()} {found} here, {expected} there")


def _md5_of(answer: Mapping[str, Any]) -> str:
    """The MD5 of an object as its ETag; empty where that is something else."""
    found = _MD5.fullmatch(answer.get("ETag", ""))
    is_encrypted = answer.get("SSECustomerAlgorithm") or answer.get("ServerSideEncryption", "").startswith("aws:kms")
    return found[1] if found and not is_encrypted else ""


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def is_there(client: "S3Client", bucket: str, key: str, size: int, sha256: str) -> bool:
    """Whether an object of this size and with this SHA-256 is there already.

    Raises:
        botocore.exceptions.ClientError: the server refuses.
    """
    try:
        found = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if code_of(error) in {"404", "NoSuchKey"}:
            return False
        raise
    return found["ContentLength"] == size and found["Metadata"].get("sha256") == sha256


def _put(upload: _Upload) -> None:
    content = upload.path.read_bytes()

    def put() -> None:
        answer = upload.client.put_object(**upload.place, Body=content, Metadata=upload.metadata)
        check_etag(content, answer)

    attempt(upload.address, put)
    upload.advance(len(content))


def _send_parts(upload: _Upload, size: int) -> None:
    begun = attempt(upload.address, lambda: _begun(upload))
    identity = begun[-1] if begun else attempt(upload.address, lambda: _begin(upload))
    there = attempt(upload.address, lambda: _parts_there(upload, identity)) if begun else {}
    try:
        part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
        numbers = range(1, -(-size // part_bytes) + 1)
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            etags = list(threads.map(lambda number: _send_part(upload, identity, number, part_bytes, there), numbers))
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in zip(numbers, etags, strict=True)]
        attempt(upload.address, lambda: _complete(upload, identity, parts, size))
    except Exception:  # not on a request to end: then the parts stay for the next run, as after a kill
        with suppress(Tune16Error):
            upload.abort(identity)
        raise
    for other in begun[:-1]:
        upload.abort(other)


def _begin(upload: _Upload) -> str:
    return upload.client.create_multipart_upload(**upload.place, Metadata=upload.metadata)["UploadId"]


def _begun(upload: _Upload) -> list[str]:
    """The unfinished uploads of this very key and file, the newest last."""
    pages = upload.client.get_paginator("list_multipart_uploads").paginate(Bucket=upload.bucket, Prefix=upload.key)
    found = [item for page in pages for item in page.get("Uploads", []) if item["Key"] == upload.key]
    return [item["UploadId"] for item in sorted(found, key=lambda item: item["Initiated"])]


def _parts_there(upload: _Upload, identity: str) -> dict[int, tuple[int, str]]:
    """Size in bytes and ETag of each part that has arrived."""
    pages = upload.client.get_paginator("list_parts").paginate(**upload.place, UploadId=identity)
    parts = [part for page in pages for part in page.get("Parts", [])]
    return {part["PartNumber"]: (part["Size"], part["ETag"]) for part in parts}


def _send_part(upload: _Upload, identity: str, number: int, part_bytes: int, there: dict[int, tuple[int, str]]) -> str:
    """Upload one part unless it is there; returns its ETag."""
    with upload.path.open("rb") as file:
        file.seek((number - 1) * part_bytes)
        content = file.read(part_bytes)

    def put() -> str:
        answer = upload.client.upload_part(**upload.place, UploadId=identity, PartNumber=number, Body=content)
        check_etag(content, answer)
        return answer["ETag"]

    size, etag = there.get(number, (0, ""))
    if size != len(content) or etag.strip('"') != _md5(content):
        etag = attempt(upload.address, put)
    upload.advance(len(content))
    return etag


def _complete(upload: _Upload, identity: str, parts: list[Any], size: int) -> None:
    """Make one object of the parts; where the answer to an earlier try was lost, it is there already."""
    try:
        upload.client.complete_multipart_upload(**upload.place, UploadId=identity, MultipartUpload={"Parts": parts})
    except ClientError as error:
        if code_of(error) != "NoSuchUpload" or upload.client.head_object(**upload.place)["ContentLength"] != size:
            raise


def abort(client: "S3Client", bucket: str, key: str, identity: str) -> None:
    """Abort one multipart upload; one that is gone counts as aborted."""
    with suppress(client.exceptions.NoSuchUpload):
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=identity)
