"""Texts beside points that do not cover each other: the first free place around each point."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from sedimo.reporting.theme import POINTS_PER_INCH, SURFACE

_LETTER, _LINE = 5.9, 13.0  # size of a character
_GAP = 8.0  # between point and text
_N_BETWEEN = 12  # places on the way from a point to the next that texts avoid
_MARK = 6.0  # half the size of a point that must stay visible


@dataclass(frozen=True, slots=True)
class Label:
    """A text for the point at `x`, `y`, in units of the axes."""

    text: str
    x: float
    y: float
    colour: str
    is_bold: bool = False


@dataclass(frozen=True, slots=True)
class _Area:
    """A rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: _Area) -> bool:
        """Whether the two share any area."""
        is_beside = self.right <= other.left or other.right <= self.left
        return not (is_beside or self.top <= other.bottom or other.top <= self.bottom)

    def is_inside(self, other: _Area) -> bool:
        """Whether it lies in the other as a whole."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )


def place_labels(axes: Axes, labels: Sequence[Label], lines: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Writes the labels beside their points, away from each other and from `lines` through points, inside the axes."""
    figure = axes.get_figure(root=True)
    if figure is None or not labels:
        return
    figure.draw_without_rendering()  # so that the layout is known
    box, scale = axes.get_window_extent(), POINTS_PER_INCH / figure.dpi
    frame = _Area(box.x0 * scale, box.y0 * scale, box.x1 * scale, box.y1 * scale)
    taken = [_square(*(axes.transData.transform(point) * scale)) for line in lines for point in _along(line)]
    for label in labels:
        x, y = (float(v) * scale for v in axes.transData.transform((label.x, label.y)))
        places = _places(x, y, _LETTER * len(label.text))
        free = (p for p in places if p.is_inside(frame) and not any(p.overlaps(t) for t in taken))
        chosen = next(free, places[0])
        taken.append(chosen)
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(chosen.left - x, chosen.bottom - y + 3),
            textcoords="offset points",
            fontsize=10.5,
            color=label.colour,
            fontweight="bold" if label.is_bold else "normal",
            zorder=6,
            bbox={"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )


def _places(x: float, y: float, width: float) -> list[_Area]:
    """Right, left, above and below the point, then further away."""
    found = []
    for extra in (0.0, _LINE, 2 * _LINE, 3 * _LINE):
        for left, bottom in (
            (x + _GAP, y - _LINE / 2 - extra),
            (x + _GAP, y - _LINE / 2 + extra),
            (x - _GAP - width, y - _LINE / 2 + extra),
            (x - _GAP - width, y - _LINE / 2 - extra),
            (x - width / 2, y + _GAP + extra),
            (x - width / 2, y - _GAP - _LINE - extra),
        ):
            found.append(_Area(left, bottom, left + width, bottom + _LINE))
    return found


def _square(x: float, y: float) -> _Area:
    return _Area(x - _MARK, y - _MARK, x + _MARK, y + _MARK)


def _along(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of a line and some between them."""
    between = [
        (x + (next_x - x) * i / _N_BETWEEN, y + (next_y - y) * i / _N_BETWEEN)
        for (x, y), (next_x, next_y) in itertools.pairwise(line)
        for i in range(_N_BETWEEN)
    ]
    return [*between, *line[-1:]]
