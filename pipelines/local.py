"""A pipeline run on this machine: the very same pipeline function, its steps as processes, an S3 server beside it."""

import contextlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from kfp import local

from components.config import CONFIG_OF_STEP, Recipe, form_values
from components.errors import Tune16Error
from pipelines.finetune import finetune
from pipelines.s3server import S3Server

BUCKET = "tune16"
LOG = "pipeline.log"
REPORT = "report.html"

_LINE = re.compile(r"(?P<step>[a-z]+): (?P<text>.*)")
_SETUP = "demo"  # who speaks while the demo's base model is made
_INDENT = "    "  # what kfp puts before the lines of a step
_FINISHED = re.compile(r"finished in (?P<seconds>[\d.]+) s")


@dataclass
class StepResult:
    """How one step went: seconds it took (None while it has not ended well) and the last thing it said."""

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
    """Run the pipeline here.

    Args:
        recipe: what to run; with ``setup: demo`` the demo's model and rows are put into the bucket first.
        folder: new folder for the log, the steps' outputs and the report.
        show: is told each line that a step says, with the step's name.

    Raises:
        Tune16Error: a step ended with a user's mistake, whose message this carries.
    """
    run = LocalRun(folder)
    started = time.monotonic()
    folder.mkdir(parents=True)
    with storage(folder / "s3"), (folder / LOG).open("w", encoding="utf-8") as log:
        listener = _Listener(run, log, show)
        with contextlib.redirect_stdout(listener):
            if recipe.setup == "demo":
                put_demo(folder / "demo")
            _run_pipeline(recipe, folder, listener)
    _collect(run)
    run.seconds = time.monotonic() - started
    return run


@contextlib.contextmanager
def storage(folder: Path) -> Iterator[None]:
    """The S3 server that the environment names, else one of our own with its data in `folder`."""
    if os.environ.get("AWS_S3_ENDPOINT"):
        yield
        return
    from components import s3

    with S3Server(folder) as server, s3.environment(server.environment(BUCKET)):
        s3.client().create_bucket(Bucket=BUCKET)
        yield


def put_demo(folder: Path) -> None:
    """Build the demo's base model and put it into the bucket with the demo's rows."""
    from components import s3
    from pipelines.demo.base import build_base
    from pipelines.demo.generate import ORDERS

    build_base(folder / "model")
    shutil.copyfile(ORDERS, folder / ORDERS.name)
    s3.upload_folder(folder, s3.default_bucket(), "demo")


def _run_pipeline(recipe: Recipe, folder: Path, listener: "_Listener") -> None:
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "steps"), raise_on_error=True)
    arguments = form_values(recipe, finetune.component_spec.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kfp warns of images, limits and secrets, which mean nothing here
        try:
            finetune(**arguments)
        except RuntimeError as error:
            if listener.error:
                raise Tune16Error(listener.error) from None
            raise Tune16Error(f"{_plain(str(error))} The whole log is in {folder / LOG}.") from None


class _Listener:
    """Stands in for stdout while kfp runs: keeps everything in the log and picks out what the steps say."""

    def __init__(self, run: LocalRun, log: IO[str], show: Callable[[str, str], None]) -> None:
        self.error = ""
        self._run = run
        self._log = log
        self._show = show
        self._line = ""

    def write(self, text: str) -> int:
        """Take text as it comes, whole lines or not."""
        self._log.write(text)
        self._line += text
        *lines, self._line = self._line.split("\n")
        for line in lines:
            self._hear(line.removeprefix(_INDENT))
        return len(text)

    def flush(self) -> None:
        """Write through to the log."""
        self._log.flush()

    def _hear(self, line: str) -> None:
        if line.startswith("error: "):
            self.error = line.removeprefix("error: ")
        elif self.error and line.startswith("  "):
            self.error += f"\n{line}"
        match = _LINE.fullmatch(line)
        if match and match["step"] in CONFIG_OF_STEP:
            self._keep(match["step"], match["text"])
        if match and (match["step"] in CONFIG_OF_STEP or match["step"] == _SETUP):
            self._show(match["step"], match["text"])

    def _keep(self, step: str, text: str) -> None:
        result = self._run.steps.setdefault(step, StepResult())
        finished = _FINISHED.fullmatch(text)
        if finished:
            result.seconds = float(finished["seconds"])
        else:
            result.said = text


def _collect(run: LocalRun) -> None:
    """Bring the report to the top of the run's folder and read the scores and the published address."""
    outputs = next((run.folder / "steps").glob("tune16-*"))
    shutil.copyfile(outputs / "evaluate" / "report", run.report)
    run.evaluation = json.loads((outputs / "evaluate" / "evaluation" / "evaluation.json").read_text())
    manifest = outputs / "upload" / "manifest"
    if manifest.is_file():
        run.address = json.loads(manifest.read_text())["address"]


def _plain(text: str) -> str:
    """Text without terminal colours."""
    return re.sub(r"\x1b\[\d+m", "", text)
