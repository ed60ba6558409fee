"""Fault scripts reach their bar, a few times each; `make faults` runs all of them in full.

Each has a process of its own, which has computed nothing before it forks. Those whose faults other tests have are
left to `make faults`, and only imported here.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SCRIPTS = {
    "canary": ["--num", "4"],
    "champion_races": ["--num", "2"],
    "full_disk": ["--num", "1"],
    "kill_pipeline": ["--num", "1", "--quantizations", ""],
    "kill_training": ["--num", "3", "--seeds", "1"],
    "kill_uploads": ["--num", "2"],
    "seeded_defects": ["--num", "1"],
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


ELSEWHERE = {  # the same faults, by test file
    "bad_data": "test_data_check.py",
    "damage_checkpoints": "test_checkpoints.py",
    "s3_faults": "test_s3.py",
    "tampering": "test_versions.py",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_script_that_is_left_to_make_faults_finds_what_it_calls(name: str) -> None:
    assert importlib.import_module(f"tests.faults.{name}").main
    assert (FOLDER.parent / "components" / ELSEWHERE[name]).is_file()


def test_every_script_is_run() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py") if "\ndef main()" in path.read_text()}
    listed = (FOLDER.parents[1] / "Makefile").read_text().partition("FAULTS := ")[2].partition("# ")[0]
    assert scripts == {*SCRIPTS, *ELSEWHERE} == set(listed.replace("\\", " ").split())
