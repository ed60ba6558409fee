"""The two halves of a decoder layer, x + attention(norm(x)) and x + mlp(norm(x)), forward and backward.

Automatic differentiation keeps the inputs of every operation, activation checkpointing keeps none. Written out by hand,
a block keeps its input, and expensive intermediate results only with `keep`. Norms and the SiLU product are computed
again in any case: they cost one pass over memory.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from components.engine import kernels
from components.engine.attention import Attended, Segments, attend, attend_backward
from components.engine.limits import MLP_TOKENS
from components.engine.linear import Linears


@dataclass(frozen=True)
class Batch:
    """What all blocks share in one micro-batch.

    Attributes:
        cos: rotary table, [tokens, head size].
        sin: as `cos`.
        segments: the rows' bounds.
        training: whether there is dropout.
        offload: whether the blocks' inputs are kept in the host's memory for the backward.
        done: the blocks whose gradients of this micro-batch are added already; each adds itself.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    segments: Segments
    training: bool
    offload: bool
    done: "set[Block]"


class Block(ABC):
    """Half a decoder layer: a norm, linear layers on its output, something between, and a linear layer back.

    Args:
        norm: an RMSNorm of Transformers.
        into: the linear layers that read the norm's output.
        back: the linear layer whose output is added to the block's input.
    """

    def __init__(self, norm: Any, into: Linears, back: Linears) -> None:
        self._norm_weight, self._eps = norm.weight, norm.variance_epsilon
        self._into, self._back = into, back
        self.parameters = into.parameters + back.parameters
        self.keep = False  # keep what backward needs, instead of computing it again

    @property
    def size(self) -> int:
        """How many numbers the adapters have."""
        return sum(parameter.numel() for parameter in self.parameters)

    def bind(self, values: torch.Tensor, gradients: torch.Tensor, work: torch.Tensor, sums: torch.Tensor) -> None:
        """Take the adapters from `values`, and add a micro-batch's gradients to `gradients`, ordered as `parameters`.

        In between they lie in `work` and `sums`, which have the computation's format and are shared by all blocks.
        """
        self._values, self._gradients, self._work, self._sums = values, gradients, work, sums
        num_into = sum(parameter.numel() for parameter in self._into.parameters)
        self._into.bind(work[:num_into], sums[:num_into])
        self._back.bind(work[num_into:], sums[num_into:])

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Apply the block to x [tokens, hidden]."""
        y: torch.Tensor = _Function.apply(x, self, batch)  # type: ignore[no-untyped-call]
        return y

    def load(self) -> None:
        """Bring the adapters into the computation's format."""
        self._work.copy_(self._values)

    def clear(self) -> None:
        """Begin the sums of one micro-batch."""
        self._sums.zero_()

    def add(self) -> None:
        """Add the micro-batch's gradients to those of the step."""
        self._gradients += self._sums

    def seed(self, training: bool) -> int | None:
        """A new seed for the block's dropout, from torch's own generator, or None where it has none."""
        drops = training and (self._into.drops or self._back.drops)
        return int(torch.randint(2**31 - 2, ())) if drops else None

    @abstractmethod
    def forward(self, x: torch.Tensor, batch: Batch, seed: int | None) -> tuple[torch.Tensor, Any]:
        """The block's output, and what its backward needs."""

    @abstractmethod
    def backward(self, grad: torch.Tensor, x: torch.Tensor, kept: Any, batch: Batch, seed: int | None) -> torch.Tensor:
        """The gradient of x from that of the output.

        `kept` is from the forward, and overwritten, or None: then it is computed again.
        """

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self._norm_weight, self._eps)

    def _norm_backward(self, grad: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm_backward_(grad, x, self._norm_weight, self._eps, residual)


class _Function(torch.autograd.Function):
    """A block as automatic differentiation sees it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: Block, batch: Batch) -> torch.Tensor:
        seed = block.seed(batch.training)
        block.load()
        y, kept = block.forward(x, batch, seed)
        kernels.bound_(y)
        ctx.save_for_backward(_to_host(x) if batch.offload and ctx.needs_input_grad[0] else x)
        ctx.block, ctx.batch, ctx.seed, ctx.kept = block, batch, seed, kept if block.keep else None
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, block = ctx.saved_tensors[0].to(grad.device, non_blocking=True), ctx.block
        kept, ctx.kept = ctx.kept, None
        block.load()
        block.clear()
        grad_x = block.backward(grad, x, kept, ctx.batch, ctx.seed)
        if block not in ctx.batch.done:
            block.add()
            ctx.batch.done.add(block)
        return grad_x, None, None


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, pinned, so that it comes back without waiting."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x)


@dataclass
class _KeptAttention:
    h: torch.Tensor | None
    unnormed: torch.Tensor | None  # q and k before their norms, where they have any
    attended: Attended
    h_back: torch.Tensor | None


class AttentionBlock(Block):
    """x + o(attention(norm(x))), with rotary positions, grouped heads, and Qwen3's norms of q and k."""

    def __init__(self, layer: Any, config: Any) -> None:
        attention = layer.self_attn
        names = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        super().__init__(
            layer.input_layernorm,
            Linears([getattr(attention, name) for name in names]),
            Linears([attention.o_proj], _residual_gain(config)),
        )
        self._num_heads, self._num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self._num_rotated = self._num_heads + self._num_key_heads
        self._size: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()

    def forward(self, x: torch.Tensor, batch: Batch, seed: int | None) -> tuple[torch.Tensor, _KeptAttention]:
        """See Block."""
        kept = self._inner(x, batch, seed)
        mixed = kept.attended.out.flatten(1)
        return self._back.forward(mixed, kept.h_back, self._back.dense(x.dtype), residual=x), kept

    def _inner(self, x: torch.Tensor, batch: Batch, seed: int | None) -> _KeptAttention:
        """Everything before the linear layer back."""
        normed = self._normed(x)
        h = self._into.reduce(normed, self._into.dropout(seed))
        qkv = self._into.forward(normed, h, self._into.dense(x.dtype))
        del normed
        unnormed = None
        if self._head_norms:
            unnormed = qkv[:, : self._num_rotated * self._size].clone()
            for part, norm in zip(self._split(qkv), self._head_norms, strict=False):
                part.copy_(kernels.rms_norm(part.contiguous(), norm.weight, norm.variance_epsilon))
        kernels.rotate_(qkv, self._num_rotated, batch.cos, batch.sin)
        q, k, v = self._split(qkv)
        attended = attend(q, k, v, batch.segments, self._scaling)
        h_back = self._back.reduce(attended.out.flatten(1), self._back.dropout(_next(seed)))
        return _KeptAttention(h, unnormed, attended, h_back)

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        kept: _KeptAttention | None,
        batch: Batch,
        seed: int | None,
    ) -> torch.Tensor:
        """See Block."""
        kept = kept or self._inner(x, batch, seed)
        mixed, dropout = kept.attended.out.flatten(1), self._back.dropout(_next(seed))
        dense = self._back.dense(x.dtype)
        grad_mixed = self._back.backward(grad, mixed, kept.h_back, dense, dropout)
        grads = attend_backward(kept.attended, grad_mixed.view_as(kept.attended.out))
        del dense, mixed, grad_mixed
        qkv = torch.cat([part.flatten(1) for part in grads], 1)
        del grads
        kernels.rotate_(qkv, self._num_rotated, batch.cos, batch.sin, backward=True)
        if kept.unnormed is not None:
            for part, before, norm in zip(self._split(qkv), self._split(kept.unnormed), self._head_norms, strict=False):
                part.copy_(
                    kernels.rms_norm_backward_(
                        part.contiguous(), before.contiguous(), norm.weight, norm.variance_epsilon
                    )
                )
        dense, dropout = self._into.dense(x.dtype), self._into.dropout(seed)
        inner = self._into.backward(qkv, self._normed(x), kept.h, dense, dropout)
        return self._norm_backward(inner, x, residual=grad)

    def _split(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """q, k and, if there, v [tokens, heads, size] of [tokens, columns]."""
        q, k = self._num_heads * self._size, self._num_rotated * self._size
        parts = [qkv[:, :q], qkv[:, q:k], qkv[:, k:]]
        return [part.view(len(part), -1, self._size) for part in parts if part.shape[1]]


@dataclass
class _KeptMlp:
    h: torch.Tensor | None
    gate_up: torch.Tensor
    h_back: torch.Tensor | None


class MlpBlock(Block):
    """x + down(silu(gate) · up), with gate and up of norm(x); one part of the tokens at a time."""

    def __init__(self, layer: Any, config: Any) -> None:
        mlp = layer.mlp
        names = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
        super().__init__(
            layer.post_attention_layernorm,
            Linears([getattr(mlp, name) for name in names]),
            Linears([mlp.down_proj], _residual_gain(config)),
        )

    def forward(self, x: torch.Tensor, batch: Batch, seed: int | None) -> tuple[torch.Tensor, list[_KeptMlp]]:
        """See Block."""
        into, back = self._into.dense(x.dtype), self._back.dense(x.dtype)
        outputs, kept = [], []
        for part, part_seed in _parts(x, seed):
            one, act = self._inner(part, into, part_seed)
            outputs.append(self._back.forward(act, one.h_back, back, residual=part))
            kept += [one] if self.keep else []
            del one, act
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs), kept

    def _inner(self, x: torch.Tensor, dense: torch.Tensor, seed: int | None) -> tuple[_KeptMlp, torch.Tensor]:
        """Everything before the linear layer back, and that one's input."""
        normed = self._normed(x)
        h = self._into.reduce(normed, self._into.dropout(seed))
        gate_up = self._into.forward(normed, h, dense)
        act = kernels.swiglu(gate_up)
        return _KeptMlp(h, gate_up, self._back.reduce(act, self._back.dropout(_next(seed)))), act

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        kept: list[_KeptMlp] | None,
        batch: Batch,
        seed: int | None,
    ) -> torch.Tensor:
        """See Block."""
        into, back = self._into.dense(x.dtype), self._back.dense(x.dtype)
        outputs = []
        for index, ((part, part_seed), (g, _)) in enumerate(zip(_parts(x, seed), _parts(grad, None), strict=True)):
            if kept:
                one = kept[index]
                act = kernels.swiglu(one.gate_up)
            else:
                one, act = self._inner(part, into, part_seed)
            dropout = self._back.dropout(_next(part_seed))
            grad_act = self._back.backward(g, act, one.h_back, back, dropout)
            del act
            kernels.swiglu_backward_(grad_act, one.gate_up)
            del grad_act
            dropout = self._into.dropout(part_seed)
            inner = self._into.backward(one.gate_up, self._normed(part), one.h, into, dropout)
            outputs.append(self._norm_backward(inner, part, residual=g))
            del one, inner
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _residual_gain(config: Any) -> float:
    """What a block's output is multiplied by before it is added to its input: Granite has such a factor."""
    return float(getattr(config, "residual_multiplier", 1.0))


def _parts(x: torch.Tensor, seed: int | None) -> list[tuple[torch.Tensor, int | None]]:
    """The tokens in parts of :data:`MLP_TOKENS`, with a seed for each."""
    return [(part, _next(seed, 2 * index)) for index, part in enumerate(torch.split(x, MLP_TOKENS))]


def _next(seed: int | None, step: int = 1) -> int | None:
    return None if seed is None else (seed + step) % 2**31
