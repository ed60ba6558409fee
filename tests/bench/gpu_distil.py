"""Distillation on a GPU: Qwen2.5-1.5B's shape learns from Qwen2.5-7B's in 14.2 GiB; the peaks beside the memory plan's.

python tests/bench/gpu_distil.py [--output FOLDER]
"""

import argparse
import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from components.config import Recipe, TrainConfig, parse
from components.planning.memory import GIBIBYTE, plan
from components.train.launch import train
from tests.bench.random_models import MAX_TOKENS, shape_of, write_checkpoint, write_rows

BUDGET = 14.2
STUDENT, TEACHER = "qwen2.5-1.5b", "qwen2.5-7b"
MICRO_BATCHES = (1, 2, 4, 8)


def main() -> None:
    """Train some steps for each micro-batch and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    card = torch.cuda.get_device_properties(0)
    torch.cuda.set_per_process_memory_fraction(BUDGET * GIBIBYTE / card.total_memory)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        student = write_checkpoint(STUDENT, torch.bfloat16, folder / "student")
        teacher = write_checkpoint(TEACHER, torch.bfloat16, folder / "teacher")
        rows = write_rows(shape_of(STUDENT).vocabulary, folder / "rows", num_rows=48)
        _release()
        for micro_batch in MICRO_BATCHES:
            runs.append(_measure(student, teacher, rows, micro_batch, folder / f"out-{micro_batch}"))
            print(runs[-1], flush=True)
    content = {"card": card.name, "torch": torch.__version__, "student": STUDENT, "teacher": TEACHER, "runs": runs}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "distillation.json").write_text(json.dumps(content, indent=1) + "\n")


def _measure(student: Path, teacher: Path, rows: Path, micro_batch: int, output: Path) -> dict[str, Any]:
    settings = {"method": "distill", "teacher": "/random", "micro_batch": micro_batch, "epochs": 1, "dropout": 0}
    recipe = parse(Recipe, {"train": settings, "prepare": {"max_tokens": MAX_TOKENS}}, where="benchmark")
    shape = replace(shape_of(STUDENT), tied_embeddings=False)  # the random checkpoint has a head of its own
    planned = plan(shape, recipe, teacher=shape_of(TEACHER))
    found = {"micro_batch": micro_batch, "planned_gib": round(planned.total / GIBIBYTE, 2)}
    torch.cuda.reset_peak_memory_stats()
    try:
        metrics = train(student, rows, output, TrainConfig.load(settings), teacher=teacher)
        found |= {name: metrics[name] for name in ("tokens_per_second", "train_loss_first", "train_loss_last")}
    except torch.cuda.OutOfMemoryError:
        found["out_of_memory"] = 1
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIBIBYTE, 2)
    _release()
    return found


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
