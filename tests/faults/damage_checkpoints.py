"""The newest checkpoint is damaged, on disk or in S3: the run goes on from the newest whole one."""

import argparse
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (all that children need is imported before they are forked)
import datasets  # noqa: F401
import peft  # noqa: F401

from components.config import TrainConfig
from components.runtime.outputs import read_record
from components.storage import s3
from components.storage.files import file_digest
from components.train.checkpoints.record import RECORD, step_of
from components.train.launch import train
from components.train.trainer import train_adapter  # noqa: F401
from pipelines.s3server import S3Server
from tests.faults.harness import child, report, write_lesson

CONFIG = TrainConfig(
    epochs=2, rank=8, dropout=0.05, micro_batch=2, num_evaluations=6, checkpoint_minutes=0.001, max_gradient_norm=1
)
PATH = "team/model"
BUCKET = "tune16"


def main() -> int:
    """Damage, start again, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=100, help="damaged checkpoints")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as scratch, S3Server(Path(scratch) / "s3") as server:
        folder = Path(scratch)
        with s3.environment(server.environment(BUCKET)):
            s3.client().create_bucket(Bucket=BUCKET)
            wanted = _undisturbed(folder)
            kept = {name: _stopped(folder, folder / name) for name in ("own", "other base", "other data")}
            outcomes = [_damage(folder, kept, wanted, number, rng) for number in range(options.num)]
    figures = {
        "damaged": len(outcomes),
        "by kind": {kind: sum(outcome["kind"] == kind for outcome in outcomes) for kind in _KINDS},
        "in S3": sum(outcome["in_s3"] for outcome in outcomes),
        "went on from the newest whole one": sum(outcome["right"] for outcome in outcomes),
        "same adapter and losses": sum(outcome["same"] for outcome in outcomes),
    }
    reached = all(outcome["right"] and outcome["same"] for outcome in outcomes) and len(outcomes) == options.num
    return report("damage_checkpoints", figures, reached, options.output)


def _undisturbed(folder: Path) -> Any:
    """Make the three lessons; the result of the first one."""
    for name, options in {"own": {}, "other base": {"seed": 8}, "other data": {"num_rows": 150}}.items():
        log = folder / f"{name}.log"
        assert child(lambda name=name, options=options: write_lesson(folder / "lessons" / name, **options), log) == 0, (  # type: ignore[misc]
            log.read_text()
        )
    assert child(lambda: _train(folder, "own", folder / "undisturbed"), folder / "log") == 0, (
        folder / "log"
    ).read_text()
    return _result(folder / "undisturbed")


def _stopped(folder: Path, place: Path) -> Path:
    """The folder of a run that was killed after its fifth checkpoint, with the last two of them."""
    place.mkdir()
    log = place / "log"
    code = child(
        lambda: _train(folder, place.name, place / "adapter"),
        log,
        lambda now: log.read_text().count(" kept, ") >= 5 if log.is_file() else False,
    )
    assert code == -9, log.read_text()
    (run,) = place.glob(".adapter.checkpoints/*")
    for remains in run.glob(".step-*"):
        shutil.rmtree(remains)
    assert len(list(run.glob("step-*"))) >= 2
    return run


def _damage(folder: Path, kept: dict[str, Path], wanted: Any, number: int, rng: random.Random) -> dict[str, Any]:
    work = folder / "work"
    run = work / ".adapter.checkpoints" / kept["own"].name
    shutil.copytree(kept["own"], run)
    newest, whole = sorted(run.glob("step-*"), reverse=True)[:2]
    kind = list(_KINDS)[number % len(_KINDS)]
    in_s3 = number // len(_KINDS) % 2 == 1
    if kind in kept:
        shutil.rmtree(newest)
        other = max(kept[kind].glob("step-*"))
        newest = run / f"step-{max(step_of(other), step_of(whole) + 1):08d}"
        shutil.copytree(other, newest)
    _KINDS[kind](newest, rng)
    prefix = f"team/checkpoints/{run.name}"
    for stored in s3.list_objects(BUCKET, ""):
        s3.delete(BUCKET, stored.key)
    if in_s3:
        for path in (newest, whole):
            s3.upload_folder(path, BUCKET, f"{prefix}/{path.name}")
        shutil.rmtree(run.parent)
    code = child(lambda: _train(folder, "own", work / "adapter", PATH if in_s3 else ""), work / "log")
    text = (work / "log").read_text()
    # Without its record a checkpoint in S3 does not exist; everywhere else it is said why it was not taken.
    is_said = "skipped the checkpoint" in text or (in_s3 and not (newest / RECORD).is_file())
    outcome = {
        "kind": kind,
        "in_s3": in_s3,
        "right": is_said and f"continuing from the checkpoint of step {step_of(whole):,} " in text,
        "same": code == 0 and _result(work / "adapter") == wanted,
    }
    print(f"{number + 1}: {outcome}", flush=True)
    if not (outcome["right"] and outcome["same"]):
        print(text)
    shutil.rmtree(work)
    return outcome


def _cut(path: Path, rng: random.Random) -> None:
    file = _some_file(path, rng)
    os.truncate(file, rng.randrange(file.stat().st_size))


def _zero(path: Path, rng: random.Random) -> None:
    file = _some_file(path, rng)
    file.write_bytes(bytes(file.stat().st_size))


def _flip(path: Path, rng: random.Random) -> None:
    file = _some_file(path, rng)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _lose(path: Path, rng: random.Random) -> None:
    _some_file(path, rng).unlink()


def _some_file(path: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path.iterdir()))


_KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": _cut,
    "zeroed": _zero,
    "bit flipped": _flip,
    "file missing": _lose,
    "other base": lambda path, rng: None,
    "other data": lambda path, rng: None,
}


def _train(folder: Path, lesson: str, output: Path, path: str = "") -> None:
    train(folder / "lessons" / lesson / "weights", folder / "lessons" / lesson / "rows", output, CONFIG, path=path)


def _result(adapter: Path) -> Any:
    return file_digest(adapter / "adapter_model.safetensors"), read_record(adapter, "train")["losses"]


if __name__ == "__main__":
    raise SystemExit(main())
