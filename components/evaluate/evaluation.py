"""The step evaluate: base and tuned model on the same held-out rows, from one model load, and the verdict.

The adapter is switched off for the base model's figures, and the champion's adapter, where there is one on the same
base model, is loaded beside it.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from peft import PeftModel
from transformers import AutoTokenizer

from components import versions
from components.config import KEPT, PROMOTED, EvaluateConfig
from components.errors import Tune16Error
from components.evaluate.report import write_card, write_report
from components.evaluate.scores import Estimate, Scores, answer, bootstrap_difference, score_answers, score_losses
from components.models import choose_dtype, load_base
from components.outputs import new_folder, read_record, write_json, write_record
from components.report import significant
from components.steps import say

SCORES_FILE = "evaluation.json"
_TUNED = "default"  # PEFT's name for the first adapter
_CHAMPION = "champion"


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the expected answer and both models' answers."""

    question: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class ChampionScore:
    """The champion's loss on the same rows; None where its base model is another one."""

    version: str
    loss: float | None


@dataclass(frozen=True)
class Evaluation:
    """Everything the report shows."""

    base: Scores
    tuned: Scores
    loss_difference: Estimate
    samples: list[Sample]
    champion: ChampionScore | None
    promoted: bool
    reason: str

    @property
    def verdict(self) -> str:
        """``promoted`` or ``kept`` (the current champion stays)."""
        return PROMOTED if self.promoted else KEPT

    def metrics(self) -> dict[str, float]:
        """The scores as flat, rounded numbers for the dashboard."""
        numbers = {}
        for name, scores in (("base", self.base), ("tuned", self.tuned)):
            numbers[f"{name}_loss"] = scores.loss.value
            numbers[f"{name}_perplexity"] = scores.perplexity
            numbers[f"{name}_exact_match"] = scores.exact_match.value
            numbers[f"{name}_chrf"] = scores.chrf.value
        return {name: significant(value) for name, value in numbers.items()}


def evaluate_adapter(
    model: Path,
    adapter: Path,
    data: Path,
    output: Path,
    config: EvaluateConfig,
    path: str = "",
    champion: str = "",
) -> Evaluation:
    """Judge an adapter.

    Args:
        model: output of the step quantize.
        adapter: output of the step train.
        data: output of the step prepare, the very one the adapter was trained on.
        output: becomes a folder with ``evaluation.json``, ``report.html`` and the model card ``README.md``.
        config: how many rows and prompts, and the improvement that is asked for.
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
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    stop_id = tokenizer.convert_tokens_to_ids(prepared["stop_token"])
    base = load_base(model, choose_dtype(trained["compute_dtype"]))
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    say("evaluate", f"scoring {len(rows)} held-out rows with the base and the tuned model")
    with tuned.disable_adapter():
        base_losses = score_losses(tuned, rows, config.batch_size)
        base_answers = answer(tuned, tokenizer, rows[: config.num_prompts], stop_id, config, "base model")
    tuned_losses = score_losses(tuned, rows, config.batch_size)
    tuned_answers = answer(tuned, tokenizer, rows[: config.num_prompts], stop_id, config, "tuned model")
    rival = _score_champion(tuned, rows, trained["model"], config, path, champion) if champion else None
    expected = [row["messages"][-1]["content"] for row in rows[: config.num_prompts]]
    base_scores = score_answers(base_losses, base_answers, expected)
    tuned_scores = score_answers(tuned_losses, tuned_answers, expected)
    promoted, reason = decide(base_scores.loss.value, tuned_scores.loss.value, rival, config.minimum_improvement)
    samples = [
        Sample(row["messages"][-2]["content"], *texts)
        for row, *texts in zip(rows, expected, base_answers, tuned_answers, strict=False)
    ]
    evaluation = Evaluation(
        base_scores,
        tuned_scores,
        bootstrap_difference(base_losses, tuned_losses),
        samples,
        rival,
        promoted,
        reason,
    )
    _write(evaluation, trained, output, config)
    say("evaluate", f"{evaluation.verdict}: {reason}")
    return evaluation


def _check_lineage(trained: dict[str, Any], prepared: dict[str, Any], quantized: dict[str, Any]) -> None:
    if trained["model"] != quantized["model"]:
        raise Tune16Error(
            f"The adapter belongs to the base model {trained['model']}, but the weights are of {quantized['model']}."
        )
    if trained["held_out_sha256"] != prepared["held_out_sha256"]:
        raise Tune16Error("The adapter was trained with another split of the data; it may have seen these rows.")


def decide(
    base_loss: float, tuned_loss: float, champion: ChampionScore | None, minimum_improvement: float
) -> tuple[bool, str]:
    """Whether the tuned model is promoted, and why in one sentence."""
    improvement = 1 - tuned_loss / base_loss
    change = f"the held-out loss is {abs(improvement):.1%} {'below' if improvement >= 0 else 'above'} the base model's"
    if improvement < minimum_improvement:
        return False, f"{change}; at least {minimum_improvement:.1%} below is asked for."
    if champion is None:
        return True, f"{change}, and there is no champion yet."
    if champion.loss is None:
        return True, f"{change}; champion {champion.version} has another base model and is not comparable."
    if tuned_loss < champion.loss:
        return (
            True,
            f"{change}, and it beats champion {champion.version} ({tuned_loss:.4f} against {champion.loss:.4f}).",
        )
    return False, f"{change}, but champion {champion.version} is at least as good ({champion.loss:.4f})."


def _score_champion(
    tuned: Any, rows: list[dict[str, Any]], model: str, config: EvaluateConfig, path: str, version: str
) -> ChampionScore:
    """Score the champion's adapter on the same rows, where it belongs to the same base model."""
    if versions.read_manifest(path, version)["lineage"]["model"] != model:
        return ChampionScore(version, None)
    say("evaluate", f"scoring champion {version}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = versions.download(path, version, Path(scratch) / "adapter", part="adapter")
        tuned.load_adapter(folder, adapter_name=_CHAMPION)
    with _using(tuned, _CHAMPION):
        return ChampionScore(version, score_losses(tuned, rows, config.batch_size).mean)


@contextmanager
def _using(tuned: Any, adapter: str) -> Iterator[None]:
    tuned.set_adapter(adapter)
    try:
        yield
    finally:
        tuned.set_adapter(_TUNED)


def _write(evaluation: Evaluation, trained: dict[str, Any], output: Path, config: EvaluateConfig) -> None:
    with new_folder(output) as folder:
        content = {
            "verdict": evaluation.verdict,
            "reason": evaluation.reason,
            "base": evaluation.base.as_dict(),
            "tuned": evaluation.tuned.as_dict(),
            "loss_difference": evaluation.loss_difference.as_dict(),
            "champion": vars(evaluation.champion) if evaluation.champion else None,
            "samples": [vars(sample) for sample in evaluation.samples],
        }
        write_json(folder / SCORES_FILE, content)
        write_report(evaluation, trained, folder)
        write_card(evaluation, trained, folder)
        write_record(folder, "evaluate", config, model=trained["model"], verdict=evaluation.verdict)
