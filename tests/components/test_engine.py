"""The engine against plain PEFT and Transformers: same outputs, same gradients, same losses."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from components.config import QuantizeConfig
from components.models import load_base
from components.quantize.checkpoint import quantize_checkpoint
from components.train.engine import blocks, loss
from components.train.engine.attention import Segments
from components.train.engine.engine import Engine, Pass
from tests.conftest import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks on the Hub for it
ROWS = [5, 1, 17, 9]  # lengths of the packed rows
IGNORED = -100


@pytest.fixture(scope="module")
def quantized(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, bits: int = 4) -> Path:
        if (kind, bits) not in made:
            folder = made[kind, bits] = tmp_path_factory.mktemp("quantized") / f"{kind}-{bits}"
            quantize_checkpoint(str(make_model(kind, dtype=torch.float16)), folder, QuantizeConfig(bits=bits))
        return made[kind, bits]

    return make


def adapted(folder: Path, targets: str | list[str] = "all-linear", **options: Any) -> Any:
    torch.manual_seed(0)
    base = load_base(folder, torch.float32)
    for name, parameter in base.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(base, config).train()


def packed(rows: list[int] = ROWS) -> Pass:
    torch.manual_seed(1)
    positions = torch.cat([torch.arange(length) for length in rows])
    tokens = torch.randint(3, 90, positions.shape)
    labels = tokens.roll(-1)
    labels[torch.rand(labels.shape) < 0.2] = IGNORED
    return Pass(tokens, labels, positions, Segments.of_lengths(rows))


def plain_gradients(model: Any, batch: Pass) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums, and the gradients of the summed loss; each row by itself, so that no mask is needed."""
    sums, bounds = torch.zeros(3), batch.segments.bounds.tolist()
    for start, end in itertools.pairwise(bounds):
        logits = model(input_ids=batch.tokens[None, start:end]).logits[0].float()
        labels = batch.labels[start:end]
        logs, counts = logits.log_softmax(-1), labels != IGNORED
        part = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        part.backward()
        entropy = -(logs.exp() * logs).sum(-1)[counts].sum()
        correct = (logits.argmax(-1) == labels)[counts].sum()
        sums += torch.stack([part, entropy, correct]).detach()
    return sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients(model: Any, batch: Pass, keep: str = "none") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    engine = Engine(model)
    for index, block in enumerate(engine.blocks):
        block.keep = keep == "all" or (keep == "some" and index % 3 == 0)
    sums = engine.sums(batch)
    sums[0].backward()
    return sums.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    fused: tuple[torch.Tensor, dict[str, torch.Tensor]], plain: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    assert torch.allclose(fused[0], plain[0], rtol=1e-5)
    assert set(fused[1]) == set(plain[1]) and plain[1]
    for name, gradient in plain[1].items():
        error = (fused[1][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "qwen3"])
@pytest.mark.parametrize("keep", ["none", "some", "all"])
def test_sums_and_gradients_are_the_plain_ones(quantized: Callable[..., Path], kind: str, keep: str) -> None:
    plain = plain_gradients(adapted(quantized(kind)), packed())
    fused = gradients(adapted(quantized(kind)), packed(), keep)
    assert len(plain[1]) == 4 * (4 if kind == "phi3" else 7)
    assert_same(fused, plain)


def test_layers_without_an_adapter_and_adapters_of_different_sizes(quantized: Callable[..., Path]) -> None:
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["q_proj", "k_proj", "up_proj"], {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"up_proj": 3}}),
        (["down_proj"], {}),
        (["v_proj", "o_proj"], {}),
    ]
    for targets, options in cases:
        plain = plain_gradients(adapted(quantized("qwen2"), targets, **options), packed())
        assert_same(gradients(adapted(quantized("qwen2"), targets, **options), packed(), "some"), plain)


def test_long_rows_go_through_the_mlp_and_the_head_in_parts(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plain_gradients(adapted(quantized("llama")), packed([40, 30]))
    monkeypatch.setattr(blocks, "_MLP_TOKENS", 16)
    monkeypatch.setattr(loss, "tokens_at_once", lambda _: 12)
    for keep in ("none", "all"):
        assert_same(gradients(adapted(quantized("llama")), packed([40, 30]), keep), plain)
