"""The verdict, and that what is published is what was judged: real models, a real champion, a real S3 server."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.config import (
    ConvertConfig,
    EvaluateConfig,
    MergeConfig,
    PreflightConfig,
    PrepareConfig,
    QuantizeConfig,
    Recipe,
    TrainConfig,
    UploadConfig,
    derived_path,
    override,
)
from components.convert.converter import convert_model
from components.evaluate import batches
from components.evaluate.decision import ChampionScore, Comparison, decide
from components.evaluate.evaluation import evaluate_adapter
from components.evaluate.scores import Estimate, Scores
from components.merge.merger import merge_adapter
from components.preflight.checks import check
from components.prepare.dataset import prepare_dataset
from components.quantize.checkpoint import quantize_checkpoint
from components.runtime.errors import Tune16Error
from components.runtime.outputs import read_json, write_json
from components.storage import versions
from components.train.launch import train
from components.upload.publisher import publish

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # PEFT looks on the Hub for a local base
]
PATH = "team/llm"
JUDGED = EvaluateConfig(num_prompts=10, max_new_tokens=12)


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


@pytest.fixture(scope="module")
def flow(make_model: Callable[..., Path], orders: Path, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    return Flow(make_model("llama"), orders, tmp_path_factory.mktemp("flow"))


# The verdict.


def _estimate(value: float, spread: float = 0.01) -> Estimate:
    return Estimate(value, value - spread, value + spread)


def _found(**changes: Any) -> Comparison:
    base, tuned = (Scores(_estimate(loss), _estimate(0.5), _estimate(0.5)) for loss in (2.0, 1.0))
    return replace(Comparison(100, base, tuned, _estimate(-1.0), _estimate(0.1), None), **changes)


def _tuned(loss: float) -> Scores:
    return Scores(_estimate(loss), _estimate(0.5), _estimate(0.5))


BEATEN, EQUAL, BETTER = (
    ChampionScore("v1", "m", 1.0 - by, _estimate(by, 0.05)) for by in (-0.2, 0.0, 0.2)
)  # fmt: skip
OTHER = ChampionScore("v1", "hf://other/base@1")


@pytest.mark.parametrize(
    ("found", "config", "verdict", "reason"),
    [
        (_found(), {}, "promoted", "50.0% below the base model's, and there is no champion yet"),
        (_found(num_rows=3), {}, "inconclusive", "only 3 rows were held out, and 10 are required"),
        (_found(num_rows=3), {"minimum_rows": 3}, "promoted", "no champion yet"),
        (_found(tuned=_tuned(1.99)), {}, "kept", "at least 1.0% below is required"),
        (_found(tuned=_tuned(2.2)), {"minimum_improvement": 0}, "kept", "10.0% above the base model's"),
        (_found(loss_difference=_estimate(-1.0, 1.5)), {}, "inconclusive", "may be chance"),
        (_found(chrf_difference=_estimate(-0.2)), {}, "inconclusive", "agree less with the expected ones"),
        (_found(champion=BEATEN), {}, "promoted", "beats champion v1 (1.0000 against 1.2000"),
        (_found(champion=EQUAL), {}, "inconclusive", "its lead over champion v1 may be chance"),
        (_found(champion=BETTER), {}, "kept", "champion v1 is at least as good"),
        (_found(champion=OTHER), {}, "kept", "made of another base model, hf://other/base@1"),
        (_found(champion=OTHER), {"replace_other_base": True}, "promoted", "replaced without a comparison"),
    ],
)
def test_verdicts(found: Comparison, config: dict[str, Any], verdict: str, reason: str) -> None:
    decided, why = decide(found, EvaluateConfig(**config))
    assert decided == verdict and reason in why


def test_three_rows_prove_nothing(flow: Flow, tmp_path: Path) -> None:
    found = flow.judge("few", EvaluateConfig(num_rows=3, num_prompts=10, max_new_tokens=4))
    assert found.verdict == "inconclusive" and not found.promoted
    content = (flow.folder / "few" / "report.html").read_text()
    assert "Inconclusive, not promoted" in content and 'class="verdict open"' in content
    with pytest.raises(Tune16Error, match="was not promoted, so it is not published"):
        publish(flow.folder, flow.folder, flow.folder / "few", UploadConfig(path=PATH))


def test_a_champion_is_beaten_row_by_row_and_never_unseen(flow: Flow, bucket: str, tmp_path: Path) -> None:
    assert flow.judge("first").verdict == "promoted"
    merged = flow.merge("merged", "first")
    convert_model(merged, flow.rows, flow.folder / "gguf", ConvertConfig(quantizations=""))
    version = publish(merged, flow.folder / "gguf", flow.folder / "first", UploadConfig(path=PATH))["version"]
    same = flow.judge("same", champion=version)
    assert same.verdict == "kept" and same.champion.loss == pytest.approx(same.tuned.loss.value, rel=1e-6)
    assert read_json(flow.folder / "same" / "evaluation.json")["champion"]["difference"]["value"] == 0

    worse = Flow(flow.base, flow.data, tmp_path / "worse", epochs=0.1, learning_rate=1e-3)
    found = worse.judge("evaluation", replace_improvement(0), champion=version)
    assert found.verdict != "promoted" and found.champion.loss < found.tuned.loss.value
    better = Flow(flow.base, flow.data, tmp_path / "better", epochs=6)
    assert better.judge("evaluation", champion=version).verdict == "promoted"

    shutil.copytree(flow.base, tmp_path / "other")
    other = Flow(tmp_path / "other", flow.data, tmp_path / "others")
    found = other.judge("evaluation", champion=version)
    assert found.verdict == "kept" and "made of another base model" in found.reason
    told = other.judge("told", JUDGED.model_copy(update={"replace_other_base": True}), champion=version)
    assert told.verdict == "promoted" and "replaced without a comparison" in told.reason
    recipe = Recipe(preflight=PreflightConfig(model=str(tmp_path / "other"), data=str(flow.data)))
    with pytest.raises(Tune16Error, match=r"upload.path: at team/llm, champion .* is made of another base model"):
        check(recipe, PATH)
    assert versions.champion_version(PATH) == version


def replace_improvement(share: float) -> EvaluateConfig:
    return JUDGED.model_copy(update={"minimum_improvement": share})


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


# Batches.


def test_batches_are_made_by_tokens_and_keep_the_order() -> None:
    lengths = [5, 100, 7, 50, 50, 1]
    seen: list[list[int]] = []

    def work(numbers: list[int]) -> list[int]:
        seen.append(numbers)
        return [10 * number for number in numbers]

    assert batches.in_batches(lengths, 3, 100, work) == [0, 10, 20, 30, 40, 50]
    assert seen == [[1], [3, 4], [2, 0, 5]]


def test_too_little_memory_halves_a_batch_and_ends_in_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    def work(numbers: list[int]) -> list[int]:
        if len(numbers) > 1 or numbers[0] == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return numbers

    assert batches.in_batches([1] * 5, 8, 100, work) == list(range(5))
    assert "halved" in capsys.readouterr().out
    with pytest.raises(Tune16Error, match=r"a row of 1 tokens does not fit the GPU's memory. Lower"):
        batches.in_batches([1] * 10, 8, 100, work)


# What is published.


def _stop_rows(path: Path) -> Path:
    rows = [{"prompt": f"Number {n}?", "completion": "Fine."} for n in range(160)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_tuned_base_model_stops_where_its_template_does(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Its own files name the base model's end, which no answer has."""
    base = tmp_path / "base"
    shutil.copytree(make_model("qwen2"), base)
    (base / "chat_template.jinja").write_text(CHATML)
    write_json(base / "generation_config.json", {"eos_token_id": 2, "bos_token_id": 1, "repetition_penalty": 1.0})
    flow = Flow(base, _stop_rows(tmp_path / "rows.jsonl"), tmp_path / "flow", epochs=4, learning_rate=1e-2)
    assert flow.judge("evaluation").verdict == "promoted"
    folder = flow.merge("merged", "evaluation") / "merged"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [stop, 2]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == CHATML
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Number 7?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "Fine.<|im_end|>"
    found = read_json(flow.folder / "merged" / "published.json")
    assert found["answers_as_judged"] == found["answers"] == 10


