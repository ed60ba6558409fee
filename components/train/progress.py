"""Reports the progress of a training run, as lines."""

import resource
import time
from dataclasses import asdict
from typing import Any

import torch

from components.runtime.lines import Line
from components.runtime.progress import PROGRESS, Progress

_HEARTBEAT_SECONDS = 300


class ProgressLines:
    """Reports each log entry: step, loss, speed, time left, memory; and every five minutes at least the step.

    Args:
        step: from which this process continues.
        num_steps: of the whole run.
        tokens: that were trained on before.
    """

    def __init__(self, step: int, num_steps: int, tokens: int) -> None:
        self._started = self._said = time.monotonic()
        self._first_step, self._num_steps, self._first_token = step, num_steps, tokens

    def step(self, step: int) -> None:
        """Report the step if nothing was reported for a while."""
        if time.monotonic() - self._said > _HEARTBEAT_SECONDS:
            self._say(Progress(step, self._num_steps))

    def log(self, entry: dict[str, Any]) -> None:
        """Report a training loss or a held-out loss."""
        step = entry["step"]
        if "eval_loss" in entry:
            self._say(Progress(step, self._num_steps, held_out=entry["eval_loss"]))
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / (step - self._first_step) * (self._num_steps - step)
        speed = (entry["num_tokens"] - self._first_token) / elapsed
        self._say(Progress(step, self._num_steps, entry["loss"], speed, left / 60, self.peak_memory()))

    def _say(self, progress: Progress) -> None:
        self._said = time.monotonic()
        Line("train", str(progress), PROGRESS, asdict(progress)).write()

    @staticmethod
    def peak_memory() -> float:
        """Peak memory in GiB: of the GPU's tensors, or of this process where there is no GPU."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
