"""Retries: one way for S3, HTTP, the cluster's API and the pipeline server.

Who calls says which faults may pass; how long is waited is decided here. By default that is a minute, with growing
pauses; :func:`patience` makes it a quarter of an hour, for work that has taken hours by then.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_fixed, wait_random_exponential

from components.runtime.timeouts import at_most

Answer = TypeVar("Answer")

OUTAGE_SECONDS = 900.0  # that work of hours waits for a service that does not answer
_NUM_TRIES = 5
_SHORT_SECONDS = 60.0  # no new try after that: a server that swallows requests costs a minute each
_FIRST_PAUSE_SECONDS = 0.5  # at most, by chance; doubled from try to try
_LONGEST_PAUSE_SECONDS = 15.0

_patience_seconds = 0.0  # of the whole process: uploads and downloads have threads of their own


@contextmanager
def patience(seconds: float = OUTAGE_SECONDS) -> Iterator[None]:
    """Let this process wait so many seconds for a service that does not answer, instead of five tries."""
    global _patience_seconds
    before, _patience_seconds = _patience_seconds, seconds
    try:
        yield
    finally:
        _patience_seconds = before


def retry(
    call: Callable[[], Answer],
    may_pass: Callable[[BaseException], bool],
    *,
    seconds: float = 0.0,
    outage: float = 0.0,
    pause: float = 0.0,
    before_pause: Callable[[BaseException], object] | None = None,
) -> Answer:
    """Call, and call again after a pause where a fault may pass.

    Args:
        call: may be done again after it has failed.
        may_pass: says of a fault whether it may be gone at the next try.
        seconds: after which there is no new try; 0 is a minute, or what :mod:`components.runtime.timeouts` allows.
        outage: seconds that a service may be away; 0 is five tries within a minute, unless :func:`patience` says more.
        pause: seconds between two tries; 0 is a growing, random pause (full jitter, as AWS recommends).
        before_pause: is called with each fault before a pause.

    Returns:
        What `call` returns.

    Raises:
        Exception: the last fault, or the first one that will not pass.
    """

    def is_enough(state: RetryCallState) -> bool:
        waited = state.seconds_since_start or 0.0
        has_tries = state.attempt_number < _NUM_TRIES and waited <= (seconds or at_most(_SHORT_SECONDS))
        return not (waited < max(outage, _patience_seconds) or (has_tries and not outage))

    def tell(state: RetryCallState) -> None:
        fault = state.outcome.exception() if state.outcome else None
        if before_pause and fault:
            before_pause(fault)

    growing = wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS)
    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        stop=is_enough,
        wait=wait_fixed(pause) if pause else growing,
        before_sleep=tell,
        reraise=True,
    )
    return retrying(call)
