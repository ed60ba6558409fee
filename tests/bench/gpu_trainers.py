"""Training speed and memory on a GPU: this project's train step, TRL with PEFT, and Unsloth, on the same rows.

    python tests/bench/gpu_trainers.py [--only NAME ...] [--unsloth-path FOLDER] [--output FOLDER]

Every trainer runs in a process of its own with 14.2 GiB for torch's allocator, on a checkpoint with random NF4 weights
that is made on the spot: rank 64 on all linear layers, rows of chat-like lengths (log-normal, mean about 400, cut at
1,024), paged 8-bit AdamW. Counted are real tokens per second over whole steps, after the first ones. Peers that are not
installed are skipped by name.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GIBIBYTE = 2**30
BUDGET = 14.2
WARM_UP, STEPS = 3, 10

# name: trainer, model, and what differs from the reference recipe
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tune16, bf16": ("tune16", "llama2-7b", {}),
    "tune16, 4 micro-batches": ("tune16", "llama2-7b", {"gradient_accumulation": 4}),
    "tune16, dropout 0.1": ("tune16", "llama2-7b", {"dropout": 0.1}),
    "tune16, fp16 as on a T4": ("tune16", "llama2-7b", {"compute_dtype": "float16"}),
    "trl + peft, 4 rows padded": ("trl", "llama2-7b", {}),
    "unsloth, packed, 4 x 1,024": ("unsloth", "llama2-7b", {"packing": True}),
    "unsloth, packed, 4 micro-batches": ("unsloth", "llama2-7b", {"packing": True, "gradient_accumulation": 4}),
    "unsloth, packed, dropout 0.1": ("unsloth", "llama2-7b", {"packing": True, "dropout": 0.1}),
    "unsloth, packed, fp16": ("unsloth", "llama2-7b", {"packing": True, "compute_dtype": "float16"}),
    "tune16, llama3.1-8b": ("tune16", "llama3.1-8b", {}),
    "unsloth, llama3.1-8b": ("unsloth", "llama3.1-8b", {"packing": True}),
    "tune16, qwen2.5-7b": ("tune16", "qwen2.5-7b", {}),
    "unsloth, qwen2.5-7b": ("unsloth", "qwen2.5-7b", {"packing": True}),
}


def main() -> None:
    """Run all settings, one process each, and write table, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="settings whose name contains one of these")
    parser.add_argument("--unsloth-path", help="folder with Unsloth's packages, where they clash with ours")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # setting, scratch, file for the result
    arguments = parser.parse_args()
    if arguments.one:
        name, scratch, result = arguments.one
        Path(result).write_text(json.dumps(run_one(name, Path(scratch))))
        return
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (trainer, _, _) in SETTINGS.items():
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            path = arguments.unsloth_path if trainer == "unsloth" else None
            if not path and trainer != "tune16" and importlib.util.find_spec(trainer) is None:
                print(f"{name}: skipped, {trainer} is not installed", flush=True)
                results.append({"setting": name, "skipped": f"{trainer} is not installed"})
                continue
            results.append({"setting": name, **_in_process(name, Path(scratch), path)})
            print(json.dumps(results[-1]), flush=True)
            write_results(results, arguments.output)
    print_table(results)


def _in_process(name: str, scratch: Path, path: str | None) -> dict[str, Any]:
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    places = [path] if path else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*places, ".", os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--one", name, str(scratch), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not result.is_file():
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300], "log": done.stderr[-3000:]}
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def run_one(name: str, scratch: Path) -> dict[str, Any]:
    """Train some steps with one setting; returns speed, peak and losses."""
    trainer_name, model_name, changes = SETTINGS[name]
    settings = {"micro_batch": 4, "gradient_accumulation": 1, "dropout": 0.0, "packing": False} | changes
    settings.setdefault("compute_dtype", "bfloat16")
    return measure(trainer_name, model_name, settings, scratch)


