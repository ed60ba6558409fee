"""The engine against plain PEFT and Transformers: same outputs, same gradients, same losses."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from components.config import PrepareConfig, QuantizeConfig, TrainConfig
from components.engine import attention, blocks, kernels, loss
from components.engine.attention import Segments
from components.engine.engine import Engine, MicroBatch, unsupported
from components.engine.packing import pack, packed_dataset
from components.models.loading import bound_float16, load_base
from components.models.shapes import read_shape
from components.prepare.dataset import prepare_dataset
from components.quantize.checkpoint import quantize_checkpoint
from components.runtime.errors import Tune16Error
from components.train.launch import train
from tests.conftest import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks on the Hub for it
ROWS = [5, 1, 17, 9]  # lengths of the packed rows
IGNORED = -100
COLUMNS = ("input_ids", "shift_labels", "position_ids")


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


def packed(rows: list[int] = ROWS) -> MicroBatch:
    torch.manual_seed(1)
    positions = torch.cat([torch.arange(length) for length in rows])
    tokens = torch.randint(3, 90, positions.shape)
    labels = tokens.roll(-1)
    labels[torch.rand(labels.shape) < 0.2] = IGNORED
    return MicroBatch(tokens, labels, positions, Segments.of_lengths(rows))


def plain_gradients(model: Any, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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


def gradients(model: Any, batch: MicroBatch, keep: str = "none") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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
    monkeypatch.setattr(blocks, "MLP_TOKENS", 16)
    monkeypatch.setattr(loss, "loss_tokens", lambda _: 12)
    for keep in ("none", "all"):
        assert_same(gradients(adapted(quantized("llama")), packed([40, 30]), keep), plain)


@pytest.mark.parametrize("bits", [8, 16])
def test_other_bases_take_the_same_road(
    quantized: Callable[..., Path], make_model: Callable[..., Path], bits: int
) -> None:
    if bits == 16:
        folder = make_model("llama", dtype=torch.float16)
        plain = adapted(folder)
    else:
        folder = quantized("llama", 8)
        plain = adapted(folder)
        for module in plain.modules():  # LLM.int8 rounds the activations too; the engine only the weights
            if isinstance(module, Linear8bitLt):
                module.forward = rounded_weights(module)
    assert_same(gradients(adapted(folder), packed()), plain_gradients(plain, packed()))


def rounded_weights(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = module.weight.data.float() * (module.weight.SCB / 127)[:, None]
    return lambda x: torch.nn.functional.linear(x, weight, module.bias)


def test_a_row_never_sees_another(quantized: Callable[..., Path]) -> None:
    engine, batch = Engine(adapted(quantized("llama"))), packed()
    together, start = engine.hidden(batch), 0
    for half in batch.halves():
        alone = engine.hidden(half)
        assert torch.allclose(together[start : start + len(alone)], alone, atol=1e-5)
        start += len(alone)


def test_attention_that_is_dropped_keeps_nothing_alive() -> None:
    inputs = [torch.randn(6, 2, 8) for _ in range(3)]
    storage = inputs[0].untyped_storage()
    uses = torch._C._storage_Use_Count(storage._cdata)
    attention.attend(*inputs, Segments.of_lengths([4, 2]), 0.3)  # without a backward, as after an evaluation
    assert torch._C._storage_Use_Count(storage._cdata) == uses


def test_dropout_is_unbiased_and_its_gradient_is_that_of_the_same_mask(quantized: Callable[..., Path]) -> None:
    engine, batch = Engine(adapted(quantized("llama"), lora_dropout=0.3)), packed()

    def loss(keep: int = 0) -> torch.Tensor:
        torch.manual_seed(5)
        engine.keep(keep)
        return engine.sums(batch)[0]

    loss().backward()
    recomputed = engine.gradients.clone()
    slope = recomputed.norm().item()
    direction = recomputed / slope
    engine.gradients.zero_()
    loss(keep=4).backward()
    assert torch.allclose(engine.gradients, recomputed, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        ahead = []
        for sign in (1, -2):
            engine.values += sign * 1e-2 * direction
            ahead.append(loss().item())
        engine.values += 1e-2 * direction
        assert slope == pytest.approx((ahead[0] - ahead[1]) / 2e-2, rel=2e-2)
        drawn = torch.stack([engine.sums(batch)[0] for _ in range(200)])
        engine._model.eval()
        assert drawn.mean() == pytest.approx(engine.sums(batch)[0].item(), rel=0.02) and drawn.std() > 0


class Faults:
    """Raises an out-of-memory error at chosen calls of the engine's operations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: set[int]) -> None:
        self.calls, self.raised, self.at = 0, 0, at
        for name in ("rms_norm", "rms_norm_backward_", "swiglu", "swiglu_backward_", "cross_entropy_", "rotate_"):
            monkeypatch.setattr(kernels, name, self._counted(getattr(kernels, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls in self.at:
                self.raised += 1
                raise torch.OutOfMemoryError("injected")
            return operation(*args, **options)

        return call


@pytest.mark.parametrize("seed", range(8))
def test_a_micro_batch_that_runs_out_of_memory_is_done_again(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    told: list[str] = []
    engine, batch = Engine(adapted(quantized("llama")), told.append), packed()
    engine.keep(4)
    expected = [engine.accumulate(batch, 0.1, torch.Tensor.backward) for _ in range(2)]
    gradients = engine.gradients.clone()
    engine.gradients.zero_()
    faults = Faults(monkeypatch, set(random.Random(seed).sample(range(1, 60), 4)))
    sums = [engine.accumulate(batch, 0.1, torch.Tensor.backward) for _ in range(2)]
    assert faults.raised >= 2 and all(line.startswith("out of memory: ") for line in told) and told
    assert torch.allclose(torch.stack(sums), torch.stack(expected), rtol=1e-5)
    assert torch.allclose(engine.gradients, gradients, rtol=1e-4, atol=1e-6)


def test_a_row_that_never_fits_is_told(quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(adapted(quantized("llama")))
    Faults(monkeypatch, set(range(1, 10000)))
    with pytest.raises(Tune16Error, match="a row of 5 tokens does not fit this GPU's memory. Lower max_tokens_per_row"):
        engine.accumulate(packed(), 1.0, torch.Tensor.backward)
    assert engine.offload


def test_inputs_that_wait_in_the_hosts_memory_change_nothing(quantized: Callable[..., Path]) -> None:
    plain = gradients(adapted(quantized("llama")), packed())
    model = adapted(quantized("llama"))
    engine = Engine(model)
    engine.offload = True
    sums = engine.sums(packed())
    sums[0].backward()
    assert_same((sums.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}), plain)


def test_what_the_engine_cannot_train(make_model: Callable[..., Path], quantized: Callable[..., Path]) -> None:
    def reason(base: Any, max_tokens: int = 64) -> str:
        content = base.config.to_dict() | {"architectures": [type(base).__name__]}
        content.pop("quantization_config", None)
        return unsupported(base, read_shape(content, "model"), max_tokens)

    mistral = load_base(make_model("mistral", sliding_window=64), torch.float32)
    assert reason(mistral) == ""
    assert "attention window is 64 tokens, and rows have up to 65" in reason(mistral, 65)
    assert "not plain LoRA" in reason(adapted(quantized("llama"), ["q_proj"], use_dora=True).get_base_model())
    turned = load_base(make_model("phi3", partial_rotary_factor=0.5), torch.float32)
    assert "rotates only a part of each head" in reason(turned)
    dropping = load_base(make_model("qwen2", attention_dropout=0.1), torch.float32)
    assert "dropout of its own" in reason(dropping)


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), max_size=300), st.integers(100, 400), st.integers(0, 5))
def test_packing_keeps_every_row_once_and_within_the_capacity(lengths: list[int], capacity: int, seed: int) -> None:
    groups = pack(lengths, capacity, seed)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in group) <= capacity for group in groups)
    assert groups == pack(lengths, capacity, seed)


