"""What every step reports while it runs: one line for each thing that happened, in a pod and on a terminal."""

import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from components.runtime.cpus import limit_threads
from components.runtime.errors import user_errors
from components.runtime.lines import FINISHED, STARTED, Line
from components.runtime.proxies import spare_loopback

PARENT_VARIABLE = "TUNE16_PARENT"  # the process of a run on this machine; its steps end with it
TERMINATED_EXIT_CODE = 143  # as a shell reports a process that SIGTERM has ended; 0 would be success to a pipeline


@dataclass
class Termination:
    """Whether the process has been asked to end."""

    is_asked: bool = False


# What libraries warn of at each start, about arguments of ours.
_NOISE = (
    r".*gradient_checkpointing.* is deprecated",
    r"Could not find a config file in .* - will assume that the vocabulary was not modified",
)


def say(step: str, text: str) -> None:
    """Print one line of progress, `<step>: <text>`, at once and without secrets."""
    Line(step, text).write()


@contextmanager
def step(name: str) -> Iterator[None]:
    """Run one step: report its start and end, and end it with one message and exit code 2 on a user's mistake.

    SIGTERM ends it with exit code 143, and what it has begun to write is removed. Nothing depends on that: a pod may be
    killed without any warning.
    """
    started = time.monotonic()
    _end_with_parent()
    limit_threads()
    spare_loopback()
    quieten()
    Line(name, "started", STARTED).write()
    with _on_sigterm(_end), user_errors():
        yield
    seconds = time.monotonic() - started
    Line(name, f"finished in {seconds:.1f} s", FINISHED, {"seconds": seconds}).write()


@contextmanager
def deferred_termination() -> Iterator[Termination]:
    """Only record SIGTERM, for work that ends at a point of its own choice."""
    termination = Termination()

    def note(*_: object) -> None:
        termination.is_asked = True

    with _on_sigterm(note):
        yield termination


def quieten() -> None:
    """Silence libraries' warnings about our own choices, in this process."""
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", pattern)


def _end_with_parent() -> None:
    """Die with the process that runs this pipeline: it may be killed alone, and its steps would run on."""
    if PARENT_VARIABLE in os.environ:
        parent = os.pidfd_open(int(os.environ[PARENT_VARIABLE]))

        def watch() -> None:
            select.select([parent], [], [])  # readable once the process has ended
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()


def _end(*_: object) -> None:
    raise SystemExit(TERMINATED_EXIT_CODE)


@contextmanager
def _on_sigterm(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
