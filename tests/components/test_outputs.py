import errno
from pathlib import Path

import pytest

from components.config import MergeConfig
from components.errors import Tune16Error, user_errors
from components.outputs import new_folder, read_record, write_record


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
