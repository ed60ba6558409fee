import os
import subprocess
import sys

import pytest

from tests.faults import seeded_defects


@pytest.mark.slow
def test_a_defect_of_each_rule_is_found() -> None:
    ended = subprocess.run(
        [sys.executable, seeded_defects.__file__, "--num", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
