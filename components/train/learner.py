"""What the training loop trains: micro-batches, their loss and its gradients, whatever computes them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from components.engine.engine import Engine, MicroBatch
from components.engine.packing import packed_dataset
from components.models.loading import device
from components.planning.memory import MemoryPlan, Step
from components.runtime.steps import say

Backward = Callable[[torch.Tensor], None]

MAX_HELD_OUT_ROWS = 200  # that are looked at during training
_STEPS_TO_SETTLE = 3


@dataclass(frozen=True)
class Batch:
    """A micro-batch: whatever its learner makes of it, how many tokens are learnt, and how many there are."""

    content: Any
    num_learnt: int
    num_tokens: int


class Learner(ABC):
    """Computes losses and gradients of one model on one data set.

    Attributes:
        model: the PEFT model, which is saved in the end.
        parameters: what the optimiser changes.
        num_batches: micro-batches of an epoch, of all processes together.
        num_held_out: micro-batches of the rows held out.
        per_step: micro-batches of each process in a step.
        split: tokens of a micro-batch and micro-batches of a step, where the memory plan has chosen them.
        measured: names of what :meth:`loss` sums up besides the loss.
    """

    model: PeftModel
    parameters: list[torch.nn.Parameter]
    num_batches: int
    num_held_out: int
    per_step: int
    split: tuple[int, int] | None = None
    measured: tuple[str, ...] = ()

    @abstractmethod
    def batch(self, number: int, held_out: bool = False) -> Batch:
        """One micro-batch, of the rows to train on or of those held out."""

    @abstractmethod
    def loss(self, content: Any) -> torch.Tensor:
        """Sums over a micro-batch's learnt tokens, [1 + len(measured)]: the loss in nats, and what is measured."""

    def backward(self, content: Any, weight: float | torch.Tensor, backward: Backward) -> torch.Tensor:
        """Add the gradients of ``weight x summed loss`` to those that are there; returns :meth:`loss`.

        Args:
            content: of a micro-batch.
            weight: for example 1 / learnt tokens of the whole step.
            backward: begins automatic differentiation, with loss scaling where there is any.
        """
        sums = self.loss(content)
        backward(sums[0] * weight)
        return sums.detach()

    def begin_step(self) -> None:
        """Drop the gradients of the step before."""
        for parameter in self.parameters:
            parameter.grad = None

    def end_step(self, step: int) -> None:  # noqa: B027  (most learn nothing from a step)
        """See how the step with this number has gone."""


class EngineLearner(Learner):
    """The 16 GB engine (:mod:`components.engine`): packed micro-batches, an adapter in one flat tensor.

    Args:
        model: a PEFT model that the engine supports.
        rows: folder with the tokenised rows, an output of the step prepare.
        step: what the memory plan is made of.
        planned: the plan to begin with; the first steps measure what it leaves. Without one all activations are kept,
            and a micro-batch has as many tokens as the configuration's.
    """

    measured = ("entropy", "mean_token_accuracy")

    def __init__(self, model: PeftModel, rows: Path, step: Step, planned: MemoryPlan | None) -> None:
        config = step.train
        self.model, self._step, self._planned = model, step, planned
        self.engine = Engine(model, lambda line: say("train", line))
        self.engine.keep(planned.num_kept if planned else len(self.engine.blocks))
        self.engine.offload = bool(planned and planned.host)
        self.parameters = [self.engine.values]
        self.split = (planned.micro_batch_tokens, planned.num_micro_batches) if planned else None
        tokens = planned.micro_batch_tokens if planned else config.micro_batch * step.max_tokens
        self.per_step = planned.num_micro_batches if planned else config.gradient_accumulation
        each = None if config.packing else config.micro_batch
        self._batches, share = packed_dataset(rows / "train.parquet", tokens, config.seed, rows_per_micro_batch=each)
        self._held_out, _ = packed_dataset(rows / "held_out.parquet", tokens, config.seed, max_rows=MAX_HELD_OUT_ROWS)
        self.num_batches, self.num_held_out = len(self._batches), len(self._held_out)
        say("train", f"engine: micro-batches of {tokens:,} tokens, {share:.1%} filled")

    def batch(self, number: int, held_out: bool = False) -> Batch:
        """One micro-batch. What it tells the host stays there: nothing waits for the GPU to read it."""
        row = (self._held_out if held_out else self._batches)[number]
        labels, lengths = row["shift_labels"], row["lengths"].tolist()
        content = MicroBatch.of(row["input_ids"], labels, row["position_ids"], lengths, device())
        return Batch(content, int((labels >= 0).sum()), int(row["num_tokens"]))

    def loss(self, content: MicroBatch) -> torch.Tensor:
        """The engine's sums: cross-entropy, entropy, tokens that were guessed."""
        return self.engine.sums(content)

    def backward(self, content: MicroBatch, weight: float | torch.Tensor, backward: Backward) -> torch.Tensor:
        """The engine's gradients, whatever happens to the memory meanwhile."""
        return self.engine.accumulate(content, weight, backward)

    def begin_step(self) -> None:
        """Begin with zeros."""
        self.engine.begin()

    def end_step(self, step: int) -> None:
        """Keep more activations if the first steps have left memory for them."""
        if step >= _STEPS_TO_SETTLE or self._planned is None or self.engine.has_stepped_back or self.engine.offload:
            return
        parts = self._planned.parts  # of which the paged optimiser's state is not in torch's count
        spare = (
            self._planned.available - torch.cuda.max_memory_reserved() - parts["fragments"] - parts["optimiser state"]
        )
        kept, blocks = self.engine.num_kept, len(self.engine.blocks)
        if more := self._step.more_that_keep(kept, self._planned.micro_batch_tokens, spare):
            self.engine.keep(kept + more)
            say("train", f"activations kept in {kept + more} of {blocks} blocks: there is room")
