"""How long one request may take, where a person waits for the answer: `--timeout` of the commands."""

from collections.abc import Iterator
from contextlib import contextmanager

_limit: float | None = None  # of the whole process, as requests are made by threads, too


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """For a while, let no request to S3, to the Hub or to a registry take longer, and try none again after that."""
    global _limit
    before, _limit = _limit, seconds
    try:
        yield
    finally:
        _limit = before


def at_most(seconds: float) -> float:
    """`seconds`, or what is allowed at present if that is less."""
    return seconds if _limit is None else min(seconds, _limit)
