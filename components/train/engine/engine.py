"""A PEFT model's training pass."""

from dataclasses import dataclass
from typing import Any

import torch

from components.train.engine.attention import Segments
from components.train.engine.blocks import AttentionBlock, Batch, Block, MlpBlock
from components.train.engine.linear import is_supported
from components.train.engine.loss import HeadLoss

_ARCHITECTURES = {
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"
}  # fmt: skip


@dataclass(frozen=True)
class Pass:
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


class Engine:
    """Computes the loss of a PEFT model and its adapter's gradients, which lie in one flat buffer.

    Args:
        model: a PEFT model with LoRA layers; its adapter becomes float32, and views of :attr:`values`.

    Raises:
        ValueError: see :func:`unsupported`.
    """

    def __init__(self, model: Any) -> None:
        reason = unsupported(model)
        if reason:
            raise ValueError(reason)
        self._model, base = model, model.get_base_model()
        self._decoder, self._head = base.model, base.lm_head.weight
        self.blocks: list[Block] = []
        for layer in self._decoder.layers:
            self.blocks += [AttentionBlock(layer, base.config), MlpBlock(layer)]
        parameters = [parameter for block in self.blocks for parameter in block.parameters]
        self.values = torch.nn.Parameter(torch.cat([parameter.data.float().reshape(-1) for parameter in parameters]))
        self.values.grad = torch.zeros_like(self.values)
        self._adopt()

    def sums(self, batch: Pass) -> torch.Tensor:
        """Sums over the pass's labels, [3]: cross-entropy (with a gradient), entropy, tokens that were guessed."""
        with torch.autocast(self._head.device.type, enabled=False):
            x = self.hidden(batch)
            sums: torch.Tensor = HeadLoss.apply(x, self._decoder.norm, self._head, batch.labels)  # type: ignore[no-untyped-call]
        return sums

    def hidden(self, batch: Pass) -> torch.Tensor:
        """The states after the last layer, before the final norm, [tokens, hidden]."""
        x = self._decoder.embed_tokens(batch.tokens).detach().requires_grad_(torch.is_grad_enabled())
        cos, sin = self._decoder.rotary_emb(x, position_ids=batch.positions[None])
        shared = Batch(cos[0], sin[0], batch.segments, self._model.training)
        for block in self.blocks:
            block.is_done = False
            x = block(x, shared)
        return x

    def _adopt(self) -> None:
        """Make the model's adapter, and each block's part of it, views of the flat buffers."""
        assert self.values.grad is not None
        start = 0
        for block in self.blocks:
            size = sum(parameter.numel() for parameter in block.parameters)
            part = slice(start, start + size)
            block.values, block.gradients = self.values.data[part], self.values.grad[part]
            for parameter in block.parameters:
                view = slice(start, start + parameter.numel())
                parameter.data = self.values.data[view].view_as(parameter)
                parameter.grad = self.values.grad[view].view_as(parameter)
                start = view.stop


def unsupported(model: Any) -> str:
    """Why the engine cannot train a PEFT model; empty if it can."""
    base = model.get_base_model()
    config, architecture = base.config, type(base).__name__
    if architecture not in _ARCHITECTURES:
        return f"{architecture} is not among {', '.join(sorted(_ARCHITECTURES))}"
    if config.hidden_act != "silu" or getattr(config, "attention_dropout", 0) or getattr(config, "resid_pdrop", 0):
        return "its activation is not silu, or it has dropout of its own"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates only a part of each head"
    if not all(is_supported(layer) for layer in _linears(base)):
        return "it has layers or adapters that are not plain LoRA on 4-bit, 8-bit or 16-bit linear layers"
    return ""


def _linears(base: Any) -> list[Any]:
    return [
        module
        for layer in base.model.layers
        for half in (layer.self_attn, layer.mlp)
        for name, module in half.named_children()
        if name.endswith("_proj")
    ]
