"""The one exception root for mistakes that a person can mend, and what becomes of it at the door."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from components.redaction import protect_output

USER_ERROR_EXIT_CODE = 2

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Tune16Error(Exception):
    """Something that the user can mend: the message says what was wrong, where, and what to do next."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a :class:`Tune16Error` into one message on stderr and exit code 2; let our own bugs show their traceback.

    A full disk counts as the user's: wherever it strikes, the output folder in the making has been removed by then
    (see :func:`components.outputs.new_folder`) and an earlier output stays whole. Neither message nor traceback shows
    a secret.
    """
    protect_output()
    try:
        yield
    except Tune16Error as error:
        message = str(error)
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = f"The disk is full ({error}). Free some space or use a larger volume, then run the step again."
    else:
        return
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(USER_ERROR_EXIT_CODE)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that no more can be written: an OSError, or a library's error that quotes one."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    return any(f"os error {code}" in str(error) for code in _DISK_FULL)
