"""The GPU's benchmarks on a toy and a CPU: they still run, whatever has been moved in what they measure."""

import importlib
from pathlib import Path

import pytest

from components.models.shapes import ModelShape
from tests.bench import gpu_trainers, random_models

TOY = ModelShape("LlamaForCausalLM", 64, 2, 4, 2, 128, 300, head_dim=16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks on the Hub for a local base
@pytest.mark.parametrize("trainer", ["tune16", "trl"])
def test_a_trainer_is_measured(trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models, "shape_of", lambda _: TOY)
    monkeypatch.setattr(random_models, "draw_length", lambda source: source.randrange(16, 40))
    monkeypatch.setattr(gpu_trainers, "WARM_UP", 1)
    monkeypatch.setattr(gpu_trainers, "STEPS", 2)
    settings = {"micro_batch": 1, "gradient_accumulation": 1, "dropout": 0.0, "packing": False}
    found = gpu_trainers.measure(trainer, "toy", {**settings, "compute_dtype": "float32"}, tmp_path)
    assert found["tokens_per_second"] > 0 and found["card"] == "CPU"


@pytest.mark.parametrize("name", [path.stem for path in sorted(Path(__file__).parent.glob("gpu_*.py"))])
def test_every_benchmark_finds_what_it_calls(name: str) -> None:
    """What they import inside of functions is imported here, as they do."""
    module = importlib.import_module(f"tests.bench.{name}")
    for line in Path(str(module.__file__)).read_text().splitlines():
        if line.strip().startswith("from components"):
            exec(line.strip(), {})
