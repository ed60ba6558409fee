"""What the fault scripts share: children that can be killed at any moment, and a tiny model with its rows.

Children are forked from a process that has imported everything, so that a kill costs tenths of a second. That process
itself computes nothing: threads do not survive a fork.
"""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.images import VERSION

Moment = Callable[[float], bool]  # told the seconds since the child began: now?


def child(work: Callable[[], object], log: Path, until: Moment | None = None) -> int:
    """Run `work` in a process of its own, its output going to `log`.

    Args:
        work: what it does; leaves with exit code 0, or as the command line would.
        log: grows.
        until: when to kill it with SIGKILL; never, if not given.

    Returns:
        The exit code; -9 for a killed process.
    """
    sys.stdout.flush()
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        _run(work, log)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if until and until(time.monotonic() - started):
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.001)


def _run(work: Callable[[], object], log: Path) -> None:
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def after(seconds: float) -> Moment:
    """The moment so many seconds after the beginning."""
    return lambda now: now >= seconds


def kills(num: int, kill: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Outcomes of `kill(number)` until it has ``killed`` so often; a moment may lie behind the end of the run."""
    outcomes: list[dict[str, Any]] = []
    num_killed = 0
    while num_killed < num:
        outcomes.append(kill(len(outcomes)))
        num_killed += outcomes[-1]["killed"]
        print(f"kill {num_killed} of {num}: {outcomes[-1]}", flush=True)
    return outcomes


def report(name: str, figures: dict[str, Any], is_reached: bool, output: Path | None) -> int:
    """Print the figures as one JSON object and keep them in `output`; returns the script's exit code."""
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": _processor(), "tune16": VERSION}
    text = json.dumps({"script": name, "reached": is_reached, **figures, "on": machine}, indent=2)
    print(text, flush=True)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    return 0 if is_reached else 1


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def write_model(folder: Path, seed: int = 7) -> None:
    """A tiny random Llama with the demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipelines.demo.base import _train_tokenizer
    from pipelines.demo.generate import CORPUS

    tokenizer = _train_tokenizer(CORPUS.read_text())
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_lesson(folder: Path, num_rows: int = 160, seed: int = 7) -> None:
    """The model, quantised (``weights``), and the demo's first rows, prepared (``rows``)."""
    from components.config import PrepareConfig, QuantizeConfig
    from components.prepare.dataset import prepare_dataset
    from components.quantize.checkpoint import quantize_checkpoint
    from pipelines.demo.generate import ORDERS

    write_model(folder / "model", seed)
    data = folder / "orders.jsonl"
    data.write_text("".join(ORDERS.read_text().splitlines(keepends=True)[:num_rows]))
    model = str(folder / "model")
    prepare_dataset(str(data), model, folder / "rows", PrepareConfig(max_tokens=128, held_out_share=0.1))
    quantize_checkpoint(model, folder / "weights", QuantizeConfig())
