"""The charts of scores and of chosen formats: drawing only, every number is in the explanation's records."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sedimo.quant.formats import Format
from sedimo.reporting.charts import WIDTH, short
from sedimo.reporting.explanation import FormatShare, ScoreBox
from sedimo.reporting.phrasing import family
from sedimo.reporting.placement import block_labels
from sedimo.reporting.rounding import number
from sedimo.reporting.theme import ACCENT, GRID, MUTED, OTHER, SURFACE, bit_colour, bit_ink, themed_svg

MAX_OPERATIONS = 48  # the worst ones are drawn
_ROW = 23
_HALF = 0.3  # half the thickness of a box [rows]
_ARROWS = {False: ("<", ">"), True: ("v", "^")}  # for ends below and above the axis, lying and upright
_CROWDED = 30  # more blocks than this have small labels
_BLOCK_WIDTH, _WIDEST = 10, 1040  # least width of a block's box, and of the page [px]
_BAR_WIDTH, _LETTER, _MARK = 400, 7.3, 13.0  # of all bars, of a character and of a mark in them [px]


def operation_scores_chart(boxes: Sequence[ScoreBox]) -> str:
    """Scores of each type of operation, the worst median on top."""
    rows = sorted(boxes, key=lambda box: (box.median, box.low))[:MAX_OPERATIONS]
    ends = _ends(rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, box in enumerate(rows):
            _box(axes, y, box, ends, is_upright=False)
        axes.set_yticks(range(len(rows)), [f"{short(b.name, 40)} (n = {b.n})" for b in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(*ends)
        axes.grid(axis="x")
        axes.set_xlabel("score, higher is better")

    return themed_svg(
        draw,
        width=WIDTH,
        height=60 + _ROW * len(rows),
        title="Scores by operation, the worst on top",
        description=_medians(rows),
        prefix="operation-scores",
    )


def block_scores_chart(boxes: Sequence[ScoreBox]) -> str:
    """Scores of each block, from input to output."""
    names, common = block_labels([box.name for box in boxes])
    names = [short(name, 36) for name in names]
    longest, ends = max(map(len, names)), _ends(boxes)
    is_upright = len(boxes) * longest > 95
    width = min(max(WIDTH, 70 + _BLOCK_WIDTH * len(boxes)), _WIDEST)
    step = math.ceil(_BLOCK_WIDTH * len(boxes) / width)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for x, box in enumerate(boxes):
            _box(axes, x, box, ends, is_upright=True)
        ticks = range(0, len(boxes), step)
        size = 8 if len(boxes) > _CROWDED else 11
        axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90 if is_upright else 0, fontsize=size)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.8, len(boxes) - 0.2)
        axes.set_ylim(*ends)
        axes.grid(axis="y")
        axes.set_xlabel(common if common and common not in names else "block, from input to output")
        axes.set_ylabel("score, higher is better")

    return themed_svg(
        draw,
        width=width,
        height=270 + (5.5 * longest if is_upright else 0),
        title="Scores by block, from input to output",
        description=_medians(boxes),
        prefix="block-scores",
    )


def formats_in(shares: Sequence[FormatShare]) -> tuple[Format, ...]:
    """The formats that occur, fewest bits first."""
    found = {Format.parse(text) for row in shares for text, n in row.counts.items() if n}
    return tuple(sorted(found, key=lambda f: (f.bits, f.family, f.group_size or 0, f.activation_bits)))


def formats_chart(shares: Sequence[FormatShare]) -> str:
    """The formats that the recipe uses on each type of operation: colour is bits, mark and text the method."""
    rows = sorted(shares, key=lambda s: -s.paper_bits)
    formats = formats_in(rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, row in enumerate(rows):
            _stack(axes, y, row, formats)
        axes.set_yticks(range(len(rows)), [short(s.operation, 40) for s in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("layers of the operation [%]")
        notes = axes.secondary_yaxis("right")
        notes.set_yticks(range(len(rows)), [f"{s.paper_bits:.2f} bits, {_layers(s.n_layers)}" for s in rows])
        notes.tick_params(length=0, labelsize=11, labelcolor=MUTED)
        notes.spines["right"].set_visible(False)

    return themed_svg(
        draw,
        width=WIDTH,
        height=60 + _ROW * len(rows),
        title="Formats of the recipe by operation",
        description="; ".join(f"{s.operation} {_counts(s, formats)}" for s in rows),
        prefix="format-shares",
    )


def _ends(boxes: Sequence[ScoreBox]) -> tuple[float, float]:
    """The limits of the axis: all finite numbers with a margin."""
    found = [v for b in boxes for v in (b.low, b.q25, b.median, b.q75, b.high) if math.isfinite(v)]
    low, high = min(found, default=0.0), max(found, default=0.0)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _box(axes: Axes, place: float, box: ScoreBox, ends: tuple[float, float], *, is_upright: bool) -> None:
    """One box with whiskers; an endless one runs to the edge of the axis and has an arrow there."""

    def line(along: Sequence[float], across: Sequence[float], colour: str, width: float) -> None:
        pair = (across, along) if is_upright else (along, across)
        axes.plot(*pair, color=colour, linewidth=width, solid_capstyle="butt", zorder=3)

    numbers = (box.low, box.q25, box.median, box.q75, box.high)
    low, q25, median, q75, high = (min(max(value, ends[0]), ends[1]) for value in numbers)
    line((low, q25), (place, place), MUTED, 1.3)
    line((q75, high), (place, place), MUTED, 1.3)
    corner, size = (q25, place - _HALF), (q75 - q25, 2 * _HALF)
    if is_upright:
        corner, size = corner[::-1], size[::-1]
    axes.add_patch(Rectangle(corner, *size, facecolor=GRID, edgecolor=OTHER, linewidth=1, zorder=2))
    if math.isfinite(box.median):
        line((median, median), (place - _HALF, place + _HALF), ACCENT, 2.4)
    for is_above in {value > 0 for value in (box.low, box.high) if math.isinf(value)}:
        x, y = (place, ends[is_above]) if is_upright else (ends[is_above], place)
        axes.plot(x, y, marker=_ARROWS[is_upright][is_above], color=MUTED, markersize=5, clip_on=False)


def _medians(boxes: Sequence[ScoreBox]) -> str:
    return "; ".join(f"{b.name} median {number(b.median)}" for b in boxes)


def _stack(axes: Axes, y: float, row: FormatShare, formats: Sequence[Format]) -> None:
    """The bar of one operation, fewest bits first, each part with its mark and name as far as they fit."""
    left = 0.0
    for f in [f for f in formats if row.counts.get(str(f), 0)]:
        width = 100 * row.counts[str(f)] / row.n_layers
        axes.barh(y, width, 0.78, left, facecolor=bit_colour(f.bits), edgecolor=SURFACE, linewidth=1.5)
        pixels, middle = width / 100 * _BAR_WIDTH, left + width / 2
        has_text = pixels > _LETTER * len(str(f)) + _MARK + 8
        if has_text:
            ink, shift = bit_ink(f.bits), 100 * (_MARK / 2 + 1) / _BAR_WIDTH
            x = middle - shift if f.is_quantized else middle
            axes.text(x, y, str(f), ha="center", va="center_baseline", fontsize=10.5, fontweight="bold", color=ink)
            middle += 100 * (_LETTER * len(str(f)) / 2 + 1) / _BAR_WIDTH
        if pixels > _MARK:
            _draw_mark(axes, middle, y, f)
        left += width


def _draw_mark(axes: Axes, x: float, y: float, f: Format) -> None:
    """The mark of the method as on the map: dash, three dashes, dot or ring."""
    kind, ink = family(f), bit_ink(f.bits)
    if kind in ("kmc", "kma"):
        face = ink if kind == "kmc" else "none"
        axes.plot(x, y, "o", markersize=5.5, markerfacecolor=face, markeredgecolor=ink, markeredgewidth=1.4)
    elif kind != "fp":
        half = 100 * 3.5 / _BAR_WIDTH
        for shift in (-0.14, 0.0, 0.14) if kind == "uaq in groups" else (0.0,):
            axes.plot([x - half, x + half], [y + shift] * 2, color=ink, linewidth=1.4)


def _layers(n: int) -> str:
    return f"{n} layer{'' if n == 1 else 's'}"


def _counts(row: FormatShare, formats: Sequence[Format]) -> str:
    return ", ".join(f"{row.counts[str(f)]} {f}" for f in formats if row.counts.get(str(f), 0))
