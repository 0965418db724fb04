"""Charts as SVG with matplotlib, one function for each kind of mark.

No number is computed here and no name is chosen; what is not finite has no place in a chart. Cells of heat maps are
one picture in a colour map whose lightness rises evenly (viridis: told apart without red-green vision, in grey print,
and on light and dark pages alike); all around them takes its colours from the page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis as PlotAxis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sedimo.reporting.figures import Axis, Bar, Heat, Look, Plot, ScoreBox, Series
from sedimo.reporting.page import Figure
from sedimo.reporting.theme import ACCENT, GRID, INK, MUTED, OTHER, PLACEHOLDER, SOFT, SURFACE, bit_colour
from sedimo.reporting.words import superscript

_COLOURS: Mapping[Look, str] = {"this": ACCENT, "other": OTHER, "ink": INK, "soft": SOFT}
_COLOUR_MAP = "viridis"
_DARK = 0.6  # of the colour map; white is read below, black above
_LEAST = 1e-4  # of the greatest value of a logarithmic map, below which differences do not matter
_FEW_DECADES = 2.4  # in sight; below, a logarithmic axis has ticks at 1, 2 and 5, whose labels have room beside
_MANY = 64  # rows, beyond which dots and edges are small
_HALF = 0.3  # half the thickness of a box [rows]
_ARROWS = {True: ("<", ">"), False: ("v", "^")}  # for ends below and above the axis, lying and upright
_BAR_WIDTH, _BAR_LETTER = 400, 7.3  # of all parts of a lying bar, and of a character in them [px]


_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor", "svg.fonttype"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.grid", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.axisbelow", "axes.unicode_minus"), True),
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "font.family": "sans-serif",
    "font.size": 12,
    "svg.hashsalt": "sedimo",
}


def draw(figure: Figure) -> str:
    """The panels of a figure as an SVG element that takes its colours from the page."""
    rc = matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]  # the stubs list every key as a literal
    with rc, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's fonts draw the text
        size = figure.width / 72, figure.height / 72  # 72 points make an inch
        canvas = Canvas(figsize=size, layout="constrained")
        _fill(canvas, figure)
        return svg_of(canvas, figure)


def svg_of(canvas: Canvas, figure: Figure) -> str:
    """The SVG element of a figure; its name keeps its ids apart from those of others."""
    FigureCanvasSVG(canvas)
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for role, colour in PLACEHOLDER.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r'\bid="', f'id="{figure.name}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{figure.name}-", svg)
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]+", r"\1 var(--sans)", svg)
    view_box = re.search(r'viewBox="[^"]+"', svg)
    opening = (
        f'<svg class="chart" xmlns:xlink="http://www.w3.org/1999/xlink" {view_box.group() if view_box else ""} '
        f'style="max-width:{figure.width:.0f}px" role="img" '
        f'aria-label="{escape(figure.title)}. {escape(figure.description)}">'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: opening, svg, count=1)


def _fill(canvas: Canvas, figure: Figure) -> None:
    is_beside = figure.n_columns > 1
    places = canvas.subplots(
        math.ceil(len(figure.panels) / figure.n_columns),
        figure.n_columns,
        squeeze=False,
        sharex=not is_beside,
        sharey=is_beside,
        width_ratios=figure.ratios or None,
    ).ravel()
    for axes, panel in zip(places, figure.panels, strict=False):
        if isinstance(panel, Heat):
            _draw_heat(axes, panel, is_beside=is_beside)
        else:
            _draw_plot(axes, panel)
        if isinstance(panel, Plot) and panel.title:
            axes.set_title(panel.title, fontsize=11, color=INK, loc="center" if is_beside else "left")
        if not is_beside:
            axes.label_outer()
    for axes in places[len(figure.panels) :]:
        axes.set_axis_off()
    if figure.label:
        canvas.supylabel(figure.label, fontsize=12)
    handles = {h.get_label(): h for axes in canvas.axes for h in axes.get_legend_handles_labels()[0]}
    if handles:
        canvas.legend(handles=list(handles.values()), loc="outside lower center", ncols=3, handlelength=2.5)


def _draw_plot(axes: Axes, plot: Plot) -> None:
    series = [mark for mark in plot.marks if isinstance(mark, Series)]
    bars = [mark for mark in plot.marks if isinstance(mark, Bar)]
    boxes = [mark for mark in plot.marks if isinstance(mark, ScoreBox)]
    for one in series:
        _draw_series(axes, one, is_flat=plot.is_flat, is_logarithmic=plot.values.is_logarithmic)
    if bars:
        _draw_bars(axes, bars, is_flat=plot.is_flat)
    if boxes:
        _draw_boxes(axes, boxes, is_flat=plot.is_flat)
    _draw_levels(axes, plot)
    values = [v.value for s in series for v in s.values if math.isfinite(v.value)]
    places = [float(p) for s in series for p in s.places]
    if plot.diagonal:
        values = places = [min(*values, *places) / 1.3, max(*values, *places) * 1.3]
        axes.plot(values, values, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    by_place, by_value = (axes.yaxis, axes.xaxis) if plot.is_flat else (axes.xaxis, axes.yaxis)
    if plot.places.ticks:
        _set_places(axes, plot.places, plot.is_flat, max([len(boxes), *(len(s.values) for s in series)]))
    else:
        _set_axis(by_place, plot.places, places)
    _set_axis(by_value, plot.values, values)
    if not any(bar.text for bar in bars):
        axes.grid(axis="both" if series and not plot.places.ticks else "x" if plot.is_flat else "y")


def _draw_levels(axes: Axes, plot: Plot) -> None:
    across = axes.axvline if plot.is_flat else axes.axhline
    if plot.zero:
        across(0.0, color=MUTED, linewidth=1, zorder=1)
    for value, text in plot.levels:
        across(value, color=ACCENT if plot.is_flat else INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        if text:
            place = axes.get_yaxis_transform()  # x in parts of the axis
            axes.annotate(text, (0, value), (4, 4), xycoords=place, textcoords="offset points", fontsize=10, color=INK)
    if plot.here is not None:
        axes.axvline(plot.here, color=MUTED, linewidth=1.2, linestyle=(0, (2, 3)), zorder=1)


def _draw_series(axes: Axes, series: Series, *, is_flat: bool, is_logarithmic: bool) -> None:
    places = series.places or range(len(series.values))
    shown = [(p, v, i) for i, (p, v) in enumerate(zip(places, series.values, strict=True)) if math.isfinite(v.value)]
    bars = [] if series.look == "soft" else [(p, v, i) for p, v, i in shown if math.isfinite(v.high - v.low)]
    if series.has_band and len(bars) == len(shown):
        ends = [v.low for _, v, _ in bars], [v.high for _, v, _ in bars]
        axes.fill_between([p for p, *_ in bars], *ends, color=_COLOURS[series.look], alpha=0.16, linewidth=0, zorder=2)
    for place, value, i in [] if series.has_band else bars:
        low = max(value.low, 0.1 * value.value) if is_logarithmic else value.low  # a bar never reaches zero
        colour = MUTED if series.bits else ACCENT if i in series.marked else _COLOURS[series.look]
        _plot(axes, [(place, low), (place, value.high)], is_flat=is_flat, color=colour, linewidth=1.6, zorder=2)
    style = _style(series)
    groups: dict[str, list[tuple[float, float]]] = {}  # dots of one colour
    for place, value, i in shown:
        colour = bit_colour(series.bits[i]) if series.bits else ACCENT if i in series.marked else ""
        groups.setdefault(colour, []).append((place, value.value))
    if series.line:
        _plot(axes, [(p, v.value) for p, v, _ in shown], is_flat=is_flat, zorder=3, **style)
        groups.pop("", None)
    for colour, points in groups.items():
        own = style | {"linestyle": "none", "zorder": 3}
        if series.bits:
            own |= {"markerfacecolor": colour, "markeredgecolor": INK, "markersize": 8}
        elif colour:
            own |= {"markerfacecolor": ACCENT, "marker": "D", "markersize": 7.5, "zorder": 4}
        _plot(axes, points, is_flat=is_flat, **own)
    if series.label:
        axes.plot([], [], label=series.label, **style)  # type: ignore[arg-type]  # styles by name


def _style(series: Series) -> dict[str, object]:
    n, colour = len(series.values), _COLOURS[series.look]
    is_soft, is_dense = series.look == "soft", n > _MANY
    size = 4.0 if is_soft else 3.0 if is_dense else 8.0 if series.look == "this" and series.line else 7.0
    return {
        "color": colour,
        "linestyle": {"-": "-", "--": (0, (4, 2)), ":": ":", "": "none"}[series.line],
        "linewidth": 2 if series.has_band or series.look == "this" else 1.4,
        "marker": series.marker or "none",
        "markersize": size,
        "markerfacecolor": SURFACE if series.is_hollow else colour,
        "markeredgecolor": colour if series.is_hollow else SURFACE,
        "markeredgewidth": 1.6 if series.is_hollow else 0 if is_dense or is_soft else 0.7,
        "markevery": max(1, n // 12) if series.has_band else 1,
        "alpha": 0.6 if is_soft else 1.0,
    }


def _plot(axes: Axes, points: Sequence[tuple[float, float]], *, is_flat: bool, **style: object) -> None:
    """Points by place and value, places along x or downwards."""
    places, values = [place for place, _ in points], [value for _, value in points]
    pair = (values, places) if is_flat else (places, values)
    axes.plot(*pair, **style)  # type: ignore[arg-type]  # styles by name


def _set_places(axes: Axes, places: Axis, is_flat: bool, n: int) -> None:
    """Names along x, or in rows from the top."""
    n = max(n, 1 + max(round(place) for place, _ in places.ticks))
    positions, texts = [place for place, _ in places.ticks], [text for _, text in places.ticks]
    size = 11 if len(texts) <= 20 else 9 if len(texts) <= 45 else 7.5
    if is_flat:
        axes.set_yticks(positions, texts, fontsize=size)
        axes.set_ylim(n - 0.4, -0.6)
        axes.set_ylabel(places.label)
    else:
        axes.set_xticks(positions, texts, rotation=90 if places.are_turned else 0, fontsize=size)
        axes.set_xlim(-0.6, n - 0.4)
        axes.set_xlabel(places.label, labelpad=10 if places.are_turned else 4)  # a browser's letters may be longer
    axes.tick_params(axis="y" if is_flat else "x", length=0)
    for text in axes.get_yticklabels() if is_flat else axes.get_xticklabels():
        if text.get_text() in places.bold:
            text.set(color=ACCENT, fontweight="bold")
    if places.notes:
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(positions, places.notes)
        beside.tick_params(length=0, labelsize=11, labelcolor=MUTED)
        beside.spines["right"].set_visible(False)


def _set_axis(axis: PlotAxis, wanted: Axis, values: Sequence[float]) -> None:
    axes, is_x = axis.axes, axis is axis.axes.xaxis
    (axes.set_xlabel if is_x else axes.set_ylabel)(wanted.label)
    if wanted.is_logarithmic and values:  # plain text at decades, or at 1, 2 and 5: no markup survives in a page
        (axes.set_xscale if is_x else axes.set_yscale)("log")
        low, high = axis.get_view_interval()  # of all that is drawn, intervals included
        decades = math.log10(high / low)
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < _FEW_DECADES else (1.0,), numticks=12))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    if wanted.is_whole:
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    elif is_x and not wanted.is_logarithmic:
        axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    if (wanted.low, wanted.high) != (None, None):
        (axes.set_xlim if is_x else axes.set_ylim)(wanted.low, wanted.high)


def _tick(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    first = round(value / 10.0**exponent)
    if -3 < exponent < 4:
        return f"{first * 10.0**exponent:.{max(-exponent, 0)}f}"
    factor = "" if first == 1 else f"{first} \N{MULTIPLICATION SIGN} "
    return f"{factor}10{superscript(exponent)}"


def _draw_heat(axes: Axes, heat: Heat, *, is_beside: bool) -> None:
    """A picture of one pixel per cell; what is not finite stays empty."""
    values = np.array(heat.cells, dtype=float)
    is_known = bool(np.isfinite(values).any())
    if heat.is_logarithmic and is_known:
        values = np.log10(np.maximum(values, np.nanmax(values) * _LEAST))
    finite = values[np.isfinite(values)]
    low, high = heat.limits or ((float(finite.min()), float(finite.max())) if is_known else (0.0, 1.0))
    spread = Normalize(low, high if high > low else low + 1)
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(shown, cmap=_COLOUR_MAP, norm=spread, interpolation="none", aspect="auto")
    rows, columns = np.nonzero(np.isneginf(values))
    axes.plot(columns, rows, linestyle="none", marker="x", color=INK, markersize=5)
    for spine in axes.spines.values():
        spine.set_visible(True)
    if heat.is_square:
        axes.set_aspect("equal")
    if heat.is_written:
        _write_cells(axes, values, low)
    if heat.strip:
        _draw_strip(axes.inset_axes((1.012, 0, 0.03, 1), sharey=axes), heat.strip)
    _set_places(axes, heat.columns, False, values.shape[1])
    _set_places(axes, heat.rows, True, values.shape[0])
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    if heat.scale and is_known:
        pad = 0.07 if heat.strip else 0.02
        side: Literal["top", "right"] = "top" if is_beside else "right"
        bar = axes.figure.colorbar(image, ax=axes, label=heat.scale, fraction=0.035, pad=pad, location=side)
        bar.outline.set_edgecolor(MUTED)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)  # hundreds of shapes would make the page large
        if heat.is_logarithmic:
            bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.2g}"))


def _write_cells(axes: Axes, values: npt.NDArray[np.float64], low: float) -> None:
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        colour = "#ffffff" if value < low + _DARK * (1.0 - low) else "#000000"
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour)


def _draw_strip(axes: Axes, bits: Sequence[float]) -> None:
    for row, b in enumerate(bits):
        axes.add_patch(Rectangle((0, row - 0.5), 1, 1, facecolor=bit_colour(round(b)), linewidth=0))
    axes.set_xlim(0, 1)
    axes.set_xticks([0.5], ["bits"], rotation=90, fontsize=8)
    axes.tick_params(length=0, labelleft=False)
    axes.spines["left"].set_visible(False)


def _draw_bars(axes: Axes, bars: Sequence[Bar], *, is_flat: bool) -> None:
    has_text = any(bar.text for bar in bars)
    edge = 1.5 if has_text else 0.5 if any(bar.bits for bar in bars) and len(bars) <= _MANY else 0
    style = {"edgecolor": SURFACE if has_text else INK, "linewidth": edge}
    for bar in bars:
        size, colour = bar.stop - bar.start, _COLOURS[bar.look] if bar.bits is None else bit_colour(round(bar.bits))
        _bar(axes, bar.place, bar.start, size, bar.thickness, is_flat=is_flat, facecolor=colour, **style)
        if bar.text and size / 100 * _BAR_WIDTH > _BAR_LETTER * len(bar.text) + 8:
            place, ink = (bar.start + size / 2, bar.place), INK if bar.bits is None else bit_colour(bar.bits, "on")
            look = {"ha": "center", "va": "center_baseline", "fontsize": 10.5, "fontweight": "bold"}
            axes.text(*place, bar.text, color=ink, **look)  # type: ignore[arg-type]  # styles by name
    if not is_flat:
        axes.use_sticky_edges = False
        axes.axhline(0.0, color=MUTED, linewidth=0.8)
        axes.set_xlim(bars[0].place - bars[0].thickness / 2, bars[-1].place + bars[-1].thickness / 2)


def _draw_boxes(axes: Axes, boxes: Sequence[ScoreBox], *, is_flat: bool) -> None:
    """Boxes with whiskers; an endless one runs to the edge of the axis and has an arrow there."""
    found = [v for b in boxes for v in (b.low, b.q25, b.median, b.q75, b.high) if math.isfinite(v)]
    low, high = min(found, default=0.0), max(found, default=0.0)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    ends = (low - margin, high + margin)
    for place, box in enumerate(boxes):
        numbers = (box.low, box.q25, box.median, box.q75, box.high)
        first, q25, median, q75, last = (min(max(value, ends[0]), ends[1]) for value in numbers)
        style: dict[str, object] = {"solid_capstyle": "butt", "zorder": 3}
        for whisker in ((first, q25), (q75, last)):
            _plot(axes, [(place, end) for end in whisker], is_flat=is_flat, color=MUTED, linewidth=1.3, **style)
        if math.isfinite(box.median):
            middle = [(place - _HALF, median), (place + _HALF, median)]
            _plot(axes, middle, is_flat=is_flat, color=ACCENT, linewidth=2.4, **style)
        look = {"facecolor": GRID, "edgecolor": OTHER, "linewidth": 1, "zorder": 2}
        _bar(axes, place, q25, q75 - q25, 2 * _HALF, is_flat=is_flat, **look)
        for is_above in {value > 0 for value in (box.low, box.high) if math.isinf(value)}:
            style = {"marker": _ARROWS[is_flat][is_above], "markersize": 5, "clip_on": False}
            _plot(axes, [(place, ends[is_above])], is_flat=is_flat, color=MUTED, **style)
    (axes.set_xlim if is_flat else axes.set_ylim)(*ends)


def _bar(
    axes: Axes, place: float, start: float, size: float, thickness: float, *, is_flat: bool, **style: object
) -> None:
    (axes.barh if is_flat else axes.bar)(place, size, thickness, start, **style)  # type: ignore[arg-type]  # by name
