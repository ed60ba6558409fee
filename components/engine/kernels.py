"""The element-wise and row-wise operations of a training step, each in one pass over memory.

On a GPU they are Triton kernels (:mod:`components.engine.triton_kernels`), elsewhere the torch code below, which
is also their definition. A trailing underscore says that an argument is overwritten.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

FLOAT16_MAX = 65504.0


@cache
def _triton() -> ModuleType | None:
    """The Triton kernels, or None where Triton is missing."""
    try:
        from components.engine import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _for(x: torch.Tensor) -> ModuleType | None:
    return _triton() if x.is_cuda else None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich's RMSNorm of [rows, size], computed in float32."""
    if fast := _for(x):
        return fast.rms_norm(x, weight, eps)  # type: ignore[no-any-return]
    return functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def rms_norm_backward_(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the norm's input, added to `residual`; `grad` [rows, size] is overwritten with it."""
    if fast := _for(x):
        return fast.rms_norm_backward_(grad, x, weight, eps, residual)  # type: ignore[no-any-return]
    value = x.float()
    scale = (value.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, g = value * scale, grad.float() * weight.float()
    result = (g - normed * (g * normed).mean(-1, keepdim=True)) * scale
    return grad.copy_(result if residual is None else result + residual.float())


def rotate_(x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False) -> None:
    """Rotary positions (Su et al., RoFormer), in place, of the first `heads` heads of each row of `x`.

    Args:
        x: [rows, columns], of which the first `heads` x size columns are turned; rows may be apart.
        heads: how many heads.
        cos: [rows, size], whose halves are equal, as Transformers makes it.
        sin: as `cos`.
        backward: turn back, which is the gradient of turning.
    """
    if fast := _for(x):
        fast.rotate_(x, heads, cos, sin, backward)
        return
    half = cos.shape[-1] // 2
    part = x[:, : heads * 2 * half].view(len(x), heads, 2, half)
    left, right = part.float().unbind(2)
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float() * (-1 if backward else 1)
    part.copy_(torch.stack([left * c - right * s, right * c + left * s], 2))


def bound_(x: torch.Tensor) -> torch.Tensor:
    """Keep float16 within its range, as Transformers does for T5: some models have activations beyond 65,504."""
    return x.clamp_(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else x


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up (Shazeer, GLU variants); `gate_up` is [rows, 2 x size], the result [rows, size].

    In float16 gate, up and their product are bounded (:func:`bound_`).
    """
    if fast := _for(gate_up):
        return fast.swiglu(gate_up)  # type: ignore[no-any-return]
    gate, up = _bounded(gate_up).chunk(2, 1)
    return _bounded(functional.silu(gate) * up, gate_up.dtype).to(gate_up.dtype)


def _bounded(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`x` in float32, within float16's range where that is its own format or `dtype`."""
    is_short = torch.float16 in (x.dtype, dtype)
    return x.float().clamp(-FLOAT16_MAX, FLOAT16_MAX) if is_short else x.float()


def swiglu_backward_(grad: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Overwrites `gate_up` with its gradient, from `grad` [rows, size]."""
    if fast := _for(grad):
        fast.swiglu_backward_(grad, gate_up)
        return
    gate, up = _bounded(gate_up).chunk(2, 1)
    share = gate.sigmoid()
    silu, g = gate * share, grad.float()
    gate_up.copy_(torch.cat([g * up * (share + silu * (1 - share)), g * silu], 1))


def dropout(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Dropout whose mask is drawn from `seed` whenever it is needed, so that none is kept for the backward pass.

    What stays grows by 1 / (1 - share), and is bounded in float16 (:func:`bound_`).
    """
    if fast := _for(x):
        return fast.dropout(x, share, seed)  # type: ignore[no-any-return]
    return bound_(x * _mask(x, share, seed))


def add_dropped_(total: torch.Tensor, x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """``total += dropout(x)``, with the mask of this seed."""
    if fast := _for(x):
        return fast.add_dropped_(total, x, share, seed)  # type: ignore[no-any-return]
    return total.add_(x * _mask(x, share, seed))


def _mask(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - share, generator=generator).div_(1 - share)


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per row; `logits` is overwritten with the gradient of the rows' sum.

    Args:
        logits: [rows, vocabulary].
        labels: [rows]; a negative one leaves its row out.

    Returns:
        [3, rows] in float32: loss and entropy in nats, and 1 where the label has the highest logit; 0 in rows left out.
    """
    if fast := _for(logits):
        return fast.cross_entropy_(logits, labels)  # type: ignore[no-any-return]
    counts = labels >= 0
    logs = logits.float().log_softmax(-1)
    chances = logs.exp()
    at = labels.clamp(min=0)[:, None]
    loss = -logs.gather(1, at)[:, 0]
    correct = logits.gather(1, at)[:, 0] >= logits.amax(1)
    out = torch.stack([loss, -(chances * logs).sum(1), correct.float()]) * counts
    logits.copy_((chances.scatter_add_(1, at, -torch.ones_like(at, dtype=chances.dtype))) * counts[:, None])
    return out


def dequantize_nf4_(packed: torch.Tensor, state: Any, out: torch.Tensor) -> None:
    """Write an NF4 weight with double quantisation (Dettmers et al., QLoRA) to `out` [rows, columns].

    Args:
        packed: bytes of two weights each, in bitsandbytes' order.
        state: bitsandbytes' QuantState.
        out: contiguous; its format is the result's.
    """
    fast = _for(packed)
    if fast and state.nested and state.blocksize == 64 and state.state2.blocksize == 256:
        fast.dequantize_nf4_(packed, state, out)
        return
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(packed, state))
