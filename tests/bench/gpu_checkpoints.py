"""What checkpoints cost on a GPU, and whether a run that is killed and started again learns the same.

    python tests/bench/gpu_checkpoints.py [--output FOLDER]

Llama-2-7b's shape with random NF4 weights, rank 64, paged 8-bit AdamW. The same run without checkpoints, twice, and
with one every few seconds: the difference, by the number of checkpoints, is the price of one; at the default there is
one in five minutes. Then a run is killed with SIGKILL after a checkpoint, and started again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "llama2-7b"
NUM_ROWS = 1200
OFTEN, NEVER = 0.2, 60.0  # minutes
DEFAULT_SECONDS = 300.0


def main() -> None:
    """Run all of it, each run in a process of its own, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # folder, name of the output, minutes
    arguments = parser.parse_args()
    if arguments.one:
        folder, name, minutes = arguments.one
        _train(Path(folder), name, float(minutes))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, "-c", _MAKE.format(folder=scratch, model=MODEL, rows=NUM_ROWS)], check=True)
        never = [_run(folder, name, NEVER) for name in ("never", "never again")]
        often = [_run(folder, name, OFTEN) for name in ("often", "often again")]
        resumed = _killed_and_started_again(folder)
    num_checkpoints = sum(run["checkpoints"] for run in often)
    price = (sum(run["seconds"] for run in often) - sum(run["seconds"] for run in never)) / num_checkpoints
    figures = {
        "runs": {"without": never, "with": often, "killed and started again": resumed},
        "seconds per checkpoint": round(price, 3),
        "share of the time at one in five minutes": round(price / DEFAULT_SECONDS, 5),
        "largest difference of a loss, two undisturbed runs": _difference(never[0], never[1]),
        "largest difference of a loss, undisturbed and resumed": _difference(never[0], resumed),
        "same adapter": {
            "two undisturbed": never[0]["sha256"] == never[1]["sha256"],
            "resumed": never[0]["sha256"] == resumed["sha256"],
        },
    }
    for run in (*never, *often, resumed):
        run.pop("losses")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "checkpoints.json").write_text(json.dumps(figures | _versions(), indent=1) + "\n")
    print(json.dumps(figures, indent=1))


_MAKE = """
import torch
from pathlib import Path
from tests.bench.random_models import shape_of, write_checkpoint, write_rows
write_checkpoint("{model}", torch.bfloat16, Path("{folder}") / "weights")
write_rows(shape_of("{model}").vocabulary, Path("{folder}") / "rows", num_rows={rows})
"""


def _train(folder: Path, name: str, minutes: float) -> None:
    import torch

    from components.config import TrainConfig
    from components.planning.memory import GIBIBYTE
    from components.train.launch import train

    torch.cuda.set_per_process_memory_fraction(14.2 * GIBIBYTE / torch.cuda.get_device_properties(0).total_memory)
    config = TrainConfig(dropout=0.05, num_evaluations=1, checkpoint_minutes=minutes)
    train(folder / "weights", folder / "rows", folder / name, config)


def _start(folder: Path, name: str, minutes: float) -> tuple[subprocess.Popen[bytes], Path]:
    log = folder / f"{name}.log"
    command = [sys.executable, __file__, "--one", str(folder), name, str(minutes)]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"PYTHONUNBUFFERED": "1"}), log


def _run(folder: Path, name: str, minutes: float) -> dict[str, Any]:
    process, log = _start(folder, name, minutes)
    assert process.wait() == 0, log.read_text()[-4000:]
    from components.runtime.outputs import read_record
    from components.storage.files import file_digest

    record, text = read_record(folder / name, "train"), log.read_text()
    found = {
        "seconds": record["metrics"]["seconds"],
        "tokens_per_second": record["metrics"]["tokens_per_second"],
        "peak_gib": record["metrics"]["peak_memory_gib"],
        "checkpoints": text.count(" kept, "),
        "sizes": sorted({line.partition(" kept, ")[2] for line in text.splitlines() if " kept, " in line}),
        "resumed": [line for line in text.splitlines() if "continuing from" in line],
        "sha256": file_digest(folder / name / "adapter_model.safetensors"),
        "losses": record["losses"],
    }
    print(name, {key: value for key, value in found.items() if key != "losses"}, flush=True)
    return found


def _killed_and_started_again(folder: Path) -> dict[str, Any]:
    process, log = _start(folder, "killed", OFTEN)
    while process.poll() is None and log.read_text().count(" kept, ") < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return _run(folder, "killed", OFTEN)


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    values = [[entry.get("loss", entry.get("eval_loss")) for entry in run["losses"]] for run in (one, other)]
    assert len(values[0]) == len(values[1])
    return float(max(abs(float(a) - float(b)) / float(a) for a, b in zip(*values, strict=True)))


def _versions() -> dict[str, Any]:
    import bitsandbytes
    import torch
    import transformers

    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }


if __name__ == "__main__":
    main()
