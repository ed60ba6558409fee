"""Frozen linear layers that share an input, with their LoRA adapters, as one operation with its own backward.

q/k/v, or gate/up, are one product with one dequantised weight; their A matrices lie one after the other, so that they
are one product too. Nothing is added out of place. Source: Hu et al., LoRA (2021).
"""

from dataclasses import dataclass
from typing import Any

import torch

from components.engine import kernels


@dataclass(frozen=True)
class Dropout:
    """Dropout of an adapter's input: the share that is dropped, and the seed that its mask is drawn from."""

    share: float
    seed: int


class Linears:
    """Linear layers with one input: y = gain · (x W^T + bias + scale · dropout(x) A^T B^T), with W frozen.

    Layers without an adapter may be among them. The dropout's mask is one for all of them.

    Args:
        layers: PEFT's LoRA layers, or the plain ones that have no adapter; see :func:`is_supported`.
        gain: factor of the output, such as Granite's ``residual_multiplier``.
    """

    def __init__(self, layers: list[Any], gain: float = 1.0) -> None:
        self._gain = gain
        self._bases = [_base(layer) for layer in layers]
        self._rows = [base.out_features for base in self._bases]
        self._columns: int = self._bases[0].in_features
        self._biases = [index for index, base in enumerate(self._bases) if base.bias is not None]
        self._adapted = [index for index, layer in enumerate(layers) if _is_adapted(layer)]
        adapted = [layers[index] for index in self._adapted]
        self._ranks = [layer.r["default"] for layer in adapted]
        self._scales = [gain * float(layer.scaling["default"]) for layer in adapted]
        self._share = getattr(adapted[0].lora_dropout["default"], "p", 0.0) if adapted else 0.0
        self.parameters = [layer.lora_A["default"].weight for layer in adapted]
        self.parameters += [layer.lora_B["default"].weight for layer in adapted]

    def bind(self, values: torch.Tensor, sums: torch.Tensor) -> None:
        """Take the adapters from `values`, and add their gradients to `sums`; both in the order of `parameters`.

        A are [sum of ranks, columns] together, and each B is [rows, rank].
        """
        self._a, self._b = self._matrices(values)
        self._a_t, self._b_t = self._a.t(), [b.t() for b in self._b]
        self._sum_a, self._sum_b = self._matrices(sums)

    def _matrices(self, flat: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        num_a = sum(self._ranks) * self._columns
        shapes = [(self._rows[index], rank) for index, rank in zip(self._adapted, self._ranks, strict=True)]
        parts = torch.split(flat[num_a:], [rows * rank for rows, rank in shapes])
        return flat[:num_a].view(-1, self._columns), [
            part.view(shape) for part, shape in zip(parts, shapes, strict=True)
        ]

    @property
    def drops(self) -> bool:
        """Whether the adapters have a dropout."""
        return self._share > 0

    def dropout(self, seed: int | None) -> Dropout | None:
        """The dropout with this seed; none for None, which is how it is outside training."""
        return Dropout(self._share, seed) if self.drops and seed is not None else None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The frozen weights, [sum of rows, columns]."""
        if len(self._bases) == 1 and _is_plain(self._bases[0]):
            weight: torch.Tensor = self._bases[0].weight.to(dtype)
            return weight
        out = torch.empty(sum(self._rows), self._columns, dtype=dtype, device=self._bases[0].weight.device)
        for base, part in zip(self._bases, _split(out, self._rows, 0), strict=True):
            _dequantize_(base, part)
        return out

    def reduce(self, x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor | None:
        """The product h = dropout(x) A^T, [tokens, sum of ranks]; None where no layer has an adapter."""
        if not self._adapted:
            return None
        return kernels.bound_(torch.mm(kernels.dropout(x, dropout.share, dropout.seed) if dropout else x, self._a_t))

    def forward(
        self, x: torch.Tensor, h: torch.Tensor | None, dense: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output [tokens, sum of rows], from x [tokens, columns] and its h; `residual` [tokens, rows] is added.

        Only layers with a residual have a gain.
        """
        # Bounded, since infinity and the adapter's infinity of the other sign would add up to NaN.
        if residual is None:
            y = torch.mm(x, dense.t())
        else:
            y = kernels.bound_(torch.addmm(residual, x, dense.t(), alpha=self._gain))
        outputs = _split(y, self._rows, 1)
        for index in self._biases:
            outputs[index].add_(self._bases[index].bias, alpha=self._gain)
        if h is not None:
            reduced = _split(h, self._ranks, 1)
            for index, part, b_t, scale in zip(self._adapted, reduced, self._b_t, self._scales, strict=True):
                outputs[index].addmm_(part, b_t, alpha=scale)
        return y

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, h: torch.Tensor | None, dense: torch.Tensor, dropout: Dropout | None
    ) -> torch.Tensor:
        """The gradient of x [tokens, columns] from that of y; the adapters' gradients are added up."""
        grad_x = torch.mm(grad, dense)
        if self._gain != 1:
            grad_x *= self._gain
        if h is None:
            return grad_x
        grads, grad_h = _split(grad, self._rows, 1), torch.empty_like(h)
        for index, part, reduced, b, total, scale in zip(
            self._adapted,
            _split(grad_h, self._ranks, 1),
            _split(h, self._ranks, 1),
            self._b,
            self._sum_b,
            self._scales,
            strict=True,
        ):
            part.addmm_(grads[index], b, beta=0, alpha=scale)
            total.addmm_(grads[index].t(), reduced, alpha=scale)
        if dropout is None:
            self._sum_a.addmm_(grad_h.t(), x)
            return grad_x.addmm_(grad_h, self._a)
        self._sum_a.addmm_(grad_h.t(), kernels.dropout(x, dropout.share, dropout.seed))
        return kernels.add_dropped_(grad_x, torch.mm(grad_h, self._a), dropout.share, dropout.seed)


def _split(whole: torch.Tensor, sizes: list[int], dim: int) -> tuple[torch.Tensor, ...]:
    return (whole,) if len(sizes) == 1 else torch.split(whole, sizes, dim)


def is_supported(layer: Any) -> bool:
    """Whether :class:`Linears` computes what this layer of a PEFT model does."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    base = _base(layer)
    if not (isinstance(base, (Linear4bit, Linear8bitLt)) or type(base) is torch.nn.Linear):
        return False
    if not _is_adapted(layer):
        return True
    changes_the_formula = any(layer.use_dora.values()) or any(layer.lora_bias.values())
    return list(layer.lora_A) == ["default"] and not changes_the_formula and not layer.merged


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if _is_adapted(layer) else layer


def _is_adapted(layer: Any) -> bool:
    return hasattr(layer, "lora_A")


def _is_plain(base: Any) -> bool:
    return base.weight.is_floating_point()  # type: ignore[no-any-return]


def _dequantize_(base: Any, out: torch.Tensor) -> None:
    """Write a frozen weight to `out` [rows, columns]."""
    if _is_plain(base):
        out.copy_(base.weight)
    elif base.weight.dtype == torch.int8:
        values, scales = base.state.CB, base.state.SCB
        if values is None:  # before bitsandbytes' own first forward
            values, scales = base.weight.data, base.weight.SCB
        torch.mul(values, (scales / 127)[:, None], out=out)
    else:
        kernels.dequantize_nf4_(base.weight.data, base.weight.quant_state, out)
