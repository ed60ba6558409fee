"""What the engine promises, measured on a GPU: memory plan, longest row, agreement with plain code, float16.

    python tests/bench/gpu_plan.py [plans] [longest] [agreement] [half] [faults] [--output FOLDER]

* plans: peaks of torch's allocator against the plan, over four architectures.
* longest: the longest single row that trains in 14.2 GiB, Llama-2-7b's shape.
* agreement: 200 steps of bfloat16 against plain Transformers, PEFT and torch's loss on the same rows.
* half: 2,000 steps of float16 with loss scaling on random rows; no loss may be anything but a number.
* faults: rows that need more memory than there is, and a plan that is wrong on purpose.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model

from components.config import QuantizeConfig, TrainConfig
from components.engine import attention
from components.engine.engine import Engine, MicroBatch
from components.planning.gpus import Gpu, known_gpu
from components.planning.memory import GIBIBYTE, MemoryPlan, Step
from tests.bench.random_models import MAX_TOKENS, draw_length, make_model, shape_of

BUDGET = 14.2
LONGEST = (32768, 49152, 65536, 81920)


def main() -> None:
    """Run the parts that are named, or all, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    card = torch.cuda.get_device_properties(0)
    path = arguments.output / "engine.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    content |= {"card": card.name, "torch": torch.__version__, "bitsandbytes": bnb.__version__}
    parts: dict[str, Callable[[], Any]] = {
        "plans": measure_plans,
        "longest": find_longest,
        "agreement": compare_losses,
        "half": stress_half,
        "faults": provoke_faults,
    }
    for name in arguments.parts or parts:
        limit = 1.0 if name == "agreement" else BUDGET * GIBIBYTE / card.total_memory
        torch.cuda.set_per_process_memory_fraction(limit)
        content[name] = parts[name]()
        arguments.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


def chats(tokens: int, vocabulary: int, seed: int = 0) -> Iterator[MicroBatch]:
    """Passes of rows of chat-like lengths, with random tokens."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        lengths: list[int] = []
        while sum(lengths) < tokens:
            lengths.append(min(draw_length(source), tokens - sum(lengths)))
        yield one_micro_batch(lengths, vocabulary)


def one_micro_batch(lengths: list[int], vocabulary: int) -> MicroBatch:
    """A pass of random rows."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    tokens = torch.randint(3, vocabulary, positions.shape)
    return MicroBatch.of(tokens, tokens.roll(-1), positions, lengths, torch.device("cuda"))


def adapt(model: Any, rank: int, dropout: float, targets: str | list[str] = "all-linear") -> Any:
    """A PEFT model with a float32 adapter."""
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=targets)
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.train()


class Run:
    """An engine with its optimiser, for some steps."""

    def __init__(self, model: Any, rank: int = 64, dropout: float = 0.0, scaled: bool = False, **targets: Any) -> None:
        self.engine = Engine(adapt(model, rank, dropout, **targets))
        self.optimizer = bnb.optim.PagedAdamW8bit([self.engine.values], lr=1e-4)
        self.scaler = torch.amp.GradScaler(enabled=scaled)

    def step(self, batch: MicroBatch) -> torch.Tensor:
        """One pass and one step of the optimiser; returns the mean loss."""
        weight = 1 / len(batch.tokens)
        sums = self.engine.accumulate(batch, weight, lambda loss: self.scaler.scale(loss).backward())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.engine.gradients.zero_()
        return sums[0] * weight


