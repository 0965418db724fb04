"""The commands, one per verb: options in, one call, tables or JSON out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sedimo.cli import console, show
from sedimo.cli.options import (
    activation_options,
    budget_options,
    format_options,
    importance_options,
    job_options,
    json_option,
    keeping_options,
    reconstruction_options,
    run_argument,
    sampling_options,
    smoothing_options,
)

METHODS = (
    "auto, adjoint, jacobian, error, ablation, combined, sqnr, orthogonality, orthogonality-lp (by the published "
    "programme), gnn (see sedimo run), uniform:FORMAT, or hybrid:FORMAT (blocks but those kept by --keep-db, --keep or "
    "--bits)"
)


@click.command()
@click.argument("source", metavar="SRC")
@click.option("--variant", help="Variant of the source's weights, such as fp16.")
@json_option
def inspect(source: str, variant: str | None, as_json: bool) -> None:
    """Show layers, operation types, blocks, groups, sizes and MACs of a denoiser."""
    from sedimo.api import inspection

    found = inspection.inspect_source(source, variant)
    if as_json:
        console.print_json(found)
    else:
        show.inspection(found)


@click.command()
@click.argument("source", metavar="SRC")
@budget_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--method", default="auto", show_default=True, help=f"How to find out what matters: {METHODS}.")
@format_options
@click.option(
    "--recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Use this recipe as it is."
)
@keeping_options
@importance_options
@activation_options
@smoothing_options
@reconstruction_options
@click.option("--minutes", type=float, help="After the default method: exchange formats and measure, for so long.")
@job_options
@sampling_options
@json_option
def quantize(as_json: bool, **options: object) -> None:
    """Write a smaller checkpoint of SRC under a budget, with a report that says why.

    Example: sedimo quantize zoo:cifar-dit --bits 3.5 -o small
    """
    from sedimo.cli.jobs import carry_out
    from sedimo.cli.orders import order_of

    carry_out(order_of(options), is_dry=bool(options["dry_run"]), as_json=as_json)


@click.command()
@click.argument("out", metavar="OUT")
@click.option("--against", required=True, metavar="SRC", help="The pipeline that OUT was made from.")
@click.option("--variant", help="Variant of SRC's weights, such as fp16.")
@click.option("--images", type=click.IntRange(0), default=0, help="Number of images for FID and KID; 0: not measured.")
@click.option(
    "--correct",
    type=click.Choice(["all", "output"]),
    is_flag=False,
    flag_value="all",
    help="Also with quantization noise corrected in the sampler; =output: predictions alone, not added noise.",
)
@sampling_options
@json_option
def evaluate(out: str, against: str, images: int, as_json: bool, **options: Any) -> None:
    """Compare the checkpoint OUT with its source on the same seeds: size, SQNR, PSNR, FID, KID."""
    from sedimo.api import comparison
    from sedimo.cli.orders import compute_of, sampling_of

    with console.progress() as progress:
        found = comparison.evaluate(
            *comparison.load_pair(out, against, compute_of(options), variant=options["variant"]),
            sampling=sampling_of(options),
            n_images=images,
            correct=options["correct"],
            progress=progress,
        )
    console.print_json(found.as_json()) if as_json else show.evaluation(found)


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@json_option
def diff(first: str, second: str, as_json: bool) -> None:
    """Show, layer by layer, where two recipes or checkpoints differ."""
    from sedimo.api.inspection import differences, read_recipe
    from sedimo.codec import to_plain

    found = differences(read_recipe(first), read_recipe(second))
    console.print_json({"differences": to_plain(found)}) if as_json else show.differences(found)


@click.command()
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("changes", metavar="LAYER=FORMAT...", nargs=-1, required=True)
@click.option("--source", required=True, metavar="SRC", help="What CHECKPOINT was made from.")
@click.option("--variant", help="Variant of SRC's weights, such as fp16.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@json_option
def change(
    checkpoint: str, changes: tuple[str, ...], source: str, variant: str | None, out: Path, as_json: bool
) -> None:
    """Give single layers of a packed CHECKPOINT other formats; nothing else is fitted or changed.

    Example: sedimo change small proj_out_2=uaq8 --source zoo:cifar-dit -o better
    """
    from sedimo.api.changing import change_formats
    from sedimo.cli.orders import formats_of

    found = change_formats(checkpoint, formats_of(changes), source=source, out=out, variant=variant)
    console.print_json(found.as_json()) if as_json else show.change(found)


@click.command()
@run_argument
@budget_options
@click.option(
    "--rule",
    default="milp",
    show_default=True,
    help="milp (exact), greedy, lp, or argmin: the papers' own, each decision for itself, without a budget.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the recipe to this file.")
@json_option
def allocate(run: Path, out: Path | None, as_json: bool, rule: str, **budget: object) -> None:
    """Choose the recipe for another budget from the measurements in the study folder RUN."""
    from sedimo.api.rereport import allocate_again
    from sedimo.cli.orders import budget_of
    from sedimo.pipelines.folder import write_file

    found = allocate_again(run, budget_of(budget), rule)
    if out is not None:
        write_file(out, found.recipe.to_json().encode())
    console.print_json(show.allocation_json(found)) if as_json else show.allocation(found)


@click.command()
@run_argument
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where to write; default: report.html in RUN.")
@json_option
def report(run: Path, out: Path | None, as_json: bool) -> None:
    """Write the report of a finished job again from its study folder RUN."""
    from sedimo.api.rereport import evidence_of, report_again

    written = str(report_again(run, out))
    if not as_json:
        click.echo(written)
        return
    console.print_json({"report": written, **evidence_of(run)})


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default="demo-out", show_default=True)
@click.option("--bits", type=float, default=3.5, show_default=True)
@json_option
def demo(out: Path, bits: float, as_json: bool) -> None:
    """Do the main job on the embedded model and say where the report is."""
    from sedimo.api.demo import run_demo

    with console.progress() as progress:
        result = run_demo(out, bits, progress, command=console.command_line())
    console.print_json(result.as_json()) if as_json else show.result(result)


ALL = (inspect, quantize, change, allocate, evaluate, diff, report, demo)
