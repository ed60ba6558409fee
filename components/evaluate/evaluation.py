"""The step evaluate: base and tuned model on the same held-out rows, from one model load, and the verdict.

The adapter is switched off for the base model's figures, and the champion's adapter, where there is one on the same
base model, is loaded beside it. Answers end by the rule that is published with the model
(:mod:`components.models.stopping`).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from components.config import EvaluateConfig
from components.evaluate.decision import Comparison, decide
from components.evaluate.report import write_card, write_report
from components.evaluate.results import ChampionScore, Evaluation, Sample
from components.evaluate.scores import (
    RowLosses,
    answer,
    bootstrap_difference,
    chrf_difference,
    score_answers,
    score_losses,
)
from components.models.loading import bound_float16, card_facts, load_base, usable_dtype
from components.models.stopping import generation_settings
from components.runtime.errors import Tune16Error
from components.runtime.outputs import EVALUATION, new_folder, read_record, write_json, write_record
from components.runtime.steps import say
from components.storage import versions

_TUNED = "default"  # PEFT's name for the first adapter
_CHAMPION = "champion"


def evaluate_adapter(
    model: Path,
    adapter: Path,
    data: Path,
    output: Path,
    config: EvaluateConfig,
    path: str = "",
    champion: str = "",
) -> Evaluation:
    """Evaluate an adapter.

    Args:
        model: output of the step quantize.
        adapter: output of the step train.
        data: output of the step prepare, the same that the adapter was trained on.
        output: becomes a folder with ``evaluation.json``, ``report.html`` and the model card ``README.md``.
        config: how many rows and prompts, and the improvement that is required.
        path: ``prefix/model-name`` in the connection's bucket, where the champion is.
        champion: the champion's version; empty where there is none.

    Raises:
        Tune16Error: the inputs do not belong together.
    """
    trained = read_record(adapter, "train")
    prepared = read_record(data, "prepare")
    _check_lineage(trained, prepared, read_record(model, "quantize"))
    rows = pq.read_table(data / "held_out.parquet").slice(0, config.num_rows).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer", padding_side="left", trust_remote_code=False)
    ends = generation_settings(model, tokenizer, prepared["stop_token"])["eos_token_id"]
    for line in card_facts():
        say("evaluate", line)
    dtype, told = usable_dtype(trained["compute_dtype"])
    if told:
        say("evaluate", told)
    base = load_base(model, dtype)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    if dtype == torch.float16:
        bound_float16(tuned)
    say("evaluate", f"scoring {len(rows)} held-out rows with the base and the tuned model")
    with tuned.disable_adapter():
        base_losses = score_losses(tuned, rows, config.batch_size)
        base_answers = answer(tuned, tokenizer, rows[: config.num_prompts], ends, config, "base model")
    tuned_losses = score_losses(tuned, rows, config.batch_size)
    tuned_answers = answer(tuned, tokenizer, rows[: config.num_prompts], ends, config, "tuned model")
    rival = None
    if champion:
        rival = _score_champion(tuned, rows, tuned_losses, trained["model"], config, path, champion)
    expected = [row["messages"][-1]["content"] for row in rows[: config.num_prompts]]
    found = Comparison(
        len(rows),
        score_answers(base_losses, base_answers, expected),
        score_answers(tuned_losses, tuned_answers, expected),
        bootstrap_difference(base_losses, tuned_losses),
        chrf_difference(base_answers, tuned_answers, expected),
        rival,
    )
    verdict, reason = decide(found, config)
    samples = [
        Sample(row["messages"][-2]["content"], *texts)
        for row, *texts in zip(rows, expected, base_answers, tuned_answers, strict=False)
    ]
    evaluation = Evaluation(found.base, found.tuned, found.loss_difference, samples, rival, verdict, reason)
    _write(evaluation, trained, output, config)
    say("evaluate", f"{evaluation.verdict}: {reason}")
    return evaluation


def _check_lineage(trained: dict[str, Any], prepared: dict[str, Any], quantized: dict[str, Any]) -> None:
    if trained["model"] != quantized["model"]:
        raise Tune16Error(
            f"The adapter belongs to the base model {trained['model']}, but the weights are of {quantized['model']}."
        )
    if trained["held_out_sha256"] != prepared["held_out_sha256"]:
        raise Tune16Error("The adapter was trained on another split of the data; it may have seen these rows.")


def _score_champion(
    tuned: Any,
    rows: list[dict[str, Any]],
    losses: RowLosses,
    model: str,
    config: EvaluateConfig,
    path: str,
    version: str,
) -> ChampionScore:
    """Score the champion's adapter on the same rows, where it belongs to the same base model.

    Raises:
        Tune16Error: the champion cannot be read.
    """
    other = versions.read_manifest(path, version)["lineage"]["model"]
    if other != model:
        return ChampionScore(version, other)
    say("evaluate", f"scoring champion {version}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = versions.download(path, version, Path(scratch) / "adapter", part="adapter")
        tuned.load_adapter(folder, adapter_name=_CHAMPION)
    with _using(tuned, _CHAMPION):
        champions = score_losses(tuned, rows, config.batch_size)
    return ChampionScore(version, other, champions.mean, bootstrap_difference(champions, losses))


@contextmanager
def _using(tuned: Any, adapter: str) -> Iterator[None]:
    tuned.set_adapter(adapter)
    try:
        yield
    finally:
        tuned.set_adapter(_TUNED)


def _as_dict(champion: ChampionScore | None) -> dict[str, Any] | None:
    if champion is None:
        return None
    return {**vars(champion), "difference": champion.difference.as_dict() if champion.difference else None}


def _write(evaluation: Evaluation, trained: dict[str, Any], output: Path, config: EvaluateConfig) -> None:
    with new_folder(output) as folder:
        content = {
            "verdict": evaluation.verdict,
            "reason": evaluation.reason,
            "base": evaluation.base.as_dict(),
            "tuned": evaluation.tuned.as_dict(),
            "loss_difference": evaluation.loss_difference.as_dict(),
            "champion": _as_dict(evaluation.champion),
            "samples": [vars(sample) for sample in evaluation.samples],
        }
        write_json(folder / EVALUATION, content)
        write_report(evaluation, trained, folder)
        write_card(evaluation, trained, folder)
        write_record(folder, "evaluate", config, model=trained["model"], verdict=evaluation.verdict)
