"""The training report: the loss over the steps, and the run in numbers."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from components.config import TrainConfig
from components.runtime import report
from components.runtime.outputs import REPORT


def write_report(history: list[dict[str, Any]], metrics: dict[str, float], config: TrainConfig, folder: Path) -> None:
    """Write ``report.html`` into `folder` from the trainer's log entries."""
    changed = config.model_dump(exclude_defaults=True)
    html = report.page(
        "Training",
        f"{metrics['steps']:,.0f} steps in {metrics['seconds']:,.0f} s.",
        report.picture(_loss_chart(history), "Training and held-out loss over the steps"),
        report.section(
            "Numbers", report.table(("What", "Value"), [(k.replace("_", " "), v) for k, v in metrics.items()])
        ),
        report.section(
            "Settings that differ from the reference recipe",
            report.table(("Setting", "Value"), changed.items()) if changed else report.paragraph("None."),
        ),
        result=report.verdict("plain", f"The final loss on held-out rows is {metrics['held_out_loss']}."),
    )
    (folder / REPORT).write_text(html, encoding="utf-8")


def _loss_chart(history: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 3.4))
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.6, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(axis="y", color="#e4e7ec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
