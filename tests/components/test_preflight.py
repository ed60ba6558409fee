"""The step preflight: names become fixed references, and what cannot work is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from components.config import (
    ConvertConfig,
    EvaluateConfig,
    PreflightConfig,
    Recipe,
    TrainConfig,
    UploadConfig,
)
from components.preflight.checks import as_markdown, check
from components.runtime.errors import Tune16Error
from components.runtime.outputs import write_record
from components.storage import versions
from components.upload.publisher import publish

PATH = "prefix/model"


def test_preflight(orders: Path, make_model: Callable[..., Path]) -> None:
    place = PreflightConfig(model=str(make_model("llama")), data=str(orders))
    fixed = check(Recipe(preflight=place))
    assert fixed.champion == "" and fixed.plan.fits
    assert "| **together**" in as_markdown(fixed.plan, fixed.disk)
    small = place.model_copy(update={"gpu_memory": 0.01})
    with pytest.raises(Tune16Error, match="does not fit the GPU: it needs 0.* GiB more than gpu_memory_gib"):
        check(Recipe(preflight=small))
    with pytest.raises(Tune16Error, match="LlamaForCausalLM has no linear layer 'qkv'"):
        check(Recipe(preflight=place, train=TrainConfig(target_modules="qkv")))


def test_an_unchanged_run_asks_for_what_the_cache_has_and_publishes_nothing(
    bucket: str,
    outputs: tuple[Path, Path, Path],
    make_model: Callable[..., Path],
    orders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What preflight hands on is all that the cache of the later steps looks at, so it has to be the same."""
    place = PreflightConfig(model=str(make_model("llama")), data=str(orders))
    recipe = Recipe(preflight=place, train=TrainConfig(rank=8), convert=ConvertConfig(quantizations="Q8_0,Q4_K_M"))
    first = check(recipe, PATH)
    trained = outputs[0] / "adapter"
    facts = {"model": first.model, "teacher": "", "data": first.data, "held_out_sha256": "h", "bits": 4}
    write_record(trained, "train", recipe.train, prepare=recipe.prepare.model_dump(), **facts)
    published = publish(*outputs, UploadConfig(path=PATH))
    assert "nothing has changed" not in capsys.readouterr().out
    assert check(recipe, PATH) == first
    assert f"nothing has changed since {published['version']}" in capsys.readouterr().out
    assert publish(*outputs, UploadConfig(path=PATH)) == published
    assert versions.read_champion(PATH) == versions.Champion(1, published["version"])
    for changed in (
        recipe.model_copy(update={"train": TrainConfig(rank=4)}),
        recipe.model_copy(update={"evaluate": EvaluateConfig(num_rows=3)}),
        recipe.model_copy(update={"convert": ConvertConfig(quantizations="")}),
        recipe.model_copy(update={"preflight": PreflightConfig(model=place.model, data=str(orders.parent))}),
    ):
        assert check(changed, PATH).champion == published["version"]
