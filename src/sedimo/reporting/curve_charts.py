"""The charts of what was measured: quality against bits, and how well predictors rank; drawing only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sedimo.reporting.charts import WIDTH, has_interval, short
from sedimo.reporting.explanation import OVERALL, CurvePoint, PredictorRow
from sedimo.reporting.explanation_phrasing import subsets
from sedimo.reporting.labelling import Label, place_labels
from sedimo.reporting.rounding import number
from sedimo.reporting.theme import ACCENT, INK, MUTED, OTHER, SOFT, SURFACE, themed_svg

_ROW = 30
_MARKERS = ("o", "D", "s", "^", "v")  # of the subsets, all recipes first
_FLOOR = 0.0  # SRCC of guessing


def curve_chart(points: Sequence[CurvePoint], *, here: float) -> str:
    """Measured quality against bits: random recipes as a cloud, this system as a line; `here` are the recipe's bits.

    Recipes whose measurement is not finite have no place in it; without any other, there is no chart.
    """
    shown = [p for p in points if math.isfinite(p.measured.value) and math.isfinite(p.bits)]
    if not shown:
        return ""
    cloud, named = [p for p in shown if p.kind == "random"], [p for p in shown if p.kind != "random"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        x, y = [p.bits for p in cloud], [p.measured.value for p in cloud]
        dots = axes.scatter(x, y, s=15, c=SOFT, alpha=0.6, linewidths=0, zorder=2)
        if min(p.bits for p in shown) <= here <= max(p.bits for p in shown):
            axes.axvline(here, color=MUTED, linewidth=1.2, linestyle=(0, (2, 3)), zorder=1)
        lines = _grouped(named)
        labels = _draw_named(axes, lines)
        axes.grid()
        axes.margins(x=0.07, y=0.09)
        axes.set_xlabel("bits per weight, as in the papers")
        axes.set_ylabel("measured SQNR [dB]")
        if cloud:
            axes.legend([dots], [_random_text(len(cloud))], loc="lower right", handletextpad=0.2)
        place_labels(axes, labels, [[(p.bits, p.measured.value) for p in line] for line in lines.values()])

    texts = [f"{p.name} {p.bits:.2f} bits {number(p.measured.value)} dB" for p in named]
    return themed_svg(
        draw,
        width=WIDTH,
        height=420,
        title="Measured quality against bits",
        description="; ".join([*texts, f"{len(cloud)} random recipes"]),
        prefix="curve",
    )


def predictors_chart(rows: Sequence[PredictorRow]) -> str:
    """Rank correlation of the predictor and its baselines with 95 % intervals, the best on top; none, no chart."""
    shown = [row for row in rows if math.isfinite(row.srcc.value)]
    if not shown:
        return ""
    order, used = subsets(rows), {row.predictor for row in rows if row.is_used}
    names = _by_rank(rows, order)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row in shown:
            i = order.index(row.subset)
            shift = 0.7 * (i - (len(order) - 1) / 2) / len(order)
            _predictor_dot(axes, names.index(row.predictor) + shift, row, _MARKERS[i % len(_MARKERS)])
        axes.set_yticks(range(len(names)), [short(n, 44) for n in names])
        for text, n in zip(axes.get_yticklabels(), names, strict=True):
            if n in used:
                text.set(color=ACCENT, fontweight="bold")
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(min(axes.get_xlim()[0], _FLOOR), max(axes.get_xlim()[1], 1.0))
        axes.axvline(_FLOOR, color=MUTED, linewidth=1)
        axes.grid(axis="x")
        axes.set_xlabel("rank correlation (SRCC): 1 is the true order, 0 guessing")
        handles = [_subset_handle(i, subset) for i, subset in enumerate(order)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)

    texts = [f"{r.predictor} {_subset_label(r.subset)} {number(r.srcc.value)}" for r in rows]
    return themed_svg(
        draw,
        width=WIDTH,
        height=90 + _ROW * len(names),
        title="How well recipes are ranked",
        description="; ".join(texts),
        prefix="predictors",
    )


def _random_text(n: int) -> str:
    return f"{n} random recipe{'' if n == 1 else 's'}"


def _grouped(points: Sequence[CurvePoint]) -> dict[tuple[str, str], list[CurvePoint]]:
    """Points that belong on one line, by kind and name, this system last: it is drawn on top."""
    lines: dict[tuple[str, str], list[CurvePoint]] = {}
    for point in sorted(points, key=lambda p: (p.kind == "this", p.bits)):
        lines.setdefault((point.kind, "" if point.kind == "this" else point.name), []).append(point)
    return lines


def _draw_named(axes: Axes, lines: Mapping[tuple[str, str], Sequence[CurvePoint]]) -> list[Label]:
    """This system as a line, uniform recipes as squares; returns what to write beside them."""
    labels = []
    for (kind, name), line in lines.items():
        is_this = kind == "this"
        _draw_line(axes, line, marker="D" if is_this else "s", is_this=is_this)
        text, colour = ("this system", ACCENT) if is_this else (short(name, 30), INK)
        labels.append(Label(text, line[-1].bits, line[-1].measured.value, colour, is_bold=is_this))
    return labels[::-1]  # this system takes its place first


def _draw_line(axes: Axes, line: Sequence[CurvePoint], *, marker: str, is_this: bool) -> None:
    colour, x, y = ACCENT if is_this else OTHER, [p.bits for p in line], [p.measured.value for p in line]
    for p in [p for p in line if has_interval(p.measured)]:
        axes.plot([p.bits] * 2, [p.measured.low, p.measured.high], color=colour, linewidth=1.6, zorder=3)
    axes.plot(
        x,
        y,
        color=colour,
        marker=marker,
        markersize=8 if is_this else 6.5,
        markeredgecolor=SURFACE,
        markeredgewidth=0.6,
        linewidth=2 if is_this else 1,
        linestyle="-" if is_this else (0, (4, 2)),
        zorder=5 if is_this else 4,
    )


def _by_rank(rows: Sequence[PredictorRow], order: Sequence[str]) -> list[str]:
    """Names of the predictors, best first on the last subset: the band is what a budget asks about."""
    found: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: order.index(row.subset)):
        if math.isfinite(row.srcc.value):
            found[row.predictor] = row.srcc.value
        else:
            found.setdefault(row.predictor, -math.inf)
    return sorted(found, key=lambda name: -found[name])


def _predictor_dot(axes: Axes, y: float, row: PredictorRow, marker: str) -> None:
    colour = ACCENT if row.is_used else OTHER
    if has_interval(row.srcc):
        axes.plot([row.srcc.low, row.srcc.high], [y, y], color=colour, linewidth=1.8, zorder=2)
    axes.plot(
        row.srcc.value,
        y,
        marker=marker,
        markersize=7,
        color=colour,
        markerfacecolor=colour if row.subset == OVERALL else SURFACE,
        markeredgecolor=colour,
        markeredgewidth=1.6,
        zorder=3,
    )


def _subset_handle(i: int, subset: str) -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=_MARKERS[i % len(_MARKERS)],
        color=INK,
        markerfacecolor=INK if subset == OVERALL else SURFACE,
        markeredgewidth=1.6,
        label=_subset_label(subset),
    )


def _subset_label(subset: str) -> str:
    return "all held-out recipes" if subset == OVERALL else subset
