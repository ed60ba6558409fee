"""S3 through boto3, set up from exactly the variables of an OpenShift AI connection.

``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_S3_ENDPOINT``, ``AWS_DEFAULT_REGION`` and ``AWS_S3_BUCKET``, and
``AWS_SESSION_TOKEN`` of keys that expire; a custom CA through boto3's own ``AWS_CA_BUNDLE``. Addresses are path style,
which every S3 server understands.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ProfileNotFound
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import S3CopyFailedError
from urllib3.exceptions import HTTPError

from components.config import CONNECTION_VARIABLES, SESSION_TOKEN
from components.runtime.errors import Tune16Error
from components.runtime.timeouts import at_most
from components.storage import transfer
from components.storage.retry import attempt, code_of, status_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_SETTLED_SECONDS = 0.5  # a small object is written in hundredths
_TRANSFER = TransferConfig(max_concurrency=4)


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
            f"S3 connection: {', '.join(missing)} not set. Name a connection's Secret in with_connection_secret, or "
            f"export {', '.join(CONNECTION_VARIABLES)}."
        )
    _check_variables()
    if (bundle := os.environ.get("AWS_CA_BUNDLE")) and not Path(bundle).exists():
        raise Tune16Error(f"S3 connection: {bundle}, which AWS_CA_BUNDLE names, is not a file. Mount your CA there.")
    variables = (*CONNECTION_VARIABLES[:4], SESSION_TOKEN)
    return _client(*(os.environ.get(name, "") for name in variables), at_most(10), at_most(60))


def _check_variables() -> None:
    """Refuse values that cannot be right; the values themselves may be secrets.

    Raises:
        Tune16Error: names the variable, and what is wrong with it.
    """
    for name in (*CONNECTION_VARIABLES, SESSION_TOKEN):
        value = os.environ.get(name, "")
        if any(character.isspace() for character in value):
            raise Tune16Error(
                f"S3 connection: {name} contains a line break or a space. Write the Secret again without it (`echo` "
                "adds a line break, `printf` and --from-literal do not)."
            )
    bucket, endpoint = os.environ.get("AWS_S3_BUCKET", ""), os.environ["AWS_S3_ENDPOINT"]
    if "/" in bucket:
        raise Tune16Error(
            f"S3 connection: AWS_S3_BUCKET is {bucket!r}; a bucket's bare name is needed, without s3:// and folders."
        )
    try:
        url = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        host, places = url.hostname or "", [part for part in url.path.split("/") if part]
    except ValueError as error:
        raise Tune16Error(f"S3 connection: AWS_S3_ENDPOINT is not an address ({error}). Correct it.") from None
    is_bucket = bucket in places if bucket and len(places) > 1 else places not in ([], ["s3"])
    if is_bucket or url.query or url.fragment:
        raise Tune16Error(
            f"S3 connection: AWS_S3_ENDPOINT has {url.path!r} after the server's address. Leave it out; the bucket "
            "belongs in AWS_S3_BUCKET."
        )
    if bucket and host.startswith((f"{bucket}.s3.", f"{bucket}.s3-")):
        raise Tune16Error(
            f"S3 connection: AWS_S3_ENDPOINT begins with the bucket's name. Write {host!r} without "
            f"{bucket + '.'!r}; the bucket belongs in AWS_S3_BUCKET."
        )


@lru_cache(maxsize=1)
def _client(
    access_key: str,
    secret_key: str,
    endpoint: str,
    region: str,
    session_token: str,
    connect_seconds: float,
    read_seconds: float,
) -> "S3Client":
    # Some servers keep the checksums that boto adds by itself as a part of the file. Every file has our own SHA-256.
    checksums: Any = {
        name: os.environ.get(f"AWS_{name.upper()}", "when_required").lower()
        for name in ("request_checksum_calculation", "response_checksum_validation")
    }
    try:
        return boto3.client(
            "s3",
            endpoint_url=endpoint if "://" in endpoint else f"https://{endpoint}",
            region_name=region or "us-east-1",
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            aws_session_token=session_token or None,
            config=Config(
                **checksums,
                s3={"addressing_style": "path"},
                retries={"mode": "standard", "max_attempts": 4},
                connect_timeout=connect_seconds,
                read_timeout=read_seconds,
            ),
        )
    except ProfileNotFound:
        raise Tune16Error(
            f"S3 connection: AWS_PROFILE is {os.environ.get('AWS_PROFILE')!r}, and there is no such profile. Unset it: "
            "the connection's own variables are enough."
        ) from None
    except (BotoCoreError, ValueError, OSError) as error:
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


def list_objects(bucket: str, prefix: str) -> list[StoredObject]:
    """All objects whose key starts with `prefix`, sorted by key."""

    def ask() -> list[StoredObject]:
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        try:
            return [
                StoredObject(found["Key"], found["Size"], found["ETag"], found["LastModified"].timestamp())
                for page in pages
                for found in page.get("Contents", [])
            ]
        except ClientError as error:
            if code_of(error) == "NoSuchKey":  # some servers say so of an empty listing
                return []
            raise

    return sorted(attempt(f"s3://{bucket}/{prefix}", ask), key=lambda stored: stored.key)


def read(bucket: str, key: str) -> bytes | None:
    """The content of a small object, or None where there is no such object."""
    found = read_aged(bucket, key)
    return found[0] if found else None


def read_aged(bucket: str, key: str) -> tuple[bytes, float] | None:
    """The content of a small object and its age in seconds by the server's own clock; None where there is none."""

    def ask() -> tuple[bytes, float] | None:
        try:
            answer = client().get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if code_of(error) in {"NoSuchKey", "404"}:
                return None
            raise
        content = answer["Body"].read()
        transfer.check_etag(content, answer)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return content, (now - answer["LastModified"]).total_seconds()

    return attempt(f"s3://{bucket}/{key}", ask)


