"""The charts of a report: drawing only, every number is in the summary."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sedimo.metrics.estimate import NORMAL_95, Estimate
from sedimo.metrics.signal import decibel
from sedimo.reporting.placement import OUTSIDE, stage_labels
from sedimo.reporting.rounding import share, superscript, with_error
from sedimo.reporting.summary import GroupRow, RecipeRow, Summary
from sedimo.reporting.theme import ACCENT, INK, MUTED, OTHER, SOFT, SURFACE, bit_colour, themed_svg

WIDTH = 760
ROW = 25
MAX_ROWS = 24
_BITS_AHEAD = 3.0  # how far beyond this recipe the frontier is drawn
_MANY_TIMES = 30  # the least cost, beyond which a curve of costs has a logarithmic axis
_FEW_DECADES = 2.2  # below, a logarithmic axis has ticks at 1, 2 and 5


def operations_chart(summary: Summary) -> str:
    """Sensitivity of each operation at the reference format, with 95 % error bars; colour is the bits it got."""
    rows = sorted(_comparable(summary.operations), key=lambda g: g.reference_cost)[-MAX_ROWS:]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _points(axes, [g.reference_cost for g in rows], list(range(len(rows))), rows, horizontal=True)
        axes.set_yticks(range(len(rows)), [short(g.name, 40) for g in rows])
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel(_cost_label(summary))
        notes = axes.secondary_yaxis("right")
        texts = [f"{g.paper_bits:.1f} bits, {share(g.params / summary.sizes.params)}" for g in rows]
        notes.set_yticks(range(len(rows)), texts)
        notes.tick_params(length=0, labelsize=11, labelcolor=MUTED)
        notes.spines["right"].set_visible(False)

    title = f"Sensitivity by operation, all at {summary.reference_format}"
    description = "; ".join(f"{g.name} {g.reference_cost:.2e}, {g.paper_bits:.1f} bits" for g in reversed(rows))
    return themed_svg(
        draw, width=WIDTH, height=86 + ROW * len(rows), title=title, description=description, prefix="operations"
    )


def blocks_chart(summary: Summary) -> str:
    """Sensitivity of each block at the reference format, in the order of the denoiser."""
    rows = sorted(_comparable(summary.blocks), key=lambda g: g.name == OUTSIDE)
    names, axis_label = stage_labels([g.name for g in rows])
    longest = max(map(len, names))
    is_upright = len(rows) * longest > 95

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _points(axes, list(range(len(rows))), [g.reference_cost for g in rows], rows, horizontal=False)
        step = math.ceil(len(rows) / 40)
        ticks = list(range(0, len(rows), step))
        axes.set_xticks(
            ticks,
            [names[i] for i in ticks],
            rotation=90 if is_upright else 0,
            fontsize=9 if len(ticks) > 30 else 11,
        )
        axes.grid(axis="y")
        axes.set_xlabel(axis_label)
        axes.set_ylabel(_cost_label(summary, is_short=True))

    description = "; ".join(f"{g.name} {g.reference_cost:.2e}" for g in rows)
    title = f"Sensitivity by block, all at {summary.reference_format}"
    height = 240 + (6.5 * longest if is_upright else 0)
    return themed_svg(draw, width=WIDTH, height=height, title=title, description=description, prefix="blocks")


def recipes_chart(summary: Summary) -> str:
    """SQNR of all measured recipes with 95 % intervals, best on top; random ones share a row."""
    rows = [r for r in summary.evidence.recipes if "sqnr_db" in r.measures and r.kind != "random"]
    random = [r for r in summary.evidence.recipes if "sqnr_db" in r.measures and r.kind == "random"]
    lines = sorted([[r] for r in rows] + ([random] if random else []), key=lambda line: _best(line))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, line in enumerate(lines):
            for row in line:
                _recipe_point(axes, row, y)
        axes.set_yticks(range(len(lines)), [_line_label(line) for line in lines])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.7, len(lines) - 0.3)
        axes.grid(axis="x")
        axes.set_xlabel("SQNR [dB], higher is better")

    description = "; ".join(f"{r.name} {with_error(r.measures['sqnr_db'], 'dB')}" for r in [*rows, *random])
    return themed_svg(
        draw,
        width=WIDTH,
        height=60 + ROW * len(lines),
        title="Quality of all measured recipes",
        description=description,
        prefix="recipes",
    )


def frontier_chart(summary: Summary) -> str:
    """Predicted quality over bits: the curve of best recipes, this one on it, others beside it."""
    points, choice = summary.evidence.frontier, summary.choice
    here = summary.sizes.paper_bits if choice.accounting == "paper" else summary.sizes.stored_bits
    scale = decibel if choice.is_noise else float

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shown = [p for p in points if not choice.is_noise or p.cost > 0]
        shown = [p for p in shown if p.bits <= here + _BITS_AHEAD]
        costs = [p.cost for p in shown]
        axes.plot([p.bits for p in shown], [scale(c) for c in costs], color=MUTED, marker="o", markersize=4)
        beside = [p for p in summary.evidence.beside_frontier if not choice.is_noise or p.cost > 0]
        for point in beside:
            axes.plot(point.bits, scale(point.cost), marker="s", color=OTHER, markersize=6)
            axes.annotate(
                point.name, (point.bits, scale(point.cost)), xytext=(6, -11), textcoords="offset points", fontsize=10
            )
        if choice.cost.value > 0 or not choice.is_noise:
            axes.plot(here, scale(choice.cost.value), marker="D", color=ACCENT, markersize=9)
            axes.annotate(
                "this recipe",
                (here, scale(choice.cost.value)),
                xytext=(-8 if choice.is_noise else 8, 8),  # above the curve, which rises or falls
                textcoords="offset points",
                ha="right" if choice.is_noise else "left",
                color=ACCENT,
                fontweight="bold",
            )
        if costs and not choice.is_noise and max(costs) > _MANY_TIMES * min(costs) > 0:
            _logarithmic(axes.yaxis, costs)
        axes.grid()
        axes.set_xlabel(f"bits per weight, {'as in the papers' if choice.accounting == 'paper' else 'as stored'}")
        axes.set_ylabel("predicted SQNR [dB]" if choice.is_noise else "predicted cost")

    description = "; ".join(f"{p.bits:.2f} bits {scale(p.cost):.3g}" for p in points if p.cost > 0)
    return themed_svg(
        draw, width=500, height=320, title="What more bits would buy", description=description, prefix="frontier"
    )


def agreement_chart(summary: Summary) -> str:
    """Predicted against measured noise; on the line, costs simply add up."""
    agreement = summary.evidence.agreement
    if agreement is None:
        return ""
    pairs = agreement.predicted, agreement.measured

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        ends = [min(map(min, pairs)) / 1.3, max(map(max, pairs)) * 1.3]
        _logarithmic(axes.xaxis, ends)
        _logarithmic(axes.yaxis, ends)
        axes.plot(ends, ends, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(*pairs, linestyle="none", marker="o", color=ACCENT, markersize=5, markeredgecolor=SURFACE)
        axes.set_xlabel("predicted noise (sum of costs)")
        axes.set_ylabel("measured noise")
        axes.grid()

    description = f"{agreement.n} recipes; rank correlation {agreement.srcc:.2f}, slope {agreement.slope:.2f}"
    return themed_svg(
        draw, width=420, height=320, title="Do costs add up?", description=description, prefix="agreement"
    )


def _comparable(groups: Sequence[GroupRow]) -> list[GroupRow]:
    return [g for g in groups if g.n_reference and g.reference_cost > 0]


def _points(axes: Axes, x: Sequence[float], y: Sequence[float], rows: Sequence[GroupRow], *, horizontal: bool) -> None:
    """Dots on a logarithmic axis with bars that never reach zero."""
    half = [NORMAL_95 * g.reference_standard_error for g in rows]
    bars = [[min(h, 0.9 * g.reference_cost) for h, g in zip(half, rows, strict=True)], half]
    _logarithmic(axes.xaxis if horizontal else axes.yaxis, x if horizontal else y)
    axes.errorbar(
        x,
        y,
        xerr=bars if horizontal else None,
        yerr=None if horizontal else bars,
        fmt="none",
        ecolor=MUTED,
        elinewidth=1.3,
        capsize=2.5,
    )
    colours = [bit_colour(g.paper_bits) for g in rows]
    axes.scatter(x, y, s=70, c=colours, edgecolors=INK, linewidths=0.8, zorder=3)


def _logarithmic(axis: Axis, values: Sequence[float]) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 or at decades only, as plain text (no markup survives in a page)."""
    decades = math.log10(max(values) / min(values))
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < _FEW_DECADES else (1.0,), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    first = round(value / 10.0**exponent)
    if -3 < exponent < 4:
        return f"{first * 10.0**exponent:.{max(-exponent, 0)}f}"
    factor = "" if first == 1 else f"{first} \N{MULTIPLICATION SIGN} "
    return f"{factor}10{superscript(exponent)}"


