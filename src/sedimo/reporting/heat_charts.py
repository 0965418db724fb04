"""Heat maps of noise, and noise along the trajectory; drawing only.

Cells are one picture in a colour map whose lightness rises evenly (viridis: told apart without red-green vision, in
grey print, and on light and dark pages alike); all around them takes its colours from the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from sedimo.metrics.estimate import Estimate
from sedimo.reporting.charts import WIDTH, short
from sedimo.reporting.maps import NoiseMap, TrajectoryLines
from sedimo.reporting.placement import block_labels
from sedimo.reporting.rounding import number
from sedimo.reporting.theme import ACCENT, INK, MUTED, OTHER, SURFACE, themed_svg

Side = Literal["right", "top"]
COLOUR_MAP = "viridis"
MAX_STEP_LABELS = 14
_EVERY = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5))
MAX_ROW_LABELS = 64
_LINES: Mapping[str, tuple[str, str, str, str]] = {  # label, colour, line style, marker
    "step": ("output, same inputs as full precision", OTHER, ":", "s"),
    "path": ("output, on its own path", ACCENT, "-", "D"),
    "latents": ("latents after the step", INK, "--", "o"),
}


def noise_map_chart(found: NoiseMap, *, title: str, prefix: str) -> str:
    """SQNR of each block at each step; without any finite number there is no chart."""
    values = np.array(found.sqnr_db, dtype=float)
    if not np.isfinite(values).any():
        return ""
    labels, common = block_labels(found.blocks)
    row = row_height(len(labels))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = draw_cells(axes, values)
        label_rows(axes, labels)
        label_steps(axes, found.timesteps)
        axes.set_ylabel(common)
        colour_bar(figure, axes, image, "SQNR [dB], higher is better")

    return themed_svg(
        draw, width=WIDTH, height=110 + row * len(labels), title=title, description=_extremes(found), prefix=prefix
    )


def trajectory_chart(found: TrajectoryLines) -> str:
    """SQNR at each step as lines with 95 % intervals as bands; without any finite number there is no chart."""
    lines = {"step": found.step, "path": found.path, "latents": found.latents}
    if not any(math.isfinite(one.value) for line in lines.values() for one in line):
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, line in lines.items():
            _draw_line(axes, line, *_LINES[name])
        label_steps(axes, found.timesteps)
        axes.set_xlim(-0.5, len(found.timesteps) - 0.5)
        axes.set_ylabel("SQNR [dB], higher is better")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=3, handlelength=3)

    ends = (f"{_LINES[name][0]} {number(line[-1].value)} dB" for name, line in lines.items())
    return themed_svg(
        draw,
        width=WIDTH,
        height=360,
        title="Noise along the trajectory",
        description=f"At the last of {len(found.timesteps)} steps: {'; '.join(ends)}",
        prefix="trajectory",
    )


def row_height(n_rows: int) -> float:
    """Of one row of a map [px]: room for its label as long as there are labels."""
    return max(420 / n_rows, 3.5) if n_rows > MAX_ROW_LABELS else 20 if n_rows <= 20 else 14


def draw_cells(axes: Axes, values: npt.NDArray[np.float64], limits: tuple[float, float] | None = None) -> AxesImage:
    """A picture of one pixel per cell; what is not finite stays empty, and endless noise is marked with a cross."""
    finite = values[np.isfinite(values)]
    low, high = limits or (float(finite.min()), float(finite.max()))
    shown = np.ma.masked_invalid(values)
    spread = Normalize(low, high if high > low else low + 1)
    image = axes.imshow(shown, cmap=COLOUR_MAP, norm=spread, interpolation="none", aspect="auto")
    rows, columns = np.nonzero(np.isneginf(values))
    axes.plot(columns, rows, linestyle="none", marker="x", color=INK, markersize=5)
    for spine in axes.spines.values():
        spine.set_visible(True)
    return image


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """One label per row while they can be read, else every so many."""
    step = math.ceil(len(labels) / MAX_ROW_LABELS)
    ticks = list(range(0, len(labels), step))
    axes.set_yticks(ticks, [short(labels[i], 40) for i in ticks], fontsize=11 if len(labels) <= 20 else 9)
    axes.tick_params(axis="y", length=0 if step == 1 else 3)


def label_steps(axes: Axes, timesteps: Sequence[float], *, n_most: int = MAX_STEP_LABELS) -> None:
    """Steps counted from 1, with the noise level that the denoiser was told."""
    every = next(n for n in _EVERY if n * n_most >= len(timesteps))
    ticks = [0, *(i for i in range(1, len(timesteps)) if (i + 1) % every == 0 and i > every / 2)]
    told = all(math.isfinite(t) for t in timesteps)
    axes.set_xticks(ticks, [f"{i + 1}\n{timesteps[i]:.4g}" if told else str(i + 1) for i in ticks])
    axes.set_xlabel("denoiser call, from noise to image" + ("; below, its timestep" if told else ""))


def colour_bar(
    figure: Figure, axes: Axes, image: AxesImage, label: str, *, pad: float = 0.02, location: Side = "right"
) -> Colorbar:
    """The scale of a map, as a picture too: hundreds of shapes would make the page large."""
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.035, pad=pad, location=location)
    bar.outline.set_edgecolor(MUTED)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)
    return bar


def _draw_line(axes: Axes, line: Sequence[Estimate], label: str, colour: str, style: str, marker: str) -> None:
    shown = [(i, one) for i, one in enumerate(line) if math.isfinite(one.value)]
    if not shown:
        return
    x, y = [i for i, _ in shown], [one.value for _, one in shown]
    every = max(1, len(shown) // 12)
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=style,
        linewidth=2,
        marker=marker,
        markevery=every,
        markersize=6.5,
        markeredgecolor=SURFACE,
        markeredgewidth=0.7,
        label=label,
        zorder=3,
    )
    low, high = [one.low for _, one in shown], [one.high for _, one in shown]
    if np.isfinite([low, high]).all():
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)


def _extremes(found: NoiseMap) -> str:
    """Where noise is most and least, in words."""
    values = np.where(np.isfinite(found.sqnr_db), found.sqnr_db, np.nan)
    places = []
    for word, at in (("Least", np.nanargmin(values)), ("most", np.nanargmax(values))):
        row, column = np.unravel_index(at, values.shape)
        places.append(f"{word} {number(float(values[row, column]))} dB at {found.blocks[row]}, call {column + 1}")
    n_blocks, n_calls = values.shape
    return f"{n_blocks} blocks at {n_calls} denoiser calls. {', '.join(places)}"
