"""Disks that fill up, that may not be written, and kill -9 while a step writes: what was there before stays whole.

Each case works on a small file system of its own, of which a random share of what the step needs is free. Where none
can be mounted, a limit on the size of files stands in for it.
"""

import argparse
import contextlib
import functools
import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes  # noqa: F401  (all that children need is imported before they are forked)
import torch
from safetensors.torch import save_file

from components.config import MergeConfig, PrepareConfig, QuantizeConfig, TrainConfig
from components.merge.merger import merge_adapter
from components.prepare.dataset import prepare_dataset
from components.quantize.checkpoint import quantize_checkpoint
from components.runtime.errors import user_errors
from components.runtime.outputs import new_folder, write_json, write_record
from components.storage import s3
from components.storage.files import file_digest
from components.train.checkpoints.store import Checkpoints, Place
from pipelines.s3server import S3Server
from tests.faults.harness import Moment, after, child, report, write_lesson

Work = Callable[[Path], object]  # writes the output folder that it is given

BUCKET = "tune16"
_VOLUME_BYTES = 16 << 20
_FILLER = "filler"
_FAULTS = ("full", "read-only", "killed")


def main() -> int:
    """Every step, every fault, `num` times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=10, help="times that each fault meets each step")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rng = random.Random(1)
    torch.set_num_threads(1)  # threads that an import has started do not survive the fork
    outcomes: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as scratch, S3Server(Path(scratch) / "s3") as server:
        folder = Path(scratch)
        with s3.environment(server.environment(BUCKET)):
            assert child(lambda: _furnish(folder), folder / "log") == 0, (folder / "log").read_text()
            for step, work in _steps(folder).items():
                for fault in _FAULTS:
                    faults = [_case(folder, step, work, fault, rng) for _ in range(options.num)]
                    outcomes[f"{step}, {fault}"] = faults
                    print(f"{step}, {fault}: {sum(faults)} of {len(faults)}", flush=True)
    good, num = (sum(map(count, outcomes.values())) for count in (sum, len))
    figures = {"file system": "tmpfs" if _can_mount() else "limit on file sizes", "cases": num, "whole": good}
    return report(
        "full_disk", {**figures, **{name: sum(found) for name, found in outcomes.items()}}, good == num, options.output
    )


def _furnish(folder: Path) -> None:
    """A model, its rows, an adapter, and an object in the bucket."""
    write_lesson(folder, num_rows=60)
    adapter = folder / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(8, 64), name.format("B"): torch.ones(64, 8)},
        adapter / "adapter_model.safetensors",
    )
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": 16})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, adapter)
    write_record(adapter, "train", TrainConfig(), model=str(folder / "model"), stop_token="</s>")
    s3.client().create_bucket(Bucket=BUCKET)
    (folder / "object").write_bytes(random.Random(2).randbytes(1 << 20))
    s3.upload(folder / "object", BUCKET, "object")


def _steps(folder: Path) -> dict[str, Work]:
    model, rows = str(folder / "model"), str(folder / "orders.jsonl")
    return {
        "prepare": lambda output: prepare_dataset(rows, model, output, PrepareConfig(max_tokens=128)),
        "quantize": lambda output: quantize_checkpoint(model, output, QuantizeConfig()),
        "merge": lambda output: merge_adapter(model, folder / "adapter", output, MergeConfig()),
        "download": _download,
        "checkpoint": _checkpoint,
    }


def _download(output: Path) -> None:
    with new_folder(output) as folder:
        s3.download(BUCKET, "object", folder / "object")


def _checkpoint(output: Path) -> None:
    """The next checkpoint of a run; the first, which `output` stands for, is not the only one afterwards."""
    checkpoints = Checkpoints({"data": "x"}, Place(output))
    with checkpoints.held():
        newest = checkpoints.newest()
        step = int(newest.name.removeprefix("step-")) + 1 if newest else 1
        state = {"weights": torch.full((1 << 18,), float(step))}
        checkpoints.save(step, lambda folder: save_file(state, folder / "state.safetensors"))
        checkpoints.wait()


def _case(folder: Path, step: str, work: Work, fault: str, rng: random.Random) -> bool:
    """One fault: an output is there, the step is run again into it, and the fault strikes."""
    with _volume(folder / "volume") as volume:
        output, log = volume / "out", folder / "log"
        started = time.monotonic()
        assert child(functools.partial(_run, work, output), log) == 0, log.read_text()
        seconds, before = time.monotonic() - started, _content(output)
        size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        log.write_text("")
        room = int(size * rng.uniform(0.02, 0.9))
        moment: Moment | None = after(rng.uniform(0.0, seconds)) if fault == "killed" else None
        with _struck(volume, fault, room):
            code = child(
                functools.partial(_run, work, output, room if fault == "full" and not _can_mount() else None),
                log,
                moment,
            )
        told, kept = log.read_text(), _content(output)
        is_good = _is_as_it_was(step, before, kept) and _is_told(step, fault, code, told)
        is_good &= fault == "killed" or [path.name for path in volume.iterdir()] == ["out"]
        is_good &= child(functools.partial(_run, work, output), log) == 0 and not list(volume.glob(".out*"))
        if not is_good:
            print(f"{step}, {fault}, {room:,} of {size:,} bytes free: exit code {code}\n{told}", flush=True)
        return is_good


def _run(work: Work, output: Path, largest_file: int | None = None) -> None:
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    with user_errors():
        work(output)


def _is_as_it_was(step: str, before: dict[str, str], after_it: dict[str, str]) -> bool:
    """A step's output is what it was; beside a checkpoint there may be the next one, whole, and nothing else."""
    if step != "checkpoint":
        return before == after_it
    return before.items() <= after_it.items() and all("/step-0000000" in name for name in after_it)


