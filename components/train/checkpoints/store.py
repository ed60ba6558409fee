"""Checkpoints of a training run: each complete or absent, and found again when the same run is restarted.

    <folder>/<run key>/step-00000120/                           state.safetensors, state.json,
                                                                and checkpoint.json: their sizes and SHA-256
    s3://bucket/<prefix>/checkpoints/<run key>/step-00000120/   the same, checkpoint.json last

The run key is a hash of everything that decides the result, so that a run never continues from another one's state. A
pipeline step gets no warning before it is killed; what is written here every few minutes is all that will be left.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from components.runtime.errors import Tune16Error
from components.runtime.lines import CHECKPOINT, Line
from components.runtime.outputs import new_folder
from components.runtime.steps import say
from components.storage import s3
from components.storage.lease import Lease, TakenOverError, held, locked
from components.train.checkpoints.record import RECORD, DamagedError, check, name_of, step_of, sync, write_record

FOLDER_VARIABLE = "TUNE16_CHECKPOINTS"  # where checkpoints are kept on a disk that outlives the step: a mounted PVC
_LOCK, _FETCH_LOCK = ".lock", ".fetch"
_KEY = re.compile(r"[0-9a-f]{16}")  # of a run
_OF_RUN = re.compile(rf"{_KEY.pattern}/(step-\d+|lease)/[^/]+")  # an object's key, below the folder of all runs
_NUM_KEPT = 2  # the second newest stands in where the newest is found damaged
_STALE_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Place:
    """Where the checkpoints of all runs are kept: a folder, and a prefix in the connection's bucket (empty: none)."""

    folder: Path
    prefix: str = ""

    @classmethod
    def of(cls, output: Path, path: str) -> "Place":
        """Beside the output or on the disk that :data:`FOLDER_VARIABLE` names, and by the prefix of the model's path.

        Args:
            output: folder of the adapter.
            path: ``prefix/model-name`` in the connection's bucket, or empty.
        """
        own = os.environ.get(FOLDER_VARIABLE)
        return cls(Path(own) if own else output.with_name(f".{output.name}.checkpoints"), path.rpartition("/")[0])


