"""Losses, generated answers and their scores, with bootstrap intervals."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sacrebleu.metrics.chrf import CHRF

from components.config import EvaluateConfig
from components.evaluate.batches import in_batches, tokens_at_once
from components.evaluate.results import Estimate, Scores
from components.models.labels import IGNORED
from components.models.loading import device
from components.runtime.errors import Tune16Error
from components.runtime.steps import say

_LOGIT_TOKENS = 512  # tokens whose logits are held at once
_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class RowLosses:
    """Summed negative log-likelihood of the answers in nats, and their number of tokens, per row."""

    sums: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Loss per answer token."""
        return float(self.sums.sum() / self.tokens.sum())


@torch.inference_mode()
def score_losses(model: Any, rows: list[dict[str, Any]], batch_size: int) -> RowLosses:
    """Score the answers of tokenised rows (``input_ids``, ``labels``) with the adapter that is active in `model`.

    Logits are computed for answer tokens only and in chunks: with a vocabulary of 128k a full batch's would not fit.

    Raises:
        Tune16Error: a loss is NaN or infinite, or a single row does not fit the GPU.
    """
    causal = model.get_base_model()

    def score(numbers: list[int]) -> list[tuple[float, int]]:
        input_ids, attention, labels = _pad([rows[number] for number in numbers])
        hidden = causal.model(input_ids=input_ids, attention_mask=attention, use_cache=False).last_hidden_state
        row_of, place = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        losses = _token_losses(causal.lm_head, hidden[row_of, place], labels[row_of, place + 1])
        row_of = row_of.cpu()
        sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, row_of, losses)
        return list(zip(sums.tolist(), torch.bincount(row_of, minlength=len(numbers)).tolist(), strict=True))

    lengths = [len(row["input_ids"]) for row in rows]
    sums, tokens = zip(*in_batches(lengths, batch_size, tokens_at_once(causal), score), strict=True)
    if not np.isfinite(sums).all():
        raise Tune16Error(
            "evaluate: the model's loss is NaN or infinite on some rows: its activations exceed the range of its "
            "number format. Set train.compute_dtype to float32, or use a GPU with bfloat16."
        )
    return RowLosses(np.array(sums), np.array(tokens, dtype=np.int64))


def _pad(batch: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Pad at the end: ids, attention mask and labels, each of shape [rows, longest row].

    Rows of one length need no mask: attention then takes none, which would be of shape [rows, longest, longest].
    """
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for number, row in enumerate(batch):
        length = len(row["input_ids"])
        ids[number, :length] = torch.tensor(row["input_ids"])
        attention[number, :length] = 1
        labels[number, :length] = torch.tensor(row["labels"])
    mask = None if attention.all() else attention.to(device())
    return ids.to(device()), mask, labels.to(device())


def _token_losses(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = [
        torch.nn.functional.cross_entropy(head(states).float(), wanted, reduction="none")
        for states, wanted in zip(torch.split(hidden, _LOGIT_TOKENS), torch.split(labels, _LOGIT_TOKENS), strict=True)
    ]
    return torch.cat(losses).double().cpu()


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], ends: list[int], config: EvaluateConfig, who: str
) -> list[str]:
    """Answer the last question of each row, greedily, in batches; an answer ends with one of the tokens `ends`.

    Raises:
        Tune16Error: a single prompt does not fit the GPU.
    """
    prompts: list[list[int]] = tokenizer.apply_chat_template(
        [row["messages"][:-1] for row in rows], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    num_answered = 0

    def generate(numbers: list[int]) -> list[str]:
        nonlocal num_answered
        inputs = tokenizer.pad({"input_ids": [prompts[number] for number in numbers]}, return_tensors="pt").to(device())
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = generated[:, inputs["input_ids"].shape[1] :]
        num_answered += len(numbers)
        say("evaluate", f"{who}: {num_answered} of {len(rows)} prompts answered")
        return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]

    lengths = [len(prompt) + config.max_new_tokens for prompt in prompts]
    return in_batches(lengths, config.batch_size, tokens_at_once(model.get_base_model()), generate)


def score_answers(losses: RowLosses, answers: list[str], expected: list[str]) -> Scores:
    """Loss, exact match (spaces aside) and chrF (0 to 1; Popović 2015), each with its interval."""
    exact = [float(got.split() == wanted.split()) for got, wanted in zip(answers, expected, strict=True)]
    ones = np.ones(len(expected))
    return Scores(
        bootstrap(losses.sums, losses.tokens.astype(float)),
        bootstrap(np.array(exact), ones),
        bootstrap(_chrf(answers, expected), ones),
    )


def chrf_difference(base: list[str], tuned: list[str], expected: list[str]) -> Estimate:
    """Tuned minus base model's chrF, answer by answer: positive is better."""
    return bootstrap(_chrf(tuned, expected) - _chrf(base, expected), np.ones(len(expected)))


def _chrf(answers: list[str], expected: list[str]) -> npt.NDArray[np.float64]:
    metric = CHRF()
    pairs = zip(answers, expected, strict=True)
    return np.array([metric.sentence_score(got, [wanted]).score / 100 for got, wanted in pairs])


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
