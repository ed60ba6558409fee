"""Every fault script runs and reaches its bar, a few times each; `make faults` runs them in full.

Each has a process of its own, which has computed nothing before it forks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SCRIPTS = {
    "bad_data": ["--num", "40"],
    "canary": ["--num", "4"],
    "champion_races": ["--num", "2"],
    "damage_checkpoints": ["--num", "6"],
    "full_disk": ["--num", "1"],
    "kill_pipeline": ["--num", "1", "--quantizations", ""],
    "kill_training": ["--num", "3", "--seeds", "1"],
    "kill_uploads": ["--num", "2"],
    "s3_faults": ["--num", "7"],
    "seeded_defects": ["--num", "1"],
    "tampering": ["--num", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_reaches_its_bar(name: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *SCRIPTS[name], "--output", tmp_path / "figures.json"],
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]


def test_every_script_is_run() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py") if "\ndef main()" in path.read_text()}
    listed = (FOLDER.parents[1] / "Makefile").read_text().partition("FAULTS := ")[2].partition("# ")[0]
    assert scripts == set(SCRIPTS) == set(listed.replace("\\", " ").split())
