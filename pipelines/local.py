"""A pipeline run on this machine: the same pipeline function, its steps as processes, with a local S3 server.

An interrupted run is resumed: kfp's cache knows the complete steps, and their outputs are in the run's folder.
Training resumes from its newest checkpoint, in the run's bucket.
"""

import contextlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from kfp import local

from components.config import CONFIG_OF_STEP, Recipe, form_values
from components.runtime import lines
from components.runtime.build import build
from components.runtime.errors import Tune16Error
from components.runtime.lines import Line
from components.runtime.outputs import EVALUATION, new_folder, read_json, write_json
from components.runtime.redaction import redacted
from components.runtime.steps import PARENT_VARIABLE
from components.storage.lease import locked
from pipelines.finetune import finetune
from pipelines.s3server import S3Server

BUCKET = "tune16"
LOG = "pipeline.log"
REPORT = "report.html"
_STATE = "run.json"  # the run's settings, and whether it has finished
_LOCK = ".lock"

_LINES = "lines.jsonl"  # what the steps have said
_INDENT = "    "  # what kfp puts before the lines of a step


@dataclass
class StepResult:
    """How one step went: seconds it took (None until it has succeeded) and its last message."""

    seconds: float | None = None
    said: str = ""


@dataclass
class LocalRun:
    """What became of a run: its folder, its steps in order, the evaluation and the address of what was published."""

    folder: Path
    steps: dict[str, StepResult] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    address: str = ""
    seconds: float = 0.0

    @property
    def report(self) -> Path:
        """The evaluation report."""
        return self.folder / REPORT


def run_locally(recipe: Recipe, folder: Path, show: Callable[[str, str], None]) -> LocalRun:
    """Run the pipeline here, from the first step that is not complete.

    Args:
        recipe: what to run; with ``setup: demo`` the demo's model and rows are put into the bucket first.
        folder: folder for the log, the steps' outputs and the report: a new one, or an interrupted run's.
        show: called with the step's name and each line that it prints.

    Raises:
        Tune16Error: a step ended with a user error, whose message this carries, or another process works on this run.
    """
    from components.storage import s3

    run = LocalRun(folder)
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    variables = {
        PARENT_VARIABLE: str(os.getpid()),
        lines.VARIABLE: lines.JSON,
        "TQDM_DISABLE": "1",  # no bars that redraw themselves in a log
    }
    with _alone_at(folder), storage(folder / "s3"), s3.environment(variables):
        _recall(run)
        _write_state(folder, recipe, finished=False)
        with (folder / LOG).open("a", encoding="utf-8") as log, (folder / _LINES).open("a", encoding="utf-8") as said:
            listener = _Listener(run, log, said, show)
            with contextlib.redirect_stdout(listener):
                if recipe.setup == "demo":
                    put_demo(folder / "demo")
                _run_pipeline(recipe, folder, listener)
        _collect(run)
        _write_state(folder, recipe, finished=True)
    run.seconds = time.monotonic() - started
    return run


