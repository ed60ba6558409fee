"""Where the step train runs: in this process, in one process for each GPU of this pod, or in pods on several nodes."""

import os
from pathlib import Path

from components.config import TrainConfig
from components.runtime.outputs import read_record
from components.train.checkpoints.store import Place
from components.train.distributed.pod import Group, check_gpus, train_in_processes

# The metrics by which runs are compared: the metric's name on the pages, which sort by it, and here.
_COMPARED = {
    "loss_training": "train_loss_last",
    "peak_memory_gib": "peak_memory_gib",
    "tokens_per_second": "tokens_per_second",
    "training_seconds": "seconds",
}


def train(
    weights: Path,
    rows: Path,
    output: Path,
    config: TrainConfig,
    teacher: Path | None = None,
    path: str = "",
    uris: tuple[str, str] = ("", ""),
) -> dict[str, float]:
    """Train an adapter as :func:`components.train.trainer.train_adapter` does, on as many GPUs and nodes as asked for.

    Args:
        weights: output of the step quantize.
        rows: output of the step prepare.
        output: becomes the adapter's folder.
        config: the settings.
        teacher: the step quantize's output for the model to learn from.
        path: ``prefix/model-name`` in the connection's bucket, for checkpoints; empty keeps them on disk only.
        uris: of the artifacts `weights` and `rows`, for several nodes.

    Raises:
        Tune16Error: as there; there are fewer GPUs than asked for, or the cluster cannot run a job on several nodes.
    """
    if not config.num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is asked for anything
    if config.num_nodes > 1:
        from components.train.distributed.nodes import train_on_nodes

        train_on_nodes({"weights": (weights, uris[0]), "rows": (rows, uris[1])}, output, config, path)
    elif config.num_gpus > 1:
        train_in_processes(weights, rows, output, config, Group(), path)
    else:
        from components.train.trainer import TrainingInputs, train_adapter

        check_gpus(config.num_gpus)
        return train_adapter(TrainingInputs(weights, rows, config, teacher), output, Place.of(output, path))
    metrics: dict[str, float] = read_record(output, "train")["metrics"]
    return metrics


def compared(metrics: dict[str, float]) -> dict[str, float]:
    """The few metrics by which people compare runs; the report has all of them."""
    return {name: metrics[own] for name, own in _COMPARED.items()}