def clean() -> None:
    """Give everything back that is not in use."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure_plans() -> list[dict[str, Any]]:
    """Peaks against plans."""
    results = []
    print(
        f"{'model':<12} {'tokens':>6} {'kept':>4} {'rank':>4} {'drop':>4} {'planned':>8} {'measured':>8} "
        f"{'reserved':>8} tokens/s, estimated"
    )
    for name in ("llama2-7b", "llama3.1-8b", "qwen2.5-7b", "phi3.5-mini"):
        shape = shape_of(name)
        for rank, dropout, dtype in ((64, 0.0, torch.bfloat16), (16, 0.1, torch.bfloat16), (64, 0.0, torch.float16)):
            attention._FIRST_CAPABILITY_WITH_FLASH = (99, 0) if dtype == torch.float16 else (8, 0)
            run = Run(make_model(shape, dtype), rank, dropout)
            config = TrainConfig(rank=rank, dropout=dropout)
            step = Step(shape, QuantizeConfig(), config, MAX_TOKENS, _gpu())
            for tokens, share in ((1024, 1.0), (2048, 1.0), (2560, 0.5), (4096, 0.25), (8192, 0.0), (512, 1.0)):
                results.append({"model": name, "rank": rank, "dropout": dropout, "dtype": str(dtype)})
                results[-1] |= _measure_plan(run, step, tokens, round(share * step.num_blocks))
            del run
            clean()
    attention._FIRST_CAPABILITY_WITH_FLASH = (8, 0)
    measured = [one for one in results if one["measured"]]
    worst = max(measured, key=lambda one: abs(one["planned"] / one["measured"] - 1))
    print(f"{len(measured)} settings, worst: {worst}")
    return results


def _measure_plan(run: Run, step: Step, tokens: int, kept: int) -> dict[str, Any]:
    limit = round(BUDGET * GIBIBYTE)
    plan = step.plan(tokens, 1, kept, limit)
    while not plan.fits and kept:
        kept -= 1
        plan = step.plan(tokens, 1, kept, limit)
    run.engine.keep(kept)
    batches = chats(tokens, step.shape.vocabulary)
    clean()
    run.step(next(batches))
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(3):
        run.step(next(batches))
    torch.cuda.synchronize()
    speed = 3 * tokens / (time.monotonic() - started)
    planned = planned_peak(plan)
    measured, reserved = (
        peak() / GIBIBYTE for peak in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    )
    stepped = run.engine.has_stepped_back
    run.engine.has_stepped_back, run.engine._most_tokens, run.engine.offload = False, None, False
    estimate = step.plan(tokens, 1, kept, limit).tokens_per_second
    print(
        f"{step.shape.architecture[:12]:<12} {tokens:>6} {kept:>4} {step.train.rank:>4} {step.train.dropout:>4} "
        f"{planned:8.2f} {measured:8.2f} {reserved:8.2f} {speed:8,.0f} {estimate or 0:8,.0f} "
        f"{planned / measured - 1:+.1%}"
        f"{' stepped back' if stepped else ''}",
        flush=True,
    )
    figures = {"planned": planned, "measured": measured, "reserved": reserved, "estimated_speed": estimate}
    figures = {key: round(value or 0, 3) for key, value in figures.items()}
    return {"tokens": tokens, "kept": kept, "stepped_back": stepped, "tokens_per_second": round(speed), **figures}


def _gpu() -> Gpu:
    """This card in the table, or the usual one."""
    return known_gpu(torch.cuda.get_device_name()) or Gpu.usual()


def planned_peak(plan: MemoryPlan) -> float:
    """GiB that torch counts: all but the paged optimiser's managed memory and the room for fragments."""
    return (plan.total - plan.parts["optimiser state"] - plan.parts["fragments"]) / GIBIBYTE


def find_longest() -> list[dict[str, Any]]:
    """Single rows, each longer than the one before, until one does not train."""
    shape, results = shape_of("llama2-7b"), []
    run = Run(make_model(shape, torch.bfloat16))
    step = Step(shape, QuantizeConfig(), TrainConfig(dropout=0), MAX_TOKENS, _gpu())
    for tokens in LONGEST:
        clean()
        plan = step.fullest(tokens, 1, round(BUDGET * GIBIBYTE))
        run.engine.keep(plan.num_kept)
        run.engine.offload = bool(plan.host)
        started = time.monotonic()
        try:
            loss = run.step(one_micro_batch([tokens], shape.vocabulary)).item()
        except Exception as error:
            print(f"longest: {tokens:,} tokens: {str(error)[:200]}", flush=True)
            break
        planned = planned_peak(plan)
        peak = torch.cuda.max_memory_allocated() / GIBIBYTE
        results.append({"tokens": tokens, "planned": planned, "peak": peak, "fits": plan.fits, "loss": loss})
        results[-1] |= {
            "seconds": time.monotonic() - started,
            "offload": run.engine.offload,
            "host": plan.host / GIBIBYTE,
        }
        print(f"longest: {results[-1]}", flush=True)
    return results


