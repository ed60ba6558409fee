"""Forward and backward of a PEFT model, and what happens when memory runs out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from components.engine.attention import Segments
from components.engine.blocks import AttentionBlock, Batch, Block, MlpBlock
from components.engine.limits import keep_order
from components.engine.linear import is_supported
from components.engine.loss import HeadLoss
from components.models.shapes import ModelShape
from components.runtime.errors import Tune16Error


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together, one after the other.

    Attributes:
        tokens: ids, [tokens].
        labels: the token that each has to predict, [tokens]; -100 does not count.
        positions: of each token within its row, [tokens].
        segments: the rows' bounds.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    segments: Segments

    @classmethod
    def of(
        cls,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor,
        lengths: list[int],
        device: torch.device,
    ) -> "MicroBatch":
        """Rows of these lengths, brought to the device."""
        tokens, labels, positions = (part.to(device, non_blocking=True).long() for part in (tokens, labels, positions))
        return cls(tokens, labels, positions, Segments.of_lengths(lengths, device))

    def halves(self) -> "list[MicroBatch]":
        """The rows in two micro-batches of about as many tokens; one if there is only one row."""
        lengths = self.segments.lengths
        if len(lengths) == 1:
            return [self]
        middle = min(range(1, len(lengths)), key=lambda index: abs(2 * sum(lengths[:index]) - sum(lengths)))
        start = sum(lengths[:middle])
        return [self._part(0, start, lengths[:middle]), self._part(start, sum(lengths), lengths[middle:])]

    def _part(self, start: int, end: int, lengths: list[int]) -> "MicroBatch":
        part = slice(start, end)
        return MicroBatch.of(self.tokens[part], self.labels[part], self.positions[part], lengths, self.tokens.device)


class Engine:
    """Computes the loss of a PEFT model and its adapter's gradients, which lie in one flat buffer.

    Args:
        model: a PEFT model that :func:`unsupported` accepts; its adapter becomes float32, and views of
            :attr:`values`.
        tell: is told what becomes of the memory plan when memory runs out.
    """

    def __init__(self, model: Any, tell: Callable[[str], object] = lambda line: None) -> None:
        self._tell = tell
        self._model, base = model, model.get_base_model()
        self._decoder, self._head = base.model, base.lm_head.weight
        self._embedding_gain = float(getattr(base.config, "embedding_multiplier", 1.0))
        self._logits_scaling = float(getattr(base.config, "logits_scaling", None) or 1.0)
        self.blocks: list[Block] = []
        for layer in self._decoder.layers:
            self.blocks += [AttentionBlock(layer, base.config), MlpBlock(layer, base.config)]
        parameters = [parameter for block in self.blocks for parameter in block.parameters]
        self.values = torch.nn.Parameter(torch.cat([parameter.data.float().reshape(-1) for parameter in parameters]))
        self.gradients = torch.zeros_like(self.values.data)
        self.offload = False  # keep the blocks' inputs in the host's memory
        self.has_stepped_back = False
        self._most_tokens: int | None = None  # of a micro-batch, once a larger one has run out of memory
        self._adopt()

    def keep(self, count: int) -> None:
        """Let `count` blocks keep what their backward needs."""
        for rank, index in enumerate(keep_order(len(self.blocks))):
            self.blocks[index].keep = rank < count

    @property
    def num_kept(self) -> int:
        """How many blocks keep what their backward needs."""
        return sum(block.keep for block in self.blocks)

    def begin(self) -> None:
        """Begin a new step: with zeros."""
        self.gradients.zero_()

    def accumulate(
        self, batch: MicroBatch, weight: float | torch.Tensor, backward: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        """Add the gradients of ``weight x cross-entropy`` to those that are there; returns :meth:`sums`.

        A micro-batch that runs out of memory is computed again, with fewer blocks that keep activations and then in
        smaller parts, until it succeeds: the gradients are the same, and none counts twice.

        Args:
            batch: the rows.
            weight: of the summed cross-entropy, for example 1 / tokens of the whole step.
            backward: begins automatic differentiation, with loss scaling where there is any.

        Raises:
            Tune16Error: a single row does not fit.
        """
        return self._accumulate(batch, weight, backward, set())

    def _accumulate(
        self,
        batch: MicroBatch,
        weight: float | torch.Tensor,
        backward: Callable[[torch.Tensor], None],
        done: set[Block],
    ) -> torch.Tensor:
        """As accumulate; the gradients of the blocks in `done` are added already."""
        if len(batch.segments.lengths) > 1 and self._most_tokens and len(batch.tokens) > self._most_tokens:
            return torch.stack([self._accumulate(half, weight, backward, set(done)) for half in batch.halves()]).sum(0)
        state = torch.get_rng_state()
        try:
            sums = self.sums(batch, done)
            backward(sums[0] * weight)
            return sums.detach()
        except torch.OutOfMemoryError:
            pass  # leave this block, which holds the micro-batch's tensors
        sums = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
        torch.set_rng_state(state)
        self._step_back(batch)
        return self._accumulate(batch, weight, backward, done)

    def _step_back(self, batch: MicroBatch) -> None:
        """Need less memory from now on.

        Raises:
            Tune16Error: it cannot.
        """
        self.has_stepped_back, tokens = True, len(batch.tokens)
        if self.num_kept:
            self.keep(self.num_kept * 3 // 4)
            self._tell(f"out of memory: activations kept in {self.num_kept} of {len(self.blocks)} blocks from now on")
        elif len(batch.segments.lengths) > 1:
            self._most_tokens = max(len(half.tokens) for half in batch.halves())
            self._tell(f"out of memory: micro-batches of at most {self._most_tokens:,} tokens from now on")
        elif not self.offload:
            self.offload = True
            self._tell("out of memory: activations kept in the host's memory from now on")
        else:
            raise Tune16Error(
                f"train: a row of {tokens:,} tokens does not fit this GPU's memory. Lower max_tokens_per_row to "
                f"{tokens * 3 // 4:,} or less."
            )

    def sums(self, batch: MicroBatch, done: set[Block] | None = None) -> torch.Tensor:
        """Sums over the micro-batch's labels, [3]: cross-entropy (with a gradient), entropy, correct tokens.

        The backward leaves out blocks that are `done`, and adds the others to them.
        """
        with torch.autocast(self._head.device.type, enabled=False):
            x = self.hidden(batch, done)
            head = (self._decoder.norm, self._head, batch.labels, self._logits_scaling)
            sums: torch.Tensor = HeadLoss.apply(x, *head)  # type: ignore[no-untyped-call]
        return sums

    def hidden(self, batch: MicroBatch, done: set[Block] | None = None) -> torch.Tensor:
        """The states after the last layer, before the final norm, [tokens, hidden]."""
        x: torch.Tensor = self._decoder.embed_tokens(batch.tokens).detach()
        x = (x * self._embedding_gain if self._embedding_gain != 1 else x).requires_grad_(torch.is_grad_enabled())
        cos, sin = self._decoder.rotary_emb(x, position_ids=batch.positions[None])
        done = set() if done is None else done
        shared = Batch(cos[0], sin[0], batch.segments, self._model.training, self.offload, done)
        for block in self.blocks:
            x = block(x, shared)
        return x

    def _adopt(self) -> None:
        """Make the model's adapter and its gradients, and each block's part of them, views of the flat buffers."""
        self.values.grad = self.gradients
        largest = max(block.size for block in self.blocks)
        work, sums = torch.empty(2, largest, dtype=self._head.dtype, device=self._head.device)
        start = 0
        for block in self.blocks:
            part = slice(start, start + block.size)
            block.bind(self.values.data[part], self.gradients[part], work[: block.size], sums[: block.size])
            for parameter in block.parameters:
                view = slice(start, start + parameter.numel())
                parameter.data = self.values.data[view].view_as(parameter)
                parameter.grad = self.gradients[view].view_as(parameter)
                start = view.stop


def unsupported(base: Any, shape: ModelShape, max_tokens: int) -> str:
    """Why the engine cannot train a model of this shape on rows of so many tokens; empty if it can."""
    layers = [layer for layer in base.modules() if hasattr(layer, "lora_A") or isinstance(layer, torch.nn.Linear)]
    if not all(is_supported(layer) for layer in layers):
        return "some layers or adapters are not plain LoRA on 4-bit, 8-bit or 16-bit linear layers"
    return shape.why_plain(max_tokens)
