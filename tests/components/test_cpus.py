"""Threads of a container with fewer processors than its node."""

from pathlib import Path

import pytest

from components.runtime import cpus


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, "2"),
        ({"cpu.max": "50000 100000\n"}, "1"),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1"),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_counts(
    files: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpus, "_GROUP", tmp_path)
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    cpus.limit_threads()
    import os

    assert os.environ.get("OMP_NUM_THREADS") == expected
    assert cpus.num_threads() == int(expected or 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpus.num_threads() == 3