def _recipe_point(axes: Axes, row: RecipeRow, y: float) -> None:
    estimate = row.measures["sqnr_db"]
    if not math.isfinite(estimate.value):
        return
    colour = {"this": ACCENT, "random": SOFT}.get(row.kind, OTHER)
    if row.kind != "random" and has_interval(estimate):
        axes.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=2)
    axes.plot(
        estimate.value,
        y,
        marker="D" if row.kind == "this" else "o",
        color=colour,
        markersize=8 if row.kind == "this" else 6,
        markeredgecolor=SURFACE,
        markeredgewidth=0.6,
    )


def _line_label(line: Sequence[RecipeRow]) -> str:
    first = line[0]
    if first.kind == "random":
        low, high = min(r.paper_bits for r in line), max(r.paper_bits for r in line)
        return f"{len(line)} random recipes ({low:.2f}\N{EN DASH}{high:.2f} bits)"
    text = f"{short(first.name, 36)} ({first.paper_bits:.2f} bits)"
    return f"this recipe: {text}" if first.kind == "this" else text


def _best(line: Sequence[RecipeRow]) -> float:
    return max(r.measures["sqnr_db"].value for r in line)


def has_interval(estimate: Estimate) -> bool:
    """Whether an interval can be drawn."""
    return math.isfinite(estimate.low) and math.isfinite(estimate.high)


def _cost_label(summary: Summary, *, is_short: bool = False) -> str:
    if is_short:
        return f"{'noise' if summary.choice.is_noise else 'cost'} at {summary.reference_format}"
    what = "noise" if summary.choice.is_noise else f"cost [{summary.choice.unit}]"
    return f"{what} if all its layers were at {summary.reference_format}\n(logarithmic; bars: 95 % interval)"


def short(text: str, n: int) -> str:
    """At most `n` characters of a text, its end: names differ there."""
    return text if len(text) <= n else f"\N{HORIZONTAL ELLIPSIS}{text[-(n - 1) :]}"