def create(bucket: str, key: str, content: bytes) -> bool:
    """Write an object that must not exist yet (``If-None-Match: *``); False if another writer was first.

    Where it had to be tried again, an object of this very content is ours: the answer to an earlier try was lost.

    Raises:
        Tune16Error: the storage cannot be written, or does not support conditional writes.
    """
    address = f"s3://{bucket}/{key}"
    num_tries = 0

    def put() -> bool:
        nonlocal num_tries
        num_tries += 1
        try:
            transfer.check_etag(content, client().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*"))
        except ClientError as error:
            num_tries += error.response["ResponseMetadata"].get("RetryAttempts", 0)
            if status_of(error) == 412:
                return False
            if code_of(error) == "NotImplemented" or status_of(error) == 501:
                raise Tune16Error(
                    f"{address}: the server does not support conditional writes (If-None-Match), which keep runs apart "
                    "that publish at the same time. Use a newer S3 server."
                ) from None
            raise
        return True

    return attempt(address, put) or (num_tries > 1 and read(bucket, key) == content)


def claim(bucket: str, key: str, content: bytes) -> bool:
    """Like :func:`create`, for an object of which two processes may want to be the maker at the very same moment.

    Some servers, such as Swift, check first and write later, and report success to both. It belongs to the one
    whose content is there once both writes have ended; so `content` has to be this process's own.
    """
    if not create(bucket, key, content):
        return False
    time.sleep(_SETTLED_SECONDS)
    return read(bucket, key) == content


def write(bucket: str, key: str, content: bytes) -> None:
    """Write a small object, over what may be there."""

    def put() -> None:
        transfer.check_etag(content, client().put_object(Bucket=bucket, Key=key, Body=content))

    attempt(f"s3://{bucket}/{key}", put)


def upload(path: Path, bucket: str, key: str, advance: Callable[[int], None] | None = None, sha256: str = "") -> None:
    """Upload one file, in parts where it is large; parts that an earlier, killed upload has brought there stay.

    Args:
        path: the file.
        bucket: where to.
        key: where to.
        advance: is called with the bytes that have arrived.
        sha256: of the file, if known: kept with the object, and a large one that is there with it is not sent again.
    """
    transfer.send(client(), path, bucket, key, sha256, advance or (lambda _: None))


def upload_folder(folder: Path, bucket: str, prefix: str) -> None:
    """Upload every file below `folder`, under `prefix`."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        upload(path, bucket, f"{prefix}/{path.relative_to(folder)}")


def download(bucket: str, key: str, path: Path) -> None:
    """Download one object to `path`, whose folders are made; where bytes were changed on the way, once more."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def fetch() -> None:
        stored = client().head_object(Bucket=bucket, Key=key)
        client().download_file(bucket, key, str(path), Config=_TRANSFER)
        transfer.check_file(path, stored)

    attempt(f"s3://{bucket}/{key}", fetch)


def copy(source_bucket: str, source_key: str, bucket: str, key: str, sha256: str) -> None:
    """Let the server copy an object, unless it has; the SHA-256 is kept with the copy.

    Raises:
        Tune16Error: the server cannot or may not.
    """
    source: Any = {"Bucket": source_bucket, "Key": source_key}
    extra = {"Metadata": {"sha256": sha256}, "MetadataDirective": "REPLACE"}
    address = f"s3://{bucket}/{key}"

    def act() -> None:
        size = client().head_object(**source)["ContentLength"]
        if not transfer.is_there(client(), bucket, key, size, sha256):
            client().copy(source, bucket, key, ExtraArgs=extra, Config=_TRANSFER)

    try:
        attempt(address, act)
    except (S3CopyFailedError, KeyError) as error:  # of servers that copy parts in another way
        raise Tune16Error(f"{address}: the server could not copy {source_key} ({error}).") from None


def delete(bucket: str, key: str) -> None:
    """Delete one object; one that is not there counts as deleted."""
    attempt(f"s3://{bucket}/{key}", lambda: client().delete_object(Bucket=bucket, Key=key))


def delete_folder(bucket: str, prefix: str, first: str) -> int:
    """Delete all objects under `prefix`, `first` what makes the others count, and parts of what was never finished.

    Args:
        bucket: where.
        prefix: ends in a slash; below it lies only what we have made.
        first: the name below `prefix` that goes before the others.

    Returns:
        The number of objects.
    """
    assert prefix.endswith("/"), prefix
    keys = [stored.key for stored in list_objects(bucket, prefix)]
    for key in sorted(keys, key=lambda key: key != f"{prefix}{first}"):
        delete(bucket, key)
    abort_uploads(bucket, prefix, lambda _: True)
    return len(keys)


def abort_uploads(bucket: str, prefix: str, is_stale: Callable[[str], bool], older_than: float = 0) -> int:
    """Abort multipart uploads that will never be finished.

    Args:
        bucket: where.
        prefix: ends in a slash.
        is_stale: says it of what follows the prefix in a key.
        older_than: seconds that have passed since they were begun.

    Returns:
        Their number.
    """
    before = time.time() - older_than
    stale = [
        found
        for found in _unfinished(bucket, prefix)
        if is_stale(found["Key"].removeprefix(prefix)) and (not older_than or found["Initiated"].timestamp() < before)
    ]
    for found in stale:
        attempt(
            f"s3://{bucket}/{found['Key']}",
            partial(transfer.abort, client(), bucket, found["Key"], found["UploadId"]),
        )
    return len(stale)


def unfinished_keys(bucket: str, prefix: str) -> list[str]:
    """The keys under `prefix` that a multipart upload has begun and not finished."""
    return [found["Key"] for found in _unfinished(bucket, prefix)]


def _unfinished(bucket: str, prefix: str) -> list[Any]:
    def ask() -> list[Any]:
        pages = client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        return [found for page in pages for found in page.get("Uploads", [])]

    return attempt(f"s3://{bucket}/{prefix}", ask)


def check_writable(bucket: str, prefix: str) -> None:
    """Write and delete a small object under `prefix`, and see that a conditional write does not overwrite it.

    Raises:
        Tune16Error: the storage cannot be reached or written; the message says what to do.
    """
    key = f"{prefix}/.tune16-write-probe-{uuid.uuid4().hex}"
    if not create(bucket, key, b"probe"):
        raise Tune16Error(f"s3://{bucket}/{key}: exists already, though its name is random. Check the server.")
    is_overwritten = create(bucket, key, b"other")
    delete(bucket, key)
    if is_overwritten:
        raise Tune16Error(
            f"s3://{bucket}/{key}: was overwritten in spite of If-None-Match, which keeps runs apart that publish at "
            "the same time. Use a newer S3 server."
        )
    _check_rights_on_parts(bucket, f"{prefix}/")


def _check_rights_on_parts(bucket: str, prefix: str) -> None:
    """Check that parts of files may be sent, listed and removed, as publishing does.

    Raises:
        Tune16Error: the server forbids one of these.
    """
    key = f"{prefix}.tune16-parts-probe-{uuid.uuid4().hex}"
    begun = _allowed("s3:PutObject", lambda: client().create_multipart_upload(Bucket=bucket, Key=key))
    upload: dict[str, Any] = {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"]} if begun else {}
    try:
        _allowed(
            "s3:ListBucketMultipartUploads",
            lambda: client().list_multipart_uploads(Bucket=bucket, Prefix=prefix, MaxUploads=1),
        )
        if begun:
            _allowed("s3:ListMultipartUploadParts", lambda: client().list_parts(**upload))
    finally:
        if begun:
            _allowed("s3:AbortMultipartUpload", lambda: transfer.abort(client(), bucket, key, begun["UploadId"]))


def _allowed(right: str, call: Callable[[], Any]) -> Any:
    """The result of `call`; None where it fails with anything but a refusal."""
    try:
        return call()
    except ClientError as error:
        if status_of(error) == 403:
            raise Tune16Error(
                f"S3 connection: publishing needs the permission {right} ({code_of(error)}). Ask for it on this bucket."
            ) from None
    except (BotoCoreError, ResponseParserError, HTTPError, KeyError):
        pass
    return None
