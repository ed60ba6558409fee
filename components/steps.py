"""What every step says of itself while it runs: one line for each thing that happened, in a pod and on a terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from components.cpus import limit_threads
from components.errors import user_errors


def say(step: str, text: str) -> None:
    """Print one progress line, `<step>: <text>`, at once; `tune16 run` shows these lines and hides all others."""
    print(f"{step}: {text}", flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Run one step: say when it starts and ends, and end it with one message and exit code 2 on a user's mistake."""
    started = time.monotonic()
    limit_threads()
    say(name, "started")
    with user_errors():
        yield
    say(name, f"finished in {time.monotonic() - started:.1f} s")
