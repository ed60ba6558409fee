"""The fault scripts of S3, small: each is alive and reaches its bar."""

import sys

import pytest

from tests.faults import champion_races, kill_uploads, s3_faults, tampering


def test_killed_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.multipart.PART_BYTES", 16 * 2**20)  # restored after the script has set its own
    monkeypatch.setattr(sys, "argv", ["kill_uploads", "--num", "1"])
    assert kill_uploads.main() == 0


def test_races_for_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["champion_races", "--num", "2"])
    assert champion_races.main() == 0


def test_tampering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.s3._SETTLED_SECONDS", 0.05)
    monkeypatch.setattr(sys, "argv", ["tampering", "--num", "1"])
    assert tampering.main() == 0


@pytest.mark.slow
def test_faults_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("multipart.PART_BYTES", "s3errors._FIRST_PAUSE_SECONDS", "s3._SETTLED_SECONDS", "s3.Config"):
        module, _, attribute = name.partition(".")
        owner = __import__(f"components.{module}", fromlist=["x"])
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))  # restored after the script has set its own
    monkeypatch.setattr(sys, "argv", ["s3_faults", "--num", "7"])
    assert s3_faults.main() == 0
