"""What the page shows of maps: charts, sentences beside them, and the same numbers as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sedimo.metrics.estimate import NORMAL_95
from sedimo.reporting.block_charts import blocks_curves
from sedimo.reporting.block_phrasing import headline, hybrid_sentence
from sedimo.reporting.heat_charts import noise_map_chart, trajectory_chart
from sedimo.reporting.maps import BlockCurves, ChannelRanges, Maps, NoiseMap, Repetition, TrajectoryLines
from sedimo.reporting.range_chart import ranges_chart
from sedimo.reporting.repetition_charts import convergence_chart, importance_chart, matrix_chart
from sedimo.reporting.rounding import number, share, with_error

_SOME = 0.99  # rank correlation from which on more timesteps change little


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its heading, what to see in it, and its numbers, if they fit on a page."""

    heading: str
    svg: Markup
    text: str
    table: Table | None = None


def maps_view(maps: Maps) -> tuple[tuple[Figure, ...], ...]:
    """Figures in the order of the page; those of one group stand side by side."""
    blocks = [] if maps.blocks is None else [_of_blocks(maps.blocks)]
    groups = [[figure] for figure in (*blocks, *_of_recipe(maps), *_of_local(maps.local))]
    if maps.repetition is not None:
        groups += _of_repetition(maps.repetition)
    groups += [[_of_ranges(found, i)] for i, found in enumerate(maps.ranges)]
    drawn = (tuple(figure for figure in group if figure.svg) for group in groups)
    return tuple(group for group in drawn if group)


def _of_blocks(found: BlockCurves) -> Figure:
    text = (
        f"{headline(found)} Above, blocks are quantized one after the other from the input on: where the curve falls, "
        "noise enters. Below, all are quantized but one: what it gains to leave that block at 16 bits. Bars are "
        f"95 % intervals, on seeds {found.seeds}. {hybrid_sentence(found)}"
    )
    svg = blocks_curves(found.rows, found.everything, kept=found.kept, gain_db=found.gain_db)
    rows = [
        (row.block, with_error(row.up_to), with_error(row.alone_kept), "16 bits" if row.block in found.kept else "")
        for row in found.rows
    ]
    columns = ("block", "this and all before", "gained by keeping it", "kept")
    return Figure(
        "Where noise enters", Markup(svg), text, Table("SQNR [dB] with its 95 % interval", columns, tuple(rows))
    )


def _of_recipe(maps: Maps) -> list[Figure]:
    found = []
    if maps.recipe is not None:
        text = (
            f"SQNR of each block's output, means of {maps.recipe.n} samples; rows are blocks from input to output. "
            "Each call has the inputs of full precision, so this is the noise that one step makes on its way through "
            f"the denoiser. {_about(maps.recipe)}"
        )
        svg = noise_map_chart(maps.recipe, title="SQNR of the recipe by block and step", prefix="noise-recipe")
        found.append(Figure("Noise block by block", Markup(svg), text, _map_table(maps.recipe)))
    if maps.trajectory is not None:
        text = (
            "Quantized against full precision on the same seeds, with 95 % intervals of the mean as bands. *Same "
            "inputs* is what one step does alone; on its *own path* the recipe also has the noise of earlier steps in "
            "its inputs. Latents are those after the step; the last are the result."
        )
        svg = trajectory_chart(maps.trajectory)
        found.append(Figure("Along the trajectory", Markup(svg), text, _lines_table(maps.trajectory)))
    return found


def _of_local(local: Sequence[NoiseMap]) -> list[Figure]:
    figures = []
    for i, found in enumerate(local):
        what = f"all at `{found.number_format}`" if found.number_format else "at the formats of this recipe"
        text = (
            f"SQNR of layers' own outputs, {what}, on full-precision inputs: noise of other layers is not in it. "
            f"Noise is averaged over the layers of a block and {found.n} samples. {_about(found)}"
        )
        title = f"Local SQNR {what.replace('`', '')} by block and step"
        svg = noise_map_chart(found, title=title, prefix=f"noise-local-{i}")
        figures.append(Figure(f"Noise at the layers' own outputs, {what}", Markup(svg), text, _map_table(found)))
    return figures


