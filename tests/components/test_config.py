import json
import re
from pathlib import Path
from typing import Any

import pytest

from components import config
from components.config import (
    PreflightConfig,
    Recipe,
    UploadConfig,
    derived_path,
    load_recipe,
    override,
)
from components.knobs import knobs_page
from components.runtime.errors import Tune16Error


def test_reference_recipe_is_the_default() -> None:
    train = config.TrainConfig()
    assert (train.rank, train.alpha, train.dropout, train.epochs, train.learning_rate) == (64, 16, 0.1, 1, 2e-4)
    assert (train.micro_batch, train.gradient_accumulation, train.max_gradient_norm) == (4, 1, 0.3)
    assert (train.target_modules, train.warmup_share, train.packing) == ("all-linear", 0.03, True)
    assert config.PrepareConfig().max_tokens == 1024
    assert config.QuantizeConfig().bits == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learnin_rate": 1}, r"train: unknown key 'learnin_rate'. Did you mean 'learning_rate'\?"),
        ({"epochs": -1}, r"train: 'epochs' is -1: input should be greater than 0"),
        ({"schedule": "linear"}, r"train: 'schedule' is 'linear': input should be 'constant' or 'cosine'"),
        ({"learning_rate": float("nan")}, r"'learning_rate'"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(Tune16Error, match=message):
        config.TrainConfig.load(options)


def test_a_key_with_a_form_field_of_its_own_is_refused_in_options() -> None:
    with pytest.raises(Tune16Error, match="more_train_options: 'rank' has a field of its own, lora_rank"):
        config.TrainConfig.load({"rank": 8}, rank=16)


def test_doubles_from_the_pipeline_become_whole_numbers() -> None:
    assert config.TrainConfig.load({"rank": 8.0}).rank == 8
    assert config.QuantizeConfig.load(bits=8.0).bits == 8
    with pytest.raises(Tune16Error, match="quantize: 'bits' is 5"):
        config.QuantizeConfig.load(bits=5)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.TrainConfig().rank = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {rnk: 3}", "unknown key 'train.rnk'. Did you mean 'rank'"),
        ("trian: {}", "unknown key 'trian'. Did you mean 'train'"),
        ("train: [", "not YAML"),
        ("- 1", "expected keys and values"),
        ("upload: {path: noprefix}", "'upload.path' is 'noprefix'"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(Tune16Error, match=message):
        config.load_recipe(path)


def test_a_missing_recipe_and_one_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(Tune16Error, match="No such file"):
        config.load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"description: caf\xe9")
    with pytest.raises(Tune16Error, match="not UTF-8"):
        config.load_recipe(tmp_path / "latin.yaml")


def test_numbers_in_scientific_form_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train:\n  learning_rate: 2e-3\nprepare:\n")
    assert config.load_recipe(path).train.learning_rate == 2e-3


def test_overrides() -> None:
    recipe = config.override(config.Recipe(), ["train.rank=8", "train.packing=false", "prepare.max_tokens=64"])
    assert (recipe.train.rank, recipe.train.packing, recipe.prepare.max_tokens) == (8, False, 64)
    for wrong, message in (
        ("train.rank", "write name=value"),
        ("rank=3", "write step.field=value"),
        ("trian.rank=3", "Did you mean 'train'"),
        ("train.rnk=3", "Did you mean 'rank'"),
    ):
        with pytest.raises(Tune16Error, match=message):
            config.override(config.Recipe(), [wrong])


def test_form_values_put_the_rest_into_options() -> None:
    recipe = config.override(config.Recipe(), ["train.rank=8", "train.alpha=32"])
    values = config.form_values(recipe)
    assert values["lora_rank"] == 8 and values["more_train_options"] == {"alpha": 32.0}
    assert values["destination_path"] == recipe.upload.path and list(values) == list(config.FORM)


def test_every_field_has_a_sentence() -> None:
    for step, cls in config.CONFIG_OF_STEP.items():
        for name, field in cls.model_fields.items():
            assert field.description and field.description.endswith("."), f"{step}.{name}"


def test_page_of_settings_is_up_to_date() -> None:
    assert (Path(config.__file__).parent / "KNOBS.md").read_text() == knobs_page()


def test_a_recipe_without_a_place_gets_one_of_its_own() -> None:
    assert re.fullmatch("tune16/llama-2-7b-chat-hf-guanaco-llama2-1-[0-9a-f]{6}", Recipe().upload.path)
    changed = override(
        Recipe(), ["preflight.model=Qwen/Qwen2.5-7B-Instruct@main", "preflight.data=rows/My Rows.csv.gz"]
    )
    assert changed.upload.path.startswith("tune16/qwen2-5-7b-instruct-my-rows-")
    assert override(changed, ["upload.path=a/b", "preflight.model=x/y"]).upload.path == "a/b"
    places = {
        derived_path(PreflightConfig(model=model, data=data))
        for model in ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
        for data in ("s3:///one/rows.jsonl", "https://two.example.com/rows.jsonl")
    }
    assert len(places) == 4 and all(place.startswith("tune16/deepseek-r1-distill-qw-rows-") for place in places)
    for wrong in ("a", "/a/b", "a/b/", "a/../b", "a//b", "s3://a/b"):
        with pytest.raises(Tune16Error, match=r"write it as prefix/model-name, such as team/llama"):
            UploadConfig.load(path=wrong)


RECIPES = sorted((Path(config.__file__).parents[1] / "pipelines" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_form_filled_in_from_a_recipe_is_that_recipe(path: Path) -> None:
    """Numbers arrive as doubles, as KFP's protobuf has them, and JSON objects as text from some clients."""
    recipe = load_recipe(path)
    values = config.form_values(recipe)
    as_sent = {
        name: float(value) if isinstance(value, int) else json.dumps(value) if name.startswith("more_") else value
        for name, value in values.items()
    }
    for form in (values, as_sent):
        found = config.read_form(form)
        assert found == recipe.model_copy(update={"setup": found.setup, "description": found.description})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"epochs": -1, "load_in_bits": 3},
            r"quantize: 'bits' is 3.*In the form: load_in_bits.\ntrain: 'epochs' is -1.*",
        ),
        ({"more_train_options": {"rank": 4}}, "more_train_options: 'rank' has a field of its own, lora_rank"),
        ({"more_train_options": "[1]"}, "more_train_options: is a JSON list, but an object is needed"),
        ({"serving_runtime": "llama.cpp", "gguf_quantizations": ""}, "form: .*serving_runtime.*gguf_quantizations"),
    ],
)
def test_what_is_wrong_in_a_form_is_named_as_the_form_names_it(changes: dict[str, Any], message: str) -> None:
    form = config.form_values(Recipe.model_validate({"upload": {"path": "team/llm"}}))
    with pytest.raises(Tune16Error, match=message):
        config.read_form({**form, **changes})
