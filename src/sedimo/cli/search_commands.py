"""The commands that find a recipe by measured recipes: `run` does all of it, `attribute` reads a study."""

from __future__ import annotations

from pathlib import Path

import click

from sedimo.cli import console, show
from sedimo.cli.options import json_option, run_argument, sampling_options, search_options


@click.command()
@click.argument("source", metavar="SRC")
@click.option("--bits", type=float, help="Budget: bits per weight in the papers' accounting.")
@click.option("--stored-bits", type=float, help="Budget: bits per weight as stored, scales and codebooks counted.")
@click.option("--bytes", "n_bytes", type=int, help="Budget: bytes of the tensors that replace the weights.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--formats", default="wide", show_default=True, help="wide, paper, or a list such as kmc4,uaq4g64,fp16.")
@click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for measurements; default: OUT.study beside OUT.",
)
@search_options
@click.option("--variant", help="Variant of the source's weights, such as fp16.")
@click.option("--link", is_flag=True, help="Hard-link the other components instead of copying them.")
@click.option("--no-check", is_flag=True, help="Skip the sampled comparison and the explanation.")
@click.option("--dry-run", is_flag=True, help="Tell seconds, denoiser calls, memory and disk, and stop.")
@sampling_options
@json_option
def run(as_json: bool, **options: object) -> None:
    """From SRC to checkpoint and report: measure recipes, learn what matters, build, explain.

    Example: sedimo run zoo:cifar-dit --bits 3.5 --trials 300 --refine 3 -o small
    """
    from sedimo.api import job
    from sedimo.cli.orders import order_of

    order = order_of({**options, "method": "gnn", "recipe": None})
    with console.progress() as progress:
        if options["dry_run"]:
            plan = job.plan(order, progress)
        else:
            result = job.run(order, progress, command=console.command_line())
    if options["dry_run"]:
        console.print_json(plan.as_json()) if as_json else show.plan(plan)
    else:
        console.print_json(result.as_json()) if as_json else show.result(result)


@click.command()
@run_argument
@click.option("--method", type=click.Choice(["gnn"]), default="gnn", show_default=True, help="What to train.")
@click.option(
    "--preset",
    default="fast",
    show_default=True,
    help="fast: starts from a noise model, contributions add; paper: as published (hours).",
)
@click.option("--objective", default="", help="Whose trials; default: the objective that has most.")
@click.option("--target", default="", help='What to predict, such as "-fid - 150*avg_bits"; default: by the objective.')
@click.option("--confidence", type=float, default=1.0, show_default=True, help="Margin of costs, in deviations.")
@json_option
def attribute(run: Path, as_json: bool, method: str, **options: object) -> None:
    """Train a predictor on the study RUN, say how good it is, and keep its table for `sedimo allocate`.

    Example: sedimo attribute runs/alpha && sedimo allocate runs/alpha --bits 3.7
    """
    from sedimo.api.attributing import AttributeOrder, attribute_run
    from sedimo.cli import show_study

    with console.progress() as progress:
        found = attribute_run(run, AttributeOrder(**options), progress)  # type: ignore[arg-type]  # click checked them
    console.print_json(found.as_json()) if as_json else show_study.attribution(found)


ALL = (run, attribute)
