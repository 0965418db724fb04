"""The chart of a comparison of methods: a panel for each budget, a row for each method; drawing only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sedimo.metrics.estimate import Estimate, ranked
from sedimo.reporting.charts import WIDTH, has_interval, short
from sedimo.reporting.rounding import number
from sedimo.reporting.theme import ACCENT, INK, OTHER, themed_svg

_ROW = 26
_MOST_COLUMNS = 4

Measured = Mapping[str, Estimate]  # by method


def methods_chart(budgets: Mapping[str, Measured], *, reference: str) -> str:
    """SQNR of each method [dB] with its 95 % interval; the highest mean over the budgets on top; nothing, no chart.

    Each panel has its own scale. Measurements that are not finite have no place in it.
    """
    shown = {budget: finite for budget, found in budgets.items() if (finite := _finite(found))}
    if not shown:
        return ""
    names = _best_first(shown)
    n_columns = min(len(shown), _MOST_COLUMNS)
    n_rows = math.ceil(len(shown) / n_columns)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False).ravel()
        for axes, (budget, found) in zip(panels, shown.items(), strict=False):
            _draw_panel(axes, names, found, reference)
            axes.set_title(budget, fontsize=12)
            axes.set_xlabel("SQNR [dB]")
        for axes in panels[::n_columns]:  # the others share its rows
            _name_rows(axes, names, reference)
        for axes in panels[len(shown) :]:
            axes.set_axis_off()

    texts = [
        f"{budget}: {', '.join(f'{name} {number(e.value)} dB' for name, e in found.items())}"
        for budget, found in shown.items()
    ]
    return themed_svg(
        draw,
        width=WIDTH,
        height=n_rows * (90 + _ROW * len(names)),
        title="Quality of every method at every budget",
        description="; ".join(texts),
        prefix="methods",
    )


def _draw_panel(axes: Axes, names: Sequence[str], found: Measured, reference: str) -> None:
    for y, name in enumerate(names):
        if name not in found:
            continue
        e, colour = found[name], ACCENT if name == reference else OTHER
        if has_interval(e):
            axes.plot([e.low, e.high], [y, y], color=colour, linewidth=2, zorder=2)
        axes.plot(e.value, y, marker="D" if name == reference else "o", color=colour, markersize=6.5, zorder=3)
    if reference in found:
        axes.axvline(found[reference].value, color=ACCENT, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.grid(axis="x")


def _name_rows(axes: Axes, names: Sequence[str], reference: str) -> None:
    axes.set_yticks(range(len(names)), [short(name, 24) for name in names])
    for text, name in zip(axes.get_yticklabels(), names, strict=True):
        text.set(color=ACCENT if name == reference else INK, fontweight="bold" if name == reference else "normal")
    axes.set_ylim(len(names) - 0.4, -0.6)


def _finite(found: Measured) -> dict[str, Estimate]:
    return {name: e for name, e in found.items() if math.isfinite(e.value)}


def _best_first(shown: Mapping[str, Measured]) -> list[str]:
    """Methods by the mean over the budgets at which they have a recipe."""
    values: dict[str, list[float]] = {}
    for found in shown.values():
        for name, e in found.items():
            values.setdefault(name, []).append(ranked(e.value))
    return sorted(values, key=lambda name: -sum(values[name]) / len(values[name]))
