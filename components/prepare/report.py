"""The data report: what became of the rows, how long they are, and what the model is trained on."""

from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from components.prepare.results import Prepared
from components.prepare.rules.findings import Findings
from components.prepare.rules.table import RULES, SEVERITIES
from components.runtime import report
from components.runtime.outputs import REPORT


def write_report(prepared: Prepared, data: str, folder: Path) -> None:
    """Write ``report.html`` into `folder`."""
    counts = prepared.counts
    rows = [
        ("Rows read", counts.rows),
        ("Exact duplicates left out", counts.duplicates),
        ("Left out because they contain a template token", counts.dropped_template_token),
        ("Left out because the whole answer was cut off", counts.dropped_answer_cut_away),
        ("Cut at the end", counts.cut),
        ("Rows to train on", counts.train_rows),
        ("Rows held out", counts.held_out_rows),
        ("Tokens to train on", counts.train_tokens),
        ("… of them in answers, which alone count in the loss", counts.train_answer_tokens),
        ("Longest row in tokens", counts.longest),
    ]
    facts = f"Form {prepared.checked.form}; chat template: {prepared.template.note}. All rows checked."
    html = report.page(
        "Data set",
        f"{data}. {facts}",
        report.table(("What", "Number"), rows),
        findings_section(prepared.checked.findings),
        report.section("Length of the rows", report.picture(_histogram(prepared), "Histogram of tokens per row")),
        report.section(
            "What the model sees",
            report.paragraph(
                "The first rows as they are tokenised; the marked text is what the model learns to write."
            ),
            *(f"<p><pre>{_marked(sample.text, sample.spans)}</pre></p>" for sample in prepared.tokens.examples),
        ),
        result=report.verdict("plain", f"{counts.train_rows:,} rows to train on, {counts.held_out_rows:,} held out."),
    )
    (folder / REPORT).write_text(html, encoding="utf-8")


def write_check_report(findings: Findings, data: str, target: Path) -> None:
    """Write the page of `tune16 data check` to `target`."""
    broken = sum(findings.counts[rule] for rule in findings.rules("error"))
    result = report.verdict(
        "bad" if broken else "good",
        f"{broken:,} faults keep these rows from being used." if broken else "These rows can be used.",
    )
    lead = f"{data}. {findings.num_rows:,} rows checked."
    target.write_text(report.page("Data check", lead, findings_section(findings), result=result), encoding="utf-8")


def findings_section(findings: Findings) -> str:
    """Which rules are broken how often, what to do, and the first places of each."""
    rules = [(rule, severity) for severity in SEVERITIES for rule in findings.rules(severity)]
    if not rules:
        return report.section("Findings", report.paragraph("No rule is broken."), *_notes(findings))
    rows = [
        (rule, severity, findings.counts[rule], findings.share(rule), RULES[rule].remedy) for rule, severity in rules
    ]
    places = [(rule, finding.place, finding.message) for rule, _ in rules for finding in findings.shown(rule)]
    return report.section(
        "Findings",
        report.table(("Rule", "Severity", "Number", "Share of the rows", "What to do"), rows),
        report.paragraph(f"The first places of each rule, at most {findings.num_shown}:"),
        report.table(("Rule", "Place", "What"), places),
        *_notes(findings),
    )


def _notes(findings: Findings) -> list[str]:
    return [report.paragraph(note) for note in findings.notes]


def _histogram(prepared: Prepared) -> Figure:
    lengths = prepared.tokens.lengths
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
