"""TRL's SFTTrainer with the engine's passes: callbacks, logging and schedules are TRL's."""

from typing import Any

import torch
from torch import distributed
from trl import SFTTrainer

from components.engine.engine import Engine, Pass
from components.models.loading import device
from components.planning.memory import MemoryPlan, Step
from components.runtime.steps import say
from components.train.state import Resumable

_STEPS_TO_SETTLE = 3
_COLUMNS = ("input_ids", "shift_labels", "position_ids")


class EngineTrainer(Resumable, SFTTrainer):
    """Trains on data sets of passes (:func:`components.engine.packing.packed_dataset`), one pass per batch.

    The loss is the mean over all trained tokens of a step, whatever the number of passes, rows and processes. Several
    processes add up their gradients once per step.

    Args:
        step: what the memory plan is made of.
        planned: the plan to begin with; the first steps measure what it leaves. Without one everything is kept.
        options: of SFTTrainer.
    """

    def __init__(self, step: Step, planned: MemoryPlan | None, **options: Any) -> None:
        super().__init__(data_collator=_only, **options)
        self.engine = Engine(self.model)
        self.engine.keep(planned.num_kept if planned else len(self.engine.blocks))
        self.engine.offload = bool(planned and planned.host)
        self._step, self._planned = step, planned
        self.accelerator.prepare_model = lambda model, **_: model  # no DDP: training_step adds up one flat tensor
        if self.args.world_size > 1:
            distributed.broadcast(self.engine.values.data, 0)
        self.model_accepts_loss_kwargs = True  # so that a step's trained tokens are counted
        self._totals = self._no_totals()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One optimiser over the adapter's flat values: one kernel instead of hundreds."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        optimizer: torch.optim.Optimizer = kind(
            [{"params": [self.engine.values], "weight_decay": self.args.weight_decay}], **options
        )
        self.optimizer = optimizer
        return optimizer

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one pass; returns its share of the step's loss."""
        if not self.model.training:  # after an evaluation; thousands of modules are not told for nothing
            self.model.train()
        self.engine.begin()
        weight = 1 / torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=self.args.device).clamp(min=1)
        batch = self._pass(inputs)
        sums = self.engine.accumulate(batch, weight, self.accelerator.backward)
        self._totals += _with_counts(sums, batch, inputs["num_tokens"])
        if self.accelerator.sync_gradients:
            if self.args.world_size > 1:
                distributed.all_reduce(self.engine.gradients)
            if 0 < self.state.global_step < _STEPS_TO_SETTLE:  # the optimiser's state is there
                self._settle()
        loss: torch.Tensor = sums[0] * weight * self.args.world_size  # the Trainer takes the processes' mean
        return loss

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The adapter, which is one tensor."""
        return {"values": self.engine.values.data}

    @property
    def passes(self) -> tuple[int, int] | None:
        """Tokens of a pass and passes of a step, where the memory plan has chosen them."""
        return (self._planned.pass_tokens, self._planned.num_passes) if self._planned else None

    def counts(self) -> dict[str, Any]:
        """The sums over this process's passes since the last log entry."""
        return {"totals": self._totals.tolist()}

    def set_counts(self, counts: dict[str, Any]) -> None:
        """Put them back."""
        self._totals.copy_(torch.tensor(counts["totals"], dtype=self._totals.dtype))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: the Trainer's own count looks at every parameter in every pass."""
        return 0

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Scale the gradients down, which are one tensor here, to the largest norm; returns the norm before."""
        norm: torch.Tensor = self.accelerator.clip_grad_norm_([self.engine.values], self.args.max_grad_norm)
        return norm

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss over all trained tokens of the held-out rows."""
        self._record_training()
        self.model.eval()
        totals, passes = self._no_totals(), eval_dataset or self.eval_dataset
        with torch.no_grad():
            for index in range(self.args.process_index, len(passes), self.args.world_size):
                batch = self._pass(_only([passes[index]]))
                totals += _with_counts(self.engine.sums(batch), batch, 0)
        self._record("eval", totals)
        metrics = {f"{metric_key_prefix}_loss": self._metrics["eval"].pop("loss")[0]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL does, with the entropy and accuracy since the last time."""
        if self.model.training:
            self._record_training()
        super().log(logs, start_time)

    def _record_training(self) -> None:
        self._record("train", self._totals)
        self._metrics["train"].pop("loss", None)  # the Trainer has its own
        self._totals = self._no_totals()

    def _settle(self) -> None:
        """Keep more activations if the first steps have left memory for them."""
        if self._planned is None or self.engine.has_stepped_back or self.engine.offload:
            return
        parts = self._planned.parts  # of which the paged optimiser's state is not in torch's count
        spare = (
            self._planned.available - torch.cuda.max_memory_reserved() - parts["fragments"] - parts["optimiser state"]
        )
        kept = self.engine.num_kept
        more = self._step.more_that_keep(kept, self._planned.pass_tokens, spare)
        if more:
            self.engine.keep(kept + more)
            say("train", f"{kept + more} of {len(self.engine.blocks)} half layers keep activations: there is room")

    def _record(self, mode: str, totals: torch.Tensor) -> None:
        """Leave means over the trained tokens of all processes where TRL looks for them."""
        if self.args.world_size > 1:
            distributed.all_reduce(totals)
        loss, entropy, correct, count, num_tokens = totals.tolist()
        self._total_train_tokens += int(num_tokens)
        if count:
            for name, value in (("loss", loss), ("entropy", entropy), ("mean_token_accuracy", correct)):
                self._metrics[mode][name] = [value / count]
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _no_totals(self) -> torch.Tensor:
        """Sums of loss, entropy and correct guesses, the number of trained tokens, and that of all tokens."""
        return torch.zeros(5, dtype=torch.float64, device=self.args.device)

    def _pass(self, inputs: dict[str, Any]) -> Pass:
        tokens, labels, positions = (inputs[name] for name in _COLUMNS)
        return Pass.of(tokens, labels, positions, inputs["lengths"], self.args.device)


def least_over_processes(number: int) -> int:
    """The smallest of this number in all processes: their cards may differ, their steps must not."""
    if not distributed.is_initialized():
        return number
    smallest = torch.tensor(number, device=device())
    distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
    return int(smallest)


def _with_counts(sums: torch.Tensor, batch: Pass, num_tokens: int) -> torch.Tensor:
    return torch.cat([sums.detach(), (batch.labels >= 0).sum()[None], sums.new_full((1,), num_tokens)])


def _only(passes: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The one pass of a batch. What it tells the host stays there: nobody waits for the GPU to read it."""
    (one,) = passes
    tokens = {name: one[name] for name in _COLUMNS}
    return {
        **tokens,
        "labels": one["shift_labels"],
        "lengths": one["lengths"].tolist(),
        "num_tokens": int(one["num_tokens"]),
    }
