"""The commands that find a recipe by measured recipes: `run` does all of it, `attribute` reads a study."""

from __future__ import annotations

from pathlib import Path

import click

from sedimo.cli import console
from sedimo.cli.options import (
    budget_options,
    job_options,
    json_option,
    run_argument,
    sampling_options,
    search_options,
)


@click.command()
@click.argument("source", metavar="SRC")
@budget_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--formats", default="wide", show_default=True, help="wide, paper, or a list such as kmc4,uaq4g64,fp16.")
@search_options
@job_options
@sampling_options
@json_option
def run(as_json: bool, **options: object) -> None:
    """From SRC to checkpoint and report: measure recipes, learn what matters, build, explain.

    Example: sedimo run zoo:cifar-dit --bits 3.5 --trials 300 --refine 3 -o small
    """
    from sedimo.cli.jobs import carry_out
    from sedimo.cli.orders import order_of

    order = order_of({**options, "method": "gnn", "recipe": None})
    carry_out(order, is_dry=bool(options["dry_run"]), as_json=as_json)


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
