"""The data report: what became of the rows, how long they are, and what the model is trained on."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from components import report
from components.outputs import REPORT

if TYPE_CHECKING:
    from components.prepare.dataset import Prepared


def write_report(prepared: "Prepared", data: str, folder: Path) -> None:
    """Write ``report.html`` into `folder`."""
    counts = prepared.counts
    rows = [
        ("Rows read", counts.rows),
        ("Exact duplicates left out", counts.duplicates),
        ("Left out because the cut took the whole answer", counts.dropped_answer_cut_away),
        ("Cut at the end", counts.cut),
        ("Rows to train on", counts.train_rows),
        ("Rows held out", counts.held_out_rows),
        ("Tokens to train on", counts.train_tokens),
        ("… of them in answers, which alone count in the loss", counts.train_answer_tokens),
        ("Longest row in tokens", counts.longest),
    ]
    facts = f"Form {prepared.form}, chat template {prepared.template.name}, all rows checked."
    html = report.page(
        "Data set",
        f"{data}. {facts}",
        report.table(("What", "Number"), rows),
        report.section("Length of the rows", report.picture(_histogram(prepared), "Histogram of tokens per row")),
        report.section(
            "What the model sees",
            report.paragraph(
                "The first rows as they are tokenised; the marked text is what the model learns to write."
            ),
            *(f"<p><pre>{_marked(text, spans)}</pre></p>" for text, spans in prepared.examples),
        ),
    )
    (folder / REPORT).write_text(html, encoding="utf-8")


def _histogram(prepared: "Prepared") -> Figure:
    lengths = prepared.lengths
    figure = Figure(figsize=(8, 2.6))
    axes = figure.subplots()
    used = min(int(np.flatnonzero(lengths)[-1]) + 1, len(lengths))
    edges = np.linspace(0, used, min(used, 40) + 1).astype(int)
    heights = np.add.reduceat(lengths[:used], edges[:-1])
    axes.bar(edges[:-1], heights, width=np.diff(edges), align="edge", color="#3b6fb6", edgecolor="white", linewidth=0.5)
    axes.set_xlabel("tokens per row")
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _marked(text: str, spans: list[tuple[int, int]]) -> str:
    pieces, position = [], 0
    for start, end in spans:
        pieces += [escape(text[position:start]), f"<mark>{escape(text[start:end])}</mark>"]
        position = end
    return "".join([*pieces, escape(text[position:])])
