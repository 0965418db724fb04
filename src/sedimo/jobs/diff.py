"""Show, layer by layer, where two recipes or checkpoints differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from sedimo.errors import InputError
from sedimo.jobs.describe import read_recipe
from sedimo.jobs.job import simple_job
from sedimo.quant.formats import FP16
from sedimo.quant.parts import entry_text
from sedimo.reporting.page import Page, Table, Text, columns, page_of, rows
from sedimo.settings import Option


def run(
    first: Annotated[str, Option((), "A recipe file or a packed checkpoint.", metavar="A")],
    second: Annotated[str, Option((), "Another one.", metavar="B")],
) -> dict[str, Any]:
    """The layers whose formats differ, in the order of the first recipe, with both formats."""
    one, other = read_recipe(first).layers, read_recipe(second).layers
    if one and other and not one.keys() & other.keys():
        raise InputError("the two have no layer in common: they are of different denoisers")
    names = dict.fromkeys([*one, *other])
    pairs = ((name, entry_text(one.get(name, FP16)), entry_text(other.get(name, FP16))) for name in names)
    return {"differences": [{"layer": name, "first": a, "second": b} for name, a, b in pairs if a != b]}


def page(found: Mapping[str, Any]) -> Page:
    """Layers that differ."""
    lines = found["differences"]
    table = Table(columns("layer", "first", "second"), rows(one.values() for one in lines))
    return page_of("", "", table, Text(f"{len(lines)} layers differ" if lines else "no layer differs"))


JOB = simple_job(__doc__, run, page)
