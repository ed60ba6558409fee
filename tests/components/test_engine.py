"""The engine against plain PEFT and Transformers: same outputs, same gradients, same losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from components.config import PrepareConfig, QuantizeConfig, TrainConfig
from components.models import load_base
from components.prepare.dataset import prepare_dataset
from components.quantize.checkpoint import quantize_checkpoint
from components.train import engine
from components.train.trainer import train_adapter
from tests.conftest import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks on the Hub for it
ROWS = (5, 1, 17, 9)  # lengths of the packed rows


@pytest.fixture(scope="module")
def quantized(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("quantized") / kind
            quantize_checkpoint(str(make_model(kind, dtype=torch.float16)), made[kind], QuantizeConfig())
        return made[kind]

    return make


def adapted(folder: Path, attention: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    base = load_base(folder, torch.float32, attention)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, config).train()


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    positions = torch.cat([torch.arange(length) for length in ROWS])[None]
    return torch.randint(3, 90, positions.shape), positions


def gradients(
    model: Any, tokens: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=tokens, position_ids=positions).logits
    model.zero_grad()
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_outputs_and_gradients_are_the_plain_ones(quantized: Callable[[str], Path], kind: str) -> None:
    tokens, positions = packed()
    plain_logits, plain = gradients(adapted(quantized(kind), "sdpa"), tokens, positions)
    assert engine.attention_for(quantized(kind), 128) == engine.ATTENTION
    model = adapted(quantized(kind), engine.ATTENTION)
    assert engine.install(model) == 2 * (4 if kind == "phi3" else 7)
    logits, fused = gradients(model, tokens, positions)
    assert torch.allclose(logits, plain_logits, atol=1e-4)
    assert set(fused) == set(plain) and len(plain) == 4 * (4 if kind == "phi3" else 7)
    for name, gradient in plain.items():
        error = (fused[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, name


def test_a_row_never_sees_another(quantized: Callable[[str], Path]) -> None:
    tokens, positions = packed()
    engine.attention_for(quantized("llama"), 128)
    model = adapted(quantized("llama"), engine.ATTENTION)
    engine.install(model)
    together = model(input_ids=tokens, position_ids=positions).logits[0]
    start = 0
    for length in ROWS:
        alone = model(input_ids=tokens[:, start : start + length]).logits[0]
        assert torch.allclose(together[start : start + length], alone, atol=1e-5)
        start += length


def test_dropout_is_unbiased_and_its_backward_uses_the_same_mask() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(16, 12, bias=True).double().requires_grad_(False)
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 16), (12, 3)))

    def once(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return engine._LoraLinear.apply(*inputs, base, 0.7, 0.4)

    assert torch.autograd.gradcheck(once, (x, a, b))
    with torch.no_grad():
        drawn = torch.stack([engine._LoraLinear.apply(x, a, b, base, 0.7, 0.4) for _ in range(4000)]).mean(0)
    assert torch.allclose(drawn, base(x) + 0.7 * x @ a.T @ b.T, atol=0.5)


def test_layers_that_are_something_else_stay_as_they_are(make_model: Callable[..., Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(make_model("llama"), dtype=torch.float32)
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])
    assert engine.install(get_peft_model(base, config)) == 0


@pytest.mark.slow
def test_fifty_steps_have_the_plain_losses(
    make_model: Callable[..., Path], quantized: Callable[[str], Path], orders: Path, tmp_path: Path
) -> None:
    prepare_dataset(
        str(orders), str(make_model("llama", dtype=torch.float16)), tmp_path / "rows", PrepareConfig(max_tokens=128)
    )
    losses = {}
    for name in ("tune16", "trl"):
        config = TrainConfig.load(engine=name, epochs=3, rank=8, dropout=0, micro_batch=2, learning_rate=2e-3)
        metrics = train_adapter(quantized("llama"), tmp_path / "rows", tmp_path / name, config)
        losses[name] = [metrics["train_loss_first"], metrics["train_loss_last"], metrics["held_out_loss"]]
        assert metrics["steps"] >= 50
    assert losses["tune16"] == pytest.approx(losses["trl"], rel=1e-3)
