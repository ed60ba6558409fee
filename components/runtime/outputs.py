"""Output folders of the steps: they appear complete or not at all, and each carries the settings it was made with."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.config import StepConfig
from components.runtime.errors import Tune16Error

RECORD = "tune16.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"  # verdict and scores, in the output of evaluate
TEACHER = "teacher"  # folder in the output of quantize: the weights of the model to learn from, where there is one
PUBLISHED = "published.json"  # how the merged model does when it is loaded as its users do


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a fresh folder beside `target` that takes its place when the block ends well.

    Whatever goes wrong, `target` is left as it was and the unfinished folder is removed. A leftover of a killed
    process is overwritten by the next one.
    """
    partial = target.with_name(f".{target.name}.partial")
    _put_back(target)
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        _replace(partial, target)
    finally:
        _remove(partial)


def _put_back(target: Path) -> None:
    """Undo the first half of a replacement whose process was killed before the second."""
    old = _old(target)
    if old.exists() and not target.exists():
        old.rename(target)


def _replace(new: Path, target: Path) -> None:
    old = _old(target)
    _remove(old)
    if target.exists():
        target.rename(old)
    new.rename(target)
    _remove(old)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_record(folder: Path, step: str, config: StepConfig, **facts: Any) -> None:
    """Write the folder's record: the step, its settings, and `facts` that later steps and the manifest need."""
    write_json(folder / RECORD, {"step": step, "config": config.model_dump(), **facts})


def read_record(folder: Path, step: str) -> dict[str, Any]:
    """Read the record that `step` left in `folder`.

    Raises:
        Tune16Error: there is none, or another step's.
    """
    path = folder / RECORD
    if not path.is_file():
        raise Tune16Error(f"{folder} is not an output of the step {step}: it has no {RECORD}. Run that step first.")
    record: dict[str, Any] = json.loads(path.read_text())
    if record["step"] != step:
        raise Tune16Error(f"{folder} was made by the step {record['step']}, but an output of {step} is needed here.")
    return record


def copy_report(folder: str, target: str) -> None:
    """Copy the report of an output folder to the path of the artifact that the dashboard shows."""
    shutil.copyfile(Path(folder) / REPORT, target)


def log_metrics(metrics: Any, numbers: dict[str, float]) -> None:
    """Put numbers into a pipeline's Metrics artifact, and into its file: kfp's own cache takes none without a file."""
    for name, value in numbers.items():
        metrics.log_metric(name, value)
    write_json(Path(metrics.path), numbers)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, without secrets."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that a step wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
