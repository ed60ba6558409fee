"""The training engine: the parts of a step that plain Transformers and PEFT do with too much memory traffic.

What it replaces, and why (measured on Llama-2-7b, rank 64; see tests/bench):

* PEFT's LoRA layer clones the base layer's output, adds out of place and copies its input for dropout. Here the frozen
  product and the adapter are one operation with a backward of its own: one buffer for the output, added to in place.
* RMSNorm in several passes over float32 copies. Here it is torch's own fused operation.
* Attention over packed rows through a dense mask of tokens x tokens. Here each row is a segment of its own
  (FlashAttention's varlen kernel, the memory-efficient one on cards before Ampere, a loop on a CPU).

Weights, names and checkpoints stay PEFT's; `engine: trl` trains without any of this, as the reference.
"""

import json
import types
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

ATTENTION = "tune16_varlen"

_FIRST_CAPABILITY_WITH_FLASH = (8, 0)


def install(model: Any) -> int:
    """Give every LoRA layer and norm of a PEFT model the fused forward; returns how many LoRA layers got it.

    Layers that are something else (LLM.int8 base, DoRA, several adapters) keep PEFT's own.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _can_fuse(module)]
    for layer in layers:
        layer.forward = types.MethodType(_fused_forward, layer)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(_fused_norm, module)
    return len(layers)


def attention_for(model: Path, max_tokens: int) -> str:
    """The attention to load a model folder with: :data:`ATTENTION`, or sdpa for one with a window that rows exceed."""
    window = json.loads((model / "config.json").read_text()).get("sliding_window")
    if window and window < max_tokens:
        return "sdpa"
    _register_attention()
    return ATTENTION


def _register_attention() -> None:
    """Make :data:`ATTENTION` a name that Transformers takes as ``attn_implementation``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)  # segments come from the positions


def _can_fuse(layer: Any) -> bool:
    from bitsandbytes.nn import Linear4bit

    base = layer.get_base_layer()
    return (
        (isinstance(base, Linear4bit) or type(base) is torch.nn.Linear)
        and list(layer.lora_A) == ["default"]
        and not any(layer.use_dora.values())
        and not any(layer.lora_bias.values())
    )


def _fused_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stands in for the forward of PEFT's LoRA layer."""
    if self.disable_adapters or self.merged or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    dropout = self.lora_dropout["default"]
    share = dropout.p if self.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    base = self.get_base_layer()
    dtype = getattr(base, "compute_dtype", None) or x.dtype
    with torch.autocast(x.device.type, enabled=False):
        y: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x.to(dtype),
            self.lora_A["default"].weight,
            self.lora_B["default"].weight,
            base,
            self.scaling["default"],
            share,
        )
    return y.to(x.dtype)


def _fused_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Stands in for the forward of the models' RMSNorm, which computes in float32 too."""
    return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scale · dropout(x) A^T B^T, with W frozen.

    Shapes: x [..., columns], A [rank, columns], B [rows, rank], y [..., rows]. Source: Hu et al., LoRA (2021), with the
    backward written out so that W is dequantised once in each direction and nothing is added out of place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: torch.nn.Module, scale: float, share: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = functional.linear(flat, _dense(base, x.dtype), _bias(base, x.dtype))
        keep = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - share) if share else None
        h = _dropped(flat, keep, share) @ a.to(x.dtype).T
        y.addmm_(h, b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(flat, a, b, h, keep)
        ctx.base, ctx.scale, ctx.share, ctx.shape = base, scale, share, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, a, b, h, keep = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_h = (grad @ b.to(x.dtype)).mul_(ctx.scale)
        grad_b = (grad.T @ h).to(b.dtype).mul_(ctx.scale)
        grad_a = (grad_h.T @ _dropped(x, keep, ctx.share)).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dense(ctx.base, x.dtype)
            if keep is None:
                grad_x.addmm_(grad_h, a.to(x.dtype))
            else:
                grad_x.add_((grad_h @ a.to(x.dtype)).mul_(keep), alpha=1 / (1 - ctx.share))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, share: float) -> torch.Tensor:
    return x if keep is None else (x * keep).mul_(1 / (1 - share))


def _dense(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight, [rows, columns], in `dtype`."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        weight: torch.Tensor = base.weight.to(dtype)
        return weight
    from bitsandbytes.functional import dequantize_4bit

    dense: torch.Tensor = dequantize_4bit(base.weight.data, state)
    return dense.to(dtype)


def _bias(base: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return None if base.bias is None else base.bias.to(dtype)


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed batch lie: their bounds [rows + 1] in tokens, as int32, and the longest one."""

    bounds: torch.Tensor
    longest: int


_last: tuple[torch.Tensor, Segments] | None = None


def find_segments(positions: torch.Tensor) -> Segments:
    """The rows of a packed batch, from positions [batch, tokens] that begin anew at 0; the last answer is kept."""
    global _last  # every layer asks for the same batch, and each look costs a wait for the GPU
    if _last is not None and _last[0] is positions:
        return _last[1]
    flat = positions.reshape(-1)
    starts = torch.nonzero(flat == 0).reshape(-1).to(torch.int32)
    bounds = torch.cat([starts, starts.new_tensor([flat.numel()])])
    segments = Segments(bounds, int(bounds.diff().max()))
    _last = (positions, segments)
    return segments


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a packed batch, as Transformers calls it.

    Args:
        module: the attention layer; unused.
        query: [batch, heads, tokens, size]; `key` and `value` may have fewer heads.
        key: as `query`.
        value: as `query`.
        attention_mask: None, as registered; padding stands at the right, where causal attention never looks back from.
        scaling: factor of the products.
        dropout: must be 0, as all supported models have it.
        position_ids: [batch or 1, tokens]; a row begins wherever it is 0.

    Returns:
        [batch, tokens, heads, size], and None for the weights.
    """
    assert not dropout, "attention dropout is not supported"
    batch, heads, tokens, size = query.shape
    if position_ids is None or position_ids.shape[0] != batch:
        position_ids = torch.arange(tokens, device=query.device).expand(batch, tokens)
    segments = find_segments(position_ids)
    q, k, v = (part.transpose(1, 2).reshape(batch * tokens, part.shape[1], size) for part in (query, key, value))
    out = _varlen(q, k, v, segments, scaling)
    return out.reshape(batch, tokens, heads, size), None


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    """Attention over [tokens, heads, size] with the kernel that the device has."""
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
