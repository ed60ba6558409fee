"""The engine's kernels in Triton: element-wise and row-wise only, no matrix products, so that they run on a T4 too.

Each has its meaning written down once, in torch, in :mod:`components.engine.kernels`; the tests compare the two.
All compute in float32 whatever the tensors' format.
"""

import torch
import triton
import triton.language as tl

_VALUES_PER_PROGRAM = 2048


@triton.jit
def _rms_norm(x, weight, out, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    value = tl.load(x + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, value * scale * w, mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See kernels.rms_norm."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    _rms_norm[(x.numel() // size,)](
        x, weight, out, size, eps, BLOCK=triton.next_power_of_2(size), num_warps=_warps(size)
    )
    return out


@triton.jit
def _rms_norm_backward(grad, x, weight, residual, size, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    value = tl.load(x + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row * size + columns, mask=mask, other=0.0).to(tl.float32) * w
    normed = value * scale
    result = (g - normed * (tl.sum(g * normed, axis=0) / size)) * scale
    if HAS_RESIDUAL:
        result += tl.load(residual + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad + row * size + columns, result, mask=mask)


def rms_norm_backward_(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> torch.Tensor:
    """See kernels.rms_norm_backward_."""
    size = x.shape[-1]
    _rms_norm_backward[(x.numel() // size,)](
        grad,
        x,
        weight,
        grad if residual is None else residual,
        size,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK=triton.next_power_of_2(size),
        num_warps=_warps(size),
    )
    return grad


@triton.jit
def _rotate(
    x, stride, cos, sin, table_stride, heads, sign, SIZE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (column < SIZE // 2)
    c = tl.load(cos + row * table_stride + column, mask=column < SIZE // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + row * table_stride + column, mask=column < SIZE // 2, other=0.0).to(tl.float32) * sign
    at = x + row * stride + head * SIZE + column
    left = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(at + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, left * c - right * s, mask=mask)
    tl.store(at + SIZE // 2, right * c + left * s, mask=mask)


def rotate_(x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> None:
    """See kernels.rotate_."""
    size = cos.shape[-1]
    _rotate[(x.shape[0],)](
        x,
        x.stride(0),
        cos,
        sin,
        cos.stride(0),
        heads,
        -1.0 if backward else 1.0,
        SIZE=size,
        HALF=triton.next_power_of_2(size // 2),
        HEADS=triton.next_power_of_2(heads),
        num_warps=8,
    )


def _limit(x: torch.Tensor) -> float:
    """The bound of numbers: float16's largest, and for other formats float32's."""
    return torch.finfo(torch.float16 if x.dtype == torch.float16 else torch.float32).max


@triton.jit
def _bounded(value, LIMIT: tl.constexpr):
    # NaN stays NaN, so that the run ends with an error.
    return tl.where(value != value, value, tl.clamp(value, -LIMIT, LIMIT))


@triton.jit
def _swiglu(gate_up, out, size, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=mask, other=0.0).to(tl.float32)
    gate, up = _bounded(gate, LIMIT), _bounded(up, LIMIT)
    tl.store(out + row * size + columns, _bounded(gate * tl.sigmoid(gate) * up, LIMIT), mask=mask)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See kernels.swiglu."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    grid = (rows, triton.cdiv(size, _VALUES_PER_PROGRAM))
    _swiglu[grid](gate_up, out, size, LIMIT=_limit(gate_up), BLOCK=_VALUES_PER_PROGRAM)
    return out


@triton.jit
def _swiglu_backward(grad, gate_up, size, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    at_gate = gate_up + row * 2 * size + columns
    gate = tl.load(at_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at_gate + size, mask=mask, other=0.0).to(tl.float32)
    gate, up = _bounded(gate, LIMIT), _bounded(up, LIMIT)
    g = tl.load(grad + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(at_gate, g * up * (share + silu * (1 - share)), mask=mask)
    tl.store(at_gate + size, g * silu, mask=mask)


def swiglu_backward_(grad: torch.Tensor, gate_up: torch.Tensor) -> None:
    """See kernels.swiglu_backward_."""
    rows, size = grad.shape
    grid = (rows, triton.cdiv(size, _VALUES_PER_PROGRAM))
    _swiglu_backward[grid](grad, gate_up, size, LIMIT=_limit(gate_up), BLOCK=_VALUES_PER_PROGRAM)


@triton.jit
def _dropout(x, out, count, share, seed, LIMIT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    # One call of the random generator gives four words, of which each decides one value of its own quarter.
    block = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK // 4)
    words = tl.rand4x(seed, tl.program_id(0) * (BLOCK // 4) + lanes)
    for quarter in tl.static_range(4):
        at = block * BLOCK + quarter * (BLOCK // 4) + lanes
        mask = at < count
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(words[quarter] >= share, value / (1 - share), 0.0)
        if ADD:  # gradients: the scaling of the loss has to see an overflow
            value += tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
        else:
            value = _bounded(value, LIMIT)
        tl.store(out + at, value, mask=mask)


def dropout(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """See kernels.dropout."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), _VALUES_PER_PROGRAM),)
    _dropout[grid](x, out, x.numel(), share, seed, LIMIT=_limit(x), ADD=False, BLOCK=_VALUES_PER_PROGRAM)
    return out


def add_dropped_(total: torch.Tensor, x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """See kernels.add_dropped_."""
    grid = (triton.cdiv(x.numel(), _VALUES_PER_PROGRAM),)
    _dropout[grid](x, total, x.numel(), share, seed, LIMIT=_limit(x), ADD=True, BLOCK=_VALUES_PER_PROGRAM)
    return total


@triton.jit
def _cross_entropy(logits, labels, loss, entropy, correct, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * SIZE
    label = tl.load(labels + row)
    counts = tl.where(label >= 0, 1.0, 0.0)
    at_label = tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    top, total, weighted = at_label, 0.0, 0.0
    for start in range(0, SIZE, BLOCK):
        mask = start + columns < SIZE
        value = tl.load(logits + start + columns, mask=mask, other=-65504.0).to(tl.float32)
        new_top = tl.maximum(top, tl.max(value, axis=0))
        part = tl.exp(value - new_top)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(part, axis=0)
        weighted = weighted * shrink + tl.sum(part * value, axis=0)
        top = new_top
    log_total = top + tl.log(total)
    tl.store(loss + row, (log_total - at_label) * counts)
    tl.store(entropy + row, (log_total - weighted / total) * counts)
    tl.store(correct + row, tl.where(at_label >= top, counts, 0.0))
    for start in range(0, SIZE, BLOCK):
        mask = start + columns < SIZE
        value = tl.load(logits + start + columns, mask=mask, other=-65504.0).to(tl.float32)
        gradient = tl.exp(value - log_total) - tl.where(start + columns == label, 1.0, 0.0)
        tl.store(logits + start + columns, gradient * counts, mask=mask)


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """See kernels.cross_entropy_."""
    out = torch.empty(3, len(labels), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(labels),)](logits, labels, *out, SIZE=logits.shape[1], BLOCK=4096, num_warps=8)
    return out


@triton.jit
def _dequantize_nf4(packed, code, scales, scale_code, scale_scales, offset, out, num_bytes, BLOCK: tl.constexpr):
    # 64 weights, or 32 bytes, share an 8-bit scale; 256 of those share a 32-bit one. The high half comes first.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_bytes
    byte = tl.load(packed + at, mask=mask, other=0).to(tl.int32)
    group = at // 32
    scale = tl.load(scale_code + tl.load(scales + group, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0)
    scale = scale * tl.load(scale_scales + group // 256, mask=mask, other=0.0) + tl.load(offset)
    high = tl.load(code + (byte >> 4)) * scale
    low = tl.load(code + (byte & 15)) * scale
    values = tl.interleave(high, low)
    start = tl.program_id(0).to(tl.int64) * BLOCK * 2
    place = start + tl.arange(0, BLOCK * 2)
    tl.store(out + place, values, mask=place < num_bytes * 2)


def dequantize_nf4_(packed: torch.Tensor, state: object, out: torch.Tensor) -> None:
    """See kernels.dequantize_nf4_."""
    _dequantize_nf4[(triton.cdiv(packed.numel(), 1024),)](
        packed,
        state.code,
        state.absmax,
        state.state2.code,
        state.state2.absmax,
        state.offset,
        out,
        packed.numel(),
        BLOCK=1024,
        num_warps=4,
    )


def _warps(size: int) -> int:
    return 8 if size >= 2048 else 4
