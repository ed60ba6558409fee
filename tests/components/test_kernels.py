"""The Triton kernels, under Triton's interpreter, against their definitions in torch."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from components.engine import kernels

fast = pytest.importorskip("components.engine.triton_kernels")
DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.allclose(left.float(), right.float(), atol=2e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_its_backward(dtype: torch.dtype) -> None:
    x, grad, residual = (torch.randn(5, 96, dtype=dtype) for _ in range(3))
    weight = torch.rand(96, dtype=dtype)
    assert close(fast.rms_norm(x, weight, 1e-5), kernels.rms_norm(x, weight, 1e-5), dtype)
    for more in (None, residual):
        expected = kernels.rms_norm_backward_(grad.clone(), x, weight, 1e-5, more)
        assert close(fast.rms_norm_backward_(grad.clone(), x, weight, 1e-5, more), expected, dtype)


@pytest.mark.parametrize("backward", [False, True])
def test_rotary_positions_turn_the_first_heads_of_a_wider_row(backward: bool) -> None:
    whole = torch.randn(7, 60)
    angles = torch.rand(7, 4).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    fused, plain = whole.clone(), whole.clone()
    fast.rotate_(fused[:, 4:], 5, cos, sin, backward)
    kernels.rotate_(plain[:, 4:], 5, cos, sin, backward)
    assert close(fused, plain, torch.float32) and torch.equal(plain[:, 44:], whole[:, 44:])
    kernels.rotate_(plain[:, 4:], 5, cos, sin, not backward)
    assert close(plain, whole, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_its_backward(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_VALUES_PER_PROGRAM", 32)
    gate_up, grad = torch.randn(3, 160, dtype=dtype), torch.randn(3, 80, dtype=dtype)
    assert close(fast.swiglu(gate_up), kernels.swiglu(gate_up), dtype)
    fused, plain = gate_up.clone(), gate_up.clone()
    fast.swiglu_backward_(grad, fused)
    kernels.swiglu_backward_(grad, plain)
    assert close(fused, plain, dtype)


@pytest.mark.parametrize("module", [fast, kernels])
def test_what_is_no_number_stays_none_and_an_overflown_gradient_infinite(module: Any) -> None:
    row = torch.tensor([[1.0, torch.nan, 1, 1, 1, torch.nan]], dtype=torch.float16)
    assert module.swiglu(row).isnan().tolist() == [[False, True, True]]
    grad = torch.ones(1, 3, dtype=torch.float16)
    module.swiglu_backward_(grad, row)
    assert row[:, :3].isnan().tolist() == [[False, True, True]]
    assert module.dropout(torch.full((8,), torch.nan, dtype=torch.float16), 0.0, 1).isnan().all()
    total = torch.ones(8, dtype=torch.float16)
    module.add_dropped_(total, torch.full((8,), torch.inf, dtype=torch.float16), 0.0, 1)
    assert total.isinf().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, under the interpreter
@pytest.mark.parametrize("module", [fast, kernels])
def test_swiglu_stays_within_float16(module: object) -> None:
    gate_up = torch.tensor(
        [[300.0, -300, 6e4, torch.inf, -torch.inf, 1, 300, 300, 6e4, torch.inf, 1, -torch.inf]]
    ).half()
    out = module.swiglu(gate_up)  # type: ignore[attr-defined]
    assert out.isfinite().all() and out[0, 2] == kernels.FLOAT16_MAX and out[0, 1] == 0
    grad = torch.ones_like(out)
    module.swiglu_backward_(grad, gate_up)  # type: ignore[attr-defined]
    assert not gate_up.isnan().any()


@pytest.mark.parametrize("module", [fast, kernels])
def test_dropout_drops_its_share_and_the_same_again(module: object) -> None:
    x = torch.ones(300, 100)
    dropped = module.dropout(x, 0.1, 5)  # type: ignore[attr-defined]
    assert torch.equal(dropped, module.dropout(x, 0.1, 5))  # type: ignore[attr-defined]
    assert not torch.equal(dropped, module.dropout(x, 0.1, 6))  # type: ignore[attr-defined]
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    total = module.add_dropped_(torch.full_like(x, 2.0), x, 0.1, 5)  # type: ignore[attr-defined]
    assert torch.allclose(total, dropped + 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [50, 9000])
def test_cross_entropy_and_its_gradient(dtype: torch.dtype, size: int) -> None:
    logits, labels = torch.randn(6, size, dtype=dtype) * 3, torch.randint(size, (6,))
    labels[2] = -100
    labels[4] = logits[4].argmax()
    fused, plain = logits.clone(), logits.clone()
    sums, expected = fast.cross_entropy_(fused, labels), kernels.cross_entropy_(plain, labels)
    assert torch.allclose(sums, expected, atol=1e-4) and close(fused, plain, dtype)
    exact = logits.float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    loss.backward()
    assert exact.grad is not None and close(plain, exact.grad, dtype)
    assert torch.allclose(expected[0].sum(), loss, rtol=1e-5)
    assert expected[2, 4] == 1 and expected[:, 2].abs().sum() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_what_bitsandbytes_makes_of_it(dtype: torch.dtype) -> None:
    weight = torch.randn(80, 640, dtype=dtype)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    out, plain = torch.empty_like(weight), torch.empty_like(weight)
    fast.dequantize_nf4_(packed, state, out)
    kernels.dequantize_nf4_(packed, state, plain)
    assert torch.equal(plain, dequantize_4bit(packed, state))
    assert close(out, plain, dtype)
