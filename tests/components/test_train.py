import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from components.config import EvaluateConfig, MergeConfig, Recipe, TrainConfig
from components.evaluate.evaluation import evaluate_adapter
from components.merge.merger import merge_adapter, merge_weights, read_deltas
from components.models.loading import choose_dtype, load_base
from components.models.shapes import read_shape
from components.planning import memory
from components.runtime.errors import Tune16Error
from components.storage.files import file_digest
from components.train.launch import train
from tests.components.conftest import SETTINGS, Made
from tests.conftest import ARCHITECTURES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # PEFT looks on the Hub for a local base
]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_training_lowers_the_loss_and_leaves_a_whole_adapter(made: Callable[..., Made], kind: str) -> None:
    run = made(kind)
    assert run.metrics["train_loss_last"] < 0.9 * run.metrics["train_loss_first"]
    names = {path.name for path in run.adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "report.html", "tune16.json"} <= names
    assert json.loads((run.adapter / "adapter_config.json").read_text())["r"] == 8
    adapted = read_deltas(run.adapter)
    per_layer = 4 if kind == "phi3" else 7
    assert len(adapted) == 2 * per_layer


@pytest.mark.parametrize("bits", [8, 16])
def test_eight_and_sixteen_bits_train(made: Callable[..., Made], bits: int) -> None:
    metrics = made("llama", bits=bits).metrics
    assert metrics["train_loss_last"] < 0.9 * metrics["train_loss_first"]


def test_two_processes_equal_one_with_twice_the_batch(made: Callable[..., Made], tmp_path: Path) -> None:
    """Over gloo: the same rows in each step, and a mean over all their tokens, so the same losses and adapter."""
    run = made("llama")
    same = {**SETTINGS, "epochs": 0.25, "num_evaluations": 1, "dropout": 0, "micro_batch": 1}
    one = train(run.weights, run.rows, tmp_path / "one", TrainConfig(**{**same, "gradient_accumulation": 4}))
    two = train(
        run.weights, run.rows, tmp_path / "two", TrainConfig(**{**same, "gradient_accumulation": 2, "num_gpus": 2})
    )
    for name in ("train_loss_first", "train_loss_last", "steps", "tokens"):
        assert two[name] == pytest.approx(one[name], rel=2e-4), name
    assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-2)  # the last batch is padded with rows
    left, right = read_deltas(tmp_path / "one"), read_deltas(tmp_path / "two")
    for name, delta in left.items():
        assert torch.allclose(delta.b @ delta.a, right[name].b @ right[name].a, atol=2e-3), name


def test_a_users_mistake_in_one_of_two_processes_is_told_once(made: Callable[..., Made], tmp_path: Path) -> None:
    run = made("llama")
    with pytest.raises(Tune16Error, match="this model has no linear layer 'qkv'"):
        train(run.weights, run.rows, tmp_path / "out", TrainConfig(num_gpus=2, target_modules="qkv"))
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_adapter(made: Callable[..., Made], tmp_path: Path) -> None:
    run = made("llama")
    again = train(run.weights, run.rows, tmp_path / "again", run.config)
    assert again["held_out_loss"] == run.metrics["held_out_loss"]
    weights = "adapter_model.safetensors"
    assert file_digest(tmp_path / "again" / weights) == file_digest(run.adapter / weights)
    for name in ("first", "second"):
        merge_adapter(str(run.base), run.adapter, tmp_path / name, MergeConfig())
    for file in (tmp_path / "first" / "merged").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / "merged" / file.name).read_bytes()


def test_packed_loss_is_the_unpacked_loss(made: Callable[..., Made]) -> None:
    """Two rows in one sequence, told apart by their positions, lose what they lose alone: they never see each other."""
    run = made("llama")
    model = load_base(run.weights, torch.float32)
    rows = pq.read_table(run.rows / "train.parquet").slice(0, 3).to_pylist()
    ids = torch.cat([torch.tensor(row["input_ids"]) for row in rows]).unsqueeze(0)
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows]).unsqueeze(0)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
        mixed = model(input_ids=ids).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-3)
    first = len(rows[0]["input_ids"])
    assert (mixed[first:] - alone[first:]).abs().max() > 0.05  # what it would be if they saw each other


