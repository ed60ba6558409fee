"""What several files of these tests work on: models through prepare, quantize and train, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config import EvaluateConfig, MergeConfig, PrepareConfig, QuantizeConfig, TrainConfig
from components.evaluate.evaluation import evaluate_adapter
from components.merge.merger import merge_adapter
from components.prepare.dataset import prepare_dataset
from components.quantize.checkpoint import quantize_checkpoint
from components.train.launch import train
from tests.faults.outputs import write_outputs

PATH = "team/llm"
JUDGED = EvaluateConfig(num_prompts=10, max_new_tokens=12)
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "learning_rate": 5e-3,
    "rank": 8,
    "alpha": 16,
    "dropout": 0.05,
    "micro_batch": 2,
    "max_gradient_norm": 1.0,
    "num_evaluations": 2,
}


class Made:
    """The outputs of prepare, quantize and train for one tiny model."""

    def __init__(self, base: Path, folder: Path, orders: Path, bits: int = 4, **settings: Any) -> None:
        self.base, self.folder = base, folder
        self.rows, self.weights, self.adapter = folder / "rows", folder / "weights", folder / "adapter"
        self.config = TrainConfig(**{**SETTINGS, **settings})
        prepare_dataset(str(orders), str(base), self.rows, PrepareConfig(max_tokens=128, held_out_share=0.1))
        quantize_checkpoint(str(base), self.weights, QuantizeConfig.load(bits=bits))
        self.metrics = train(self.weights, self.rows, self.adapter, self.config)


@pytest.fixture(scope="session")
def made(
    make_model: Callable[..., Path], orders: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Made]:
    cache: dict[tuple[Any, ...], Made] = {}

    def make(kind: str, bits: int = 4, **settings: Any) -> Made:
        key = (kind, bits, *settings.items())
        if key not in cache:
            base = make_model(kind, dtype=torch.float16)
            cache[key] = Made(base, tmp_path_factory.mktemp("made"), orders, bits, **settings)
        return cache[key]

    return make


class Flow:
    """One model through the steps from prepare to evaluate."""

    def __init__(self, base: Path, data: Path, folder: Path, epochs: float = 2, **settings: Any) -> None:
        self.base, self.data, self.folder = base, data, folder
        self.rows, self.weights, self.adapter = folder / "rows", folder / "weights", folder / "adapter"
        config = {"epochs": epochs, "learning_rate": 5e-3, "rank": 8, "dropout": 0, "micro_batch": 2, **settings}
        prepare_dataset(str(data), str(base), self.rows, PrepareConfig(max_tokens=128, held_out_share=0.1))
        quantize_checkpoint(str(base), self.weights, QuantizeConfig())
        train(self.weights, self.rows, self.adapter, TrainConfig(num_evaluations=1, max_gradient_norm=1, **config))

    def judge(self, name: str, config: EvaluateConfig = JUDGED, champion: str = "") -> Any:
        output = self.folder / name
        return evaluate_adapter(self.weights, self.adapter, self.rows, output, config, PATH, champion)

    def merge(self, name: str, evaluation: str) -> Path:
        merge_adapter(
            str(self.base), self.adapter, self.folder / name, MergeConfig(), self.rows, self.folder / evaluation
        )
        return self.folder / name


@pytest.fixture(scope="session")
def flow(make_model: Callable[..., Path], orders: Path, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    return Flow(make_model("llama"), orders, tmp_path_factory.mktemp("flow"))


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """What the steps merge, convert and evaluate leave, small."""
    return write_outputs(tmp_path / "out")
