"""Training on several nodes, as one of them: what a pod of the job does that :mod:`.nodes` began."""

import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from components.runtime.errors import Tune16Error
from components.runtime.lines import ERROR, Line
from components.runtime.retry import patience
from components.runtime.steps import TERMINATED_EXIT_CODE, say
from components.train.distributed.pod import Group, train_in_processes
from components.train.distributed.scratch import ALIVE_SECONDS, JobEndedError, Scratch

_MASTER_PORT = 29500
_ENDED = (
    "train: the nodes were stopped before the last step (reported by node {node}; perhaps a node was drained, or "
    "its pod evicted), so there is no result. Start the run again: it continues from its newest checkpoint."
)


def train_as_node(source: str) -> None:
    """Fetch the inputs, train with the others, and, as the first node, keep the adapter.

    Args:
        source: ``s3://`` folder of the job.

    Raises:
        Tune16Error: as for training in one pod, or the step that began the job is gone.
    """
    scratch, node = Scratch.parse(source), int(_variable("NODE_RANK", "RANK", "0"))
    try:
        with patience():
            scratch.check_alive()
            threading.Thread(target=_watch, args=(scratch,), daemon=True).start()
            _train(scratch, node)
    except Tune16Error as error:
        with suppress(Tune16Error):
            scratch.report(node, error)
        raise
    except SystemExit as ended:
        if ended.code == TERMINATED_EXIT_CODE:
            with suppress(Tune16Error):
                scratch.report(node, Tune16Error(_ENDED.format(node=node)))
        raise


def _train(scratch: Scratch, node: int) -> None:
    address = _variable("MASTER_ADDR", "MASTER_ADDR", "127.0.0.1")
    port = int(_variable("MASTER_PORT", "MASTER_PORT", str(_MASTER_PORT)))
    with tempfile.TemporaryDirectory() as folder:
        weights, rows, settings, path = scratch.fetch_inputs(Path(folder))
        output = Path(folder) / "adapter"
        train_in_processes(weights, rows, output, settings, Group(settings.num_nodes, node, address, port), path)
        if node == 0:
            scratch.put_adapter(output)


def _variable(name: str, plain: str, default: str) -> str:
    """What the job's controller says: torchrun's PET_* variables, or the plain ones of older controllers."""
    return os.environ.get(f"PET_{name}") or os.environ.get(plain) or default


def _watch(scratch: Scratch) -> None:
    """End this pod when the step that began the job is gone; in a thread of its own, since training blocks this one.

    A storage that cannot be asked says nothing about the step.
    """
    while True:
        time.sleep(ALIVE_SECONDS)
        try:
            scratch.check_alive()
        except JobEndedError as error:
            Line("train", str(error), ERROR).write()
            os._exit(TERMINATED_EXIT_CODE)
        except Tune16Error as error:
            say("train", f"the storage does not answer; training continues: {error}")