def compare_losses(steps: int = 200, layers: int = 8) -> dict[str, Any]:
    """The same rows and the same start, plain and fused, in bfloat16; 8 layers of Llama-2-7b, every row by itself."""
    shape = shape_of("llama2-7b")
    losses: dict[str, list[float]] = {}
    for kind in ("plain", "tune16"):
        model = make_model(shape, torch.bfloat16, layers)
        torch.manual_seed(0)
        adapted = adapt(model, 64, 0.0)
        batches, found = chats(2048, 4000), []
        source = [next(batches) for _ in range(20)]  # seen again and again, so that there is something to learn
        engine = Engine(adapted) if kind == "tune16" else None
        trained = [engine.values] if engine else [p for p in adapted.parameters() if p.requires_grad]
        optimizer = bnb.optim.PagedAdamW8bit(trained, lr=2e-4)
        for index in range(steps):
            batch = source[index % len(source)]
            if engine:
                found.append(engine.accumulate(batch, 1 / 2048, torch.Tensor.backward)[0] / 2048)
            else:
                found.append(_plain_step(adapted, batch) / 2048)
            optimizer.step()
            engine.gradients.zero_() if engine else optimizer.zero_grad()
        losses[kind] = torch.stack(found).tolist()
        del model, adapted, engine, optimizer, trained
        clean()
    apart = [abs(a - b) / a for a, b in zip(losses["plain"], losses["tune16"], strict=True)]
    result = {"first": losses["plain"][0], "last": losses["plain"][-1], "last_tune16": losses["tune16"][-1]}
    result |= {"largest_share_apart": max(apart), "mean_share_apart_last_50": sum(apart[-50:]) / 50}
    print(f"agreement: {result}", flush=True)
    return result


def _plain_step(model: Any, batch: MicroBatch) -> torch.Tensor:
    total = torch.zeros((), device="cuda")
    for start, end in pairwise(batch.segments.bounds.tolist()):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=batch.tokens[None, start:end], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels[start:end], reduction="sum")
        (loss / 2048).backward()
        total += loss.detach()
    return total


def stress_half(steps: int = 2000, layers: int = 2) -> dict[str, Any]:
    """Random rows and a high learning rate in float16, with the kernels of a card before Ampere."""
    attention._FIRST_CAPABILITY_WITH_FLASH = (99, 0)
    shape = shape_of("llama2-7b")
    run = Run(make_model(shape, torch.float16, layers), dropout=0.1, scaled=True)
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-3
    batches = chats(512, shape.vocabulary)
    losses = torch.stack([run.step(next(batches)) for _ in range(steps)])
    attention._FIRST_CAPABILITY_WITH_FLASH = (8, 0)
    bad = int((~losses.isfinite()).sum())
    result = {"steps": steps, "not_numbers": bad, "first": losses[0].item(), "last": losses[-1].item()}
    result |= {"scale": run.scaler.get_scale(), "values_finite": bool(run.engine.values.isfinite().all())}
    print(f"half: {result}", flush=True)
    return result


def provoke_faults() -> dict[str, Any]:
    """Far more kept activations than there is memory for: the engine steps back, and the gradients are the same."""
    shape = shape_of("llama2-7b")
    run = Run(make_model(shape, torch.bfloat16))
    batch = next(chats(8192, shape.vocabulary))
    clean()
    run.engine.keep(0)
    weight = 1 / len(batch.tokens)
    expected = run.engine.accumulate(batch, weight, torch.Tensor.backward)[0].item()
    gradients = run.engine.gradients.clone()
    run.engine.gradients.zero_()
    run.engine.keep(len(run.engine.blocks))
    found = run.engine.accumulate(batch, weight, torch.Tensor.backward)[0].item()
    apart = ((run.engine.gradients - gradients).norm() / gradients.norm()).item()
    result = {"expected": expected, "found": found, "gradients_apart": apart, "kept": run.engine.num_kept}
    print(f"faults: {result}", flush=True)
    return result


if __name__ == "__main__":
    main()
