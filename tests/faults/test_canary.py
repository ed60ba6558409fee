import os
import subprocess
import sys

from tests.faults import canary


def test_the_quick_commands_leak_nothing() -> None:
    ended = subprocess.run(
        [sys.executable, canary.__file__, "--num", "4"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
