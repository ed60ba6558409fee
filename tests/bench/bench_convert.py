"""convert on a model of Llama-2-7b's width: its time beside llama.cpp's own script, and the peak memory of each part.

`--layers 32` is the whole 7B and takes 31 GB of disk. The converter reads through memory maps, whose pages count as
resident but can be dropped at any time; ``anonymous_mib`` is what cannot. With `--limit-gib 3` (as root) everything is
in a control group with so much memory, page cache included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from measure import write

from components.convert.llamacpp import convert_weights, converter
from components.convert.tokenizer import stage
from components.models.tensors import TensorWriter, write_index
from pipelines.demo.base import _train_tokenizer

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 4096, 11008, 32000, 32
QUANTIZE = "import sys; from pathlib import Path; from components.convert.llamacpp import quantize; "
QUANTIZE += "quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])"
# Where a control group limits memory: version 1 of the kernel's interface, or version 2.
OLD = Path("/sys/fs/cgroup/memory").is_dir()
GROUP = Path("/sys/fs/cgroup/memory" if OLD else "/sys/fs/cgroup") / "tune16-bench"
LIMIT, PEAK = ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if OLD else ("memory.max", "memory.peak")


def write_model(folder: Path, num_layers: int) -> int:
    """A Llama of random float16 weights, a file for every four layers; returns its bytes."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "dtype": "float16",
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _train_tokenizer("some words to learn from").save_pretrained(folder)
    square, wide = _random(HIDDEN, HIDDEN), _random(INTERMEDIATE, HIDDEN)
    matrices = {f"self_attn.{name}_proj": square for name in "qkvo"}
    matrices |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide.T.contiguous()}
    norm = torch.ones(HIDDEN, dtype=torch.float16)
    file_of_tensor: dict[str, str] = {}
    for first in range(0, num_layers, 4):
        name = f"model-{first:05d}.safetensors"
        with TensorWriter(folder / name, num_tensors=64) as writer:
            if first == 0:
                writer.add("model.embed_tokens.weight", _random(VOCABULARY, HIDDEN))
                writer.add("lm_head.weight", _random(VOCABULARY, HIDDEN))
                writer.add("model.norm.weight", norm)
            for layer in range(first, min(first + 4, num_layers)):
                for module, matrix in matrices.items():
                    writer.add(f"model.layers.{layer}.{module}.weight", matrix)
                for place in ("input_layernorm", "post_attention_layernorm"):
                    writer.add(f"model.layers.{layer}.{place}.weight", norm)
        file_of_tensor |= dict.fromkeys(writer.names, name)
    write_index(folder, file_of_tensor)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _random(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * 0.02).half()


@contextmanager
def watched(figures: dict[str, float]) -> Iterator[None]:
    """Take the time, and the most memory that this process's children have at once."""
    peaks, done = {"RssAnon": 0, "VmRSS": 0}, threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            now = dict.fromkeys(peaks, 0)
            for status in _children():
                for line in status.splitlines():
                    name, _, value = line.partition(":")
                    if name in now:
                        now[name] += int(value.split()[0])
            peaks.update({name: max(peaks[name], now[name]) for name in peaks})

    watcher = threading.Thread(target=look)
    watcher.start()
    started = time.monotonic()
    try:
        yield
    finally:
        figures["seconds"] = round(time.monotonic() - started, 1)
        done.set()
        watcher.join()
        figures["anonymous_mib"], figures["resident_mib"] = (round(peak / 1024) for peak in peaks.values())


def _children() -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{os.getpid()}\n" in (status := (folder / "status").read_text()):
                yield status
        except OSError:
            continue


def measure(name: str, work: Callable[[], object]) -> dict[str, float]:
    figures: dict[str, float] = {}
    with watched(figures):
        work()
    print(name, figures, file=sys.stderr, flush=True)
    return figures


def limit(gibibytes: float) -> None:
    """Let this process and its children have so much memory, page cache included."""
    GROUP.mkdir(exist_ok=True)
    (GROUP / LIMIT).write_text(str(round(gibibytes * 2**30)))
    (GROUP / "cgroup.procs").write_text(str(os.getpid()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--limit-gib", type=float, default=0)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    tools = converter()
    assert tools, "make llama"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        model, file = Path(scratch) / "model", Path(scratch) / "model.gguf"
        figures: dict[str, object] = {"layers": arguments.layers, "limit_gib": arguments.limit_gib}
        figures["bytes"] = write_model(model, arguments.layers)
        if arguments.limit_gib:
            limit(arguments.limit_gib)
        script = [sys.executable, tools / "convert_hf_to_gguf.py", model, "--outtype", "f16", "--outfile", file]
        quiet = {"check": True, "capture_output": True}

        def ours() -> None:
            convert_weights(tools, stage(model, Path(tempfile.mkdtemp(dir=scratch)) / "staged"), file, "model")

        for number in ("first", "second"):
            figures[f"llama.cpp's script, {number}"] = measure("script", lambda: subprocess.run(script, **quiet))
            file.unlink()
            figures[f"convert, {number}"] = measure("convert", ours)
        command = [sys.executable, "-c", QUANTIZE, file, Path(scratch) / "small.gguf", "Q4_K_M"]
        figures["quantise to Q4_K_M"] = measure("Q4_K_M", lambda: subprocess.run(command, **quiet))
        if arguments.limit_gib:
            figures["group_peak_mib"] = int((GROUP / PEAK).read_text()) >> 20
    write("convert" if arguments.layers < 32 else "convert-7b", figures)


if __name__ == "__main__":
    main()
