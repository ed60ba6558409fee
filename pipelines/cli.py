"""The command `tune16`: plan, run and compile here; the commands that speak to a cluster are in cli_cluster.py."""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from components.config import override
from components.errors import user_errors
from pipelines import cli_cluster
from pipelines.options import AsJson, RecipeName, Settings, find_recipe, plan_recipe

app = typer.Typer(
    help="Fine-tune a large language model with QLoRA on one 16 GB GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(cli_cluster.doctor)
app.command()(cli_cluster.submit)
app.add_typer(cli_cluster.runs, name="runs")
app.add_typer(cli_cluster.schedules, name="schedule")
console = Console(highlight=False)


@app.command()
def run(
    recipe: RecipeName = "demo",
    set_: Settings = [],  # noqa: B006
    folder: Annotated[Path, typer.Option(help="Where the run's folder is made.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Run the pipeline on this machine, from data set to uploaded model."""
    from pipelines.local import run_locally

    settings = override(find_recipe(recipe), set_)
    name = f"{Path(recipe).stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    out = Console(highlight=False, file=sys.stderr if as_json else sys.stdout)  # kfp gets another stdout
    result = run_locally(
        settings, (folder / name).absolute(), lambda step, text: out.print(f"[bold cyan]{step:>9}[/] {escape(text)}")
    )
    if as_json:
        print(json.dumps({**asdict(result), "folder": str(result.folder), "report": str(result.report)}, indent=2))
        return
    _print_run(result)


@app.command(name="plan")
def plan_(recipe: RecipeName = "llama2-7b-16gb", set_: Settings = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Plan the GPU memory of a recipe; well-known models need no network."""
    settings = override(find_recipe(recipe), set_)
    memory = plan_recipe(settings)
    if as_json:
        content = {"parts": memory.parts, "total": memory.total, "available": memory.available, "fits": memory.fits}
        print(json.dumps(content, indent=2))
    else:
        table = Table("GPU memory while training", "GiB", title=settings.preflight.model)
        for name, size in memory.parts.items():
            table.add_row(name, f"{size / 2**30:.2f}")
        table.add_section()
        table.add_row(f"together, of {memory.available / 2**30:.2f}", f"{memory.total / 2**30:.2f}")
        console.print(table)
    from components.preflight.checks import refuse_unfit

    refuse_unfit(memory)


@app.command(name="compile")
def compile_(
    output: Annotated[
        Path | None, typer.Option(help="File to write; the default is manifests/base/pipeline.yaml.")
    ] = None,
    ir: Annotated[bool, typer.Option("--ir", help="The plain form, for the dashboard's upload (tune16.yaml).")] = False,
) -> None:
    """Compile the pipeline to YAML."""
    from pipelines.compile import MANIFEST, compile_ir, compile_manifest

    target = output or (Path("tune16.yaml") if ir else MANIFEST)
    (compile_ir if ir else compile_manifest)(target)
    console.print(f"{target}: {target.stat().st_size:,} bytes")


def _print_run(result: Any) -> None:
    steps = Table("step", "seconds", "result")
    for name, step in result.steps.items():
        steps.add_row(name, "" if step.seconds is None else f"{step.seconds:.1f}", escape(step.said))
    console.print(steps)
    scores = Table("on held-out rows", "base", "tuned")
    base, tuned = result.evaluation["base"], result.evaluation["tuned"]
    for name in ("loss", "exact_match", "chrf"):
        scores.add_row(name.replace("_", " "), f"{base[name]['value']:g}", f"{tuned[name]['value']:g}")
    scores.add_row("perplexity", f"{base['perplexity']:g}", f"{tuned['perplexity']:g}")
    console.print(scores)
    console.print(f"{result.evaluation['verdict']}: {escape(result.evaluation['reason'])}")
    if result.address:
        console.print(f"published  {result.address}")
    console.print(f"report     {result.report}", soft_wrap=True)
    console.print(f"done in {result.seconds:.0f} s")


def main() -> None:
    """Entry point of the command `tune16`."""
    with user_errors():
        app()


if __name__ == "__main__":
    main()
