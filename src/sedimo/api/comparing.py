"""All methods side by side: the same formats, budgets and fresh seeds; what each costs, and how they agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sedimo.api.checking import UNIFORM_SLACK_BITS
from sedimo.api.measuring import make_bank, measure_table, search_recipe
from sedimo.api.opening import Opened, open_source
from sedimo.api.order import DEFAULT_COMPUTE, DEFAULT_SAMPLING, BudgetOrder, Compute, Order, SamplingOrder
from sedimo.api.planning import MeasuredMethod
from sedimo.api.search_order import SearchOrder
from sedimo.api.searching import Measuring, allocated
from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import content_key, to_plain
from sedimo.errors import InputError
from sedimo.measurement.objective import counted_calls
from sedimo.measurement.study import Study
from sedimo.measurement.trial import Trial
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import paired_difference, sqnr_estimates, summarize
from sedimo.reporting.comparison import ComparisonLine, ComparisonPage, CostLine
from sedimo.sensitivity.orthogonality import ImportanceOptions, Objective
from sedimo.sensitivity.quality import LEAST_RECIPES, prediction_quality
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import Recipe

UNIFORM, REFERENCE = "uniform", "jacobian"
ORTHOGONALITY: Mapping[str, Objective] = {
    "orthogonality": "bits",
    "orthogonality-lp": "bits",
    "orthogonality-noise": "noise",
}
MEASURED: Mapping[str, MeasuredMethod] = {
    "error": "error",
    "jacobian": "jacobian",
    "ablation": "ablation",
    "combined": "combined",
    "sqnr": "sqnr",
    **dict.fromkeys(ORTHOGONALITY, "orthogonality"),
}
COMPARED = (UNIFORM, *MEASURED, "gnn")  # what others build on comes before them
BUILDS_ON = {
    "combined": ("jacobian", "ablation"),
    "orthogonality-lp": ("orthogonality",),
    "orthogonality-noise": ("orthogonality",),
    "gnn": ("jacobian",),
}
LEAST_USED = 0.995  # of a budget, for a recipe to count as of equal size


@dataclass(frozen=True, slots=True)
class CompareOrder:
    """Which methods at which paper bits, measured on `n_fresh` seeds; `n_trials` in three rounds are for `gnn`."""

    source: str
    store: Path
    bits: tuple[float, ...]
    methods: tuple[str, ...] = COMPARED
    formats: str = "wide"
    variant: str | None = None
    sampling: SamplingOrder = DEFAULT_SAMPLING
    compute: Compute = DEFAULT_COMPUTE
    n_fresh: int = 64
    n_trials: int = 120

    def __post_init__(self) -> None:
        """Refuses unknown methods, budgets that no weight has, and too few seeds for an error bar."""
        unknown = [m for m in self.methods if m not in COMPARED]
        if unknown or not self.methods:
            raise InputError(f"methods to compare are {', '.join(COMPARED)}; got {unknown or 'none'}")
        if not self.bits:
            raise InputError("comparing needs at least one budget: --bits 3.0,3.5,4.0")
        for bits in self.bits:
            BudgetOrder(bits=bits)
        if self.n_fresh < 2:
            raise InputError(f"comparing needs at least two fresh seeds, got {self.n_fresh}")

    @property
    def in_order(self) -> tuple[str, ...]:
        """The methods, those that others build on first."""
        return tuple(m for m in COMPARED if m in self.methods)

    def job(self, method: str, bits: float) -> Order:
        """The main job's order of one method at one budget; nothing of it is written."""
        return Order(
            self.source,
            None,
            BudgetOrder(bits=bits),
            method="gnn" if method == "gnn" else MEASURED.get(method, "error"),
            formats=self.formats,
            variant=self.variant,
            sampling=replace(self.sampling, n_check_seeds=self.n_fresh),
            compute=self.compute,
            check=False,
            search=SearchOrder(self.n_trials, 3),
            importance=ImportanceOptions(objective=ORTHOGONALITY.get(method, "bits")),
        )


