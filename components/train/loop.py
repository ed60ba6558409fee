"""The training loop: a run's steps from the first to the last, the same for the engine and for TRL's losses.

One step, :meth:`Loop._take_step`: every process takes its micro-batches of the step; each adds the gradients of its
summed loss over the step's number of learnt tokens, of all processes; these gradients are added up over the processes,
clipped, and the optimiser and the schedule move on. So the loss is the mean over all learnt tokens of a step, whatever
the number of micro-batches, rows and processes.

The engine's losses stay on the GPU until they are logged, evaluated or kept in a checkpoint, which wait for it anyway;
TRL waits for the GPU in each micro-batch.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from components.config import TrainConfig
from components.models.loading import device
from components.runtime.errors import Tune16Error
from components.runtime.steps import Termination
from components.train.checkpoints.state import read_state, restore, write_state
from components.train.checkpoints.store import Checkpoints
from components.train.distributed import processes
from components.train.learner import Learner
from components.train.progress import ProgressLines

_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}
_NOT_FINITE = (
    "train: the {what} became NaN or infinite at step {step:,}. Lower train.learning_rate, or on a GPU without "
    "bfloat16 set train.compute_dtype to float32."
)


class Loop:
    """A training run.

    Args:
        learner: computes losses and gradients.
        config: the settings.
        dtype: number format of the computation; float16 gets loss scaling.
        checkpoints: where the run's state is kept.
        log: is given each log entry: ``step``, ``epoch``, and ``loss``, ``learning_rate``, ``grad_norm``,
            ``num_tokens`` so far and what the learner measures, or ``eval_loss`` and the latter.

    Attributes:
        step: steps that have been done.
        num_steps: steps of the whole run.
        history: all log entries.
        tokens: that have been trained on, without padding.
    """

    def __init__(
        self,
        learner: Learner,
        config: TrainConfig,
        dtype: torch.dtype,
        checkpoints: Checkpoints,
        log: Callable[[dict[str, Any]], object] = lambda entry: None,
    ) -> None:
        self.learner, self._config, self._checkpoints, self._tell = learner, config, checkpoints, log
        joined = processes.join()
        self._index, self._num_processes = joined.process_index, joined.num_processes
        self.steps_per_epoch = math.ceil(learner.num_batches / (learner.per_step * self._num_processes))
        self.num_steps = max(1, math.ceil(self.steps_per_epoch * config.epochs))
        self.step, self.tokens, self.history = 0, 0, list[dict[str, Any]]()
        self.optimizer = make_optimizer(learner.parameters, config)
        self.scaler = torch.amp.GradScaler(device().type, enabled=dtype == torch.float16)
        warm_up = math.ceil(self.num_steps * config.warmup_share)
        self.schedule = get_scheduler(_SCHEDULES[config.schedule], self.optimizer, warm_up, self.num_steps)
        self.pending = list[list[float]]()  # sums of each step since the last log entry: loss, learnt, tokens, measured
        self._unseen = list[tuple[torch.Tensor, int, int]]()  # of this process: sums on the GPU, learnt, tokens
        self._norm = torch.zeros(())
        self._order: tuple[int, list[int]] = (-1, [])  # an epoch, and its micro-batches in their order
        self._kept_step, self._kept_at = -1, time.monotonic()
        self._seconds_before, self._started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent training so far, in all the processes that have worked on this run."""
        return self._seconds_before + time.monotonic() - self._started

    def run(self, newest: Path | None, termination: Termination) -> bool:
        """Train to the last step, from a checkpoint if there is one.

        Args:
            newest: the checkpoint.
            termination: says whether one of the processes has been asked to end; then a checkpoint is kept.

        Returns:
            Whether the last step was reached; the same in all processes.

        Raises:
            Tune16Error: the loss became NaN or infinite, or a single row does not fit the GPU.
        """
        self._begin(newest)
        while self.step < self.num_steps:
            self._take_step()
            is_last = self.step == self.num_steps
            if is_last or self.step % max(1, self.num_steps // 50) == 0:
                self._log()
            if is_last or self.step % max(1, self.num_steps // self._config.num_evaluations) == 0:
                self.evaluate()
            is_epochs_end = self.step % self.steps_per_epoch == 0
            is_due, ends = processes.agreed(self._is_due(), termination.is_asked)
            if is_last or is_epochs_end or is_due or ends:
                self._keep()
            if ends:
                break
        (was_asked,) = processes.agreed(termination.is_asked)  # none publishes what another calls unfinished
        return not was_asked and self.step == self.num_steps

    def _begin(self, newest: Path | None) -> None:
        processes.take_firsts(self.learner.parameters)
        if newest:
            tensors, state = read_state(newest)
            restore(self.learner.parameters, self.optimizer, tensors, state["optimizer"])
            for group, rate in zip(self.optimizer.param_groups, state["learning_rates"], strict=True):
                group["lr"] = rate
            self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.tokens, self.history = state["step"], state["tokens"], state["history"]
            self.pending, self._seconds_before = state["pending"], state["seconds"]
            processes.set_randomness(state["randomness"][self._index])
        self._progress = ProgressLines(self.step, self.num_steps, self.tokens)
        self._started = time.monotonic()
        self.learner.model.train()

    def _take_step(self) -> None:
        numbers = self._numbers_of_step()
        batches = [self.learner.batch(max(number, 0)) for number in numbers]
        counted = [batch for number, batch in zip(numbers, batches, strict=True) if number >= 0]
        learnt = sum(batch.num_learnt for batch in counted)
        learnt_by_all = processes.add_up(torch.tensor(learnt, device=device())).clamp(min=1)
        self.learner.begin_step()
        sums = torch.zeros(1 + len(self.learner.measured), dtype=torch.float64, device=device())
        for number, batch in zip(numbers, batches, strict=True):
            counts = number >= 0  # else it fills up a process that has fewer than others, which wait for it
            sums += counts * self.learner.backward(batch.content, counts / learnt_by_all, self._differentiate)
        processes.add_up_gradients(self.learner.parameters)
        self.scaler.unscale_(self.optimizer)
        self._norm = clip_grad_norm_(self.learner.parameters, self._config.max_gradient_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else the step was left out, since gradients were infinite
            self.schedule.step()
        self.step += 1
        self._unseen.append((sums, learnt, sum(batch.num_tokens for batch in counted)))
        self.learner.end_step(self.step)
        self._progress.step(self.step)

    def _differentiate(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _numbers_of_step(self) -> list[int]:
        """The process's own micro-batches of the step, of an order that is another in each epoch; -1 fills up."""
        epoch, step = divmod(self.step, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._config.seed + epoch)
            self._order = epoch, torch.randperm(self.learner.num_batches, generator=generator).tolist()
        size = self.learner.per_step * self._num_processes
        of_step = self._order[1][step * size : (step + 1) * size]
        of_step += [-1] * (-len(of_step) % self._num_processes)
        return of_step[self._index :: self._num_processes]

    def _log(self) -> None:
        self._look()
        loss = sum(row[0] / max(row[1], 1) for row in self.pending) / len(self.pending)
        rate = self.optimizer.param_groups[0]["lr"]
        entry = {"loss": loss, "learning_rate": float(rate), "grad_norm": float(self._norm), "num_tokens": self.tokens}
        self._enter(entry | self._measured(self.pending))
        self.pending = []

    def evaluate(self) -> None:
        """Log the mean loss over all learnt tokens of the held-out rows."""
        self._look()
        total = torch.zeros(1 + len(self.learner.measured), dtype=torch.float64, device=device())
        learnt = 0
        self.learner.model.eval()
        with torch.no_grad():
            for number in self._held_out():
                batch = self.learner.batch(number % self.learner.num_held_out, held_out=True)
                sums = self.learner.loss(batch.content)
                if number < self.learner.num_held_out:
                    total, learnt = total + sums, learnt + batch.num_learnt
        self.learner.model.train()
        loss, learnt, *measured = processes.add_up(
            torch.cat([total[:1], total.new_tensor([learnt]), total[1:]])
        ).tolist()
        if not math.isfinite(loss):
            raise Tune16Error(_NOT_FINITE.format(what="held-out loss", step=self.step))
        entry = {"loss": loss / max(learnt, 1)} | self._measured([[loss, learnt, 0, *measured]])
        self._enter({f"eval_{name}": value for name, value in entry.items()})

    def _held_out(self) -> Iterator[int]:
        """The process's own held-out micro-batches; those beyond the last one only keep it in step with the others."""
        per_process = math.ceil(self.learner.num_held_out / self._num_processes)
        return iter(range(self._index, per_process * self._num_processes, self._num_processes))

    def _look(self) -> None:
        """Bring the sums of the steps since the last look to the host, added up over the processes.

        Raises:
            Tune16Error: the loss of one became NaN or infinite.
        """
        if not self._unseen:
            return
        sums = torch.stack([sums for sums, *_ in self._unseen])
        counts = torch.tensor([counts for _, *counts in self._unseen], dtype=sums.dtype, device=sums.device)
        rows = processes.add_up(torch.cat([sums[:, :1], counts, sums[:, 1:]], 1)).tolist()
        for step, row in enumerate(rows, self.step - len(rows) + 1):
            if not math.isfinite(row[0]):
                raise Tune16Error(_NOT_FINITE.format(what="loss", step=step))
        self.tokens += int(sum(row[2] for row in rows))
        self.pending += rows
        self._unseen = []

    def _measured(self, rows: list[list[float]]) -> dict[str, float]:
        learnt = max(sum(row[1] for row in rows), 1)
        return {name: sum(row[3 + at] for row in rows) / learnt for at, name in enumerate(self.learner.measured)}

    def _enter(self, numbers: dict[str, float]) -> None:
        entry = {"step": self.step, "epoch": self.step / self.steps_per_epoch, **numbers}
        self.history.append(entry)
        self._progress.log(entry)
        self._tell(entry)

    def _is_due(self) -> bool:
        """Whether the first process has trained long enough since its last checkpoint."""
        has_waited = time.monotonic() - self._kept_at > self._config.checkpoint_minutes * 60
        return self._index == 0 and has_waited and not self._checkpoints.is_busy

    def _keep(self) -> None:
        """Keep a checkpoint: what the next step depends on is copied now, and written in the background."""
        if self.step == self._kept_step:
            return
        self._look()
        self._kept_step, self._kept_at = self.step, time.monotonic()
        randomness = processes.of_all(processes.randomness())
        if self._index:
            return
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "history": self.history,
            "pending": self.pending,
            "seconds": self.seconds,
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "randomness": randomness,
            "split": self.learner.split,
        }
        self._checkpoints.save(self.step, write_state(self.learner.parameters, self.optimizer, state))


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: with paged 8-bit state (Dettmers et al., https://arxiv.org/abs/2305.14314), or torch's own."""
    name = config.optimizer
    if name == "auto":
        name = "paged_adamw_8bit" if torch.cuda.is_available() else "adamw"
    options = {"lr": config.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": config.weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options)  # type: ignore[arg-type]
    from bitsandbytes.optim import PagedAdamW8bit

    optimizer: torch.optim.Optimizer = PagedAdamW8bit(parameters, **options)
    return optimizer
