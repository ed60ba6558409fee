"""The script runs in a process of its own, which has computed nothing before it forks."""

import os
import subprocess
import sys

import pytest

from tests.faults import full_disk


@pytest.mark.slow
def test_every_fault_meets_every_step_once() -> None:
    ended = subprocess.run(
        [sys.executable, full_disk.__file__, "--num", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
