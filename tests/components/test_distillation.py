"""A student learns from a teacher: the trainer, what it refuses, and its memory plan."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from components.config import EvaluateConfig, MergeConfig, PrepareConfig, QuantizeConfig, Recipe, TrainConfig, parse
from components.evaluate.evaluation import evaluate_adapter
from components.merge.merger import merge_adapter
from components.models.shapes import known_shape
from components.planning.memory import plan
from components.preflight.checks import check
from components.prepare.dataset import prepare_dataset
from components.quantize.checkpoint import quantize_checkpoint, quantize_teacher
from components.runtime.errors import Tune16Error
from components.train.launch import train
from components.train.trl import fit_teacher

SETTINGS: dict[str, Any] = {
    "method": "distill",
    "epochs": 2,
    "learning_rate": 5e-3,
    "rank": 8,
    "dropout": 0,
    "micro_batch": 4,
    "max_gradient_norm": 1.0,
    "num_evaluations": 2,
}
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


@pytest.fixture(scope="module")
def made(make_model: Callable[..., Path], orders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student and a deeper teacher in 4 bits, and the student's rows."""
    folder = tmp_path_factory.mktemp("made")
    student = make_model("llama", dtype=torch.float16)
    prepare_dataset(str(orders), str(student), folder / "rows", PrepareConfig(max_tokens=128, held_out_share=0.1))
    teacher = folder / "base"
    shutil.copytree(make_model("llama", dtype=torch.float16, num_hidden_layers=3), teacher)
    _teach(teacher, folder / "rows")
    quantize_checkpoint(str(student), folder / "weights", QuantizeConfig())
    quantize_teacher(str(teacher), folder / "teacher")
    return {"student": student, "base": teacher, **{name: folder / name for name in ("rows", "weights", "teacher")}}


def _teach(folder: Path, rows: Path) -> None:
    """Train a teacher on the rows, so that there is something to learn from it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for row in pq.read_table(rows / "train.parquet").to_pylist():
        ids = torch.tensor([row["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model.half().save_pretrained(folder)


def config(made: dict[str, Path], **changes: Any) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, "teacher": str(made["base"]), **changes})


@pytest.mark.slow
def test_a_student_comes_closer_to_its_teacher_and_is_evaluated_as_any_model(
    made: dict[str, Path], tmp_path: Path
) -> None:
    inputs = (made["weights"], made["rows"])
    metrics = train(*inputs, tmp_path / "adapter", config(made), teacher=made["teacher"])
    assert metrics["train_loss_last"] < 0.9 * metrics["train_loss_first"]
    assert metrics["tokens"] > 0 and metrics["held_out_loss"] < metrics["train_loss_first"]
    record = json.loads((tmp_path / "adapter" / "tune16.json").read_text())
    assert record["teacher"] == str(made["base"]) and record["config"]["method"] == "distill"
    again = train(*inputs, tmp_path / "again", config(made), teacher=made["teacher"])
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert again["held_out_loss"] == metrics["held_out_loss"]
    assert all(torch.equal(first[name], second[name]) for name in first), "the same seed gives the same adapter"
    evaluate_adapter(made["weights"], tmp_path / "adapter", made["rows"], tmp_path / "verdict", EvaluateConfig())
    assert f"taught by `{made['base']}`" in (tmp_path / "verdict" / "README.md").read_text()
    merge_adapter(str(made["student"]), tmp_path / "adapter", tmp_path / "merged", MergeConfig())
    divergences = [_divergence(made, folder) for folder in (made["student"], tmp_path / "merged" / "merged")]
    assert divergences[1] < 0.9 * divergences[0]


@torch.inference_mode()
def _divergence(made: dict[str, Path], student: Path) -> float:
    """KL(teacher || student) on held-out answers, in nats per token, with full-precision models."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (made["base"], student)]
    total, count = 0.0, 0
    for row in pq.read_table(made["rows"] / "held_out.parquet").to_pylist():
        wanted, got = (model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1) for model in models)
        learnt = torch.tensor(row["labels"][1:]) >= 0
        total += torch.nn.functional.kl_div(got[learnt], wanted[learnt], log_target=True, reduction="sum").item()
        count += int(learnt.sum())
    return total / count


