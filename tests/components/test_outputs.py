import errno
import os
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from components.config import MergeConfig
from components.runtime.errors import Tune16Error, user_errors
from components.runtime.outputs import new_folder, read_record, write_record


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with new_folder(target) as folder:
        (folder / "b").write_text("2")
    assert sorted(path.name for path in target.parent.rglob("*")) == ["b", "out"]


def test_a_failure_leaves_the_earlier_output_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "a").read_text() == "1"


def test_an_output_put_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("1")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / "a").read_text() == "1" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_records_name_their_step(tmp_path: Path) -> None:
    with pytest.raises(Tune16Error, match="has no tune16.json"):
        read_record(tmp_path, "merge")
    write_record(tmp_path, "merge", MergeConfig(), model="m")
    assert read_record(tmp_path, "merge")["model"] == "m"
    with pytest.raises(Tune16Error, match="made by the step merge"):
        read_record(tmp_path, "train")


def test_a_full_disk_is_told_and_bugs_are_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert stopped.value.code == 2
    assert "error: The disk is full" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: The disk is full .* Free space .*TMPDIR"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "error: The disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/data/out"), "error: /data/out: Read-only file system. Choose"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/out"),
            "error: /data/out: Permission denied. Choose",
        ),
        (MemoryError(), r"error: There is not enough memory \(MemoryError\). Give the step more"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "error: There is not enough memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "error: A process .* was killed"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            r"error: No usable temporary directory found in \['/tmp'\]: free space",
        ),
    ],
)
def test_what_the_machine_lacks_is_told_in_one_line(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise error
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert re.match(message, told) and told.count("\n") == 1


def test_what_libraries_say_of_memory_and_killed_workers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), user_errors():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "error: There is not enough memory" in capsys.readouterr().err
    with pytest.raises(SystemExit), user_errors(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(os.kill, 0, 0).result()
        pool.submit(signal.raise_signal, signal.SIGKILL).result()
    assert "error: A process of this step was killed" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_a_bug() -> None:
    with pytest.raises(FileNotFoundError), user_errors():
        Path("/nowhere").read_text()
