"""Causal attention within each row of a packed batch, with the kernel that the device has.

FlashAttention's (Dao, 2023) for rows of different lengths from compute capability 8.0 on, the memory-efficient one
(Rabe and Staats, 2021; xFormers) on older cards, one row after the other on a CPU.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

_FIRST_CAPABILITY_WITH_FLASH = (8, 0)
_CAUSAL = 1  # the memory-efficient kernel's number for a causal mask


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed batch lie: their bounds [rows + 1], as int32, and on the host their lengths."""

    bounds: torch.Tensor
    lengths: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device | str = "cpu") -> "Segments":
        """Rows of these lengths, one after the other; computed on the host, so that nothing waits for the GPU."""
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(bounds.to(device, non_blocking=True), lengths)


@dataclass
class Attended:
    """The output [tokens, heads, size], and the graph's ends for the backward."""

    out: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    end: torch.Tensor


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> Attended:
    """Attention over q [tokens, heads, size]; k and v may have fewer heads, of which each serves several of q's."""
    q, k, v = (part.detach().requires_grad_() for part in (q, k, v))
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        end = _varlen(q, k, v, segments, scale)
    return Attended(end.detach(), (q, k, v), end)


def attend_backward(attended: Attended, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of q, k and v; works once."""
    grads = torch.autograd.grad(attended.end, attended.inputs, grad)
    attended.inputs, attended.end = (), attended.out
    return grads


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    bounds, longest = segments.bounds, segments.longest
    if not q.is_cuda:
        return _one_by_one(q, k, v, bounds.tolist(), scale)
    if torch.cuda.get_device_capability(q.device) >= _FIRST_CAPABILITY_WITH_FLASH and q.dtype != torch.float32:
        return torch.ops.aten._flash_attention_forward(  # type: ignore[no-any-return]
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
        )[0]
    return _Efficient.apply(q, k, v, segments, scale)  # type: ignore[no-any-return, no-untyped-call]


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel, which lacks grouped heads: k and v are repeated for it, but not kept so."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float
    ) -> torch.Tensor:
        bounds, longest = segments.bounds, segments.longest
        repeated = (part[None] for part in (q, *_repeat(k, v, q.shape[1] // k.shape[1])))
        out, *rest = torch.ops.aten._efficient_attention_forward(
            *repeated, None, bounds, bounds, longest, longest, 0.0, _CAUSAL, True, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, *rest[:3])
        ctx.longest, ctx.bounds, ctx.scale = longest, bounds, scale
        output: torch.Tensor = out[0]
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, log_sums, seed, offset = ctx.saved_tensors
        groups, bounds, longest = q.shape[1] // k.shape[1], ctx.bounds, ctx.longest
        repeated = (part[None] for part in (q, *_repeat(k, v, groups)))
        grads = torch.ops.aten._efficient_attention_backward(
            grad[None], *repeated, None, out, bounds, bounds, longest, longest, log_sums, 0.0, seed, offset, _CAUSAL,
            False, scale=ctx.scale,
        )  # fmt: skip
        grad_q, *others = (part[0] for part in grads[:3])
        if groups > 1:
            others = [part.view(len(part), -1, groups, part.shape[2]).sum(2) for part in others]
        return grad_q, *others, None, None


def _repeat(k: torch.Tensor, v: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def _one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float) -> torch.Tensor:
    rows = []
    for start, end in pairwise(bounds):
        one_q, one_k, one_v = (tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v))
        row = functional.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, scale=scale, enable_gqa=True)
        rows.append(row[0].transpose(0, 1))
    return torch.cat(rows)
