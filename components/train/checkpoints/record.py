"""A checkpoint's record: the hashes of its files, which are checked before a run continues from it."""

import os
from pathlib import Path
from typing import Any

from components.runtime.outputs import read_json, write_json
from components.storage.files import describe_files, first_difference

RECORD = "checkpoint.json"


class DamagedError(Exception):
    """A checkpoint that cannot be used, and why."""


def write_record(folder: Path, step: int, made_of: dict[str, Any]) -> None:
    """Write the record of the files in a folder, flush all to the disk, and read them back.

    Raises:
        DamagedError: what can be read is not what was written.
    """
    write_json(folder / RECORD, {"step": step, "made_of": made_of, "files": describe_files(folder)})
    sync(folder)
    check(folder, step, made_of)


def check(path: Path, step: int, made_of: dict[str, Any]) -> None:
    """See that a checkpoint is whole and this run's.

    Raises:
        DamagedError: it is not; says why.
    """
    try:
        content = read_json(path / RECORD)
        difference = first_difference(path, content["files"])
        other, its_step = dict(content["made_of"]), int(content["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"its {RECORD} cannot be read ({type(error).__name__})") from None
    if other != made_of:
        names = sorted(name for name in made_of | other if made_of.get(name) != other.get(name))
        raise DamagedError(f"it belongs to another run, with other {', '.join(names)}")
    if its_step != step:
        raise DamagedError(f"it is of step {its_step:,}")
    match difference:
        case name, "missing":
            raise DamagedError(f"its file {name} is missing")
        case name, _:
            raise DamagedError(f"its file {name} is damaged: the SHA-256 differs")


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def sync(folder: Path) -> None:
    """Bring a folder and its files to the disk itself: a node that fails loses what only its memory has."""
    for path in (*folder.glob("*"), folder):
        if path.is_file() or path == folder:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