def _of_repetition(found: Repetition) -> list[list[Figure]]:
    matrix = (
        f"How alike the outputs of two layers are between {found.n} samples (linear CKA, 0 to 1), mean of "
        f"{len(found.timesteps)} timesteps. At the right, the bits that each layer got, coloured as in the map above."
        f"{_dark(found)}"
    )
    importance = (
        "A layer that repeats others less is more important. Left, by timestep (empty: its output does not tell "
        "samples apart); middle, over all timesteps, the greatest being 1; right, the bits that it got."
    )
    converged = f"How soon importances from few timesteps have the order of those from all. {_sufficient(found)}"
    chart, table = Markup(importance_chart(found)), _importance_table(found)
    single = [
        Figure(f"The {name} timestep alone", Markup(matrix_chart(found, name, is_small=True)), "Colours as above.")
        for name in ("first", "last")
    ]
    return [
        [Figure("What repeats what", Markup(matrix_chart(found, "mean")), matrix)],
        single if len(found.timesteps) > 1 else [],
        [Figure("Importance, and the bits it led to", chart, importance, table)],
        [Figure("Enough timesteps?", Markup(convergence_chart(found)), converged)],
    ]


def _dark(found: Repetition) -> str:
    """What layers of which nothing is known look like in the matrix."""
    n_dark = int(np.isnan(np.array(found.per_step)).all(axis=0).sum())
    if not n_dark:
        return ""
    which = "The dark line is a layer" if n_dark == 1 else f"Dark lines are the {n_dark} layers"
    return f" {which} whose outputs do not tell samples apart, such as those that see the timestep alone."


def _sufficient(found: Repetition) -> str:
    """From how many timesteps on more of them change little."""
    too_few = max((i + 1 for i, value in enumerate(found.converged) if not value >= _SOME), default=0)
    if too_few + 1 >= len(found.converged):
        return f"No fewer than all {len(found.converged)} keep the rank correlation at {_SOME} or above."
    return f"From {too_few + 1} on, the rank correlation is at least {_SOME}."


def _of_ranges(found: ChannelRanges, position: int) -> Figure:
    text = "Bars reach from the least to the greatest value of a channel. Each panel has its own scale."
    svg = ranges_chart(found, prefix=f"ranges-{position}")
    return Figure(f"Activation ranges of `{found.layer}`", Markup(svg), text)


def _about(found: NoiseMap) -> str:
    """What the colours do not tell: errors, and cells that have none."""
    values, errors = np.array(found.sqnr_db, dtype=float), np.array(found.standard_error, dtype=float)
    is_known = np.isfinite(values) & np.isfinite(errors)
    parts = []
    if is_known.any():
        parts.append(f"Standard errors are {number(float(np.median(errors[is_known])))} dB in the median cell.")
    for is_so, what in ((np.isposinf, "are empty: no noise at all"), (np.isneginf, "have a cross: they diverged")):
        count = int(is_so(values).sum())
        if count:
            parts.append(f"{share(count / values.size)} of the cells {what}.")
    return " ".join(parts)


def _map_table(found: NoiseMap) -> Table:
    rows = [
        (name, *(_cell(value, error) for value, error in zip(values, errors, strict=True)))
        for name, values, errors in zip(found.blocks, found.sqnr_db, found.standard_error, strict=True)
    ]
    columns = ("block", *(str(i + 1) for i in range(len(found.timesteps))))
    return Table("SQNR [dB] by block and denoiser call, ± standard error", columns, tuple(rows))


def _cell(value: float, error: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else "diverged"
    return f"{value:.1f}" if math.isnan(error) else f"{value:.1f} ± {error:.1f}"


def _lines_table(found: TrajectoryLines) -> Table:
    columns = ("call", "timestep", "output, same inputs", "output, own path", "latents after it")
    rows = [
        (str(i + 1), f"{timestep:.4g}", *map(with_error, (step, path, latents)))
        for i, (timestep, step, path, latents) in enumerate(
            zip(found.timesteps, found.step, found.path, found.latents, strict=True)
        )
    ]
    return Table("SQNR [dB] with its 95 % interval", columns, tuple(rows))


def _importance_table(found: Repetition) -> Table:
    rows = [
        (name, f"{theta:.3f} ± {NORMAL_95 * error:.3f}", f"{bits:.3g}")
        for name, theta, error, bits in zip(found.layers, found.theta, found.standard_error, found.bits, strict=True)
    ]
    return Table("Importance with its 95 % interval", ("layer", "importance", "bits"), tuple(rows))
