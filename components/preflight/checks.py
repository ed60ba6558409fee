"""The step preflight: everything that can be known before a GPU is asked for."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from components import s3, versions
from components.config import PreflightConfig, PrepareConfig, QuantizeConfig, TrainConfig
from components.errors import Tune16Error
from components.memory import MemoryPlan, plan, read_shape
from components.references import parse, pin, read_config
from components.steps import say


@dataclass(frozen=True)
class Preflight:
    """Fixed references of model and data set, the champion's version (empty: none yet), and the memory plan."""

    model: str
    data: str
    champion: str
    plan: MemoryPlan


def check(
    config: PreflightConfig, prepare: PrepareConfig, quantize: QuantizeConfig, train: TrainConfig, path: str = ""
) -> Preflight:
    """Turn names into fixed references and find out what would fail later.

    Args:
        config: model, data set and GPU memory.
        prepare: settings that the memory plan needs, like those of the next two.
        quantize: the number of bits.
        train: adapter, micro-batch and so on.
        path: ``prefix/model-name`` in the connection's bucket that must be writable; empty checks no storage.

    Raises:
        Tune16Error: the storage cannot be written, model or data set cannot be read, the architecture is not
            supported, or training would not fit the GPU.
    """
    champion = None
    if path:
        s3.check_writable(s3.default_bucket(), path)
        say("preflight", f"s3://{s3.default_bucket()}/{path} is writable")
        champion = versions.read_champion(path)
    model = pin(parse(config.model, "model"))
    say("preflight", f"model {model}")
    data = pin(parse(config.data, "data"))
    say("preflight", f"data set {data}")
    with tempfile.TemporaryDirectory() as scratch:
        shape = read_shape(read_config(model, Path(scratch)), where=str(model))
    memory = plan(shape, quantize, prepare, train, config.gpu_memory)
    for line in memory.lines():
        say("preflight", line)
    refuse_unfit(memory)
    return Preflight(str(model), str(data), champion.version if champion else "", memory)


def refuse_unfit(memory: MemoryPlan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        Tune16Error: by how much it is over, and which knobs help.
    """
    if not memory.fits:
        over = (memory.total - memory.available) / 2**30
        largest = max(memory.parts, key=lambda name: memory.parts[name])
        raise Tune16Error(
            f"This run does not fit the GPU: it needs {over:.1f} GiB more than preflight_gpu_memory; the largest part "
            f"is '{largest}'. Lower train_micro_batch, prepare_max_tokens or train_rank, or set quantize_bits to 4."
        )


def as_markdown(memory: MemoryPlan) -> str:
    """The memory plan as a Markdown table for the dashboard."""
    rows = [f"| {name} | {size / 2**30:.2f} |" for name, size in memory.parts.items()]
    total = f"| **together**, of {memory.available / 2**30:.2f} | **{memory.total / 2**30:.2f}** |"
    return "\n".join(["| GPU memory while training | GiB |", "|---|---:|", *rows, total, ""])
