"""Says the progress of a training run, as lines."""

import resource
import time
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.runtime.lines import Line
from components.runtime.progress import PROGRESS, Progress

_HEARTBEAT_SECONDS = 300


class ProgressLines(TrainerCallback):
    """Says at each log entry: step, loss, speed, time left, memory; and every five minutes at least where it is."""

    def __init__(self) -> None:
        self._started = self._said = time.monotonic()
        self._first_step = self._first_token = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; a run may go on from a checkpoint, with steps and tokens of another process."""
        self._started = self._said = time.monotonic()
        self._first_step = state.global_step
        self._first_token = max((entry.get("num_tokens", 0) for entry in state.log_history), default=0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say where it is if nothing has been said for a while."""
        if time.monotonic() - self._said > _HEARTBEAT_SECONDS:
            self._say(Progress(state.global_step, state.max_steps))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say one line per training loss and per held-out loss."""
        logs = logs or {}
        if "eval_loss" in logs:
            self._say(Progress(state.global_step, state.max_steps, held_out=logs["eval_loss"]))
        elif "loss" in logs:
            elapsed = time.monotonic() - self._started
            left = elapsed / (state.global_step - self._first_step) * (state.max_steps - state.global_step)
            speed = (logs.get("num_tokens", 0) - self._first_token) / elapsed
            loss = float(logs["loss"])
            self._say(Progress(state.global_step, state.max_steps, loss, speed, left / 60, self.peak_memory()))

    def _say(self, progress: Progress) -> None:
        self._said = time.monotonic()
        Line("train", str(progress), PROGRESS, asdict(progress)).write()

    @staticmethod
    def peak_memory() -> float:
        """Peak memory in GiB: of the GPU's tensors, or of this process where there is no GPU."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
