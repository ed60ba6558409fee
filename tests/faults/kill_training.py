"""kill -9 of training at random moments: the run that is started again ends with the same adapter and the same losses.

A third of the kills strike while a checkpoint is being written, a third within an evaluation, the others anywhere.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (all that children need is imported before they are forked)
import datasets  # noqa: F401
import peft  # noqa: F401

from components.config import TrainConfig
from components.runtime.outputs import read_record
from components.storage.files import file_digest
from components.train.launch import train
from components.train.loop import Loop
from components.train.trainer import train_adapter  # noqa: F401
from tests.faults.harness import Moment, after, child, report, write_lesson

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "rank": 8,
    "dropout": 0.05,
    "micro_batch": 2,
    "num_evaluations": 6,
    "checkpoint_minutes": 0.001,
}


def main() -> int:
    """Kill, start again, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=20, help="kills per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        assert child(lambda: write_lesson(folder), folder / "log") == 0, (folder / "log").read_text()
        outcomes = [
            outcome
            for seed in range(options.seeds)
            for outcome in _of_seed(folder, TrainConfig(seed=seed, **SETTINGS), options.num, rng)
        ]
    same = sum(outcome["same"] for outcome in outcomes)
    figures = {
        "kills": len(outcomes),
        "inside a save": sum(outcome["in_save"] for outcome in outcomes),
        "inside an evaluation": sum(outcome["in_evaluation"] for outcome in outcomes),
        "went on from a checkpoint": sum(outcome["resumed"] for outcome in outcomes),
        "same adapter and losses": same,
    }
    return report("kill_training", figures, same == len(outcomes) == options.num * options.seeds, options.output)


def _of_seed(folder: Path, config: TrainConfig, num: int, rng: random.Random) -> list[dict[str, bool]]:
    work = folder / f"seed-{config.seed}"
    work.mkdir()
    started = time.monotonic()
    assert child(lambda: _train(folder, work / "undisturbed", config), work / "log") == 0, (work / "log").read_text()
    seconds = time.monotonic() - started
    wanted = _result(work / "undisturbed")
    outcomes = []
    for number in range(num):
        moments = _moments(work / str(number), number, seconds, rng)
        outcome = _kill(folder, work / str(number), config, wanted, moments)
        outcomes.append(outcome)
        print(f"seed {config.seed}, kill {number + 1} of {num}: {outcome}", flush=True)
        shutil.rmtree(work / str(number))
    return outcomes


def _kill(folder: Path, work: Path, config: TrainConfig, wanted: Any, moments: Iterator[Moment]) -> dict[str, bool]:
    log, code = work / "log", 0
    while code != -9 or (work / "adapter").exists():  # the moment may lie behind the end of the run
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        code = child(lambda: _train(folder, work / "adapter", config, work / "evaluating"), log, next(moments))
    outcome = {
        "in_save": any(work.glob(".adapter.checkpoints/*/.step-*.partial")),
        "in_evaluation": (work / "evaluating").exists(),
    }
    code = child(lambda: _train(folder, work / "adapter", config), log)
    text = log.read_text()
    outcome["resumed"] = "going on from" in text
    outcome["same"] = code == 0 and _result(work / "adapter") == wanted
    if not outcome["same"]:
        print(text)
    return outcome


def _moments(work: Path, number: int, seconds: float, rng: random.Random) -> Iterator[Moment]:
    """Anywhere, within a save, or within an evaluation, none of which is the first."""
    while True:
        earliest = rng.uniform(0.3, 0.8) * seconds
        if number % 3 == 0:
            yield after(rng.uniform(0.1, seconds))
        elif number % 3 == 1:
            yield lambda now, start=earliest: now > start and any(work.glob(".adapter.checkpoints/*/.step-*.partial"))
        else:
            yield lambda now, start=earliest: now > start and (work / "evaluating").exists()


def _train(folder: Path, output: Path, config: TrainConfig, marker: Path | None = None) -> None:
    if marker:
        evaluate = Loop.evaluate

        def marked(*arguments: Any, **options: Any) -> Any:
            marker.touch()
            try:
                return evaluate(*arguments, **options)
            finally:
                marker.unlink()

        Loop.evaluate = marked  # type: ignore[method-assign]
    train(folder / "weights", folder / "rows", output, config)


def _result(adapter: Path) -> Any:
    return file_digest(adapter / "adapter_model.safetensors"), read_record(adapter, "train")["losses"]


if __name__ == "__main__":
    raise SystemExit(main())
