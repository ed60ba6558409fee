"""The folder in the bucket that a job on several nodes works in, between the step that began it and its pods.

    <prefix>/<model name>/scratch/tune16-train-<8 hexadecimal digits>/
    config.json                   the settings, and where weights and rows are
    weights/ rows/                unless the storage has them already, as outputs of the steps before
    alive                         renewed by the step every minute
    error-<node>                  what went wrong in a pod
    adapter/                      the result

Without a fresh ``alive`` the pods give up, so that a step that was killed leaves no GPU busy; while the storage cannot
be asked they go on. Errors lie here because pods and their logs may be gone by the time that the step looks. What is
removed lies below a name that only a job of this model has.
"""

import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from components.config import TrainConfig
from components.models.fetching import fetch, pin
from components.models.references import parse
from components.runtime.errors import Tune16Error
from components.runtime.retry import OUTAGE_SECONDS
from components.storage import s3
from components.storage.artifacts import find_artifact

ALIVE_SECONDS = 60.0
_ORPHANED_SECONDS = 2 * OUTAGE_SECONDS  # the step may have had to wait for the storage before it renewed ``alive``
_LEFTOVER_SECONDS = 86400
_ROOT = "scratch"
_JOB = re.compile(r"tune16-train-[0-9a-f]{8}")
_CONFIG, _ALIVE, _ERROR = "config.json", "alive", "error-"


class JobEndedError(Tune16Error):
    """The job's step has ended, or one of its pods failed."""


def new_job() -> str:
    """A name for a job, which is unique."""
    return f"tune16-train-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class Scratch:
    """One job's folder: the bucket and the prefix of its keys."""

    bucket: str
    prefix: str

    @classmethod
    def of_job(cls, job: str, path: str) -> "Scratch":
        """The folder of a job on the model at `path`, in the connection's bucket."""
        return cls(s3.default_bucket(), f"{path}/{_ROOT}/{job}")

    @classmethod
    def parse(cls, address: str) -> "Scratch":
        """The folder with this ``s3://`` address."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        return cls(bucket, prefix)

    @property
    def address(self) -> str:
        """The folder's ``s3://`` address."""
        return f"s3://{self.bucket}/{self.prefix}"

    @property
    def _root(self) -> str:
        """The folder of all jobs on this model."""
        return self.prefix.rpartition("/")[0]

    @property
    def _path(self) -> str:
        """The model's path in the bucket."""
        return self._root.removesuffix(f"/{_ROOT}")

    @contextmanager
    def holding(self, inputs: dict[str, tuple[Path, str]], config: TrainConfig) -> Iterator[None]:
        """The job's inputs in the bucket while it runs; what killed steps have left there goes too.

        Args:
            inputs: ``weights`` and ``rows``: each one's folder and the URI of its artifact, which the pods read where
                it is, if it lies in the same storage.
            config: the settings.
        """
        self._remove_leftovers()
        try:
            self.renew()
            places = {name: self._provide(name, *found) for name, found in inputs.items()}
            content = json.dumps({"config": config.model_dump(), "path": self._path, **places})
            s3.create(self.bucket, f"{self.prefix}/{_CONFIG}", content.encode())
            yield
        finally:
            self._remove(self.prefix)

    def _provide(self, name: str, folder: Path, uri: str) -> str:
        """The address of an input, which is brought into the bucket if the storage does not have it."""
        if artifact := find_artifact(uri, folder):
            return artifact.address
        s3.upload_folder(folder, self.bucket, f"{self.prefix}/{name}")
        return f"{self.address}/{name}"

    def renew(self) -> None:
        """Say that the step is still there."""
        s3.write(self.bucket, f"{self.prefix}/{_ALIVE}", b"")

    def check_alive(self) -> None:
        """See that the step is there, and that no pod has failed: a failed job's pods are started again and again.

        Raises:
            JobEndedError: it is gone, or one has, with that one's message.
            Tune16Error: the storage cannot be asked.
        """
        self.raise_reported()
        found = s3.read_aged(self.bucket, f"{self.prefix}/{_ALIVE}")
        if found is None or found[1] > _ORPHANED_SECONDS:
            raise JobEndedError(f"{self.address}: the step that started this job has ended.")

    def report(self, node: int, error: Tune16Error) -> None:
        """Leave a pod's message for the step, unless it has gone and cleaned up; the first message counts."""
        key = f"{self.prefix}/{_ERROR}{node}"
        s3.create(self.bucket, key, json.dumps({"node": node, "message": str(error)}).encode())
        if s3.read(self.bucket, f"{self.prefix}/{_ALIVE}") is None:
            s3.delete(self.bucket, key)

    def raise_reported(self) -> None:
        """Raise the message that a pod has left, if any has.

        Raises:
            JobEndedError: with that message.
        """
        for stored in s3.list_objects(self.bucket, f"{self.prefix}/{_ERROR}"):
            raise JobEndedError(json.loads(s3.read(self.bucket, stored.key) or b"{}").get("message", stored.key))

    def fetch_inputs(self, folder: Path) -> tuple[Path, Path, TrainConfig, str]:
        """Bring weights and rows below `folder`; returns both, the settings, and the model's path in the bucket."""
        content = json.loads(s3.read(self.bucket, f"{self.prefix}/{_CONFIG}") or b"{}")
        weights = fetch(parse(content["weights"], "model"), folder / "weights", ["*"])
        rows = fetch(parse(content["rows"], "data"), folder / "rows", ["*"])
        return weights, rows, TrainConfig.model_validate(content["config"]), content["path"]

    def put_adapter(self, folder: Path) -> None:
        """Keep the result."""
        s3.upload_folder(folder, self.bucket, f"{self.prefix}/adapter")

    def fetch_adapter(self, folder: Path) -> None:
        """Bring the result into `folder`."""
        fetch(pin(parse(f"{self.address}/adapter", "model")), folder, ["*"])

    def _remove_leftovers(self) -> None:
        """Remove the folders of this model's jobs in which nothing has been written for a day."""
        newest: dict[str, float] = {}
        for stored in s3.list_objects(self.bucket, f"{self._root}/"):
            job, inside, _ = stored.key.removeprefix(f"{self._root}/").partition("/")
            if inside and _JOB.fullmatch(job):
                newest[job] = max(newest.get(job, 0.0), stored.modified)
        for job, modified in newest.items():
            if time.time() - modified > _LEFTOVER_SECONDS:
                self._remove(f"{self._root}/{job}")

    def _remove(self, prefix: str) -> None:
        """Remove a job's folder: ``alive`` first, so that a pod's late message is either seen here or taken back."""
        s3.delete(self.bucket, f"{prefix}/{_ALIVE}")
        s3.delete_folder(self.bucket, f"{prefix}/", first="")