@pytest.mark.parametrize("capacity", [2048, 2752, 4096])
def test_packing_fills_98_percent_on_lengths_of_chats(capacity: int) -> None:
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(5.75, 0.75, 5000).round(), 16, 1024).astype(int).tolist()
    groups = pack(lengths, capacity, 42)
    assert sum(lengths) / (len(groups) * capacity) >= 0.98


def test_packing_ends_on_lengths_that_do_not_fill() -> None:
    groups = pack([600] * 20_000, 1024, 0)  # two never fit: every group stays open
    assert len(groups) == 20_000


@pytest.fixture(scope="module")
def rows(make_model: Callable[..., Path], orders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "rows"
    prepare_dataset(str(orders), str(make_model("llama", dtype=torch.float16)), folder, PrepareConfig(max_tokens=128))
    return folder


def test_passes_hold_the_rows_and_their_next_tokens(rows: Path) -> None:
    table = pq.read_table(rows / "train.parquet").to_pylist()
    dataset, share = packed_dataset(rows / "train.parquet", 256, seed=1)
    expected = {tuple(row["input_ids"]): row["labels"] for row in table}
    seen, padding = 0, 0
    for one in dataset:
        assert len(one["input_ids"]) <= 256 and len(one["input_ids"]) % 64 == 0
        for ids, labels, positions in zip(*(one[name].split(one["lengths"].tolist()) for name in COLUMNS), strict=True):
            assert positions.tolist() == list(range(len(ids)))
            if not ids.any():
                padding += len(ids)
                assert (labels == IGNORED).all()
                continue
            seen += 1
            assert labels.tolist() == [*expected[tuple(ids.tolist())][1:], IGNORED]
    assert seen == len(table) and share == pytest.approx(1 - padding / sum(len(one["input_ids"]) for one in dataset))


@pytest.mark.slow
def test_fifty_steps_have_the_plain_losses(quantized: Callable[..., Path], rows: Path) -> None:
    """Plain PEFT and torch's AdamW against the engine and its flat adapter: the same batches in the same order."""
    dataset, _ = packed_dataset(rows / "train.parquet", 256, seed=1)
    micro_batches = [
        MicroBatch(*(one[name] for name in COLUMNS), Segments.of_lengths(one["lengths"].tolist())) for one in dataset
    ]
    plain, fused = adapted(quantized("llama")), adapted(quantized("llama"))
    engine = Engine(fused)
    optimizers = [
        torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3),
        torch.optim.AdamW([engine.values], lr=1e-3),
    ]
    for step in range(50):
        batch = micro_batches[step % len(micro_batches)]
        count = int((batch.labels >= 0).sum())
        expected = plain_gradients(plain, batch)[0][0] / count
        got = engine.accumulate(batch, 1.0, torch.Tensor.backward)[0] / count
        assert got.item() == pytest.approx(expected.item(), rel=1e-5), step
        for optimizer in optimizers:
            optimizer.step()
        plain.zero_grad()
        engine.gradients.zero_()


