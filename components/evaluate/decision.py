"""The verdict: whether the tuned model is better than the base model and the champion, or whether it may be chance."""

from dataclasses import dataclass

from components.config import INCONCLUSIVE, KEPT, PROMOTED, EvaluateConfig
from components.evaluate.results import ChampionScore, Estimate, Scores
from components.storage import versions


@dataclass(frozen=True)
class Comparison:
    """What the verdict depends on; differences are tuned minus base, row by row."""

    num_rows: int
    base: Scores
    tuned: Scores
    loss_difference: Estimate
    chrf_difference: Estimate
    champion: ChampionScore | None


def decide(found: Comparison, config: EvaluateConfig) -> tuple[str, str]:
    """``promoted``, ``kept`` (the champion stays, or none is made) or ``inconclusive``, and why in one sentence.

    A difference counts where its 95 % interval over the rows excludes zero.
    """
    base, tuned = found.base.loss.value, found.tuned.loss.value
    improvement = 1 - tuned / base
    change = f"the held-out loss is {abs(improvement):.1%} {'below' if improvement >= 0 else 'above'} the base model's"
    if found.num_rows < config.minimum_rows:
        return INCONCLUSIVE, (
            f"{change}, but only {found.num_rows} rows were held out, and {config.minimum_rows} are required. Add "
            "rows, or raise prepare.held_out_share."
        )
    if improvement < config.minimum_improvement:
        return KEPT, f"{change}; at least {config.minimum_improvement:.1%} below is required."
    if found.loss_difference.high >= 0:
        return INCONCLUSIVE, (
            f"{change}, but that may be chance: row by row it is {found.loss_difference}. Hold out more rows "
            "(prepare.held_out_share), or train longer."
        )
    if found.chrf_difference.high < 0:
        return INCONCLUSIVE, (
            f"{change}, but its own answers agree less with the expected ones: chrF {found.tuned.chrf.value:.3f} "
            f"against {found.base.chrf.value:.3f}. Check the answers."
        )
    return _against_champion(found.champion, tuned, change, config)


def _against_champion(
    champion: ChampionScore | None, tuned: float, change: str, config: EvaluateConfig
) -> tuple[str, str]:
    if champion is None:
        return PROMOTED, f"{change}, and there is no champion yet."
    if champion.loss is None or champion.difference is None:
        if config.replace_other_base:
            return PROMOTED, (
                f"{change}; champion {champion.version} has the base model {champion.model} and is replaced "
                "without a comparison, as evaluate.replace_other_base is set."
            )
        return KEPT, f"{change}, but {versions.other_base(champion.version, champion.model)}"
    figures = f"{tuned:.4f} against {champion.loss:.4f}, row by row {champion.difference}"
    if champion.difference.high < 0:
        return PROMOTED, f"{change}, and it beats champion {champion.version} ({figures})."
    if champion.difference.low >= 0:
        return KEPT, f"{change}, but champion {champion.version} is at least as good ({figures})."
    return INCONCLUSIVE, f"{change}, but its lead over champion {champion.version} may be chance ({figures})."
