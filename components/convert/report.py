"""The report on the GGUF files: how much smaller each is, and what that costs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from components.runtime import report
from components.runtime.outputs import REPORT

if TYPE_CHECKING:
    from components.convert.trial import Trial

_SHOWN_DIFFERENCES = 10
_HEAD = ("File", "Size", "Loss", "Loss against F16", "Same answers as F16", "Tokens/s on this CPU")


def write_report(
    trials: list["Trial"], rows: list[dict[str, Any]], settings: dict[str, Any], folder: Path, reason: str
) -> None:
    """Write ``report.html`` into `folder`; with `reason`, why there are no files."""
    title = "Size and quality of the GGUF files"
    if reason:
        result = report.verdict("bad", f"No GGUF files: {reason}.")
        html = report.page(title, "GGUF files for llama.cpp.", result=result)
    else:
        html = report.page(
            title,
            f"GGUF files for llama.cpp, tested on {len(rows)} prompts that were not trained on.",
            report.picture(_plot(trials), "Loss against size of each file"),
            report.section("Every file", report.table(_HEAD, [_row(trial, trials[0]) for trial in trials])),
            report.paragraph(
                "Loss is on the answers of the held-out rows, lower is better. F16 is the merged model with 16 bits; a "
                "file's answer is the same if every character is. Speed is that of one conversation."
            ),
            report.section("Answers that changed", _differences(trials, rows)),
            report.section("Settings", report.table(("Setting", "Value"), settings.items())),
            result=_token_notice(trials, len(rows)),
        )
    (folder / REPORT).write_text(html, encoding="utf-8")


def _token_notice(trials: list["Trial"], count: int) -> str:
    """Say so where the files' template or tokenizer does not give the tokens that the model was trained with."""
    same = min(trial.same_tokens for trial in trials)
    text = (
        f"{same} of {count} prompts become the same tokens as in training, with the files' own template and tokenizer"
    )
    is_good = same == count
    return report.verdict("good" if is_good else "bad", f"{text}." if is_good else f"Only {text}. Check its answers.")


def _row(trial: "Trial", full: "Trial") -> tuple[Any, ...]:
    figures = trial.as_dict(full)
    return (
        trial.name,
        report.size(trial.size),
        figures["loss"],
        f"{trial.loss / full.loss - 1:+.1%}",
        f"{figures['same_answers']:.1%}",
        figures["tokens_per_second"],
    )


def _plot(trials: list["Trial"]) -> Figure:
    figure = Figure(figsize=(8, 3.2))
    axes = figure.subplots()
    unit, bytes_per_unit = ("GiB", 2**30) if trials[0].size >= 2**30 else ("MiB", 2**20)
    sizes, losses = [trial.size / bytes_per_unit for trial in trials], [trial.loss for trial in trials]
    axes.scatter(sizes, losses, s=60, color=["#9aa5b8", *["#1a7f37"] * (len(trials) - 1)], zorder=3)
    for trial, size, loss in zip(trials, sizes, losses, strict=True):
        axes.annotate(trial.name, (size, loss), xytext=(6, 6), textcoords="offset points", fontsize=9)
    axes.set_xlabel(f"size in {unit}")
    axes.set_ylabel("held-out loss")
    axes.margins(0.15, 0.25)
    axes.set_xlim(left=0)
    axes.grid(color="#dfe3ea")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _differences(trials: list["Trial"], rows: list[dict[str, Any]]) -> str:
    full, *others = trials
    found = [
        (row["messages"][-2]["content"], trial.name, full.answers[place], trial.answers[place])
        for place, row in enumerate(rows)
        for trial in others
        if trial.answers[place] != full.answers[place]
    ]
    if not found:
        return report.paragraph("None: every file gives the same answers as F16.")
    return report.table(("Question", "File", "F16", "This file"), found[:_SHOWN_DIFFERENCES])
