"""What the panels of a figure show: dots with intervals, lines with bands, bars and boxes (`Plot`), and heat maps.

Panels are values: which data they show under which names. `drawing` makes pictures of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy.typing as npt

from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate

WIDTH = 760
ROW = 25  # height of a row of dots, boxes or bars [px]
LETTER = 6.0  # width of a character [px]
_MOST_NAMES = 64
Look = Literal["this", "other", "ink", "soft"]
Marker = Literal["o", "D", "s", "^", "v", "P", "X", "*", "p", "h", "<", ">", ""]


@dataclass(frozen=True, slots=True)
class Axis:
    """What stands along an axis: numbers, or names at places (`ticks`), with `notes` at the other side.

    `bold` names stand out. Names of places are upright if they `are_turned`. `low` and `high` are the limits.
    """

    label: str = ""
    ticks: tuple[tuple[float, str], ...] = ()
    notes: tuple[str, ...] = ()
    bold: tuple[str, ...] = ()
    are_turned: bool = False
    is_logarithmic: bool = False
    is_whole: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Values at places, 0, 1, 2 and so on unless they are given.

    Dots with the 95 % intervals of their values as bars or, of a line, as a band. With `bits` each dot has the colour
    of its bits; those at `marked` indices are this system's. Soft ones are a cloud of small dots without intervals.
    """

    values: tuple[Estimate, ...]
    places: tuple[float, ...] = ()
    label: str = ""
    look: Look = "other"
    marker: Marker = "o"
    is_hollow: bool = False
    line: Literal["", "-", "--", ":"] = ""
    has_band: bool = False
    bits: tuple[float, ...] = ()
    marked: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar at a place from one value to another, in the colour of its bits, and with a text in it if that fits."""

    place: float
    start: float
    stop: float
    thickness: float = 0.8
    bits: float | None = None
    text: str = ""
    look: Look = "other"


@dataclass(frozen=True, slots=True)
class ScoreBox:
    """Five numbers of `n` scores (higher = better); `low` and `high` are the 5 % and the 95 % quantile."""

    name: str
    n: int
    low: float
    q25: float
    median: float
    q75: float
    high: float

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"the box of {self.name!r} must stand for at least one score, got n = {self.n}")
        numbers = (self.low, self.q25, self.median, self.q75, self.high)
        if any(not one <= other for one, other in pairwise(numbers)):
            raise InputError(f"the quantiles of {self.name!r} must not fall, got {numbers}")


@dataclass(frozen=True, slots=True)
class Plot:
    """Dots and lines, bars, or boxes, which are at places 0, 1, 2 and so on.

    Places run along x, or, if it `is_flat`, down in rows; `levels` are values with a broken line.
    """

    marks: Sequence[Series] | Sequence[Bar] | Sequence[ScoreBox]
    places: Axis
    values: Axis
    levels: tuple[tuple[float, str], ...] = ()
    zero: bool = False
    here: float | None = None
    diagonal: bool = False
    is_flat: bool = False
    title: str = ""


@dataclass(frozen=True, slots=True)
class Heat:
    """A matrix in colours; endless noise is a cross. `strip` are bits shown beside each row.

    `limits` are those of the colours, whose scale is called `scale` (none, no scale) and may be logarithmic.
    """

    cells: npt.ArrayLike
    rows: Axis
    columns: Axis
    scale: str = ""
    limits: tuple[float, float] | None = None
    is_logarithmic: bool = False
    is_square: bool = False
    is_written: bool = False
    strip: tuple[float, ...] = ()


Panel = Plot | Heat


def named(names: Sequence[str], *, n_most: int = _MOST_NAMES) -> tuple[tuple[float, str], ...]:
    """Names of places, every so many of them if there are more than can be read."""
    step = max(math.ceil(len(names) / n_most), 1)
    return tuple((i, names[i]) for i in range(0, len(names), step))


def room(names: Sequence[str]) -> float:
    """The height that names beside each other take because they have to be turned [px]; 0 if they have not."""
    longest = max(map(len, names), default=0)
    return LETTER * longest if len(names) * longest > 95 else 0


def short(text: str, n: int) -> str:
    """At most `n` characters of a text, its end: names differ there."""
    return text if len(text) <= n else f"\N{HORIZONTAL ELLIPSIS}{text[-(n - 1) :]}"


def only(value: float) -> Estimate:
    """A value of which no error is known."""
    return Estimate(value, math.nan, math.nan, math.nan, 0)
