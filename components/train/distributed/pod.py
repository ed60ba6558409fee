"""Training in one process for each GPU of this pod, alone or with the pods of other nodes.

The processes train one adapter together: each takes its share of every step's micro-batches, and the gradients are
added up over all learnt tokens, so that 2 GPUs equal one with twice the micro-batches.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from components.config import TrainConfig
from components.kubernetes.account import is_step_of_pipeline
from components.runtime.cpus import num_threads
from components.runtime.errors import USER_ERROR_EXIT_CODE, Tune16Error, message_of
from components.runtime.redaction import protect_output
from components.runtime.steps import TERMINATED_EXIT_CODE, deferred_termination, quieten, say
from components.train.checkpoints.store import Place

_GRACE_SECONDS = 10  # that the others have to end by themselves once one process has


@dataclass(frozen=True)
class Group:
    """The processes that train together: how many nodes, which of them this is, and where the first one listens."""

    num_nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def train_in_processes(
    weights: Path, rows: Path, output: Path, config: TrainConfig, group: Group, path: str = ""
) -> None:
    """Train in one process for each GPU of this node; without a GPU they share the CPU.

    Raises:
        Tune16Error: there are fewer GPUs than ``num_gpus``, or a process met a user's mistake or was killed.
        SystemExit: the process was asked to end; a checkpoint has been kept.
    """
    check_gpus(config.num_gpus)
    group = group if group.port else Group(group.num_nodes, group.node, group.address, _free_port())
    say("train", f"{config.num_processes} processes, {config.processes_per_node} of them on this node")
    messages = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (weights, rows, output, config, group, Place.of(output, path), messages)
    with deferred_termination() as termination:
        processes = spawn(_work, arguments, nprocs=config.processes_per_node, join=False)  # type: ignore[no-untyped-call]
        has_told = False
        try:
            while not processes.join(timeout=1, grace_period=_GRACE_SECONDS):
                if termination.is_asked and not has_told:
                    has_told = True
                    for pid in processes.pids():
                        os.kill(pid, signal.SIGTERM)
        except (ProcessExitedException, ProcessRaisedException) as error:
            if not messages.empty():
                raise messages.get() from None
            if termination.is_asked or getattr(error, "exit_code", None) == TERMINATED_EXIT_CODE:
                raise SystemExit(TERMINATED_EXIT_CODE) from None
            if killed_by := getattr(error, "signal_name", None):
                raise Tune16Error(
                    f"train: one of the training processes was killed ({killed_by}); usually for lack of memory. "
                    "Start the run again: it continues from its newest checkpoint."
                ) from None
            raise RuntimeError(f"a training process ended unexpectedly: {error}") from error


def _work(
    local_rank: int,
    weights: Path,
    rows: Path,
    output: Path,
    config: TrainConfig,
    group: Group,
    place: Place,
    messages: Any,
) -> None:
    """One process of the group. All do the same; only the first one prints, and only its output is kept."""
    protect_output()
    quieten()
    rank = group.node * config.processes_per_node + local_rank
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(config.num_processes),
        "MASTER_ADDR": group.address,
        "MASTER_PORT": str(group.port),
        # Without it accelerate gives every process all cores, which then wait for each other most of the time.
        "OMP_NUM_THREADS": str(max(1, num_threads() // config.processes_per_node)),
    }
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    from components.train.trainer import TrainingInputs, train_adapter

    with tempfile.TemporaryDirectory() as scratch:
        if rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  (until the process ends)
            output = Path(scratch) / "adapter"
        try:
            train_adapter(TrainingInputs(weights, rows, config), output, place)
        except Exception as error:
            if not (message := message_of(error)):
                raise
            messages.put(error if isinstance(error, Tune16Error) else Tune16Error(message))
            raise SystemExit(USER_ERROR_EXIT_CODE) from None
    torch.distributed.destroy_process_group()


def check_gpus(wanted: int) -> None:
    """See that there are so many GPUs; a laptop may train on its CPU, a pipeline's pod may not.

    Raises:
        Tune16Error: there are fewer.
    """
    found = torch.cuda.device_count()
    if found < wanted and (found or is_step_of_pipeline()):
        raise Tune16Error(f"train.num_gpus: is {wanted}, but this node has {found} GPUs.")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
