"""The commands that find a recipe by measured recipes: `run` does all of it, `attribute` reads a study."""

from __future__ import annotations

from pathlib import Path

import click

from sedimo.cli import console
from sedimo.cli.options import (
    activation_options,
    budget_options,
    format_options,
    job_options,
    json_option,
    keeping_options,
    reconstruction_options,
    run_argument,
    sampling_options,
    search_options,
    smoothing_options,
)


@click.command()
@click.argument("source", metavar="SRC")
@budget_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.")
@format_options
@search_options
@activation_options
@smoothing_options
@reconstruction_options
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


@click.command()
@click.argument("source", metavar="SRC")
@click.option("--format", "number_format", required=True, help="The format of quantized blocks, such as uaq4.")
@click.option("--store", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@click.option("--objective", default="final_latents", show_default=True, help="final_latents, path or step.")
@keeping_options
@click.option("--bits", type=float, help="Keep as many blocks at 16 bits as so many paper bits per weight allow.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="File for the recipe.")
@click.option("--page", type=click.Path(dir_okay=False, path_type=Path), help="File for a page with both curves.")
@activation_options
@smoothing_options
@click.option("--variant", help="Variant of the source's weights, such as fp16.")
@sampling_options
@json_option
def blocks(as_json: bool, out: Path | None, page: Path | None, **options: object) -> None:
    """Which blocks of SRC noise enters through: the first N quantized, all but one; and a hybrid recipe.

    Example: sedimo blocks zoo:cifar-dit --format uaq4 --store runs/blocks --keep 1 -o hybrid.json
    """
    from sedimo.api.blocks import measure_blocks
    from sedimo.cli import show_study
    from sedimo.cli.orders import blocks_order_of
    from sedimo.pipelines.folder import write_file
    from sedimo.reporting.block_page import write_block_page

    with console.progress() as progress:
        found = measure_blocks(blocks_order_of(options), progress)
    if out is not None:
        write_file(out, found.recipe.to_json().encode())
    if page is not None:
        write_block_page(found.as_curves(), page)
    console.print_json(found.as_json()) if as_json else show_study.blocks(found)


@click.command()
@click.argument("source", metavar="SRC")
@click.option("--bits", required=True, help="Budgets in paper bits, such as 3.0,3.5,4.0.")
@click.option("--bops", help="Budget of bit operations besides: 350G, 1.5T, or 12.5% of those at 16 bits.")
@click.option("--methods", default="all", show_default=True, help="all, or some of them, separated by commas.")
@click.option("--store", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@format_options
@activation_options
@smoothing_options
@click.option("--compensate", is_flag=True, help="Codes of all methods by error feedback, as the default has them.")
@click.option("--fresh", "n_fresh", default=64, show_default=True, help="Fresh seeds that every recipe is measured on.")
@click.option("--trials", "n_trials", default=120, show_default=True, help="Measured recipes of gnn, per budget.")
@click.option("--variant", help="Variant of the source's weights, such as fp16.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="File for the page.")
@sampling_options
@json_option
def compare(as_json: bool, out: Path | None, **options: object) -> None:
    """All methods side by side on SRC: same formats, same budgets, same fresh seeds, paired.

    Example: sedimo compare zoo:cifar-dit --bits 3.5,4.0 --store runs/compare -o compare.html
    """
    from sedimo.api.comparing import compare_methods
    from sedimo.cli import show_study
    from sedimo.cli.orders import compare_order_of
    from sedimo.reporting.comparison import write_comparison

    with console.progress() as progress:
        found = compare_methods(compare_order_of(options), progress)
    if out is not None:
        write_comparison(found.as_page(), out)
    console.print_json(found.as_json()) if as_json else show_study.comparison(found)


@click.command()
@click.argument("question", type=click.Choice(["alpha", "calibration", "threshold", "samples", "schedulers"]))
@click.argument("source", metavar="SRC")
@click.option("--store", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@click.option("--values", default="", help="Values, separated by commas; default: the question's usual ones.")
@click.option("--format", "number_format", help="Format of all layers; default: uaq8a8, or uaq4 without activations.")
@click.option("--fresh", "n_fresh", default=16, show_default=True, help="Fresh seeds that every value is measured on.")
@click.option("--smooth-share", default=0.1, show_default=True, help="alpha: share of the layers to smooth.")
@click.option(
    "--signal",
    type=click.Choice(["jacobian", "sqnr"]),
    default="jacobian",
    show_default=True,
    help="schedulers: the sensitivity that is compared.",
)
@activation_options
@click.option("--variant", help="Variant of the source's weights, such as fp16.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="File for the page.")
@sampling_options
@json_option
def sweep(as_json: bool, out: Path | None, **options: object) -> None:
    r"""One knob over several values on SRC, on the same fresh seeds: what the papers leave open.

    \b
    alpha        how much SmoothQuant moves into the weights; baseline: no smoothing
    calibration  at how many steps static ranges are taken; baseline: dynamic ranges
    threshold    how many blocks stay at 16 bits, by rank of gain; baseline: none
    samples      how many samples local SQNR needs
    schedulers   whether sensitivities depend on the noise scheduler

    Example: sedimo sweep alpha zoo:cifar-dit --store runs/sweeps -o alpha.html
    """
    from sedimo.api.sweeping import sweep as answer
    from sedimo.cli import show_study
    from sedimo.cli.orders import sweep_order_of
    from sedimo.reporting.sweep import write_sweep

    with console.progress() as progress:
        found = answer(sweep_order_of(options), progress)
    if out is not None:
        write_sweep(found, out)
    console.print_json(found.as_json()) if as_json else show_study.sweep(found)


ALL = (run, attribute, blocks, compare, sweep)
