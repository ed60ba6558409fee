"""S3 through boto3, set up from exactly the variables of an OpenShift AI connection.

``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_S3_ENDPOINT``, ``AWS_DEFAULT_REGION`` and ``AWS_S3_BUCKET``; a
custom CA through boto3's own ``AWS_CA_BUNDLE``. Addresses are path style, which every S3 server understands.
"""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    EndpointConnectionError,
    HTTPClientError,
    SSLError,
)

from components.config import CONNECTION_VARIABLES
from components.errors import Tune16Error

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_MEBIBYTE = 1024 * 1024
_TRANSFER = TransferConfig(multipart_threshold=16 * _MEBIBYTE, multipart_chunksize=16 * _MEBIBYTE, max_concurrency=4)

_REMEDIES = {
    "NoSuchBucket": "there is no such bucket. Create it, or correct AWS_S3_BUCKET.",
    "NoSuchKey": "there is no such object. Check the address.",
    "404": "there is no such object. Check the address.",
    "AccessDenied": "access is denied. Ask for read and write rights on this bucket.",
    "403": "access is denied. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and the rights on this bucket.",
    "InvalidAccessKeyId": "the server does not know this access key. Check AWS_ACCESS_KEY_ID in the connection.",
    "SignatureDoesNotMatch": "the secret key is wrong. Check AWS_SECRET_ACCESS_KEY in the connection.",
    "RequestTimeTooSkewed": "this machine's clock is off by more than the server allows. Set it right.",
    "SlowDown": "the server asks to slow down. Try again later.",
    "NotImplemented": "the server does not know this kind of request; it needs a newer S3 server.",
}


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing: its key, size in bytes, ETag, and when it was written, in seconds since 1970."""

    key: str
    size: int
    etag: str
    modified: float


def client() -> "S3Client":
    """A client for the connection in the environment.

    Raises:
        Tune16Error: the environment lacks a part of it.
    """
    missing = [name for name in CONNECTION_VARIABLES[:3] if not os.environ.get(name)]
    if missing:
        raise Tune16Error(
            f"S3 connection: {', '.join(missing)} not set. Name a connection's Secret in cluster_connection, or "
            f"export {', '.join(CONNECTION_VARIABLES)}."
        )
    return _client(*(os.environ.get(name, "") for name in CONNECTION_VARIABLES[:4]))


@lru_cache(maxsize=1)
def _client(access_key: str, secret_key: str, endpoint: str, region: str) -> "S3Client":
    try:
        return boto3.client(
            "s3",
            endpoint_url=endpoint if "://" in endpoint else f"https://{endpoint}",
            region_name=region or "us-east-1",
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"mode": "standard", "max_attempts": 4},
                connect_timeout=10,
                read_timeout=60,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise Tune16Error(f"S3 connection: {error}. Check AWS_S3_ENDPOINT and AWS_CA_BUNDLE.") from None


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """These variables for a while, as a step has them from its Secrets; what was there before comes back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def default_bucket() -> str:
    """The connection's own bucket.

    Raises:
        Tune16Error: it names none.
    """
    bucket = os.environ.get("AWS_S3_BUCKET")
    if not bucket:
        raise Tune16Error("S3 connection: AWS_S3_BUCKET is not set. Add the bucket to the connection.")
    return bucket


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn boto's errors into messages that name the address and the remedy."""
    endpoint = os.environ.get("AWS_S3_ENDPOINT", "")
    try:
        yield
    except ClientError as error:
        code = error.response["Error"].get("Code", "")
        remedy = _REMEDIES.get(code, f"{code}: {error.response['Error'].get('Message', '')}")
        raise Tune16Error(f"{address} at {endpoint}: {remedy}") from None
    except S3UploadFailedError as error:
        raise Tune16Error(f"{address} at {endpoint}: {error}") from None
    except SSLError as error:
        raise Tune16Error(
            f"{endpoint}: its certificate is not trusted ({error}). Set AWS_CA_BUNDLE to your CA's file."
        ) from None
    except (EndpointConnectionError, ConnectionError, HTTPClientError) as error:
        raise Tune16Error(f"{endpoint}: cannot be reached ({error}). Check AWS_S3_ENDPOINT and the network.") from None


def list_objects(bucket: str, prefix: str) -> list[StoredObject]:
    """All objects whose key starts with `prefix`, sorted by key."""
    objects = []
    with explained(f"s3://{bucket}/{prefix}"):
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            objects += [
                StoredObject(found["Key"], found["Size"], found["ETag"], found["LastModified"].timestamp())
                for found in page.get("Contents", [])
            ]
    return sorted(objects, key=lambda stored: stored.key)


def read(bucket: str, key: str) -> bytes | None:
    """The content of a small object, or None where there is no such object."""
    found = read_aged(bucket, key)
    return found[0] if found else None


def read_aged(bucket: str, key: str) -> tuple[bytes, float] | None:
    """The content of a small object and its age in seconds by the server's own clock; None where there is none."""
    with explained(f"s3://{bucket}/{key}"):
        try:
            answer = client().get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"].get("Code") in {"NoSuchKey", "404"}:
                return None
            raise
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return answer["Body"].read(), (now - answer["LastModified"]).total_seconds()


def create(bucket: str, key: str, content: bytes) -> bool:
    """Write an object that must not exist yet (``If-None-Match: *``); False if another writer was first."""
    with explained(f"s3://{bucket}/{key}"):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in {409, 412}:
                return False
            raise
    return True


def write(bucket: str, key: str, content: bytes) -> None:
    """Write a small object, over what may be there."""
    with explained(f"s3://{bucket}/{key}"):
        client().put_object(Bucket=bucket, Key=key, Body=content)


def upload(path: Path, bucket: str, key: str, advance: Callable[[int], None] | None = None) -> None:
    """Upload one file, in parts where it is large; `advance` is told the bytes that have gone."""
    with explained(f"s3://{bucket}/{key}"):
        client().upload_file(str(path), bucket, key, Config=_TRANSFER, Callback=advance)


def upload_folder(folder: Path, bucket: str, prefix: str) -> None:
    """Upload every file below `folder`, under `prefix`."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        upload(path, bucket, f"{prefix}/{path.relative_to(folder)}")


def download(bucket: str, key: str, path: Path) -> None:
    """Download one object to `path`, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained(f"s3://{bucket}/{key}"):
        client().download_file(bucket, key, str(path), Config=_TRANSFER)


def delete(bucket: str, key: str) -> None:
    """Delete one object; one that is not there counts as deleted."""
    with explained(f"s3://{bucket}/{key}"):
        client().delete_object(Bucket=bucket, Key=key)


def abort_uploads(bucket: str, prefix: str, before: datetime) -> int:
    """Abort the multipart uploads under `prefix` that began before `before`; returns their number."""
    aborted = 0
    with explained(f"s3://{bucket}/{prefix}"):
        pages = client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        for upload_part in [found for page in pages for found in page.get("Uploads", [])]:
            if upload_part["Initiated"] < before:
                client().abort_multipart_upload(Bucket=bucket, Key=upload_part["Key"], UploadId=upload_part["UploadId"])
                aborted += 1
    return aborted


def check_writable(bucket: str, prefix: str) -> None:
    """Write and delete a small object under `prefix`.

    Raises:
        Tune16Error: the storage cannot be reached or written; the message says what to do.
    """
    key = f"{prefix}/.tune16-write-probe-{uuid.uuid4().hex}"
    if not create(bucket, key, b"probe"):
        raise Tune16Error(f"s3://{bucket}/{key}: exists already, though its name is random. Check the server.")
    delete(bucket, key)