def test_training_with_and_without_packing_agrees(made: Callable[..., Made], tmp_path: Path) -> None:
    """All rows in one step: packing changes the order and the padding, not the loss."""
    run = made("llama")
    rows = pq.read_table(run.rows / "train.parquet").slice(0, 12)
    data = tmp_path / "rows"
    shutil.copytree(run.rows, data)
    pq.write_table(rows, data / "train.parquet")
    losses = []
    for packing in (True, False):
        config = run.config.model_copy(update={"packing": packing, "micro_batch": 12, "epochs": 1.0, "dropout": 0.0})
        losses.append(train(run.weights, data, tmp_path / str(packing), config)["train_loss_first"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_adapters_that_do_not_belong_are_refused(
    made: Callable[..., Made], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    run, other = made("llama"), made("mistral")
    with pytest.raises(Tune16Error, match="belongs to the base model"):
        merge_adapter(str(other.base), run.adapter, tmp_path / "out", MergeConfig())
    with pytest.raises(Tune16Error, match="belongs to the base model"):
        evaluate_adapter(other.weights, run.adapter, run.rows, tmp_path / "out", EvaluateConfig())
    with pytest.raises(Tune16Error, match="was tokenised for"):
        train(other.weights, run.rows, tmp_path / "out", run.config)
    wider = make_model("llama", dtype=torch.float16, hidden_size=128)
    with pytest.raises(Tune16Error, match="belongs to another base model"):
        merge_weights(wider, run.adapter, tmp_path / "merged")
    assert not (tmp_path / "out").exists()


def test_unknown_target_modules_are_named(made: Callable[..., Made], tmp_path: Path) -> None:
    run = made("llama")
    config = run.config.model_copy(update={"target_modules": "q_proj,w_pack"})
    with pytest.raises(Tune16Error, match="no linear layer 'w_pack'. It has: all-linear, down_proj"):
        train(run.weights, run.rows, tmp_path / "out", config)


def test_weights_and_biases_offline_and_mlflow(
    made: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made("llama")
    config = run.config.model_copy(update={"wandb_project": "tests", "epochs": 0.1})
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(Tune16Error, match="WANDB_API_KEY is not in the environment"):
        train(run.weights, run.rows, tmp_path / "out", config)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(run.weights, run.rows, tmp_path / "out", config)
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_dtype_without_a_gpu() -> None:
    assert choose_dtype("auto") is torch.float32
    assert choose_dtype("float16") is torch.float16


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_plan_counts_the_adapter_and_the_weights_exactly(made: Callable[..., Made], kind: str) -> None:
    run = made(kind)
    shape = read_shape(json.loads((run.base / "config.json").read_text()), "tiny")
    planned = memory.plan(shape, Recipe(train=run.config)).parts["adapter"]
    assert planned == 4 * sum(delta.a.numel() + delta.b.numel() for delta in read_deltas(run.adapter).values())
    weights = {k: v for f in run.base.glob("*.safetensors") for k, v in load_file(f).items()}
    linears = sum(w.numel() for name, w in weights.items() if name.startswith("model.layers.") and w.dim() == 2)
    assert shape.num_linear_weights == linears
    assert shape.num_embedding_weights == sum(w.numel() for n, w in weights.items() if "embed" in n or "lm_head" in n)


def test_transformers_still_counts_the_gpus_of_a_process_where_we_set_their_number(tmp_path: Path) -> None:
    """The one private name of theirs: TRL refuses a process that sees several GPUs and does not set it."""
    from trl import SFTConfig

    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    assert hasattr(arguments, "_n_gpu"), (
        "Transformers has moved TrainingArguments._n_gpu: components/train/trl.py sets it"
    )
    arguments._n_gpu = 5
    assert arguments.n_gpu == 5, "TrainingArguments.n_gpu no longer reads _n_gpu: components/train/trl.py sets it to 1"


def test_plain_trl_trains_in_two_processes_too(made: Callable[..., Made], tmp_path: Path) -> None:
    """Rows that fill no step for both: one of the processes takes part without counting."""
    run = made("llama")
    rows = tmp_path / "rows"
    shutil.copytree(run.rows, rows)
    pq.write_table(pq.read_table(run.rows / "train.parquet").slice(0, 7), rows / "train.parquet")
    same = {**SETTINGS, "engine": "trl", "packing": False, "dropout": 0, "micro_batch": 2, "num_evaluations": 1}
    one = train(run.weights, rows, tmp_path / "one", TrainConfig(**{**same, "gradient_accumulation": 2}))
    two = train(run.weights, rows, tmp_path / "two", TrainConfig(**{**same, "num_gpus": 2}))
    for name in ("train_loss_first", "train_loss_last", "held_out_loss", "steps", "tokens"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
