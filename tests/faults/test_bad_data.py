"""The script runs in a process of its own, which has computed nothing before it forks."""

import os
import subprocess
import sys

import pytest

from tests.faults import bad_data


@pytest.mark.slow
def test_malformed_files_are_refused_with_their_places() -> None:
    ended = subprocess.run(
        [sys.executable, bad_data.__file__, "--num", "40"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