@pytest.mark.slow
def test_training_has_the_losses_of_plain_trl(quantized: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    """All rows in one step, so that the order does not matter."""
    losses = {}
    for name in ("tune16", "trl"):
        config = TrainConfig.load(
            engine=name, epochs=20, rank=8, dropout=0, micro_batch=1000, packing=False, learning_rate=2e-3
        )
        metrics = train(quantized("llama"), rows, tmp_path / name, config)
        losses[name] = [metrics["train_loss_first"], metrics["train_loss_last"], metrics["held_out_loss"]]
    assert losses["tune16"] == pytest.approx(losses["trl"], rel=1e-4)


def test_activations_beyond_float16_end_neither_the_engine_nor_plain_transformers(
    quantized: Callable[..., Path],
) -> None:
    """As Qwen2-7B has them in public: products of 1e5 and more, of which float16 makes infinity."""

    def outlier_model() -> Any:
        torch.manual_seed(0)
        base = load_base(quantized("qwen2"), torch.float16)
        base.model.layers[0].post_attention_layernorm.weight.data.fill_(6000)
        return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.3)).train()

    batch, plain = packed(), outlier_model()
    alone = batch.tokens[None, : ROWS[0]]
    assert not plain(input_ids=alone).logits.isfinite().all(), "the model has outliers"
    bound_float16(plain)
    assert plain(input_ids=alone).logits.isfinite().all()
    engine = Engine(outlier_model())
    sums = engine.sums(batch)
    sums[0].backward()
    assert sums.isfinite().all() and engine.gradients.isfinite().all() and engine.gradients.any()
