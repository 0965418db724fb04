"""Ranges of activations per channel, before and after smoothing; drawing only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sedimo.reporting.charts import WIDTH
from sedimo.reporting.maps import ChannelRanges
from sedimo.reporting.rounding import number
from sedimo.reporting.theme import ACCENT, INK, MUTED, OTHER, themed_svg

MAX_BARS = 320  # more channels share bars, which then reach over all of them


def ranges_chart(found: ChannelRanges, *, prefix: str) -> str:
    """Least to greatest value of every channel as a bar, before on top and after below.

    Each has its own scale: quantizing a whole tensor follows its widest channel, whatever that is.
    """
    panels = {
        "before": (np.array(found.before_low), np.array(found.before_high), OTHER),
        "after": (np.array(found.after_low), np.array(found.after_high), ACCENT),
    }

    def draw(figure: Figure) -> None:
        both = figure.subplots(2, 1, sharex=True)
        for axes, (name, (low, high, colour)) in zip(both, panels.items(), strict=True):
            _draw_ranges(axes, low, high, colour)
            axes.set_title(f"{name} smoothing: {_spread(low, high)}", fontsize=11, loc="left", color=INK)
        both[1].set_xlabel("input channel")
        figure.supylabel("activation", fontsize=12)

    texts = (f"{name} {_spread(low, high)}" for name, (low, high, _) in panels.items())
    return themed_svg(
        draw,
        width=WIDTH,
        height=360,
        title=f"Activation ranges per channel of {found.layer}",
        description=f"{len(found.before_low)} channels; {'; '.join(texts)}",
        prefix=prefix,
    )


def merged(low: npt.ArrayLike, high: npt.ArrayLike, n_most: int) -> npt.NDArray[np.float64]:
    """Least and greatest of neighbouring channels `[4, N]`: first channel, number of channels, low, high.

    No extreme value is lost, so that an outlier among thousands of channels is seen.
    """
    lows, highs = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    edges = np.unique(np.linspace(0, len(lows), min(n_most, len(lows)) + 1).round().astype(int))
    starts = edges[:-1]
    return np.stack([starts, np.diff(edges), np.minimum.reduceat(lows, starts), np.maximum.reduceat(highs, starts)])


def _draw_ranges(axes: Axes, low: npt.ArrayLike, high: npt.ArrayLike, colour: str) -> None:
    first, count, lows, highs = merged(low, high, MAX_BARS)
    axes.bar(first, highs - lows, width=count, bottom=lows, align="edge", color=colour, linewidth=0)
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    axes.set_xlim(0, float(first[-1] + count[-1]))
    axes.grid(axis="y")


def _spread(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> str:
    """How far the widest channel is from the usual one, which is what quantization of the whole tensor suffers from."""
    size = np.maximum(np.abs(low), np.abs(high))
    middle, widest = float(np.median(size)), float(size.max())
    text = f"largest {number(widest)}, median channel {number(middle)}"
    return f"{text}, ratio {number(widest / middle)}" if middle > 0 else text
