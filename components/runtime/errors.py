"""The base exception for mistakes that a user can fix, and how a process reports it."""

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from components.runtime.lines import ERROR, JSON, VARIABLE, Line
from components.runtime.redaction import protect_output

USER_ERROR_EXIT_CODE = 2

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", f"os error {errno.ENOMEM}")
_NO_SCRATCH = "No usable temporary directory"  # how the standard library says so
_KILLED = ("DataLoader worker", "process pool was terminated", "terminated abruptly")


class Tune16Error(Exception):
    """Something that the user can fix: the message says what was wrong, where, and what to do next."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a :class:`Tune16Error` into one message on stderr and exit code 2; our own bugs show their traceback.

    A full disk, a folder that may not be written, and a lack of memory count as the user's: wherever they strike, the
    output folder in the making has been removed by then (see :func:`components.runtime.outputs.new_folder`) and an
    earlier output stays whole. Neither message nor traceback shows a secret.
    """
    protect_output()
    try:
        yield
    except Exception as error:
        message = message_of(error)
        if not message:
            raise
    else:
        return
    sys.stdout.flush()
    if os.environ.get(VARIABLE) == JSON:
        Line("", message, ERROR).write()
    else:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(USER_ERROR_EXIT_CODE)


def message_of(error: Exception) -> str:
    """What was wrong and what to do, for faults of the user or the machine; empty for our own."""
    if isinstance(error, Tune16Error):
        return str(error)
    if is_disk_full(error):
        scratch = tempfile.tempdir or "/tmp"  # asked for anew, it would be looked for on the full disk
        return (
            f"The disk is full ({error}). Free space where the output is written and in {scratch}, the folder for "
            "temporary files (TMPDIR chooses another), then run the step again."
        )
    if isinstance(error, OSError) and error.errno in _NO_ACCESS and error.filename:
        return (
            f"{error.filename}: {error.strerror}. Choose a folder that this user may write, or mount the volume with "
            "write access, then run the step again."
        )
    text = str(error)
    if isinstance(error, FileNotFoundError) and _NO_SCRATCH in text:
        return f"{error.strerror}: free space in one of them, or set TMPDIR to a folder that can be written."
    if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM or _has(text, _NO_MEMORY):
        return f"There is not enough memory ({first_line(error)}). Give the step more, then run it again."
    if _has(text, _KILLED):
        return (
            f"A process of this step was killed ({first_line(error)}); the usual reason is a lack of memory. Give the "
            "step more, then run it again."
        )
    return ""


def _has(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text for sign in signs)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type where it says nothing: libraries go on for pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that no more can be written: an OSError, or a library's error that quotes one."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    return any(f"os error {code}" in str(error) for code in _DISK_FULL)
