"""What an evaluation finds, in numbers and in a verdict."""

import math
from dataclasses import dataclass
from typing import Any

from components.config import PROMOTED
from components.runtime.report import significant


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
class Scores:
    """One model's scores on the held-out rows."""

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


@dataclass(frozen=True)
class ChampionScore:
    """The champion's loss on the same rows, and the tuned model's difference from it, row by row.

    Both are None where it was not scored, since its base model is another one.
    """

    version: str
    model: str
    loss: float | None = None
    difference: Estimate | None = None


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the expected answer and both models' answers."""

    question: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Evaluation:
    """Everything the report shows."""

    base: Scores
    tuned: Scores
    loss_difference: Estimate
    samples: list[Sample]
    champion: ChampionScore | None
    verdict: str
    reason: str

    @property
    def promoted(self) -> bool:
        """Whether the tuned model becomes the champion."""
        return self.verdict == PROMOTED

    def metrics(self) -> dict[str, float]:
        """The scores as flat, rounded numbers for the dashboard, which sorts them by name."""
        numbers = {}
        for name, scores in (("base", self.base), ("tuned", self.tuned)):
            numbers[f"loss_{name}"] = scores.loss.value
            numbers[f"exact_match_{name}"] = scores.exact_match.value
            numbers[f"chrf_{name}"] = scores.chrf.value
        return {name: significant(value) for name, value in numbers.items()}
