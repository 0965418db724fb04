"""The page of a comparison of methods: quality against bits, the same as a table, what each cost, how they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from sedimo.measurement.ledger import Spent
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.pipelines.folder import write_file
from sedimo.reporting.comparison_chart import methods_chart
from sedimo.reporting.explanation_tables import figure
from sedimo.reporting.html import page
from sedimo.reporting.rounding import count, duration


@dataclass(frozen=True, slots=True)
class ComparisonLine:
    """A method at a budget, which its recipe uses up if it `is_full`; `ahead` is None for the reference.

    `bops` are bit operations of one sample and call; a peer has formats of its own.
    """

    method: str
    budget: float
    paper_bits: float
    stored_bits: float
    is_full: bool
    bops: int
    measured: Estimate
    ahead: Estimate | None
    is_peer: bool = False

    @property
    def label(self) -> str:
        """The method, as it is shown."""
        return f"{self.method} (peer)" if self.is_peer else self.method


@dataclass(frozen=True, slots=True)
class CostLine:
    """What a method took at all budgets, and its rank correlation with the measured ablation, if known."""

    method: str
    spent: Spent
    agreement: Estimate | None


@dataclass(frozen=True)
class ComparisonPage:
    """All that the page tells; `seeds` and `n_steps` say on what recipes were measured."""

    source: str
    reference: str
    seeds: str
    n_steps: int
    n_comparisons: int
    lines: Sequence[ComparisonLine]
    costs: Sequence[CostLine]
    notes: Sequence[str] = ()


def write_comparison(comparison: ComparisonPage, path: Path) -> None:
    """Writes the page; an existing file is replaced at once or not at all."""
    write_file(path, render_comparison(comparison).encode())


def render_comparison(comparison: ComparisonPage) -> str:
    """The page as HTML text."""
    c = comparison
    return page(
        "comparison.html.j2",
        {
            "c": c,
            "headline": _headline(c.lines),
            "peers": " and ".join(dict.fromkeys(line.method for line in c.lines if line.is_peer)),
            "chart": Markup(_chart(c)),  # texts in it are escaped
            "budgets": _rows_by_budget(c.lines),
            "is_full": all(line.is_full for line in c.lines),
            "costs": [
                (
                    line.method,
                    line.spent.is_complete,
                    duration(line.spent.seconds),
                    f"{line.spent.denoiser_calls:,}",
                    None if line.agreement is None else figure(line.agreement),
                )
                for line in c.costs
            ],
        },
    )


def _rows_by_budget(lines: Sequence[ComparisonLine]) -> dict[str, list[tuple[object, ...]]]:
    """The cells of each line, the highest quality first, by the name of its budget."""
    rows: dict[str, list[tuple[object, ...]]] = {}
    for line in sorted(lines, key=lambda x: (x.budget, -ranked(x.measured.value))):
        ahead = None if line.ahead is None else figure(line.ahead)
        sizes = (f"{line.paper_bits:.3f}", line.is_full, f"{line.stored_bits:.3f}", count(line.bops))
        rows.setdefault(_budget_name(line.budget), []).append(
            (line.label, *sizes, figure(line.measured), ahead, verdict(line.ahead))
        )
    return rows


def _budget_name(budget: float) -> str:
    return f"{budget:g} bits"


def _chart(comparison: ComparisonPage) -> str:
    budgets: dict[str, dict[str, Estimate]] = {}
    for line in sorted(comparison.lines, key=lambda x: x.budget):
        budgets.setdefault(_budget_name(line.budget), {})[line.label] = line.measured
    return methods_chart(budgets, reference=comparison.reference)


def _headline(lines: Sequence[ComparisonLine]) -> str:
    """Which method is highest at which budgets."""
    best: dict[str, list[float]] = {}
    for budget in sorted({line.budget for line in lines}):
        values = {line.method: ranked(line.measured.value) for line in lines if line.budget == budget}
        first = [method for method, value in values.items() if value == max(values.values())]
        best.setdefault("` and `".join(first), []).append(budget)
    places = (f"`{method}` at {_listed(budgets)} bits" for method, budgets in best.items())
    return f"Highest quality: {', '.join(places)}."


def _listed(budgets: Sequence[float]) -> str:
    """`3, 3.5 and 4`."""
    *most, last = (f"{budget:g}" for budget in budgets)
    return f"{', '.join(most)} and {last}" if most else last


def verdict(ahead: Estimate | None) -> str:
    """What a paired difference to the reference shows; None for the reference itself."""
    if ahead is None:
        return "reference"
    if ahead.low > 0:
        return "better"
    return "worse" if ahead.high < 0 else "no difference shown"
