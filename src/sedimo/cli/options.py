"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    """The command with options; help lists the last one first."""
    for option in options:
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """What determines a sample besides the weights; part of every trial's key."""
    return _with(
        command,
        click.option("--resolution", type=click.IntRange(8), help="Image size [pixels]; default: the pipeline's."),
        click.option("--guidance", type=float, help="Guidance scale; default: the pipeline's."),
        click.option(
            "--prompts",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Text file, a prompt or class per line; default: the pipeline's classes or prompts, or built-in ones.",
        ),
        click.option("--steps", type=click.IntRange(1, 1000), default=10, show_default=True, help="Denoising steps."),
        click.option("--seeds", type=click.IntRange(2), default=8, show_default=True, help="Number of samples."),
        click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="First seed."),
        click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Compute dtype."),
        click.option("--device", help="cpu, cuda, cuda:1, mps; default: the GPU if there is one."),
    )


def format_options(command: Command) -> Command:
    """Which formats there are to choose from."""
    return _with(
        command,
        click.option(
            "--whole-layers",
            is_flag=True,
            help="One decision per layer, also where its input is a concatenation of streams (skips of a U-Net).",
        ),
        click.option("--ends", help="Format of the first and last layers, such as uaq8; default: like the others."),
        click.option(
            "--act", help="Widths of activations, such as a8 or a4,a6,a8: each format with each; default: a16."
        ),
        click.option(
            "--formats", default="wide", show_default=True, help="wide, paper, or a list such as kmc4,uaq4g64,fp16."
        ),
    )


def budget_options(command: Command) -> Command:
    """A size, bit operations, or both."""
    return _with(
        command,
        click.option(
            "--bops",
            help="Budget: bit operations of a sample and call, attention too: 350G, 1.5T, 12.5% of those at 16 bits.",
        ),
        click.option("--bytes", "n_bytes", type=int, help="Budget: bytes of the tensors that replace the weights."),
        click.option(
            "--stored-bits", type=float, help="Budget: bits per weight as stored, scales and codebooks counted."
        ),
        click.option("--bits", type=float, help="Budget: bits per weight in the papers' accounting."),
    )


def job_options(command: Command) -> Command:
    """Where the main job keeps what it measures, and what it leaves out."""
    return _with(
        command,
        click.option("--dry-run", is_flag=True, help="Tell seconds, denoiser calls, memory and disk, and stop."),
        click.option("--no-check", is_flag=True, help="Skip the sampled comparison and what else explains the result."),
        click.option("--link", is_flag=True, help="Hard-link the other components instead of copying them."),
        click.option("--variant", help="Variant of the source's weights, such as fp16."),
        click.option(
            "--store",
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder for measurements; default: OUT.study beside OUT.",
        ),
    )


def importance_options(command: Command) -> Command:
    """Knobs of the method orthogonality."""
    return _with(
        command,
        click.option(
            "--importance-of",
            type=click.Choice(["bits", "noise"]),
            default="bits",
            show_default=True,
            help="orthogonality: weigh missing bits, as published, or weight noise.",
        ),
        click.option(
            "--tail-mean",
            is_flag=True,
            help="orthogonality: importance is the mean from a layer to the last one, as published.",
        ),
        click.option(
            "--tau", type=float, default=0.0, show_default=True, help="orthogonality: how much more early steps count."
        ),
        click.option(
            "--beta", type=float, default=10.0, show_default=True, help="orthogonality: how sharply repetition counts."
        ),
    )


def activation_options(command: Command) -> Command:
    """How activations are rounded, where formats such as uaq4a8 ask for it."""
    return _with(
        command,
        click.option(
            "--act-by-timestep", is_flag=True, help="Static ranges of their own for each calibrated timestep."
        ),
        click.option(
            "--act-steps",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Steps to calibrate static ranges at; 1: the first, of most noise, alone; 0: all.",
        ),
        click.option("--act-symmetric", is_flag=True, help="Round activations without a zero point."),
        click.option(
            "--act-ranges",
            type=click.Choice(["dynamic", "min-max", "percentile", "mse"]),
            default="dynamic",
            show_default=True,
            help="Range of each token or image, or static ranges calibrated this way.",
        ),
    )


def smoothing_options(command: Command) -> Command:
    """SmoothQuant before anything is packed."""
    return _with(
        command,
        click.option(
            "--smooth-share",
            type=float,
            help="Share of the layers to smooth, most sensitive first; 1 for all; default: 0.1.",
        ),
        click.option(
            "--smooth",
            type=float,
            metavar="ALPHA",
            help="SmoothQuant first: how much of the inputs' range moves into the weights, such as 0.7.",
        ),
    )


def reconstruction_options(command: Command) -> Command:
    """How codes are chosen: the nearest, by error feedback, or learned."""
    return _with(
        command,
        click.option(
            "--compensate/--no-compensate",
            default=None,
            help="Codes that make up for one another's errors (error feedback); default: with --method auto.",
        ),
        click.option(
            "--reconstruct-steps",
            type=click.IntRange(1),
            help="Steps of learning per block; more take longer and help more.",
        ),
        click.option(
            "--reconstruct",
            is_flag=True,
            help="Learn the rounding of uaq formats, block by block, on the model's own trajectory.",
        ),
    )


def keeping_options(command: Command) -> Command:
    """By which rule blocks stay at 16 bits, where --bits is not it."""
    return _with(
        command,
        click.option("--keep", type=click.IntRange(0), help="Keep so many blocks at 16 bits, those that gain most."),
        click.option("--keep-db", type=float, help="Keep blocks at 16 bits whose protection gains so much [dB]."),
    )


def json_option(command: Command) -> Command:
    """JSON instead of tables."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")(command)


def run_argument(command: Command) -> Command:
    """The folder of a study."""
    kind = click.Path(exists=True, file_okay=False, path_type=Path)
    return click.argument("run", metavar="RUN", type=kind)(command)


def search_options(command: Command) -> Command:
    """How recipes are searched by measuring."""
    return _with(
        command,
        click.option("--study-seed", type=int, default=0, show_default=True, help="Which random recipes."),
        click.option(
            "--confidence",
            type=float,
            default=1.0,
            show_default=True,
            help="Margin of costs, in standard deviations of what the trials leave unknown.",
        ),
        click.option(
            "--level",
            type=click.Choice(["decisions", "groups"]),
            default="decisions",
            show_default=True,
            help="Decide on single layers, or on all variants of attention and feed-forward groups.",
        ),
        click.option("--target", default="sqnr_db", show_default=True, help="What to predict, such as sqnr_db."),
        click.option(
            "--prior",
            default="jacobian",
            show_default=True,
            help="What the predictor starts from: jacobian, adjoint, ablation, or error.",
        ),
        click.option("--refine", type=int, default=3, show_default=True, help="Rounds of measuring what is proposed."),
        click.option("--trials", type=int, default=300, show_default=True, help="Number of measured recipes."),
    )
