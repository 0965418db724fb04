"""Show, layer by layer, where two recipes or checkpoints differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sedimo.bank import Progress
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.jobs.describe import read_recipe
from sedimo.jobs.job import Job
from sedimo.quant.formats import FP16
from sedimo.quant.parts import entry_text
from sedimo.reporting.page import Page, Table, Text, columns, page_of, rows
from sedimo.settings import REQUIRED, option
from sedimo.space import Recipe


@dataclass(frozen=True, slots=True)
class DiffSettings:
    """Two recipe files or packed checkpoints."""

    first: str = option(REQUIRED, metavar="A", help="A recipe file or a packed checkpoint.")
    second: str = option(REQUIRED, metavar="B", help="Another one.")


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """A layer that two recipes treat differently."""

    layer: str
    first: str
    second: str


def run(settings: DiffSettings, _progress: Progress) -> tuple[LayerDifference, ...]:
    """The layers whose formats differ.

    Raises:
        InputError: nothing there, or recipes of different denoisers.
        StateError: a damaged file.
    """
    return differences(read_recipe(settings.first), read_recipe(settings.second))


def differences(first: Recipe, second: Recipe) -> tuple[LayerDifference, ...]:
    """Layers whose formats differ, in the order of the first recipe."""
    names = dict.fromkeys([*first.layers, *second.layers])
    if first.layers and second.layers and not first.layers.keys() & second.layers.keys():
        raise InputError("the two have no layer in common: they are of different denoisers")
    pairs = ((n, *(entry_text(recipe.layers.get(n, FP16)) for recipe in (first, second))) for n in names)
    return tuple(LayerDifference(*pair) for pair in pairs if pair[1] != pair[2])


def page(found: Sequence[LayerDifference]) -> Page:
    """Layers that differ."""
    table = Table(columns("layer", "first", "second"), rows((d.layer, d.first, d.second) for d in found))
    return page_of("", "", table, Text(f"{len(found)} layers differ" if found else "no layer differs"))


JOB = Job(
    name="diff",
    words="""Show, layer by layer, where two recipes or checkpoints differ.""",
    settings=DiffSettings,
    page=page,
    run=run,
    as_json=lambda found: {"differences": to_plain(found)},
)