def find_interrupted(runs: Path, recipe: Recipe) -> Path | None:
    """The newest unfinished run of exactly this recipe that no process is working on."""
    wanted = _state(recipe, finished=False)
    for state in sorted(runs.glob(f"*/{_STATE}"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(Tune16Error, ValueError), _alone_at(state.parent):
            if read_json(state) == wanted:
                return state.parent
    return None


def _state(recipe: Recipe, finished: bool) -> dict[str, Any]:
    return {"recipe": recipe.model_dump(mode="json"), "tune16": build(), "finished": finished}


def _write_state(folder: Path, recipe: Recipe, finished: bool) -> None:
    partial = folder / f".{_STATE}"
    write_json(partial, _state(recipe, finished))
    partial.rename(folder / _STATE)


def _alone_at(folder: Path) -> contextlib.AbstractContextManager[None]:
    return locked(folder / _LOCK, f"the run {folder}")


def _recall(run: LocalRun) -> None:
    """Restore the messages from before the interruption: steps that are complete do not print them again."""
    said = run.folder / _LINES
    for text in said.read_text(encoding="utf-8").splitlines() if said.is_file() else []:
        if line := Line.parse(text):
            _keep(run, line)


@contextlib.contextmanager
def storage(folder: Path) -> Iterator[None]:
    """The S3 server that the environment names, else a local one with its data in `folder`."""
    if os.environ.get("AWS_S3_ENDPOINT"):
        yield
        return
    from components.storage import s3

    with S3Server(folder) as server, s3.environment(server.environment(BUCKET)):
        if not any(found["Name"] == BUCKET for found in s3.client().list_buckets()["Buckets"]):
            s3.client().create_bucket(Bucket=BUCKET)
        yield


def put_demo(folder: Path, prefix: str = "demo") -> None:
    """Build the demo's base model and upload it with the demo's rows to the bucket, at `prefix`."""
    from components.storage import s3
    from pipelines.demo.base import build_base
    from pipelines.demo.generate import ORDERS

    if not folder.exists():
        with new_folder(folder) as partial:
            build_base(partial / "model")
            shutil.copyfile(ORDERS, partial / ORDERS.name)
    s3.upload_folder(folder, s3.default_bucket(), prefix)


def _run_pipeline(recipe: Recipe, folder: Path, listener: "_Listener") -> None:
    root = str(folder / "steps")
    local.init(local.SubprocessRunner(use_venv=False), root, raise_on_error=True, enable_caching=True)
    arguments = form_values(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kfp warns of images, limits and secrets, which have no effect here
        try:
            finetune(**arguments)
        except RuntimeError as error:
            if listener.error:
                raise Tune16Error(listener.error) from None
            raise Tune16Error(f"{_plain(str(error))} The full log is in {folder / LOG}.") from None


class _Listener:
    """Stands in for stdout while kfp runs: writes everything to the log and extracts what the steps print.

    Args:
        run: gets what the steps say.
        log: takes all that is printed, for people.
        said: takes what the steps say, for the next process that works on this run.
        show: is told of each line that a step says.
    """

    def __init__(self, run: LocalRun, log: IO[str], said: IO[str], show: Callable[[str, str], None]) -> None:
        self.error = ""
        self._run = run
        self._log = log
        self._said = said
        self._show = show
        self._line = ""

    def write(self, text: str) -> int:
        """Take text as it comes, whole lines or not."""
        self._line += redacted(text)
        *whole, self._line = self._line.split("\n")
        for line in whole:
            said = Line.parse(line.removeprefix(_INDENT))
            said = replace(said, text=redacted(said.text)) if said else None
            self._log.write(f"{_INDENT}{said}\n" if said else f"{line}\n")
            if said:
                self._take(said)
        return len(text)

    def flush(self) -> None:
        """Write through to the log."""
        self._log.flush()

    def _take(self, line: Line) -> None:
        if line.event == lines.ERROR:
            self.error = line.text
            return
        if line.step in CONFIG_OF_STEP:
            _keep(self._run, line)
            self._said.write(f"{line.as_json()}\n")
            self._said.flush()
        self._show(line.step, line.text)


def _keep(run: LocalRun, line: Line) -> None:
    result = run.steps.setdefault(line.step, StepResult())
    if line.event == lines.FINISHED:
        result.seconds = line.data["seconds"]
    elif line.event != lines.CHECKPOINT:  # which is written in the background, after the result
        result.said = line.text


def _collect(run: LocalRun) -> None:
    """Bring the report to the top of the run's folder and read the scores and the published address."""
    shutil.copyfile(_output(run, "evaluate/evaluation_report"), run.report)
    run.evaluation = read_json(_output(run, "evaluate/evaluation") / EVALUATION)
    if "upload" in run.steps:
        run.address = read_json(_output(run, "upload/manifest"))["address"]


def _output(run: LocalRun, name: str) -> Path:
    """A step's output: each attempt has a folder of its own, and the last one that made it counts."""
    return max(run.folder.glob(f"steps/tune16-*/{name}"))


def _plain(text: str) -> str:
    """Text without terminal colours."""
    return re.sub(r"\x1b\[\d+m", "", text)