def measure(trainer_name: str, model_name: str, settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Speed, peak and losses of one trainer; without a GPU, which the tests have not, the peak is 0."""
    if trainer_name == "unsloth":
        import unsloth  # noqa: F401  (before everything that it changes)
    import torch

    from components.runtime.steps import Termination

    card = "CPU"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        card = properties.name
        torch.cuda.set_per_process_memory_fraction(BUDGET * GIBIBYTE / properties.total_memory)
    model, rows = _inputs(model_name, scratch)
    torch.cuda.empty_cache()
    if trainer_name == "tune16":
        counted = loop = timed_loop(model, rows, settings, scratch)
        loop.run(None, Termination())
        history = loop.history
    else:
        trainer = {"trl": build_trl, "unsloth": build_unsloth}[trainer_name](model, rows, settings, scratch)
        counted = _Counted(trainer)
        trainer.train()
        history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {
        "tokens_per_second": round(counted.timed_tokens / counted.timed_seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIBIBYTE, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIBIBYTE, 2),
        "seconds_per_step": round(counted.timed_seconds / STEPS, 4),
        "losses": [round(float(losses[0]), 3), round(float(losses[-1]), 3)],
        "card": card,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "transformers", "peft", "trl", "bitsandbytes", "triton", "unsloth"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _inputs(model_name: str, scratch: Path) -> tuple[Path, Path]:
    """Checkpoint and rows, made once for all settings of a model."""
    import torch

    from tests.bench.random_models import shape_of, write_checkpoint, write_rows

    model, rows = scratch / model_name, scratch / f"{model_name}-rows"
    if not rows.exists():
        write_checkpoint(model_name, torch.bfloat16, model)
        write_rows(shape_of(model_name).vocabulary, rows)
    return model, rows


class _Counted:
    """Counts the real tokens that a trainer's batches hold, and the time, once it has warmed up."""

    def __init__(self, trainer: Any) -> None:
        import torch
        from transformers import TrainerCallback

        self.timed_tokens, self.timed_seconds, self._seen = 0, 0.0, 0
        collate = trainer.data_collator
        counted = self

        def count(rows: list[dict[str, Any]]) -> Any:
            counted._seen += sum(int(row.get("num_tokens", 0)) or len(row["input_ids"]) for row in rows)
            return collate(rows)

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step in (WARM_UP, WARM_UP + STEPS):
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    sign = -1 if state.global_step == WARM_UP else 1
                    counted.timed_seconds += sign * time.monotonic()
                    counted.timed_tokens += sign * counted._seen
                control.should_training_stop = state.global_step >= WARM_UP + STEPS

        trainer.data_collator = count
        trainer.add_callback(Clock())


def timed_loop(model: Path, rows: Path, settings: dict[str, Any], scratch: Path) -> Any:
    """The project's own loop, as the step train builds it, which counts its tokens and its time once warmed up."""
    import torch

    from components.config import TrainConfig
    from components.engine import attention
    from components.train.checkpoints.store import Checkpoints, Place
    from components.train.loop import Loop
    from components.train.trainer import TrainingInputs, make_learner

    class TimedLoop(Loop):
        timed_tokens, timed_seconds, _counted = 0, 0.0, 0

        def _take_step(self) -> None:
            super()._take_step()
            self._counted += self._unseen[-1][2]
            if self.step in (WARM_UP, WARM_UP + STEPS):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                sign = -1 if self.step == WARM_UP else 1
                self.timed_seconds += sign * time.monotonic()
                self.timed_tokens += sign * self._counted

        def evaluate(self) -> None:
            pass

        def _keep(self) -> None:
            pass  # what a checkpoint costs, gpu_checkpoints.py measures

    if settings["compute_dtype"] == "float16":
        attention._FIRST_CAPABILITY_WITH_FLASH = (99, 0)  # what a card before Ampere has
    config = TrainConfig(
        micro_batch=settings["micro_batch"],
        gradient_accumulation=settings["gradient_accumulation"],
        dropout=settings["dropout"],
        compute_dtype=settings["compute_dtype"],
        num_evaluations=1,
    )
    inputs = TrainingInputs(model, rows, config)
    checkpoints = Checkpoints({}, Place(scratch / "checkpoints"))
    loop = TimedLoop(make_learner(inputs, scratch / "out"), config, inputs.dtype, checkpoints)
    loop.num_steps = WARM_UP + STEPS
    return loop


def _arguments(rows: Path, settings: dict[str, Any], scratch: Path) -> tuple[Any, Any]:
    import torch
    from datasets import Dataset
    from trl import SFTConfig

    half = settings["compute_dtype"] == "float16"
    arguments = SFTConfig(
        output_dir=str(scratch / "out"),
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["gradient_accumulation"],
        max_length=1024,
        packing=settings["packing"],
        gradient_checkpointing=True,
        bf16=settings["compute_dtype"] == "bfloat16",
        fp16=half,
        optim="paged_adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return arguments, Dataset.from_parquet(str(rows / "train.parquet"), cache_dir=str(scratch / "cache"))


def build_trl(model: Path, rows: Path, settings: dict[str, Any], scratch: Path) -> Any:
    """TRL and PEFT as people run them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    from components.models.loading import device

    dtype = getattr(torch, settings["compute_dtype"])
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, device_map={"": device()}, attn_implementation="sdpa"
    )
    arguments, data = _arguments(rows, settings, scratch)
    lora = LoraConfig(r=64, lora_alpha=16, lora_dropout=settings["dropout"], target_modules="all-linear")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return SFTTrainer(model=base, args=arguments, train_dataset=data, peft_config=lora, processing_class=tokenizer)


def build_unsloth(model: Path, rows: Path, settings: dict[str, Any], scratch: Path) -> Any:
    """Unsloth as its notebooks do it, with its own activation checkpointing."""
    import torch
    from trl import SFTTrainer
    from unsloth import FastLanguageModel

    dtype = getattr(torch, settings["compute_dtype"])
    base, tokenizer = FastLanguageModel.from_pretrained(str(model), max_seq_length=1024, dtype=dtype, load_in_4bit=True)
    base = FastLanguageModel.get_peft_model(
        base,
        r=64,
        lora_alpha=16,
        lora_dropout=settings["dropout"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth",
    )
    arguments, data = _arguments(rows, settings, scratch)
    return SFTTrainer(model=base, args=arguments, train_dataset=data, processing_class=tokenizer)


def print_table(results: list[dict[str, Any]]) -> None:
    """One line per setting."""
    width = max(len(one["setting"]) for one in results)
    for one in results:
        said = one.get("skipped") or one.get("failed")
        figures = said or f"{one['tokens_per_second']:>8,} tokens/s {one['peak_gib']:>7.2f} GiB"
        print(f"{one['setting']:<{width}} {figures}")


def write_results(results: list[dict[str, Any]], folder: Path) -> None:
    """Write ``trainers.json`` and ``trainers.png``."""
    measured = [one for one in results if "tokens_per_second" in one]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainers.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    names = {one["setting"] for one in results}
    others = [one for one in before.get("results", []) if one["setting"] not in names]
    path.write_text(json.dumps(before | {"budget_gib": BUDGET, "results": results + others}, indent=1) + "\n")
    if measured:
        _draw(measured, folder / "trainers.png")


def _draw(measured: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for number, one in enumerate(sorted(measured, key=lambda one: -one["tokens_per_second"]), 1):
        color = {"tune16": "C2", "trl": "C0"}.get(one["setting"].replace(",", " ").split()[0], "C1")
        place = (one["peak_gib"], one["tokens_per_second"])
        axes.plot(*place, "o", color=color, label=f"{number:>2}  {one['setting']}  {one['tokens_per_second']:,}")
        axes.annotate(str(number), place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.axvline(BUDGET, color="black", linestyle="--", label=f"the limit, {BUDGET} GiB")
    axes.set(xlim=(0, BUDGET * 1.05), ylim=(0, None), xlabel="peak of torch's allocator, GiB", ylabel="real tokens/s")
    axes.set_title(f"QLoRA, rank 64, on one {measured[0]['card']}")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