@dataclass(frozen=True, slots=True)
class MethodCost:
    """Seconds and denoiser calls of finding a method's recipes at all budgets, beyond what the study already held.

    The fits of all formats, which every method shares, come before. After an interruption, or in a study that
    others have filled, it is less than the method takes from nothing.
    """

    seconds: float
    denoiser_calls: int


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """A method at a budget: its recipe measured on the fresh seeds, and what it is ahead of the reference, paired.

    `is_full` tells whether it uses at least 99.5 % of the budget.
    """

    method: str
    bits: float
    paper_bits: float
    stored_bits: float
    is_full: bool
    sqnr_db: Estimate
    ahead: Estimate | None
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows; `n_comparisons` paired differences were looked at.

    `costs` hold what a method builds on, too, if that was part of the comparison.

    `agreement` is Kendall's tau between operations' costs by each method's table and by the measured ablation, at the
    formats nearest to the middle budget.
    """

    source: str
    reference: str
    seeds: str
    n_steps: int
    rows: tuple[ComparedRow, ...]
    costs: Mapping[str, MethodCost]
    n_comparisons: int
    agreement: Mapping[str, Estimate]

    def as_json(self) -> Mapping[str, object]:
        """Plain values; scripts may rely on the names (see docs/cli.md)."""
        plain: dict[str, object] = to_plain(self)
        return plain

    def as_page(self) -> ComparisonPage:
        """What the page tells."""
        lines = [ComparisonLine(r.method, r.bits, r.paper_bits, r.stored_bits, r.sqnr_db, r.ahead) for r in self.rows]
        costs = [
            CostLine(method, cost.seconds, cost.denoiser_calls, self.agreement.get(method))
            for method, cost in self.costs.items()
        ]
        return ComparisonPage(self.source, self.reference, self.seeds, self.n_steps, self.n_comparisons, lines, costs)


def compare_methods(order: CompareOrder, progress: Progress = SILENT) -> Comparison:
    """Every method's recipe at every budget on the same fresh seeds. Resumes in the study.

    Raises:
        InputError: the source cannot be sampled, or a budget that its formats do not allow.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    opened = open_source(order.job(REFERENCE, order.bits[0]))
    tables: dict[str, SensitivityTable] = {}
    with Study(order.store) as study:
        bank = make_bank(opened, is_exact=True, cache=study.path.parent, progress=progress)
        opened.space = bank.space
        plan = opened.order.sampling.checking(opened.pipe)  # the same for all methods and budgets
        fresh = Measuring.on(opened.pipe, bank, study, plan, progress=progress)
        rows: list[ComparedRow] = []
        own: dict[str, list[MethodCost]] = {}
        for bits in order.bits:
            found = {}
            for method in order.in_order:
                opened.order = order.job(method, bits)
                with _counted(opened, study, method) as cost:
                    found[method] = _recipe(opened, bank, study, method, tables, progress)
                own.setdefault(method, []).append(cost())
            rows += _rows(bank, bits, found, fresh)
    middle = sorted(order.bits)[len(order.bits) // 2]
    return Comparison(
        source=opened.name,
        reference=_reference(order.in_order),
        seeds=f"{plan.seeds[0]} to {plan.seeds[-1]}",
        n_steps=plan.n_steps,
        rows=tuple(rows),
        costs={method: _total(own, method) for method in order.in_order},
        n_comparisons=sum(row.ahead is not None for row in rows),
        agreement=agreement(tables, middle),
    )


def agreement(tables: Mapping[str, SensitivityTable], bits: float) -> dict[str, Estimate]:
    """Kendall's tau between operations' costs by each method and by the ablation, with bootstrap intervals.

    An operation's cost is the mean over its decisions, at each one's format nearest to `bits`. Fewer than three
    operations have no order worth a number.
    """
    if "ablation" not in tables:
        return {}
    truth, found = _of_operations(tables["ablation"], bits), {}
    for method, table in tables.items():
        costs = _of_operations(table, bits)
        if method != "ablation" and len(truth) >= LEAST_RECIPES:
            found[method] = prediction_quality([costs[name] for name in truth], list(truth.values())).kendall_tau
    return found


def _of_operations(table: SensitivityTable, bits: float) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for decision, costs in table.by_decision.items():
        quantized = [c for c in costs if c.format.is_quantized]
        if not quantized:
            continue
        nearest = min(quantized, key=lambda c: (abs(8 * c.paper_bytes / table.params[decision] - bits), c.cost))
        sums.setdefault(table.operations[decision], []).append(nearest.cost)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def _recipe(
    opened: Opened, bank: Bank, study: Study, method: str, tables: dict[str, SensitivityTable], progress: Progress
) -> Recipe:
    budget = opened.order.budget
    if method == UNIFORM:
        return _best_uniform(opened, bank, study, budget.in_bits(bank.space.params), progress)
    if method == "gnn":
        measured, allocation = search_recipe(opened, study, progress)
        tables[method] = measured.table
        return allocation.recipe
    tables[method] = measure_table(opened, MEASURED[method], study, progress).table
    return allocated(tables[method], budget, rule="lp" if method.endswith("-lp") else "milp").recipe


def _best_uniform(opened: Opened, bank: Bank, study: Study, bits: float, progress: Progress) -> Recipe:
    """The uniform recipe of about the budget that is best on the searched seeds."""
    space = bank.space
    uniform = (space.uniform(f) for f in space.common_formats)
    fitting = [r for r in uniform if space.paper_bits(r) <= bits + UNIFORM_SLACK_BITS]
    if not fitting:
        raise InputError(f"no uniform format takes at most {bits + UNIFORM_SLACK_BITS:.2f} bits per weight")
    plan = opened.order.sampling.searching(opened.pipe)
    trials = Measuring.on(opened.pipe, bank, study, plan, progress=progress).trials(fitting)
    return max(trials, key=lambda t: float(t.powers.sqnr_db.mean())).recipe


def _rows(bank: Bank, bits: float, found: Mapping[str, Recipe], fresh: Measuring) -> Iterator[ComparedRow]:
    trials: dict[str, Trial] = dict(zip(found, fresh.trials(list(found.values())), strict=True))
    space, reference = bank.space, _reference(tuple(found))
    for method, recipe in found.items():
        paper_bits = space.paper_bits(recipe)
        ahead = paired_difference(trials[method].powers, trials[reference].powers).estimate
        yield ComparedRow(
            method=method,
            bits=bits,
            paper_bits=paper_bits,
            stored_bits=8 * bank.stored_bytes(recipe) / space.params,
            is_full=paper_bits >= LEAST_USED * bits,
            sqnr_db=sqnr_estimates(summarize(trials[method].powers))["sqnr_db"],
            ahead=None if method == reference else ahead,
            recipe=recipe,
        )


def _reference(methods: Sequence[str]) -> str:
    """What all others are compared with: first-order noise, or the first method."""
    return REFERENCE if REFERENCE in methods else methods[0]


def _total(own: Mapping[str, Sequence[MethodCost]], method: str) -> MethodCost:
    """What a method took at all budgets, with what it found measured already by the methods that it builds on."""
    parts = [cost for name in (method, *BUILDS_ON.get(method, ())) for cost in own.get(name, ())]
    return MethodCost(sum(c.seconds for c in parts), sum(c.denoiser_calls for c in parts))


@contextmanager
def _counted(opened: Opened, study: Study, method: str) -> Iterator[Callable[[], MethodCost]]:
    """Seconds and denoiser calls of what is done inside; those of the first time, when the study knows it."""
    name = f"cost:{content_key([method, to_plain(opened.order)])[:16]}"
    begin = time.monotonic()
    with counted_calls(opened.pipe) as calls:
        yield lambda: study.record(MethodCost, name)
    if name not in study.record_names():
        study.put_record(name, MethodCost(time.monotonic() - begin, len(calls)))
