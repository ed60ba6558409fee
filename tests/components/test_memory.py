"""The memory plan: against what was measured on a GPU, and what it promises of itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.config import PreflightConfig, PrepareConfig, QuantizeConfig, Recipe, TrainConfig
from components.engine.limits import keep_order
from components.models.shapes import known_shape
from components.planning.gpus import GPUS, find_gpu, known_gpu
from components.planning.memory import GIBIBYTE, HOST_MEMORY, Step, nearest, plan
from components.runtime.errors import Tune16Error
from tests.bench.random_models import SHAPES

MEASURED = json.loads((Path(__file__).parents[1] / "bench" / "results" / "engine.json").read_text())
LLAMA = known_shape("NousResearch/Llama-2-7b-chat-hf")
assert LLAMA


def recipe(memory: float = 14.2, **settings: Any) -> Recipe:
    rows = PrepareConfig(max_tokens=settings.pop("max_tokens", 1024))
    bits = QuantizeConfig(bits=settings.pop("bits", 4))
    return Recipe(
        preflight=PreflightConfig(gpu_memory=memory), prepare=rows, quantize=bits, train=TrainConfig(**settings)
    )


def test_what_was_measured_is_within_five_percent_of_the_plan() -> None:
    assert len(MEASURED["plans"]) >= 24 and len({one["model"] for one in MEASURED["plans"]}) >= 4
    for one in MEASURED["plans"]:
        shape = known_shape(SHAPES[one["model"]])
        assert shape and not one["stepped_back"]
        step = Step(shape, QuantizeConfig(), TrainConfig(rank=one["rank"], dropout=one["dropout"]), 1024, GPUS["h200"])
        parts = step.plan(one["tokens"], 1, one["kept"], round(14.2 * GIBIBYTE)).parts
        outside = parts["optimiser state"] + parts["fragments"]  # what torch's own count leaves out
        planned = (sum(parts.values()) - outside) / GIBIBYTE
        assert planned == pytest.approx(one["measured"], rel=0.05), one
        assert planned + parts["fragments"] / GIBIBYTE >= one["measured"], one


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from([256, 1024, 4096]),
    st.integers(1, 16),
    st.integers(1, 8),
    st.sampled_from([8, 64, 256]),
    st.sampled_from([4, 8, 16]),
    st.floats(6, 40),
)
def test_a_plan_that_fits_keeps_its_promises(
    model: str, max_tokens: int, rows: int, passes: int, rank: int, bits: int, memory: float
) -> None:
    shape = known_shape(SHAPES[model])
    assert shape
    wanted = recipe(memory, max_tokens=max_tokens, micro_batch=rows, gradient_accumulation=passes, rank=rank, bits=bits)
    found = plan(shape, wanted, GPUS["t4"])
    assert found.fits == (found.total <= memory * GIBIBYTE and found.host <= HOST_MEMORY)
    assert (
        found.micro_batch_tokens >= max_tokens
        and found.micro_batch_tokens * found.num_micro_batches >= rows * passes * max_tokens
    )
    assert 0 <= found.num_kept <= found.num_blocks and (found.tokens_per_second or 0) > 0
    more = plan(shape, recipe(memory + 8, **{**wanted.train.model_dump(), "max_tokens": max_tokens, "bits": bits}))
    assert more.fits or not found.fits
    if not found.fits:
        assert found.host and not found.num_kept


def test_memory_is_spent_on_what_is_kept() -> None:
    small, large = (plan(LLAMA, recipe(memory, micro_batch=8), GPUS["a10"]) for memory in (9.0, 14.2))
    assert small.num_kept < large.num_kept and small.tokens_per_second < large.tokens_per_second
    assert any("activations kept in" in line for line in large.lines())
    assert plan(LLAMA, recipe()).step_seconds is None


def test_late_mlps_keep_first() -> None:
    assert keep_order(6) == [5, 3, 1, 4, 2, 0]
    step = Step(LLAMA, QuantizeConfig(), TrainConfig(), 1024, GPUS["t4"])
    mlp = 2048 * 2 * (2 * 11008 + 3 * 64)
    assert [step.more_that_keep(0, 2048, spare) for spare in (mlp - 1, mlp, 3 * mlp)] == [0, 1, 3]


def test_rows_that_are_long_wait_in_the_hosts_memory() -> None:
    found = plan(LLAMA, recipe(max_tokens=32768, micro_batch=1))
    assert found.fits and found.host == 64 * 32768 * 4096 * 2
    more = plan(LLAMA, recipe(max_tokens=33024, micro_batch=1))
    assert (
        more.total < more.available and more.host == 2 * found.host and not more.fits
    )  # pinned memory comes in powers of two
    assert any("kept in the host's memory" in line for line in found.lines())


def test_what_never_fits_gets_the_nearest_that_does() -> None:
    too_long = recipe(max_tokens=131072, rank=64)
    assert not plan(LLAMA, too_long).fits
    changes = nearest(LLAMA, too_long)
    assert changes and changes[0].startswith("max_tokens_per_row ")
    tokens = int(changes[0].split()[1].replace(",", ""))
    assert plan(LLAMA, recipe(max_tokens=tokens)).fits and not plan(LLAMA, recipe(max_tokens=tokens + 64)).fits
    assert "load_in_bits 8" in nearest(LLAMA, recipe(bits=16))
    assert nearest(LLAMA, recipe(memory=1.0)) == []
    assert any(change.startswith("lora_rank ") for change in nearest(LLAMA, recipe(rank=1024, memory=10)))


def test_the_plain_road_has_a_plan_of_its_own() -> None:
    windowed = dataclasses.replace(LLAMA, window=512)  # which the engine leaves to it
    for found in (plan(LLAMA, recipe(engine="trl")), plan(windowed, recipe())):
        assert "attention mask" in found.parts and found.num_blocks == 0 and found.micro_batch_tokens == 4096


def test_without_packing_a_pass_is_a_micro_batch() -> None:
    found = plan(LLAMA, recipe(packing=False, micro_batch=2, gradient_accumulation=8))
    assert (found.micro_batch_tokens, found.num_micro_batches) == (2048, 8)


def test_gpus_by_name() -> None:
    assert find_gpu("T4").memory == 14.2
    with pytest.raises(Tune16Error, match="Unknown GPU 'gtx'. Known: t4, v100-16"):
        find_gpu("gtx")


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
    ],
)
def test_gpus_by_the_name_they_report(reported: str, name: str) -> None:
    assert known_gpu(reported) is GPUS[name]


def test_long_rows_and_float32_and_no_host_where_the_gpu_has_room() -> None:
    assert known_gpu("some card") is None
    assert plan(LLAMA, recipe(max_tokens=65536)).micro_batch_tokens == 65536
    half, full = (plan(LLAMA, recipe(24, compute_dtype=name, bits=16)) for name in ("float16", "float32"))
    assert full.parts["frozen linears"] == 2 * half.parts["frozen linears"]
    assert not plan(LLAMA, recipe(9, max_tokens=4096), GPUS["t4"]).host
