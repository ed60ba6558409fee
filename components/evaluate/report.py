"""The evaluation report, for readers without a technical background, and the model card."""

from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from components.config import INCONCLUSIVE, KEPT, PROMOTED
from components.evaluate.results import Evaluation
from components.models.references import parse
from components.runtime import report
from components.runtime.outputs import REPORT

_SHOWN_SAMPLES = 20
_WORDS = {PROMOTED: "Promoted", KEPT: "Not promoted", INCONCLUSIVE: "Inconclusive, not promoted"}
_COLOURS: dict[str, report.Colour] = {PROMOTED: "good", KEPT: "bad", INCONCLUSIVE: "open"}


def write_report(evaluation: Evaluation, trained: dict[str, Any], folder: Path) -> None:
    """Write ``report.html`` into `folder`."""
    html = report.page(
        "Is the tuned model better?",
        f"{trained['model']}, tuned on {trained['data']}.",
        report.picture(_bars(evaluation), "Loss, exact match and chrF of base and tuned model"),
        report.section(
            "Scores on rows that were never trained on",
            report.table(("Score", "Base model", "Tuned model"), score_rows(evaluation)),
            report.paragraph(
                "In brackets: the range that 95 % of repeated draws of the rows fall into. Exact match and chrF "
                "(agreement in short character sequences) run from 0 to 1."
            ),
        ),
        report.section("Answers side by side", _samples(evaluation)),
        report.section("Settings", report.table(("Setting", "Value"), trained["config"].items())),
        result=report.verdict(_COLOURS[evaluation.verdict], f"{_WORDS[evaluation.verdict]}: {evaluation.reason}"),
    )
    (folder / REPORT).write_text(html, encoding="utf-8")


def score_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Score, base, tuned: the rows of the table."""
    base, tuned = evaluation.base, evaluation.tuned
    rows = [
        ("Loss (lower is better)", str(base.loss), str(tuned.loss)),
        ("Perplexity (lower is better)", f"{base.perplexity:.4g}", f"{tuned.perplexity:.4g}"),
        ("Exact match", str(base.exact_match), str(tuned.exact_match)),
        ("chrF", str(base.chrf), str(tuned.chrf)),
        ("Difference in loss, row by row", "", str(evaluation.loss_difference)),
    ]
    if evaluation.champion and evaluation.champion.loss is not None:
        rows.append((f"Loss of champion {evaluation.champion.version}", "", f"{evaluation.champion.loss:.4g}"))
        rows.append(("Difference from the champion's, row by row", "", str(evaluation.champion.difference)))
    return rows


def _bars(evaluation: Evaluation) -> Figure:
    figure = Figure(figsize=(8, 2.8))
    axes = figure.subplots(1, 3)
    names = (("loss", "Loss (lower is better)"), ("exact_match", "Exact match"), ("chrf", "chrF"))
    for plot, (name, title) in zip(axes, names, strict=True):
        estimates = [getattr(evaluation.base, name), getattr(evaluation.tuned, name)]
        heights = [estimate.value for estimate in estimates]
        errors = [[max(0.0, e.value - e.low) for e in estimates], [max(0.0, e.high - e.value) for e in estimates]]
        plot.bar(["base", "tuned"], heights, yerr=errors, capsize=4, color=["#9aa5b8", "#1a7f37"], width=0.6)
        plot.set_title(title, fontsize=10)
        plot.set_ylim(bottom=0, top=None if name == "loss" else 1.05)
        plot.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _samples(evaluation: Evaluation) -> str:
    rows = [
        (sample.question, sample.expected, sample.base, sample.tuned) for sample in evaluation.samples[:_SHOWN_SAMPLES]
    ]
    return report.table(("Question", "Expected", "Base model", "Tuned model"), rows)


def _how(trained: dict[str, Any]) -> str:
    return f"taught by `{trained['teacher']}`, " if trained["teacher"] else ""


def write_card(evaluation: Evaluation, trained: dict[str, Any], folder: Path) -> None:
    """Write the model card ``README.md`` with the header that model hubs read."""
    model, data = parse(trained["model"], "model"), parse(trained["data"], "data")
    header: dict[str, Any] = {
        "base_model": model.address if model.scheme == "hf" else str(model),
        "library_name": "peft",
        "tags": ["lora", "qlora", "tune16"],
    }
    if data.scheme == "hf":
        header["datasets"] = [data.address]
    settings = "\n".join(f"| {name} | {value} |" for name, value in trained["config"].items())
    scores = "\n".join(f"| {' | '.join(row)} |" for row in score_rows(evaluation))
    card = f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# A fine-tune of {model.address}

Base model `{model}`, {_how(trained)}tuned on `{data}` with {trained["bits"]}-bit frozen weights and a LoRA adapter of
rank {trained["config"]["rank"]}.

**{_WORDS[evaluation.verdict]}**: {evaluation.reason}

## Evaluation

On held-out rows of the same data set, which were never trained on; 95 % bootstrap intervals in brackets.

| score | base model | tuned model |
|---|---|---|
{scores}

The figures show how the model does on data like this. They say nothing about other uses, facts it may get wrong, or
harm it may do; it keeps the limits and the licence of its base model.

## Training

| setting | value |
|---|---|
{settings}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
