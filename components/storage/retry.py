"""What can go wrong between this machine and S3: what is tried again, and the messages when that does not help."""

import builtins
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    SSLError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from components.runtime.errors import Tune16Error
from components.runtime.retry import Answer, retry

_NO_BUCKET = "there is no such bucket. Create it, or correct AWS_S3_BUCKET."
_NO_OBJECT = "there is no such object. Check the address."
_BUSY = "the server is overloaded and asks to slow down. Try again later."
_CHANGED = "bytes were changed on the way, repeatedly. Check the network, and proxies between here and the server."
_FAILED = "the server fails repeatedly. Check its log, or try again later."
_SKEWED = "this machine's clock is off by more than the server allows. Correct it."
_REMEDIES = {
    "NoSuchBucket": _NO_BUCKET,
    "NoSuchKey": _NO_OBJECT,
    "404": _NO_OBJECT,
    "AccessDenied": "access is denied. Ask for read and write rights on this bucket.",
    "403": "access is denied. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and the rights on this bucket.",
    "InvalidAccessKeyId": "the server does not know this access key. Check AWS_ACCESS_KEY_ID in the connection.",
    "SignatureDoesNotMatch": "the secret key is wrong. Check AWS_SECRET_ACCESS_KEY in the connection.",
    "RequestTimeTooSkewed": _SKEWED,
    "RequestExpired": _SKEWED,
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "503": _BUSY,
    "500": _FAILED,
    "502": _FAILED,
    "504": _FAILED,
    "InternalError": _FAILED,
    "EntityTooLarge": "the server does not accept objects of this size. Raise its limit, or that of a proxy before it.",
    "413": "the server does not accept requests of this size. Raise its limit, or that of a proxy before it.",
    "NotImplemented": "the server does not know this kind of request; it needs a newer S3 server.",
    "BadDigest": _CHANGED,
    "XAmzContentSHA256Mismatch": _CHANGED,
}
# Refusals that may not recur at the next try; all answers from 500 on count as well, but 501.
_TRANSIENT_CODES = {
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "ConditionalRequestConflict",
    "OperationAborted",
}


class ChangedOnTheWayError(Exception):
    """What arrived is not what was sent."""


_TRANSIENT = (
    ChangedOnTheWayError,
    ConnectionError,
    HTTPClientError,  # time-outs and bodies that break off, too
    IncompleteReadError,
    FlexibleChecksumError,
    ResponseParserError,
    HTTPError,  # botocore reads refusals without catching errors
    Boto3Error,  # a download whose parts broke off too often
    builtins.ConnectionError,
    builtins.TimeoutError,
)


def attempt(address: str, call: Callable[[], Answer]) -> Answer:
    """Do something with S3, again after a pause where a fault may pass; pauses grow and are a matter of chance.

    Args:
        address: what it is about; begins the message.
        call: may be done again after it has failed.

    Raises:
        Tune16Error: it failed for good; says why, and what to do.
    """
    with explained(address):
        return retry(call, _may_pass)


def code_of(error: ClientError) -> str:
    """The server's error code, such as NoSuchKey; the HTTP status where it sends none."""
    return error.response["Error"].get("Code") or str(status_of(error))


def status_of(error: ClientError) -> int:
    """The HTTP status of a refusal."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, ClientError):
        return (status_of(error) >= 500 and status_of(error) != 501) or code_of(error) in _TRANSIENT_CODES
    return isinstance(error, _TRANSIENT) and not isinstance(error, SSLError)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn boto's errors into messages that name the address and the remedy."""
    endpoint = os.environ.get("AWS_S3_ENDPOINT", "")
    try:
        yield
    except ClientError as error:
        answer = f"{code_of(error)}: {error.response['Error'].get('Message', '')}"
        raise Tune16Error(f"{address} at {endpoint}: {_REMEDIES.get(code_of(error), answer)}") from None
    except SSLError as error:
        if "WRONG_VERSION_NUMBER" in str(error):
            raise Tune16Error(
                f"{endpoint}: does not use TLS. Correct AWS_S3_ENDPOINT: http://, or another port."
            ) from None
        raise Tune16Error(
            f"{endpoint}: its certificate is not trusted ({error}). Set AWS_CA_BUNDLE to your CA's file."
        ) from None
    except (ChangedOnTheWayError, FlexibleChecksumError) as error:
        raise Tune16Error(f"{address} at {endpoint}: {_CHANGED} ({error})") from None
    except (IncompleteReadError, ResponseParserError, HTTPError, Boto3Error) as error:
        raise Tune16Error(
            f"{address} at {endpoint}: answers are cut off or not valid ({_line(error)}). Check the network, and "
            "proxies between here and the server."
        ) from None
    except (ConnectionError, HTTPClientError, builtins.ConnectionError, builtins.TimeoutError) as error:
        raise Tune16Error(
            f"{endpoint}: cannot be reached ({_line(error)}). Check AWS_S3_ENDPOINT and the network."
        ) from None
    except BotoCoreError as error:
        raise Tune16Error(f"{address} at {endpoint}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
