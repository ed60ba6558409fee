"""Causal attention within each row of a packed batch, with the kernel that the device has.

FlashAttention's (Dao, 2023) for rows of different lengths from compute capability 8.0 on, the memory-efficient one
(Rabe and Staats, 2021; xFormers) on older cards, one row after the other on a CPU.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

_FIRST_CAPABILITY_WITH_FLASH = (8, 0)


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed batch lie: their bounds [rows + 1] in tokens, as int32, and the longest one."""

    bounds: torch.Tensor
    longest: int

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device | str = "cpu") -> "Segments":
        """Rows of these lengths, one after the other; found on the host, so that nobody waits for the GPU."""
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(bounds.to(device, non_blocking=True), max(lengths))


@dataclass
class Attended:
    """The output [tokens, heads, size] and what leads back from it."""

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
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    causal_from_top_left = 1
    return torch.ops.aten._efficient_attention_forward(  # type: ignore[no-any-return]
        q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, causal_from_top_left, True, scale=scale
    )[0][0]


def _one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], scale: float) -> torch.Tensor:
    rows = []
    for start, end in pairwise(bounds):
        one_q, one_k, one_v = (tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v))
        row = functional.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, scale=scale, enable_gqa=True)
        rows.append(row[0].transpose(0, 1))
    return torch.cat(rows)
