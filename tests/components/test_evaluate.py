"""The verdict, and that what is published is what was judged: real models, a real champion, a real S3 server."""

import json
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
    PreflightConfig,
    Recipe,
    UploadConfig,
)
from components.convert.converter import convert_model
from components.evaluate import batches
from components.evaluate.decision import ChampionScore, Comparison, decide
from components.evaluate.evaluation import evaluate_adapter
from components.evaluate.scores import Estimate, Scores, bootstrap, score_losses
from components.models.loading import load_base
from components.preflight.checks import check
from components.runtime.errors import Tune16Error
from components.runtime.outputs import read_json, write_json
from components.storage import versions
from components.upload.publisher import publish
from tests.components.conftest import JUDGED, PATH, Flow, Made

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # PEFT looks on the Hub for a local base
]


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


def test_evaluation(made: Callable[..., Made], tmp_path: Path) -> None:
    run = made("llama")
    config = EvaluateConfig(num_prompts=10, max_new_tokens=8, batch_size=4)
    result = evaluate_adapter(run.weights, run.adapter, run.rows, tmp_path / "out", config)
    assert result.promoted and result.tuned.loss.value < result.base.loss.value
    assert result.loss_difference.high < 0
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(content["samples"]) == 10 and content["verdict"] == "promoted"
    assert "Promoted" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nbase_model:")


def test_losses_are_those_of_the_model_alone(made: Callable[..., Made]) -> None:
    from peft import PeftModel

    run = made("llama")
    model = PeftModel.from_pretrained(load_base(run.weights, torch.float32), run.adapter).eval()
    rows = pq.read_table(run.rows / "held_out.parquet").to_pylist()[:5]
    ours = score_losses(model, rows, batch_size=3)
    for row, total, count in zip(rows, ours.sums, ours.tokens, strict=True):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert total / count == pytest.approx(float(loss), rel=1e-4)


def test_bootstrap_intervals_hold_the_value() -> None:

    estimate = bootstrap(np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4))
    assert estimate.low < estimate.value == 2.5 < estimate.high
