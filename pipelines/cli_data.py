"""The commands of `tune16` on data sets: check."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from components.config import PrepareConfig
from components.prepare.rules.table import RULES, SEVERITIES
from pipelines.options import AsJson

if TYPE_CHECKING:
    from components.prepare.checkup import Checkup

_PLACES = 3  # per rule on the terminal; the report lists more

data = typer.Typer(help="Data sets: check them before a run.", no_args_is_help=True)
console = Console(highlight=False)


@data.callback()
def _data() -> None:
    """Data sets: check them before a run."""


@data.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file or folder, s3://, https:// or org/name.")],
    model: Annotated[str, typer.Option(help="Model whose tokenizer and chat template are used.")] = "",
    form: Annotated[str, typer.Option("--format", help="Format of the rows.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 1024,
    configuration: Annotated[str, typer.Option(help="Configuration, if the data set's card lists several.")] = "",
    split: Annotated[str, typer.Option(help="Split, if the data set has several.")] = "train",
    report: Annotated[Path | None, typer.Option(help="Write an HTML report to this file.")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write a cleaned copy next to the file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a data set against all rules of the step prepare; exit code 2 if it would be refused."""
    from components.prepare.checkup import check_data

    options = {"format": form, "configuration": configuration, "split": split}
    config = PrepareConfig.load(options, max_tokens=max_tokens)
    notes = Console(highlight=False, stderr=True)
    found = check_data(file, config, model, fix, lambda text: notes.print(f"[dim]{text}[/]"))
    if report:
        from components.prepare.report import write_check_report

        write_check_report(found.findings, file, report)
    if as_json:
        print(json.dumps(_as_json(found), indent=2))
    else:
        _print(found, file, report)
    sys.stdout.flush()
    found.findings.refuse(file)


def _as_json(found: "Checkup") -> dict[str, Any]:
    clean = {"file": str(found.clean), "done": found.done} if found.clean else None
    return {**found.findings.as_json(), "clean": clean}


def _print(found: "Checkup", file: str, report: Path | None) -> None:
    findings = found.findings
    table = Table("rule", "number", "first places", "what to do", title=escape(file))
    for severity, colour in zip(SEVERITIES, ("red", "yellow"), strict=True):
        for rule in findings.rules(severity):
            shown = [escape(f"{finding.place}: {finding.message}") for finding in findings.shown(rule)[:_PLACES]]
            table.add_row(
                f"[{colour}]{rule}[/]", f"{findings.counts[rule]:,}", "\n".join(shown), escape(RULES[rule].remedy)
            )
    if table.row_count:
        console.print(table)
    errors = sum(findings.counts[rule] for rule in findings.rules("error"))
    warnings = sum(findings.counts[rule] for rule in findings.rules("warning"))
    console.print(f"{findings.num_rows:,} readable rows, {errors:,} errors, {warnings:,} warnings")
    for note in findings.notes:
        console.print(escape(note))
    for what, count in found.done.items():
        console.print(f"{count:>9,}  {what}")
    for path in filter(None, (found.clean, report)):
        console.print(f"written: {escape(str(path))}", soft_wrap=True)
