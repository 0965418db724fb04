"""Choose the recipe for another budget from the measurements in the study folder RUN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sedimo.allocation.budget import NO_BUDGET, BudgetSettings, allocated
from sedimo.allocation.problem import Allocation
from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Progress
from sedimo.jobs.job import Job
from sedimo.jobs.report import TABLE
from sedimo.lab.study import Study
from sedimo.pipelines.folder import write_file
from sedimo.reporting.page import Facts, Page, Table, columns, page_of, rows
from sedimo.reporting.words import count
from sedimo.settings import REQUIRED, block, option

_KEYS = ("bits", "paper_bits", "stored_bits", "bops", "objective", "bound", "gap", "status", "method")


@dataclass(frozen=True, slots=True)
class AllocateSettings:
    """Which study, which budget, by which rule, and a file for the recipe."""

    run: Path = option(REQUIRED, metavar="RUN", place="folder", help="The folder of a study.")
    budget: BudgetSettings = block(NO_BUDGET, "Budget")
    rule: str = option(
        "milp",
        "--rule",
        help="milp (exact), greedy, lp, or argmin: the papers' own, each decision for itself, without a budget.",
    )
    out: Path | None = option(None, "-o", "--out", help="Write the recipe to this file.")


def run(settings: AllocateSettings, _progress: Progress) -> Allocation:
    """The best recipe by the table that a job has kept, written to a file if there is one."""
    with Study(settings.run, create=False) as study:
        table = study.record(SensitivityTable, TABLE)
    found = allocated(table, settings.budget, rule=settings.rule)
    if settings.out is not None:
        write_file(settings.out, found.recipe.to_json().encode())
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


JOB = Job(__doc__, AllocateSettings, run, page, as_json=as_json)
