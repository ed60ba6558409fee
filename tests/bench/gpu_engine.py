"""Training speed on a GPU: the engine's layers against plain Transformers and PEFT, in 14.2 GiB, on random weights.

    python tests/bench/gpu_engine.py [--steps 6] [--json tests/bench/results/engine.json]

One base model of Llama-2-7b's shape is made in NF4 on the spot. Every setting trains the same adapter (rank 64 on all
linears) on rows of chat-like lengths (log-normal, mean about 400, cut at 1,024), with every layer recomputed, and
reports real tokens a second over the whole step, the peak of torch's allocator, and the loss of each step.
"""

import argparse
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, get_peft_model

GIBIBYTE = 2**30
BUDGET = 14.2
VOCABULARY = 32000
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def main() -> None:
    """Run all settings and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    card = torch.cuda.get_device_properties(0)
    torch.cuda.set_per_process_memory_fraction(BUDGET * GIBIBYTE / card.total_memory)
    results = []
    for dtype, name, fused, tokens, dropout, kept in (
        (torch.bfloat16, "plain, micro-batch 4, padded", False, 0, 0.0, 0),
        (torch.bfloat16, "plain, one row of 4,096", False, -4096, 0.0, 0),
        (torch.bfloat16, "engine, packed to 4,096", True, 4096, 0.0, 0),
        (torch.bfloat16, "engine, packed to 4,096, 4 layers kept", True, 4096, 0.0, 4),
        (torch.bfloat16, "engine, packed to 2,048, 12 layers kept", True, 2048, 0.0, 12),
        (torch.bfloat16, "engine, packed to 8,192", True, 8192, 0.0, 0),
        (torch.bfloat16, "engine, packed to 4,096, dropout 0.1", True, 4096, 0.1, 0),
        (torch.float16, "engine, packed to 4,096, efficient attention", True, 4096, 0.0, 0),
    ):
        results.append(_measure(name, dtype, fused, tokens, dropout, kept, arguments))
        print(json.dumps({key: value for key, value in results[-1].items() if key != "losses"}), flush=True)
    results.append(_compare_losses(arguments))
    print(json.dumps(results[-1]))
    if arguments.json:
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitsandbytes": bnb.__version__,
        }
        arguments.json.write_text(json.dumps({"card": card.name, **versions, "results": results}, indent=2) + "\n")


def _measure(
    name: str, dtype: torch.dtype, fused: bool, tokens: int, dropout: float, kept: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    try:
        losses, real, seconds = _train(dtype, fused, tokens, dropout, kept, arguments)
    except torch.OutOfMemoryError:
        return {"setting": name, "tokens_per_second": None, "peak_gib": None, "note": "out of memory"}
    finally:
        gc.collect()
    peak = torch.cuda.max_memory_allocated() / GIBIBYTE
    return {"setting": name, "tokens_per_second": round(real / seconds), "peak_gib": round(peak, 2), "losses": losses}


def _compare_losses(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same single rows, plain and fused: the losses have to follow each other."""
    plain = _train(torch.bfloat16, False, -2048, 0.0, 0, arguments)[0]
    fused = _train(torch.bfloat16, True, -2048, 0.0, 0, arguments)[0]
    apart = max(abs(a - b) / a for a, b in zip(plain, fused, strict=True))
    return {"setting": "losses, engine against plain", "largest_share_apart": apart}


def _train(
    dtype: torch.dtype, fused: bool, tokens: int, dropout: float, kept: int, arguments: argparse.Namespace
) -> tuple[list[float], int, float]:
    """Train some steps; returns the losses, and the real tokens and seconds of all steps after two for warming up."""
    efficient = dtype == torch.float16
    flash = engine._FIRST_CAPABILITY_WITH_FLASH
    engine._FIRST_CAPABILITY_WITH_FLASH = (99, 0) if efficient else flash  # what a card before Ampere has
    try:
        model = _model(dtype, fused, dropout, arguments.layers, kept)
        optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        scaler = torch.amp.GradScaler(enabled=efficient)
        torch.cuda.reset_peak_memory_stats()
        losses, real, started = [], 0, 0.0
        for step, batch in enumerate(_batches(tokens, arguments.steps + 2)):
            if step == 2:
                torch.cuda.synchronize()
                real, started = 0, time.monotonic()
            real += int((batch["labels"] != -100).sum())
            with torch.autocast("cuda", dtype):
                loss = model(**batch, use_cache=False).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        torch.cuda.synchronize()
        return losses, real, time.monotonic() - started
    finally:
        engine._FIRST_CAPABILITY_WITH_FLASH = flash


def _model(dtype: torch.dtype, fused: bool, dropout: float, layers: int, kept: int) -> Any:
    """Llama-2-7b's shape in NF4 with random weights and an adapter of rank 64."""
    torch.manual_seed(0)
    attention = "sdpa"
    if fused:
        pass
        attention = engine.ATTENTION
    config = transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}, vocab_size=VOCABULARY)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                setattr(parent, name, _nf4(child, dtype))
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            value = torch.ones if "norm" in name else lambda *size, **kw: torch.randn(*size, **kw) * 0.02
            owner.weight = torch.nn.Parameter(value(*parameter.shape, dtype=dtype, device="cuda"), requires_grad=False)
    model.is_loaded_in_4bit = True
    lora = LoraConfig(r=64, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear")
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    for layer in model.model.layers[:kept]:
        layer.gradient_checkpointing = False
    if fused:
        pass
    return adapted.train()


def _nf4(linear: torch.nn.Linear, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = torch.randn(linear.out_features, linear.in_features, dtype=dtype, device="cuda") * 0.02
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).cuda()
    layer.weight.quant_state.dtype = dtype
    return layer


def _batches(tokens: int, number: int) -> Any:
    """Batches of random rows: 4 padded ones (0), packed to `tokens`, or one row of -`tokens`."""
    source = random.Random(0)
    torch.manual_seed(1)

    def length() -> int:
        return max(16, min(1024, round(source.lognormvariate(5.75, 0.75))))

    for _ in range(number):
        if tokens == 0:
            lengths = [length() for _ in range(4)]
            ids = torch.randint(3, VOCABULARY, (4, max(lengths)), device="cuda")
            mask = torch.arange(max(lengths), device="cuda")[None] < torch.tensor(lengths, device="cuda")[:, None]
            yield {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
            continue
        lengths = [-tokens] if tokens < 0 else []
        while sum(lengths) < tokens:
            lengths.append(min(length(), tokens - sum(lengths)))
        positions = torch.cat([torch.arange(size, device="cuda") for size in lengths])[None]
        ids = torch.randint(3, VOCABULARY, positions.shape, device="cuda")
        yield {"input_ids": ids, "position_ids": positions, "labels": ids}


if __name__ == "__main__":
    main()
