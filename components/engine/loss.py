"""Cross-entropy over the frozen head, one part of the tokens at a time, so that all logits never exist at once.

The gradient of the hidden states is computed together with the loss; the backward only scales it.
"""

from typing import Any

import torch

from components.engine import kernels
from components.engine.limits import loss_tokens


class HeadLoss(torch.autograd.Function):
    """Sums over tokens [3] in float32: cross-entropy, entropy, and how often the label has the highest logit.

    Args (of apply):
        x: last hidden states before the final norm, [tokens, hidden].
        norm: the final RMSNorm.
        head: the head's weight, [vocabulary, hidden].
        labels: the next token of each, [tokens]; negative ones do not count.
        scaling: what logits are divided by, as Granite's are.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: Any, head: torch.Tensor, labels: torch.Tensor, scaling: float = 1.0
    ) -> torch.Tensor:
        """The sums; the gradient of the cross-entropy is kept, [tokens, hidden]."""
        weight, eps = norm.weight, norm.variance_epsilon
        size, grads = loss_tokens(len(head)), torch.empty_like(x)
        sums = torch.zeros(3, dtype=torch.float32, device=x.device)
        for part, target, grad in zip(*(torch.split(whole, size) for whole in (x, labels, grads)), strict=True):
            logits = kernels.rms_norm(part, weight, eps) @ head.T
            if scaling != 1:
                logits /= scaling
            sums += kernels.cross_entropy_(logits, target).sum(1)
            if ctx.needs_input_grad[0]:
                torch.mm(logits, head, out=grad)
                if scaling != 1:
                    grad /= scaling
                kernels.rms_norm_backward_(grad, part, weight, eps)
        ctx.save_for_backward(grads)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """That gradient, scaled; the other sums have none."""
        (grads,) = ctx.saved_tensors
        return (grads * grad[0]).to(grads.dtype), None, None, None, None
