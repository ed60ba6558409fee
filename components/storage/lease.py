"""Leases in S3, and locks on a disk: one process at a time holds one, and a dead holder loses it soon.

    <prefix>/lease/000007.json     made by a conditional write, renewed by its holder alone; the highest number counts

A holder that has not renewed its lease for :data:`EXPIRES_SECONDS` is dead. The server's clock gives the lease's age;
a process on this very machine is looked up at once. A new holder makes the next number, so that two can never win; the
previous one sees that number and stops (a fencing token, as in Chubby, https://research.google/pubs/pub27897).
"""

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from components.runtime.errors import Tune16Error
from components.storage import s3

RENEW_SECONDS = 10.0
EXPIRES_SECONDS = 40.0
_LOOK_SECONDS = 1.0
_NAME = re.compile(r"\d{6,}\.json")


class TakenOverError(Tune16Error):
    """Another process holds the lease now."""


class Lease:
    """One lease that is held: its object's key, and whether it still counts."""

    def __init__(self, bucket: str, prefix: str, number: int, what: str) -> None:
        self._bucket, self._prefix, self._number, self._what = bucket, prefix, number, what
        self._renewed = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that this process still holds the lease; call it before anything that only the holder may do.

        Raises:
            TakenOverError: another process has taken over.
            Tune16Error: the storage does not answer.
        """
        if time.monotonic() - self._renewed > EXPIRES_SECONDS:  # if no other has taken over, it counts again
            self._renew()
        newest = _newest(self._bucket, self._prefix)
        if newest != self._number:
            who = (_read(self._bucket, self._prefix, newest) or ({}, 0.0))[0].get("holder", "another run")
            raise TakenOverError(
                f"{self._what}: {who} has taken over, since this process did not renew its lease in time."
            )

    def release(self) -> None:
        """Release it for the next holder at once."""
        self._ended.set()
        self._thread.join()
        with suppress(Tune16Error):
            self._write(released=True)

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with suppress(Tune16Error):
                self._renew()

    def _renew(self) -> None:
        self._write()
        self._renewed = time.monotonic()

    def _write(self, released: bool = False) -> None:
        s3.write(self._bucket, _key(self._prefix, self._number), _content(released))


@contextmanager
def held(prefix: str, what: str) -> Iterator[Lease]:
    """Hold the lease of `prefix` in the connection's bucket.

    Args:
        prefix: below which its objects lie, in ``lease/``.
        what: the work that the lease protects; begins the messages.

    Raises:
        Tune16Error: another process, which is alive, holds it; the message says which.
    """
    bucket = s3.default_bucket()
    lease = Lease(bucket, prefix, _take(bucket, prefix, what), what)
    try:
        yield lease
    finally:
        lease.release()


@contextmanager
def locked(path: Path, what: str = "") -> Iterator[None]:
    """Hold a file's lock, which the system takes back from a process that dies.

    Args:
        path: the file, which is made.
        what: the protected work; begins the refusal. Without it, a lock that another process holds is waited for.

    Raises:
        Tune16Error: another process holds it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if what else 0))
        except BlockingIOError:
            raise Tune16Error(f"{what}: another process on this disk is working on it. Wait, or stop it.") from None
        yield


def _take(bucket: str, prefix: str, what: str) -> int:
    """Make the next number once the holder of the newest one is gone; returns it."""
    newest = _newest(bucket, prefix)
    if newest:
        _wait_for_end(bucket, prefix, newest, what)
    number = newest + 1
    if not s3.claim(bucket, _key(prefix, number), _content()) or _newest(bucket, prefix) != number:
        raise Tune16Error(f"{what}: another run started it at the same moment.")
    for earlier in _numbers(bucket, prefix):
        if earlier < number:
            s3.delete(bucket, _key(prefix, earlier))
    return number


def _wait_for_end(bucket: str, prefix: str, number: int, what: str) -> None:
    """Return when the lease's holder has released it or died.

    Raises:
        Tune16Error: the holder is alive.
    """
    started, first_sign = time.monotonic(), None
    while found := _read(bucket, prefix, number):
        content, age = found
        if content["released"] or age > EXPIRES_SECONDS or _is_dead(content["process"]):
            return
        first_sign = first_sign or content["sign"]
        if content["sign"] != first_sign or _is_here(content["process"]):
            raise Tune16Error(f"{what}: {content['holder']} is working on it. Wait until it ends, or stop it.")
        if time.monotonic() - started > 2 * EXPIRES_SECONDS:
            return  # the server's clock stands still, but by ours the lease has expired
        time.sleep(_LOOK_SECONDS)


def _newest(bucket: str, prefix: str) -> int:
    return max(_numbers(bucket, prefix), default=0)


def _numbers(bucket: str, prefix: str) -> list[int]:
    """The numbers of all leases of `prefix`; other objects there are ignored."""
    names = [PurePosixPath(stored.key).name for stored in s3.list_objects(bucket, f"{prefix}/lease/")]
    return [int(name.removesuffix(".json")) for name in names if _NAME.fullmatch(name)]


def _read(bucket: str, prefix: str, number: int) -> tuple[dict[str, Any], float] | None:
    """A lease's content and its age in seconds."""
    found = s3.read_aged(bucket, _key(prefix, number))
    return (json.loads(found[0]), found[1]) if found else None


def _key(prefix: str, number: int) -> str:
    return f"{prefix}/lease/{number:06d}.json"


def own_name() -> str:
    """The name of this process in the messages of others: its pod, or its number and machine."""
    return os.environ.get("KFP_POD_NAME") or f"process {os.getpid()} on {os.uname().nodename}"


def _content(released: bool = False) -> bytes:
    content = {"holder": own_name(), "process": _identity(os.getpid()), "sign": time.time_ns(), "released": released}
    return json.dumps(content).encode()


def _identity(pid: int) -> list[str]:
    """What identifies a process: the machine's boot, the container, the pid and when it started."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115  (no path of this file system)
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return [boot, space, str(pid), started]


def _is_here(process: list[str]) -> bool:
    """Whether this is a living process of this very machine and container."""
    try:
        return _identity(int(process[2])) == process
    except OSError:
        return False


def _is_dead(process: list[str]) -> bool:
    """Whether this was a process of this very machine and container, and has ended."""
    return process[:2] == _identity(os.getpid())[:2] and not _is_here(process)
