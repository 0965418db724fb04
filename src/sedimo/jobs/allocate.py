"""Choose the recipe for another budget from the measurements in the study folder RUN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from sedimo.allocation.budget import NO_BUDGET, BudgetSettings, allocated
from sedimo.allocation.solve import Allocation
from sedimo.allocation.table import SensitivityTable
from sedimo.jobs.job import simple_job
from sedimo.jobs.report import TABLE
from sedimo.lab.study import Study
from sedimo.pipelines.folder import write_file
from sedimo.reporting.page import Facts, Page, Table, columns, page_of, rows
from sedimo.reporting.words import count
from sedimo.settings import Option

_KEYS = ("bits", "paper_bits", "stored_bits", "bops", "objective", "bound", "gap", "status", "method")


def run(
    folder: Annotated[Path, Option((), "The folder of a study.", metavar="RUN", place="folder")],
    budget: Annotated[BudgetSettings, "Budget"] = NO_BUDGET,
    rule: Annotated[
        str, Option(("--rule",), "milp (exact), greedy, lp; argmin: each decision alone, no budget.")
    ] = "milp",
    out: Annotated[Path | None, Option(("-o", "--out"), "Write the recipe to this file.")] = None,
) -> Allocation:
    """The best recipe by the table that a job has kept, written to a file if there is one."""
    with Study(folder, create=False) as study:
        table = study.record(SensitivityTable, TABLE)
    found = allocated(table, budget, rule=rule)
    if out is not None:
        write_file(out, found.recipe.to_json().encode())
    return found


def as_json(found: Allocation) -> Mapping[str, object]:
    """The keys that scripts may rely on."""
    recipe = {name: str(entry) for name, entry in found.recipe.layers.items()}
    return {"recipe": recipe, **{name: getattr(found, name) for name in _KEYS}}


def page(found: Allocation) -> Page:
    """The recipe per decision, and its certificate."""
    facts = {
        "size": f"{found.paper_bits:.3f} paper bits, {found.stored_bits:.3f} stored bits per weight",
        "method": f"{found.method}: objective {found.objective:.4g}, bound {found.bound:.4g}, gap {found.gap:.1e}, "
        f"{found.status}",
        "work": f"{count(found.bops)} bit operations a sample and call",
    }
    table = Table(columns("decision", "format"), rows(found.choice.items()))
    return page_of("", "", table, Facts(tuple(facts.items())))


JOB = simple_job(__doc__, run, page, as_json=as_json)