class Checkpoints:
    """The checkpoints of one run.

    They are written and copied to S3 by threads in the background. Errors there are reported but do not end the
    run, which is more valuable than its checkpoint.

    Args:
        made_of: everything that decides the result; its hash is the run key.
        place: where they are kept.
    """

    def __init__(self, made_of: dict[str, Any], place: Place) -> None:
        self._made_of = made_of
        self.key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = place.folder / self.key
        self.prefix = f"{place.prefix}/checkpoints/{self.key}" if place.prefix else ""
        self._lease: Lease | None = None
        self._writer: ThreadPoolExecutor
        self._uploader: ThreadPoolExecutor
        self._writing: Future[None] | None = None
        self._uploading: Future[None] | None = None
        self._on_its_way = -1  # the step that is being copied to S3

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only process that works on this run; work in the background is finished at the end.

        Raises:
            Tune16Error: another process, which is alive, works on it.
        """
        what = f"train: the run {self.key}, with the same model, data and settings"
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(self.folder / _LOCK, what))
            self._lease = stack.enter_context(held(self.prefix, what) if self.prefix else nullcontext())
            _remove_remains(self.folder)
            self._abort_uploads()
            try:
                with ThreadPoolExecutor(1) as self._uploader, ThreadPoolExecutor(1) as self._writer:
                    yield
            finally:
                if not _steps(self.folder):
                    _remove_run(self.folder)

    @property
    def is_busy(self) -> bool:
        """Whether the last checkpoint is still being written to disk."""
        return self._writing is not None and not self._writing.done()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint, in the background; waits only where the one before is not on disk yet.

        Args:
            step: steps that have been done.
            write: writes the files into a new folder.

        Raises:
            Tune16Error: another process had taken the run over when the one before was to be kept.
        """
        if self._writing:
            self._writing.result()
        self._writing = self._writer.submit(self._write, step, write)

    def wait(self) -> None:
        """Wait until the last checkpoint is kept, in S3 as well."""
        if self._writing:
            self._writing.result()
        if self._uploading:
            self._uploading.result()

    def newest(self, in_s3_only: bool = False) -> Path | None:
        """The newest whole checkpoint, brought to this disk; reports which was used, and which were skipped and why.

        Damaged ones are removed: they would count as newer than those that are still to come.

        Args:
            in_s3_only: take none that lies on this disk alone, since other nodes need it too.
        """
        local, remote = set(_steps(self.folder)), self._remote_steps()
        for step in sorted(local | remote, reverse=True):
            path = None
            if step in local and not in_s3_only:
                path = self._tried(step, "this disk", self._checked, lambda step: _remove_folder(self._path(step)))
            if step in remote and path is None:
                path = self._tried(step, "S3", self.fetch, self._remove_from_s3)
            if path:
                return path
        return None

    def _tried(self, step: int, place: str, take: Callable[[int], Path], remove: Callable[[int], None]) -> Path | None:
        try:
            path = take(step)
        except (DamagedError, Tune16Error) as error:
            say("train", f"skipped the checkpoint of step {step:,} on {place}: {error}")
            if isinstance(error, DamagedError):
                remove(step)
            return None
        say("train", f"continuing from the checkpoint of step {step:,} on {place}")
        return path

    def fetch(self, step: int) -> Path:
        """The checkpoint of a step, from S3 where this disk has no whole one.

        Raises:
            DamagedError: it is not what was kept.
            Tune16Error: the storage cannot be read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        with locked(self.folder / _FETCH_LOCK):
            with suppress(DamagedError):
                return self._checked(step)
            with new_folder(path) as partial:
                for stored in s3.list_objects(s3.default_bucket(), f"{self.prefix}/{path.name}/"):
                    s3.download(s3.default_bucket(), stored.key, partial / Path(stored.key).name)
                check(partial, step, self._made_of)
        return path

    def finish(self) -> None:
        """The run has its result: beside the output nothing is kept, elsewhere the last checkpoint is, for a week.

        The result may yet be lost with its pod before the pipeline has stored it.
        """
        self.wait()
        if FOLDER_VARIABLE not in os.environ:
            _remove_run(self.folder)
        if self.prefix:
            _remove_stale(self.prefix.rpartition("/")[0])

    def _abort_uploads(self) -> None:
        """Take away the parts, which no listing shows, of checkpoints that killed processes were uploading.

        Those of the newest one here are resumed.
        """
        if not self.prefix:
            return
        newest = max(_steps(self.folder), default=-1)
        try:
            s3.abort_uploads(
                s3.default_bucket(), f"{self.prefix}/", lambda key: key.partition("/")[0] != name_of(newest)
            )
        except Tune16Error as error:
            say("train", f"unfinished uploads of checkpoints were not removed: {error}")

    def _check_lease(self) -> None:
        try:
            if self._lease:
                self._lease.check()
        except TakenOverError:
            raise
        except Tune16Error as error:
            say("train", f"the storage does not answer, so the checkpoint may stay on this disk: {error}")

    def _write(self, step: int, write: Callable[[Path], None]) -> None:
        self._check_lease()
        path = self._path(step)
        try:
            with new_folder(path) as partial:
                write(partial)
                write_record(partial, step, self._made_of)
            sync(self.folder)
        except (OSError, SafetensorError, DamagedError) as error:
            say("train", f"the checkpoint of step {step:,} could not be kept ({error}); training continues")
            return
        Line("train", f"checkpoint of step {step:,} kept, {_size(path) / 2**20:,.0f} MiB", CHECKPOINT).write()
        self._remove_old()
        if self.prefix:
            self._uploading = self._uploader.submit(self._upload_newest)

    def _upload_newest(self) -> None:
        """Copy the newest checkpoint to S3, checkpoint.json last, unless it is there already."""
        steps = sorted(_steps(self.folder))
        if not self.prefix or not steps:
            return
        self._on_its_way = steps[-1]
        path = self._path(steps[-1])
        try:
            remote = self._remote_steps()
            if steps[-1] in remote:
                return
            for file in sorted(path.iterdir(), key=lambda file: file.name == RECORD):
                s3.upload(file, s3.default_bucket(), f"{self.prefix}/{path.name}/{file.name}")
            for step in sorted(remote)[: -(_NUM_KEPT - 1)]:
                self._remove_from_s3(step)
        except (OSError, Tune16Error) as error:
            say("train", f"the checkpoint of step {steps[-1]:,} is on this disk only: {error}")

    def _path(self, step: int) -> Path:
        return self.folder / name_of(step)

    def _checked(self, step: int) -> Path:
        path = self._path(step)
        check(path, step, self._made_of)
        return path

    def _remote_steps(self) -> set[int]:
        """Steps of which S3 has a complete checkpoint."""
        if not self.prefix:
            return set()
        keys = [stored.key for stored in s3.list_objects(s3.default_bucket(), f"{self.prefix}/step-")]
        return {step_of(Path(key).parent) for key in keys if key.endswith(f"/{RECORD}")}

    def _remove_old(self) -> None:
        """Keep the newest ones, and the one that is on its way to S3."""
        is_uploading = self._uploading is not None and not self._uploading.done()
        for step in sorted(_steps(self.folder))[:-_NUM_KEPT]:
            if step != self._on_its_way or not is_uploading:
                _remove_folder(self._path(step))

    def _remove_from_s3(self, step: int) -> None:
        s3.delete_folder(s3.default_bucket(), f"{self.prefix}/{name_of(step)}/", first=RECORD)


def _steps(folder: Path) -> list[int]:
    return [step_of(path) for path in folder.glob("step-*")]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _remove_folder(path: Path) -> None:
    """Remove a checkpoint: renamed at once, then file by file."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _remove_run(folder: Path) -> None:
    """Remove a run's folder, and the folder of all runs once it is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _remove_remains(folder: Path) -> None:
    """Remove what killed processes left half written or half removed, and old runs beside this one."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)
    for run in folder.parent.iterdir():
        is_run = _KEY.fullmatch(run.name) and (run / _LOCK).is_file()
        if is_run and run != folder and time.time() - run.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(run, ignore_errors=True)


def _remove_stale(prefix: str) -> None:
    """Remove the checkpoints in S3 of runs without a sign of life for a week."""
    try:
        bucket, of_run = s3.default_bucket(), defaultdict[str, list[s3.StoredObject]](list)
        for stored in s3.list_objects(bucket, f"{prefix}/"):
            name = stored.key.removeprefix(f"{prefix}/")
            if _OF_RUN.fullmatch(name):
                of_run[name.partition("/")[0]].append(stored)
        for objects in of_run.values():
            if time.time() - max(stored.modified for stored in objects) > _STALE_SECONDS:
                for stored in objects:
                    s3.delete(bucket, stored.key)
        s3.abort_uploads(bucket, f"{prefix}/", lambda key: bool(_OF_RUN.fullmatch(key)), older_than=_STALE_SECONDS)
    except Tune16Error as error:
        say("train", f"old checkpoints were not removed: {error}")
