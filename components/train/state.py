"""All of a training run that its next step depends on: taken out of a Trainer, and put back into a new one.

That is the adapter, the optimiser, the schedule, the loss scaling, the random generators of every process, the position
in the data, and the losses that have been added up but not logged yet. Tensors go into safetensors and the rest into
JSON; nothing is pickled.
"""

import dataclasses
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.runtime.errors import Tune16Error
from components.runtime.outputs import read_json
from components.runtime.steps import Termination
from components.train.checkpoints import Checkpoints
from components.train.seal import step_of

_TENSORS, _STATE, _TRAINER_STATE = "state.safetensors", "state.json", "trainer_state.json"
_OPTIMIZER = "optimizer"
_NO_NUMBER = (
    "train: {what} is no finite number. Lower train.learning_rate; on a GPU without bfloat16, set train.compute_dtype "
    "to float32."
)


class Resumable(Trainer):
    """A Trainer that keeps checkpoints and goes on from one as if it had never been stopped.

    It stands before TRL's trainer among the bases: ``class X(Resumable, SFTTrainer)``.
    """

    def protect(self, checkpoints: Checkpoints, every_seconds: float, termination: Termination) -> None:
        """Keep a checkpoint every so many seconds, at the end of each epoch, and when the process is asked to end."""
        self._checkpoints = checkpoints
        self._kept_step = -1
        self._sums_of_losses: list[tuple[int, torch.Tensor]] = []
        self._seconds_before, self._started = 0.0, time.monotonic()
        self.add_callback(_Occasions(self, every_seconds, termination))

    @property
    def seconds(self) -> float:
        """Time spent training so far, in all the processes that have worked on this run."""
        return self._seconds_before + time.monotonic() - self._started

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, beside the optimiser's, that training changes in place."""
        return {name: value.data for name, value in self.model.named_parameters() if value.requires_grad}

    @property
    def passes(self) -> tuple[int, int] | None:
        """Tokens of a pass and passes of a step, where the memory plan has chosen them."""
        return None

    def counts(self) -> dict[str, Any]:
        """What this process has counted since the last log entry, beside the loss."""
        return {}

    def set_counts(self, counts: dict[str, Any]) -> None:
        """Put back what :meth:`counts` gave."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Take the state as it is now; it is written in the background."""
        if self.state.global_step == self._kept_step:
            return
        self._kept_step = self.state.global_step
        own = {"randomness": _randomness(), "loss": self._tr_loss.item(), **self.counts()}
        of_processes = _of_all_processes(own)
        if self.args.process_index:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # paged states are the host's memory too, which the GPU may still be writing
        values, numbers = _split(_optimizer_states(self.optimizer))
        tensors = {name: value.to("cpu", copy=True) for name, value in (self.state_tensors() | values).items()}
        state = json.dumps(
            {
                "optimizer": numbers,
                "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
                "schedule": self.lr_scheduler.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "processes": of_processes,
                "total_loss": self._total_loss_scalar,
                "last_logged": self._globalstep_last_logged,
                "metrics": self._metrics,
                "num_tokens": self._total_train_tokens,
                "seconds": self.seconds,
                "passes": self.passes,
            }
        )
        trainer_state = json.dumps(dataclasses.asdict(self.state))

        def write(folder: Path) -> None:
            save_file(tensors, folder / _TENSORS)
            (folder / _STATE).write_text(state)
            (folder / _TRAINER_STATE).write_text(trainer_state)

        self._checkpoints.save(self.state.global_step, write)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        """As the Trainer does, but for a loss that is no number any more: that ends the run, and no checkpoint has it.

        What has been added up is looked at when the GPU is waited for anyway.
        """
        self._sums_of_losses.append((self.state.global_step, tr_loss.detach().clone()))
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            are_numbers = torch.stack([total for _, total in self._sums_of_losses]).isfinite().flatten().tolist()
            if not all(are_numbers):
                first = self._sums_of_losses[are_numbers.index(False)][0]
                raise Tune16Error(_NO_NUMBER.format(what=f"the loss of step {first:,}"))
            self._sums_of_losses = []
        super()._maybe_log_save_evaluate(tr_loss, *arguments, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer does, but for a held-out loss that is no number."""
        if not math.isfinite(float(logs.get("eval_loss", 0))):
            raise Tune16Error(_NO_NUMBER.format(what=f"the held-out loss at step {self.state.global_step:,}"))
        super().log(logs, start_time)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Nothing where the run was killed after its last step: in part of an epoch there would be a next one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: the adapter is put back with the optimiser, once that exists."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Put the adapter, the optimiser and the schedule back."""
        if checkpoint is None:
            return
        tensors, state = load_file(Path(checkpoint) / _TENSORS), read_json(Path(checkpoint) / _STATE)
        for name, value in self.state_tensors().items():
            value.copy_(tensors.pop(name))
        _restore_optimizer(self.optimizer, tensors, state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, state["learning_rates"], strict=True):
            group["lr"] = rate
        self.lr_scheduler.load_state_dict(state["schedule"])
        self._seconds_before = state["seconds"]

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Put the loss scaling back."""
        if checkpoint is not None and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(read_json(Path(checkpoint) / _STATE)["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put the random generators back, and what was counted since the last log entry: the Trainer has zeroed it."""
        if checkpoint is None:
            return
        state = read_json(Path(checkpoint) / _STATE)
        own = state["processes"][self.args.process_index]
        _set_randomness(own["randomness"])
        self._tr_loss.fill_(own["loss"])
        self.set_counts(own)
        self._total_loss_scalar, self._globalstep_last_logged = state["total_loss"], state["last_logged"]
        for mode, values in state["metrics"].items():
            self._metrics[mode].update(values)
        self._total_train_tokens = state["num_tokens"]


class _Occasions(TrainerCallback):
    """Says when a checkpoint is due."""

    def __init__(self, trainer: Resumable, every_seconds: float, termination: Termination) -> None:
        self._trainer, self._every_seconds, self._termination = trainer, every_seconds, termination
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After so many seconds, and at once when the process is asked to end, which it then does."""
        is_due = time.monotonic() - self._last > self._every_seconds and not self._trainer._checkpoints.is_busy
        is_due, ends = agreed(is_due and not args.process_index, self._termination.is_asked)
        if is_due or ends:
            control.should_save = True
            self._last = time.monotonic()
        if ends:
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the end of each epoch."""
        control.should_save = True


def read_passes(checkpoint: Path) -> tuple[int, int] | None:
    """The passes that a checkpoint's run has been split into, as :attr:`Resumable.passes` gave them."""
    passes = read_json(checkpoint / _STATE)["passes"]
    return (passes[0], passes[1]) if passes else None


def is_first() -> bool:
    """Whether this is the only process, or the first of those that train together."""
    return os.environ.get("RANK", "0") == "0"


def agree_on_newest(checkpoints: Checkpoints, on_several_nodes: bool) -> Path | None:
    """The checkpoint that the first process finds, on every process's disk."""
    newest = checkpoints.newest(in_s3_only=on_several_nodes) if is_first() else None
    if not distributed.is_initialized():
        return newest
    steps = [step_of(newest) if newest else None]
    distributed.broadcast_object_list(steps)
    return checkpoints.fetch(steps[0]) if steps[0] is not None else None


def agreed(*flags: bool) -> list[bool]:
    """Each flag, true in all processes where it is true in one."""
    if not distributed.is_initialized():
        return list(flags)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    values = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def _optimizer_states(optimizer: Any) -> dict[str, dict[str, Any]]:
    """The optimiser's state of each parameter, by the parameter's number."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {str(number): dict(optimizer.state[parameter]) for number, parameter in enumerate(parameters)}


def _split(states: dict[str, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Tensors, by names such as ``optimizer/0/exp_avg``, and plain numbers."""
    tensors = {
        f"{_OPTIMIZER}/{number}/{name}": value
        for number, state in states.items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    numbers = {
        number: {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
        for number, state in states.items()
    }
    return tensors, numbers


def _restore_optimizer(optimizer: Any, tensors: dict[str, torch.Tensor], numbers: dict[str, dict[str, Any]]) -> None:
    """Put the optimiser's state back, into memory of its own kind.

    bitsandbytes' ``load_state_dict`` would make paged states plain ones
    (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/782), so it makes new ones first.
    """
    raw, number = getattr(optimizer, "optimizer", optimizer), 0  # out of accelerate's wrapper
    for group_index, group in enumerate(raw.param_groups):
        for index, parameter in enumerate(group["params"]):
            saved = {
                name.rpartition("/")[2]: value
                for name, value in tensors.items()
                if name.startswith(f"{_OPTIMIZER}/{number}/")
            }
            state = raw.state[parameter]
            if saved and hasattr(raw, "init_state"):
                raw.init_state(group, parameter, group_index, index)
            for name, value in saved.items():
                if name in state:
                    state[name].copy_(value)
                else:  # torch's own optimisers: counters stay on the CPU, moments lie beside their parameter
                    state[name] = value.to(parameter.device) if value.shape == parameter.shape else value
            state.update(numbers[str(number)])
            number += 1


def _randomness() -> dict[str, Any]:
    """The state of every random generator of this process."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else "",
    }


def _set_randomness(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _of_all_processes(value: Any) -> list[Any]:
    """The value of every process, in their order."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
