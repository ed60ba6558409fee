"""The command `tune16`: plan, run and compile on this machine; the other cli_*.py have the rest."""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from components.__main__ import chat, serve
from components.config import override
from components.images import VERSION
from components.runtime.errors import Tune16Error, user_errors
from components.runtime.proxies import spare_loopback
from components.runtime.report import size
from pipelines import cli_cluster, cli_data, cli_runs, cli_schedules
from pipelines.options import AsJson, RecipeName, Settings, find_recipe, find_shapes

if TYPE_CHECKING:
    from components.planning.memory import MemoryPlan

app = typer.Typer(
    help="Fine-tune a large language model with QLoRA on one 16 GB GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(serve)
app.command()(chat)
app.command()(cli_cluster.doctor)
app.command()(cli_cluster.submit)
app.add_typer(cli_runs.runs, name="runs")
app.add_typer(cli_schedules.schedules, name="schedule")
app.add_typer(cli_data.data, name="data")
console = Console(highlight=False)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"tune16 {VERSION}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune a large language model with QLoRA on one 16 GB GPU."""


_BAR = 40  # columns of the terminal for the whole GPU


@app.command()
def run(
    recipe: RecipeName = "demo",
    set_: Settings = [],  # noqa: B006
    folder: Annotated[Path, typer.Option(help="Where to create the run's folder.")] = Path("runs"),
    new: Annotated[bool, typer.Option("--new", help="Start a new run instead of resuming an interrupted one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline on this machine, from data set to uploaded model; an interrupted run is resumed."""
    from pipelines.local import find_interrupted, run_locally

    settings = override(find_recipe(recipe), set_)
    out = Console(highlight=False, file=sys.stderr if as_json else sys.stdout)  # kfp gets another stdout
    interrupted = None if new else find_interrupted(folder, settings)
    if interrupted:
        out.print(f"resuming the interrupted run {interrupted}; --new starts another", soft_wrap=True)
    place = interrupted or folder / f"{Path(recipe).stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    result = run_locally(
        settings, place.absolute(), lambda step, text: out.print(f"[bold cyan]{step:>9}[/] {escape(text)}")
    )
    if as_json:
        print(json.dumps({**asdict(result), "folder": str(result.folder), "report": str(result.report)}, indent=2))
        return
    _print_run(result)


@app.command(name="plan")
def plan_(
    recipe: RecipeName = "llama2-7b-16gb",
    model: Annotated[str, typer.Option(help="Model to plan for, instead of the recipe's.")] = "",
    gpu: Annotated[str, typer.Option(help="GPU to plan for: t4, v100-16, a10, l4, a100-40, h100, ...")] = "",
    price: Annotated[float, typer.Option(help="Cost of one hour of this GPU, in any currency.", min=0)] = 0,
    tokens: Annotated[float, typer.Option(help="Millions of tokens to train on.", min=0.001)] = 1,
    set_: Settings = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Plan the GPU memory and the time of a recipe; well-known models need no network."""
    from components.planning.gpus import find_gpu
    from components.planning.memory import plan
    from components.preflight.checks import refuse_unfit

    card = find_gpu(gpu) if gpu else None
    places = [f"preflight.gpu_memory={card.memory}"] if card else []
    settings = override(find_recipe(recipe), [*places, *([f"preflight.model={model}"] if model else []), *set_])
    shape, teacher = find_shapes(settings)
    planned = plan(shape, settings, card, teacher)
    if price and not planned.tokens_per_second:
        raise Tune16Error("--price needs --gpu and the engine tune16: other speeds are not known.")
    num_gpus = settings.train.num_processes
    hours = tokens * 1e6 / planned.tokens_per_second / num_gpus / 3600 if planned.tokens_per_second else None
    cost = hours * num_gpus * price if hours and price else None
    if as_json:
        fields = {**asdict(planned), "total": planned.total, "fits": planned.fits, "hours": hours, "cost": cost}
        print(json.dumps(fields, indent=2))
    else:
        _print_plan(planned, settings.preflight.model, tokens, hours, cost)
    refuse_unfit(planned, settings, shape, teacher)


def _print_plan(planned: "MemoryPlan", model: str, tokens: float, hours: float | None, cost: float | None) -> None:
    console.print(planned.result())
    table = Table("GPU memory while training", "", "", title=model)
    for name, part in planned.parts.items():
        bar = round(_BAR * part / max(planned.available, planned.total))
        table.add_row(name, size(part), "█" * bar or "▏")
    table.add_section()
    table.add_row(f"total, of {size(planned.available)}", size(planned.total), "")
    console.print(table)
    for fact in planned.facts():
        console.print(fact)
    if hours:
        price = f", {cost:,.2f} at that price" if cost else ""
        console.print(f"{tokens:g} million tokens take about {hours * 60:,.0f} minutes{price}")


@app.command(name="compile")
def compile_(
    output: Annotated[
        Path | None, typer.Option(help="File to write; the default is manifests/base/pipeline.yaml.")
    ] = None,
    ir: Annotated[bool, typer.Option("--ir", help="The plain form, to upload in the dashboard (tune16.yaml).")] = False,
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
    spare_loopback()
    with user_errors():
        app()


if __name__ == "__main__":
    main()