@pytest.mark.slow
def test_missing_weights_of_the_teacher_are_told(made: dict[str, Path], tmp_path: Path) -> None:
    inputs = (made["weights"], made["rows"], tmp_path / "adapter")
    with pytest.raises(Tune16Error, match="train.teacher: its weights are missing. Run the step quantize"):
        train(*inputs, config(made))
    quantize_teacher("", tmp_path / "none")
    with pytest.raises(Tune16Error, match="train.teacher: its weights are missing"):
        train(*inputs, config(made), teacher=tmp_path / "none")


@pytest.mark.slow
def test_a_teacher_of_another_vocabulary_fails_in_preflight(
    made: dict[str, Path], make_model: Callable[..., Path], orders: Path
) -> None:
    other = make_model("qwen2")
    sections = {"preflight": {"model": str(made["student"]), "data": str(orders)}}
    for teacher, message in ((other, "differ in vocabulary"), (made["base"], "")):
        recipe = parse(Recipe, {**sections, "train": {**SETTINGS, "teacher": str(teacher)}}, where="test")
        if message:
            with pytest.raises(Tune16Error, match=message):
                check(recipe)
        else:
            fixed = check(recipe)
            assert fixed.teacher.startswith("file://") and fixed.plan.parts["teacher"] > 0


def test_a_teachers_padded_head_is_cut_to_the_students_words(tokenizer: PreTrainedTokenizerFast) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    student, teacher = (LlamaForCausalLM(LlamaConfig(vocab_size=words, **size)) for words in (100, 128))
    head = teacher.lm_head.weight[:100].clone()
    fitted = fit_teacher(teacher, student)
    ids = torch.tensor([[1, 2, 3]])
    assert fitted(ids).logits.shape[-1] == 100 and torch.equal(fitted.lm_head.weight, head)
    assert not any(parameter.requires_grad for parameter in fitted.parameters())
    with pytest.raises(Tune16Error, match="has 100 tokens, the student 128"):
        fit_teacher(student, LlamaForCausalLM(LlamaConfig(vocab_size=128, **size)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "distill"}, "set both or neither"),
        ({"teacher": "org/model"}, "set both or neither"),
        ({"method": "distill", "teacher": "org/model", "num_gpus": 2}, "trains on one GPU"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Tune16Error, match=message):
        TrainConfig.load(settings)


def test_the_plan_is_within_five_percent_of_what_was_measured() -> None:
    """tests/bench/gpu_distil.py on an H200; its random student has a head of its own."""
    recorded = json.loads((Path(__file__).parents[1] / "bench" / "results" / "distillation.json").read_text())
    small, large = known_shape("Qwen/Qwen2.5-1.5B-Instruct"), known_shape("Qwen/Qwen2.5-7B-Instruct")
    assert small and large and len(recorded["runs"]) >= 4
    for run in recorded["runs"]:
        settings = {"method": "distill", "teacher": "x", "micro_batch": run["micro_batch"], "dropout": 0}
        recipe = parse(Recipe, {"train": settings}, where="test")
        planned = plan(replace(small, tied_embeddings=False), recipe, teacher=large).total / 2**30
        assert abs(planned / run["peak_gib"] - 1) < 0.05, run


def test_the_plan_counts_the_teacher() -> None:
    small, large = known_shape("Qwen/Qwen2.5-1.5B-Instruct"), known_shape("Qwen/Qwen2.5-7B-Instruct")
    assert small and large
    recipe = parse(Recipe, {"train": {"method": "distill", "teacher": "x", "gradient_accumulation": 4}}, where="test")
    planned = plan(small, recipe, teacher=large)
    assert planned.fits and 4 < planned.parts["teacher"] / 2**30 < 6
    assert plan(small, recipe.model_copy(update={"train": TrainConfig(engine="trl")})).total < planned.total
    assert not plan(large, recipe, teacher=large).fits or plan(large, recipe, teacher=large).total > planned.total