def _is_told(step: str, fault: str, code: int, told: str) -> bool:
    """Whether one line said what was wrong. A run that finds no room for its checkpoint goes on without."""
    if fault == "killed":
        return code in (-9, 0)
    if "Traceback" in told:
        return False
    if step == "checkpoint" and fault == "full":
        return code == 0 and told.count("could not be kept") == 1
    lines = told.splitlines()
    return code == 2 and lines[-1].startswith("error: ") and not any(line.startswith("error: ") for line in lines[:-1])


def _content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a reader would see, by name."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = {str(file.relative_to(folder)): file for file in files}
    return {
        name: file_digest(file) for name, file in names.items() if not any(p.startswith(".") for p in name.split("/"))
    }


@contextlib.contextmanager
def _volume(place: Path) -> Iterator[Path]:
    """An empty file system of 16 MiB at `place`, or an empty folder where nothing can be mounted."""
    place.mkdir()
    if _can_mount():
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_VOLUME_BYTES}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        if _can_mount():
            subprocess.run(["umount", "-l", place], check=True)
        subprocess.run(["rm", "-rf", place], check=True)


@contextlib.contextmanager
def _struck(volume: Path, fault: str, room: int) -> Iterator[None]:
    """The volume with no more than `room` bytes free, or closed to writers."""
    if fault == "full" and _can_mount():
        free = os.statvfs(volume).f_bavail * os.statvfs(volume).f_frsize
        (volume / _FILLER).write_bytes(bytes(free - room))
    elif fault == "read-only":
        _close(volume, True)
    yield
    if fault == "read-only":
        _close(volume, False)
    (volume / _FILLER).unlink(missing_ok=True)


def _close(volume: Path, is_closed: bool) -> None:
    if _can_mount():
        subprocess.run(["mount", "-o", f"remount,{'ro' if is_closed else 'rw'}", volume], check=True)
    else:
        for folder in (volume, *(path for path in volume.rglob("*") if path.is_dir())):
            folder.chmod(0o555 if is_closed else 0o755)


@functools.cache
def _can_mount() -> bool:
    """Whether this process may mount a file system in memory."""
    with tempfile.TemporaryDirectory() as place:
        is_mounted = not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode
        if is_mounted:
            subprocess.run(["umount", place], check=True)
    return is_mounted


if __name__ == "__main__":
    raise SystemExit(main())
