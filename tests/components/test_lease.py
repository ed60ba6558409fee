"""Leases: one holder at a time; the dead hold none; who was taken for dead notices."""

import json
import os
import subprocess
import sys
import threading

import pytest

from components.runtime.errors import Tune16Error
from components.storage import lease, s3

PREFIX = "somewhere/run"


def _stored(bucket: str) -> list[str]:
    return [stored.key for stored in s3.list_objects(bucket, f"{PREFIX}/lease/")]


def _of_elsewhere(bucket: str, number: int = 1) -> None:
    """A lease that another machine holds."""
    content = {"holder": "pod-1", "process": ["other", "machine", "1", "2"], "sign": 1, "released": False}
    s3.write(bucket, f"{PREFIX}/lease/{number:06d}.json", json.dumps(content).encode())


def test_one_holder_at_a_time(bucket: str) -> None:
    with lease.held(PREFIX, "training") as first:
        first.check()
        with (
            pytest.raises(Tune16Error, match=f"training: process {os.getpid()} on .* is working on it"),
            lease.held(PREFIX, "training"),
        ):
            pass
    with lease.held(PREFIX, "training"):
        assert _stored(bucket) == [f"{PREFIX}/lease/000002.json"]


def test_a_killed_process_of_this_machine_holds_nothing(bucket: str) -> None:
    script = f"""
import time
from components.storage import lease
with lease.held({PREFIX!r}, "x"):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(Tune16Error, match="is working on it"), lease.held(PREFIX, "x"):
            pass
        process.kill()
    with lease.held(PREFIX, "x") as taken:
        taken.check()


def test_silence_elsewhere_is_death_and_a_sign_is_life(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRES_SECONDS", 2.0)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.1)
    _of_elsewhere(bucket)
    with lease.held(PREFIX, "x") as held:
        held.check()
        _of_elsewhere(bucket, 3)
        with pytest.raises(Tune16Error, match="x: pod-1 has taken over"):
            held.check()
    renewing = threading.Timer(0.5, lambda: s3.write(bucket, f"{PREFIX}/lease/000003.json", _sign(2)))
    _of_elsewhere(bucket, 3)
    renewing.start()
    with pytest.raises(Tune16Error, match="x: pod-1 is working on it"), lease.held(PREFIX, "x"):
        pass
    renewing.join()


def _sign(number: int) -> bytes:
    content = {"holder": "pod-1", "process": ["other", "machine", "1", "2"], "sign": number, "released": False}
    return json.dumps(content).encode()
