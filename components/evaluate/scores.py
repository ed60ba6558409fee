"""Losses, generated answers and their scores, with bootstrap intervals."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sacrebleu.metrics.chrf import CHRF

from components.config import EvaluateConfig
from components.models import device
from components.report import significant
from components.steps import say

_IGNORED = -100
_LOGIT_TOKENS = 512  # tokens whose logits are held at once
_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over rows."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Rounded, for files and dashboards."""
        return {name: significant(value) for name, value in vars(self).items()}

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class RowLosses:
    """Summed negative log-likelihood of the answers in nats, and their number of tokens, per row."""

    sums: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Loss per answer token."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Scores:
    """How one model does on the held-out rows."""

    loss: Estimate
    exact_match: Estimate
    chrf: Estimate

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss.value, 700))

    def as_dict(self) -> dict[str, Any]:
        """Rounded, for files and dashboards."""
        return {
            "loss": self.loss.as_dict(),
            "perplexity": significant(self.perplexity),
            "exact_match": self.exact_match.as_dict(),
            "chrf": self.chrf.as_dict(),
        }


@torch.inference_mode()
def score_losses(model: Any, rows: list[dict[str, Any]], batch_size: int) -> RowLosses:
    """Score the answers of tokenised rows (``input_ids``, ``labels``) with the adapter that is active in `model`.

    Logits are computed for answer tokens only and in chunks: with a vocabulary of 128k a full batch's would not fit.
    """
    causal = model.get_base_model()
    sums, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        input_ids, attention, labels = _pad(batch)
        hidden = causal.model(input_ids=input_ids, attention_mask=attention, use_cache=False).last_hidden_state
        row_of, place = (labels[:, 1:] != _IGNORED).nonzero(as_tuple=True)
        losses = _token_losses(causal.lm_head, hidden[row_of, place], labels[row_of, place + 1])
        row_of = row_of.cpu()
        sums[start : start + len(batch)] = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, row_of, losses)
        tokens[start : start + len(batch)] = torch.bincount(row_of, minlength=len(batch))
    return RowLosses(sums, tokens)


def _pad(batch: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad at the end: ids, attention mask and labels, each of shape [rows, longest row]."""
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, _IGNORED)
    for number, row in enumerate(batch):
        length = len(row["input_ids"])
        ids[number, :length] = torch.tensor(row["input_ids"])
        attention[number, :length] = 1
        labels[number, :length] = torch.tensor(row["labels"])
    return ids.to(device()), attention.to(device()), labels.to(device())


def _token_losses(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = [
        torch.nn.functional.cross_entropy(head(states).float(), wanted, reduction="none")
        for states, wanted in zip(torch.split(hidden, _LOGIT_TOKENS), torch.split(labels, _LOGIT_TOKENS), strict=True)
    ]
    return torch.cat(losses).double().cpu()


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], stop_id: int, config: EvaluateConfig, who: str
) -> list[str]:
    """Answer the last question of each row, greedily, in batches."""
    answers: list[str] = []
    remaining = iter(rows)
    while batch := list(islice(remaining, config.batch_size)):
        prompts = [row["messages"][:-1] for row in batch]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(device())
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=stop_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = generated[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
        say("evaluate", f"{who}: {len(answers)} of {len(rows)} prompts answered")
    return answers


def score_answers(losses: RowLosses, answers: list[str], expected: list[str]) -> Scores:
    """Loss, exact match (spaces aside) and chrF (0 to 1; Popović 2015), each with its interval."""
    metric = CHRF()
    exact = [float(got.split() == wanted.split()) for got, wanted in zip(answers, expected, strict=True)]
    chrf = [metric.sentence_score(got, [wanted]).score / 100 for got, wanted in zip(answers, expected, strict=True)]
    ones = np.ones(len(expected))
    return Scores(
        bootstrap(losses.sums, losses.tokens.astype(float)),
        bootstrap(np.array(exact), ones),
        bootstrap(np.array(chrf), ones),
    )


def bootstrap(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> Estimate:
    """sum(values) / sum(weights), and its interval when rows are drawn again with replacement."""
    picks = _resamples(len(values))
    return _estimate(float(values.sum() / weights.sum()), values[picks].sum(axis=1) / weights[picks].sum(axis=1))


def bootstrap_difference(base: RowLosses, tuned: RowLosses) -> Estimate:
    """Tuned minus base loss, both on the same drawn rows: negative is better."""
    picks = _resamples(len(base.sums))
    drawn = (tuned.sums[picks] - base.sums[picks]).sum(axis=1) / base.tokens[picks].sum(axis=1)
    return _estimate(tuned.mean - base.mean, drawn)


def _resamples(num_rows: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(num_rows, size=(_RESAMPLES, num_rows))


def _estimate(value: float, drawn: npt.NDArray[np.float64]) -> Estimate:
    low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))
