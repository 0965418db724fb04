"""Show, layer by layer, where two recipes or checkpoints differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sedimo.bank import Progress
from sedimo.errors import InputError
from sedimo.jobs.describe import read_recipe
from sedimo.jobs.job import Job
from sedimo.quant.formats import FP16
from sedimo.quant.parts import entry_text
from sedimo.reporting.page import Page, Table, Text, columns, page_of, rows
from sedimo.settings import REQUIRED, option


@dataclass(frozen=True, slots=True)
class DiffSettings:
    """Two recipe files or packed checkpoints."""

    first: str = option(REQUIRED, metavar="A", help="A recipe file or a packed checkpoint.")
    second: str = option(REQUIRED, metavar="B", help="Another one.")


def run(settings: DiffSettings, _progress: Progress) -> dict[str, tuple[str, str]]:
    """The layers whose formats differ, in the order of the first recipe, with both formats."""
    first, second = read_recipe(settings.first).layers, read_recipe(settings.second).layers
    if first and second and not first.keys() & second.keys():
        raise InputError("the two have no layer in common: they are of different denoisers")
    names = dict.fromkeys([*first, *second])
    pairs = {n: (entry_text(first.get(n, FP16)), entry_text(second.get(n, FP16))) for n in names}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


def as_json(found: Mapping[str, tuple[str, str]]) -> object:
    """The keys that scripts may rely on."""
    return {"differences": [{"layer": name, "first": a, "second": b} for name, (a, b) in found.items()]}


def page(found: Mapping[str, tuple[str, str]]) -> Page:
    """Layers that differ."""
    table = Table(columns("layer", "first", "second"), rows((name, *pair) for name, pair in found.items()))
    return page_of("", "", table, Text(f"{len(found)} layers differ" if found else "no layer differs"))


JOB = Job(__doc__, DiffSettings, run, page, as_json=as_json)
