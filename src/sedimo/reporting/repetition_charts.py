"""How much layers repeat each other, how important that makes them, and the bits they got; drawing only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sedimo.metrics.estimate import NORMAL_95
from sedimo.reporting.charts import WIDTH
from sedimo.reporting.heat_charts import MAX_ROW_LABELS, colour_bar, draw_cells, label_steps, row_height
from sedimo.reporting.maps import Repetition
from sedimo.reporting.placement import stage, stage_labels
from sedimo.reporting.rounding import number
from sedimo.reporting.theme import ACCENT, INK, MUTED, SURFACE, bit_colour, themed_svg

_SMALL = 372  # width of a chart that stands beside another [px]
_LEAST = 1e-4  # of the greatest importance, below which differences do not matter
_NAME = 34  # characters of a layer's label
_TITLES = {"mean": "mean of the timesteps", "first": "first timestep", "last": "last timestep"}


def matrix_chart(found: Repetition, name: str, *, is_small: bool = False) -> str:
    """One matrix of a probe, layers in the order of the denoiser, with the bits of each beside it.

    A small one has no scale, and its labels are few.
    """
    matrix, width = found.matrix(name), _SMALL if is_small else WIDTH

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = draw_cells(axes, matrix, (0.0, 1.0))
        axes.set_aspect("equal")
        _bits_strip(axes.inset_axes((1.012, 0, 0.03, 1), sharey=axes), found.bits)
        label_layers(axes, found, n_most=round(width / 17))
        ticks, labels = list(axes.get_yticks()), [text.get_text() for text in axes.get_yticklabels()]
        axes.set_xticks(ticks, labels, rotation=90, fontsize=8)
        if not is_small:
            colour_bar(figure, axes, image, "correlation of outputs (linear CKA)", pad=0.07)

    rows, columns = np.triu_indices(len(matrix), 1)
    most = int(np.argmax(matrix[rows, columns]))
    pair = f"{found.layers[rows[most]]} and {found.layers[columns[most]]}"
    return themed_svg(
        draw,
        width=width,
        height=width * (0.95 if is_small else 0.8),
        title=f"Orthogonality of {len(matrix)} layers, {_TITLES[name]}",
        description=f"Most alike are {pair}, {number(float(matrix[rows, columns][most]))}",
        prefix=f"orthogonality-{name}",
    )


def importance_chart(found: Repetition) -> str:
    """Importance of each layer by timestep and over all of them, and beside it the bits that it got."""
    n = len(found.layers)
    per_step = _logarithms(np.array(found.per_step).T)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 3, width_ratios=(3, 3, 2), sharey=True)
        if per_step is not None:
            image = draw_cells(panels[0], per_step)
            bar = colour_bar(figure, panels[0], image, "at the timestep (logarithmic)", location="top")
            bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.2g}"))
        label_steps(panels[0], found.timesteps, n_most=5)
        panels[0].set_xlabel("sampled timestep")
        _theta(panels[1], found)
        _bits(panels[2], found.bits)
        panels[0].set_ylim(n - 0.5, -0.5)
        label_layers(panels[0], found, n_most=MAX_ROW_LABELS)

    order = np.argsort(found.theta)
    ends = "; ".join(f"{found.layers[i]} {found.theta[i]:.2f}, {found.bits[i]:.3g} bits" for i in (order[-1], order[0]))
    return themed_svg(
        draw,
        width=WIDTH,
        height=90 + row_height(n) * n,
        title="Importance of layers and the bits they got",
        description=f"{n} layers. Most and least important: {ends}",
        prefix="importance",
    )


def convergence_chart(found: Repetition) -> str:
    """How soon importances from few timesteps have the order of those from all; one timestep has no chart."""
    if np.isfinite(found.converged).sum() < 2:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        n = range(1, len(found.converged) + 1)
        axes.plot(n, found.converged, color=ACCENT, marker="o", markersize=6, markeredgecolor=SURFACE)
        axes.axhline(1.0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        span = max(1.0 - np.nanmin(found.converged), 0.05)
        axes.set_ylim(1.0 - 1.08 * span, 1.0 + 0.08 * span)
        axes.grid()
        axes.set_xlabel("timesteps sampled, evenly over the trajectory")
        axes.set_ylabel("rank correlation with all")

    texts = "; ".join(f"{i + 1}: {value:.3f}" for i, value in enumerate(found.converged))
    return themed_svg(
        draw, width=500, height=300, title="Convergence over timesteps", description=texts, prefix="convergence"
    )


def _logarithms(importances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Of importances, which fall exponentially, over a limited number of decades; None where nothing is known."""
    if not np.isfinite(importances).any():
        return None
    found: npt.NDArray[np.float64] = np.log10(np.maximum(importances, np.nanmax(importances) * _LEAST))
    return found


def _theta(axes: Axes, found: Repetition) -> None:
    rows = range(len(found.theta))
    half = [NORMAL_95 * e for e in found.standard_error]
    is_dense = len(found.theta) > MAX_ROW_LABELS
    axes.errorbar(
        found.theta,
        rows,
        xerr=None if not np.isfinite(half).all() else half,
        fmt="o",
        markersize=2.5 if is_dense else 5,
        color=ACCENT,
        ecolor=MUTED,
        elinewidth=0.8 if is_dense else 1.3,
    )
    axes.set_xlim(0, 1.05)
    axes.grid(axis="x")
    axes.set_xlabel("importance over all\n(bars: 95 % interval)")
    axes.tick_params(axis="y", length=0)


def _bits(axes: Axes, bits: Sequence[float]) -> None:
    """Bars from nothing to each layer's bits, in the colours of the map of layers."""
    colours, edge = [bit_colour(round(b)) for b in bits], 0 if len(bits) > MAX_ROW_LABELS else 0.5
    axes.barh(range(len(bits)), bits, height=0.86, color=colours, edgecolor=INK, linewidth=edge)
    axes.set_xlim(0, max(bits) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(axis="x")
    axes.set_xlabel("bits it got")
    axes.tick_params(axis="y", length=0)


def _bits_strip(axes: Axes, bits: Sequence[float]) -> None:
    for row, b in enumerate(bits):
        axes.add_patch(Rectangle((0, row - 0.5), 1, 1, facecolor=bit_colour(round(b)), linewidth=0))
    axes.set_xlim(0, 1)
    axes.set_xticks([0.5], ["bits"], rotation=90, fontsize=8)
    axes.tick_params(length=0, labelleft=False)
    axes.spines["left"].set_visible(False)


def _label(name: str) -> str:
    """Begin and end of a long name: layers differ in the one, operations in the other."""
    return name if len(name) <= _NAME else f"{name[:20]}\N{HORIZONTAL ELLIPSIS}{name[-(_NAME - 21) :]}"


def label_layers(axes: Axes, found: Repetition, *, n_most: int) -> None:
    """Every layer by its name while there is room, else where an outermost block begins, as far as there is room."""
    n = len(found.layers)
    if n <= n_most:
        axes.set_yticks(range(n), [_label(name) for name in found.layers], fontsize=9)
        axes.tick_params(axis="y", length=0)
        return
    begins: dict[str, int] = {}
    for i, block in enumerate(found.blocks):
        if block:
            begins.setdefault(stage(block), i)
    labels = stage_labels(list(begins))[0]
    shown: dict[int, str] = {}
    for tick, label in zip(begins.values(), labels, strict=True):
        if not shown or tick - next(reversed(shown)) >= n / n_most:
            shown[tick] = label
    axes.set_yticks(list(shown), list(shown.values()), fontsize=8)
    axes.set_ylabel("layers, labelled where a block begins")
