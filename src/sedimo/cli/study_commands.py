"""The commands that fill studies and read them."""

from __future__ import annotations

from pathlib import Path

import click

from sedimo.cli import console, show_study
from sedimo.cli.options import (
    activation_options,
    format_options,
    json_option,
    run_argument,
    sampling_options,
    smoothing_options,
)


@click.command()
@click.argument("source", metavar="SRC")
@click.option("--store", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@click.option("--trials", type=int, required=True, help="Number of random recipes; those the study has count.")
@format_options
@activation_options
@smoothing_options
@click.option(
    "--objective",
    default="final_latents",
    show_default=True,
    help="What to measure, separated by commas: final_latents, path, step, fid.",
)
@click.option(
    "--sampler",
    default="stratified",
    show_default=True,
    help="stratified: bits evenly over a range, placed as differently as can be; paper: as published.",
)
@click.option("--low-bits", type=float, help="Least paper bits of stratified; default: what the formats allow.")
@click.option("--high-bits", type=float, help="Most paper bits of stratified; default: what they allow, up to 5.")
@click.option("--study-seed", type=int, default=0, show_default=True, help="Which random recipes.")
@click.option(
    "--prior",
    default="jacobian",
    show_default=True,
    help="What predictors of this study start from: jacobian, adjoint, ablation, or error.",
)
@click.option("--executor", default="serial", show_default=True, help="serial, or process: several pipelines at once.")
@click.option("--workers", type=int, help="Number of processes of --executor process.")
@click.option("--variant", help="Variant of the source's weights, such as fp16.")
@click.option("--dry-run", is_flag=True, help="Tell trials, denoiser calls, time, memory and disk, and stop.")
@sampling_options
@json_option
def explore(as_json: bool, **options: object) -> None:
    """Measure random recipes of SRC and keep them in the study RUN; Ctrl-C is safe, the same command goes on.

    Example: sedimo explore zoo:cifar-dit --store runs/alpha --trials 300
    """
    from sedimo.api import exploring
    from sedimo.cli.orders import explore_order_of

    order = explore_order_of(options)
    with console.progress() as progress:
        if options["dry_run"]:
            plan = exploring.plan_exploration(order, progress)
        else:
            found = exploring.explore_source(order, progress)
    if options["dry_run"]:
        console.print_json(plan.as_json()) if as_json else show_study.exploration_plan(plan)
    else:
        console.print_json(found.as_json()) if as_json else show_study.exploration(found)


@click.command()
@run_argument
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write all of them to this file, as JSON.")
@json_option
def trials(run: Path, out: Path | None, as_json: bool) -> None:
    """Show the trials of the study RUN, or write them to a file that depends on nothing but what was measured."""
    from sedimo.api.listing import export_run, list_trials
    from sedimo.codec import to_plain

    if out is not None:
        n_trials = export_run(run, out)
        plain = {"out": str(out), "trials": n_trials}
        console.print_json(plain) if as_json else click.echo(f"{n_trials} trials written to {out}")
        return
    found = list_trials(run)
    console.print_json({"trials": to_plain(found)}) if as_json else show_study.trials(found)


ALL = (explore, trials)
