"""The curves of blocks: the first N quantized, and what each gains by staying at 16 bits; drawing only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sedimo.metrics.estimate import Estimate
from sedimo.reporting.charts import WIDTH, has_interval, short
from sedimo.reporting.placement import block_labels
from sedimo.reporting.rounding import number
from sedimo.reporting.theme import ACCENT, INK, MUTED, OTHER, SURFACE, themed_svg
from sedimo.sensitivity.blocks import BlockRow

_MOST_LABELS = 90
_LETTER = 6.0  # of a label [px]
_FEW = 16  # blocks, whose labels are large


def blocks_curves(
    rows: Sequence[BlockRow], everything: Estimate, *, kept: Sequence[str] = (), gain_db: float | None = None
) -> str:
    """Both curves over the same blocks with 95 % intervals; `kept` stay at 16 bits, `gain_db` is their threshold.

    Blocks that make no noise have no chart.
    """
    if not any(math.isfinite(row.up_to.value) for row in rows):
        return ""
    labels, common = block_labels([row.block for row in rows])
    shown = [short(label, 28) for label in labels]

    def draw(figure: Figure) -> None:
        first, alone = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1))
        draw_points(first, [row.up_to for row in rows], [False] * len(rows), is_line=True)
        if math.isfinite(everything.value):
            draw_level(first, everything.value, f"all blocks: {number(everything.value, everything.standard_error)} dB")
        first.set_ylabel("SQNR [dB]\nthis block and all before")
        draw_points(alone, [row.alone_kept for row in rows], [row.block in kept for row in rows], is_line=False)
        alone.axhline(0.0, color=MUTED, linewidth=1)
        if gain_db is not None:
            draw_level(alone, gain_db, f"threshold: {gain_db:g} dB")
        alone.set_ylabel("gain [dB]\nby keeping this block alone")
        if kept:
            alone.legend(handles=_handles(), loc="best", fontsize=10)
        _label(alone, shown, common)

    gains = {row.block: row.alone_kept.value for row in rows if math.isfinite(row.alone_kept.value)}
    most = max(gains, key=lambda name: gains[name], default=None)
    gain = "" if most is None else f" Keeping {most} gains most, {number(gains[most])} dB."
    return themed_svg(
        draw,
        width=WIDTH,
        height=470 + (_LETTER * max(map(len, shown)) if _is_upright(shown) else 0),
        title=f"Noise entering through {len(rows)} blocks",
        description=f"All blocks quantized: {number(everything.value)} dB.{gain}",
        prefix="block-curves",
    )


def draw_points(axes: Axes, values: Sequence[Estimate], is_kept: Sequence[bool], *, is_line: bool) -> None:
    """Dots with bars; blocks that stay at 16 bits are diamonds. What is not finite has no place."""
    shown = [(i, one) for i, one in enumerate(values) if math.isfinite(one.value)]
    if is_line:
        axes.plot([i for i, _ in shown], [one.value for _, one in shown], color=OTHER, linewidth=1.4, zorder=2)
    for i, one in shown:
        colour = ACCENT if is_kept[i] else OTHER
        if has_interval(one):
            axes.plot([i, i], [one.low, one.high], color=colour, linewidth=1.6, zorder=2)
        _dot(axes, i, one.value, is_kept=is_kept[i])
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.grid(axis="y")


def _dot(axes: Axes, x: float, y: float, *, is_kept: bool) -> None:
    axes.plot(
        x,
        y,
        linestyle="none",
        marker="D" if is_kept else "o",
        color=ACCENT if is_kept else OTHER,
        markersize=7.5 if is_kept else 6,
        markeredgecolor=SURFACE,
        markeredgewidth=0.7,
        zorder=3,
    )


def draw_level(axes: Axes, value: float, text: str) -> None:
    """A broken line at a value, with a text on it."""
    axes.axhline(value, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text,
        (0, value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=10,
        color=INK,
    )


def _handles() -> list[Line2D]:
    marks = {"stays at 16 bits": ("D", ACCENT), "quantized": ("o", OTHER)}
    return [
        Line2D([], [], linestyle="none", marker=marker, color=colour, label=text)
        for text, (marker, colour) in marks.items()
    ]


def _is_upright(labels: Sequence[str]) -> bool:
    return len(labels) * max(map(len, labels)) > 95


def _label(axes: Axes, labels: Sequence[str], common: str) -> None:
    ticks = list(range(0, len(labels), math.ceil(len(labels) / _MOST_LABELS)))
    size = 11 if len(labels) <= _FEW else 9 if len(labels) <= _MOST_LABELS // 2 else 7
    axes.set_xticks(ticks, [labels[i] for i in ticks], rotation=90 if _is_upright(labels) else 0, fontsize=size)
    axes.set_xlabel(f"{common or 'block'}, from input to output", labelpad=10)  # a browser's letters may be longer