def test_a_merged_model_that_does_not_do_as_it_was_judged_is_refused(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.merge import merger

    flow.judge("judged", EvaluateConfig(num_prompts=10, max_new_tokens=40))
    written = merger.generation_settings
    monkeypatch.setattr(merger, "generation_settings", lambda *inputs: {**written(*inputs), "eos_token_id": [3]})
    with pytest.raises(Tune16Error, match="would not end its answers: its generation_config.json does not name"):
        flow.merge("endless", "judged")
    monkeypatch.undo()
    adapter = tmp_path / "adapter"
    shutil.copytree(flow.adapter, adapter)
    (adapter / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    with pytest.raises(Tune16Error, match="Its files were changed after training"):
        merge_adapter(str(flow.base), adapter, tmp_path / "out", MergeConfig(), flow.rows, flow.folder / "judged")
    assert not (flow.folder / "endless").exists() and not (tmp_path / "out").exists()


def test_a_window_that_the_conversion_loses_is_told(
    make_model: Callable[..., Path], orders: Path, tmp_path: Path
) -> None:
    """llama.cpp has no sliding window for Mistral: the file computes something else than the weights."""
    pytest.importorskip("llama_cpp")
    flow = Flow(make_model("mistral", sliding_window=8), orders, tmp_path, epochs=4)
    flow.judge("evaluation")
    merged = flow.merge("merged", "evaluation")
    with pytest.raises(Tune16Error, match="the loss of the 16-bit GGUF file is .* the weights it was made from"):
        convert_model(merged, flow.rows, tmp_path / "gguf", ConvertConfig(quantizations="Q8_0"))
    assert not (tmp_path / "gguf").exists()


def test_the_rows_asked_are_the_longest_that_fit() -> None:
    from components.merge.published import _choose

    assert _choose([10, 2000, 30, 20], 55) == [2, 3]
    assert _choose([10, 2000, 30, 20], 1) == [2, 3]
    assert _choose([2000, 1500], 1) == [1]
    assert len(_choose(list(np.arange(1, 100)), 10**9)) == 32


def test_padding_that_the_embedding_lacks_never_reaches_the_model(
    make_model: Callable[..., Path], orders: Path, tmp_path: Path
) -> None:
    """As the first Llama-2 conversions had it: one token more than the embedding has rows."""
    base = tmp_path / "base"
    shutil.copytree(make_model("llama"), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(base)
    assert tokenizer.pad_token_id >= read_json(base / "config.json")["vocab_size"]
    flow = Flow(base, orders, tmp_path / "flow", engine="trl", packing=False)
    assert flow.judge("evaluation").verdict == "promoted"
    largest = max(max(row) for row in pq.read_table(flow.rows / "train.parquet")["input_ids"].to_pylist())
    assert largest < read_json(base / "config.json")["vocab_size"]
