"""The charts of a sweep: quality at each value of a knob, and how sensitivities rank alike; drawing only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sedimo.metrics.estimate import Estimate
from sedimo.reporting.block_charts import draw_level, draw_points
from sedimo.reporting.charts import WIDTH
from sedimo.reporting.heat_charts import colour_bar, draw_cells
from sedimo.reporting.rounding import number
from sedimo.reporting.theme import MUTED, themed_svg

_HEIGHT = 430
_ROW = 74  # of the matrix [px]
_DARK = 0.6  # of the colour map; white is read below, black above
_NOTHING = Estimate(math.nan, math.nan, math.nan, math.nan, 0)


def values_chart(
    values: Sequence[str], measured: Sequence[Estimate], ahead: Sequence[Estimate | None], *, knob: str
) -> str:
    """SQNR at each value with 95 % intervals, and what each gains on the first one, the baseline, paired."""
    if not any(math.isfinite(one.value) for one in measured):
        return ""

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        _dots(above, measured)
        if math.isfinite(measured[0].value):
            draw_level(above, measured[0].value, "baseline")
        above.set_ylabel("SQNR [dB]")
        _dots(below, [one or _NOTHING for one in ahead])
        below.axhline(0.0, color=MUTED, linewidth=1)
        below.set_ylabel("ahead of the\nbaseline [dB]")
        _label(below, values, knob)

    return themed_svg(
        draw,
        width=WIDTH,
        height=_HEIGHT,
        title=f"SQNR by {knob}",
        description="; ".join(f"{v} {number(m.value)} dB" for v, m in zip(values, measured, strict=True)),
        prefix="sweep",
    )


def ranks_chart(errors: Mapping[str, float], srcc: Mapping[str, Estimate], *, knob: str) -> str:
    """Rank correlation with the largest set with 95 % intervals, and the mean standard error of each set [dB]."""

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        _dots(above, [srcc.get(name, _NOTHING) for name in errors])
        above.set_ylabel("rank correlation\nwith the largest set")
        _dots(below, [replace(_NOTHING, value=error) for error in errors.values()])
        below.set_ylim(bottom=0.0, top=1.1 * below.get_ylim()[1])
        below.set_ylabel("mean standard error\nof local SQNR [dB]")
        _label(below, [*errors], knob)

    return themed_svg(
        draw,
        width=WIDTH,
        height=_HEIGHT,
        title=f"Agreement of sensitivities by {knob}",
        description="; ".join(f"{name} {number(one.value)}" for name, one in srcc.items()),
        prefix="sweep",
    )


def ranks_matrix(names: Sequence[str], srcc: Mapping[tuple[str, str], float]) -> str:
    """Rank correlation of every two sensitivities as a matrix with its numbers; one that is none is left empty."""
    matrix, index = np.eye(len(names)), {name: i for i, name in enumerate(names)}
    for (first, second), value in srcc.items():
        matrix[index[first], index[second]] = matrix[index[second], index[first]] = value
    low = math.floor(10 * np.nanmin(matrix)) / 10

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = draw_cells(axes, matrix, (low, 1.0))
        axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
        axes.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
        for row, column in np.argwhere(np.isfinite(matrix)):
            value = matrix[row, column]
            colour = "#ffffff" if value < low + _DARK * (1.0 - low) else "#000000"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour)
        colour_bar(figure, axes, image, "rank correlation")

    return themed_svg(
        draw,
        width=WIDTH,
        height=60 + _ROW * len(names),
        title="Rank correlation of sensitivities",
        description="; ".join(f"{a} and {b} {number(value)}" for (a, b), value in srcc.items()),
        prefix="sweep",
    )


def _dots(axes: Axes, measured: Sequence[Estimate]) -> None:
    draw_points(axes, measured, [False] * len(measured), is_line=False)


def _label(axes: Axes, values: Sequence[str], knob: str) -> None:
    is_upright = sum(map(len, values)) > 80
    axes.set_xticks(range(len(values)), values, rotation=90 if is_upright else 0)
    axes.set_xlabel(knob)
