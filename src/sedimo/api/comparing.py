"""All methods side by side: the same formats, budgets and fresh seeds; what each costs, and how they agree."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sedimo.api.agreeing import agreement
from sedimo.api.bops_order import BopsOrder
from sedimo.api.checking import UNIFORM_SLACK_BITS
from sedimo.api.measuring import decide_by_effects, make_bank, measure_table, search_recipe
from sedimo.api.opening import Opened, check_budget, open_source
from sedimo.api.order import (
    DEFAULT_COMPUTE,
    DEFAULT_SAMPLING,
    DYNAMIC_ACTIVATIONS,
    METHODS,
    ActivationOrder,
    BudgetOrder,
    Compute,
    Order,
    SamplingOrder,
    refuse_blind,
)
from sedimo.api.peer import LEAST_USED, PEERS, PeerRecipe, decide_peer, measure_peers, wanted_methods
from sedimo.api.planning import MeasuredMethod
from sedimo.api.predicting import refuse_other_space
from sedimo.api.search_order import SearchOrder
from sedimo.api.searching import Measuring, allocated, draw_around
from sedimo.api.smooth_order import SmoothOrder
from sedimo.api.smoothing import smooth_source
from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import content_key, to_plain
from sedimo.errors import InputError
from sedimo.measurement.ledger import Ledger, Spent, add_up
from sedimo.measurement.study import Study
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import NoisePowers, paired_difference, sqnr_estimates, summarize
from sedimo.quant.formats import parse_formats
from sedimo.reporting.comparison import ComparisonLine, ComparisonPage, CostLine
from sedimo.sensitivity.combine import rank_average
from sedimo.sensitivity.error import error_table
from sedimo.sensitivity.orthogonality import ImportanceOptions, Objective
from sedimo.sensitivity.table import SensitivityTable, of_family
from sedimo.space import Recipe, SearchSpace

UNIFORM, REFERENCE, PUBLISHED_LP = "uniform", "jacobian", "orthogonality-lp"
ORTHOGONALITY: Mapping[str, Objective] = {
    "orthogonality": "bits",
    PUBLISHED_LP: "bits",
    "orthogonality-noise": "noise",
}
MEASURED: Mapping[str, MeasuredMethod] = {
    "error": "error",
    "adjoint": "adjoint",
    "jacobian": "jacobian",
    "ablation": "ablation",
    "combined": "combined",
    "sqnr": "sqnr",
    **dict.fromkeys(ORTHOGONALITY, "orthogonality"),
}
RANK_AVERAGE, AVERAGED = "rank-average", ("jacobian", "ablation", "sqnr")
_UNNAMED = (
    ("streams", True),
    ("keep_db", None),
    ("keep", None),
    ("minutes", None),
    ("compensate", None),
)  # defaults of orders that older studies do not name
DEFAULT, SIGNED = "auto", "adjoint"
COMPARED = (UNIFORM, DEFAULT, *MEASURED, RANK_AVERAGE, "gnn", *PEERS)


def importance_of(method: str) -> ImportanceOptions:
    """What a compared method takes as importance, if it takes any."""
    return ImportanceOptions(objective=ORTHOGONALITY.get(method, "bits"))


@dataclass(frozen=True, slots=True)
class CompareOrder:
    """Which methods at which paper bits, measured on `n_fresh` seeds; `n_trials` in three rounds are for `gnn`.

    Every budget has the limit `bops` of bit operations besides, if there is one; `ends` is the format of the first and
    last layers in every recipe, None: they are decided on like the others; `streams` as in `Order`. With `smooth`,
    everything is about the smoothed weights; `activations` say how inputs are rounded. Codes of all methods but peers
    are the nearest ones, or with `compensate` by error feedback.
    """

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
    bops: BopsOrder | None = None
    ends: str | None = None
    streams: bool = True
    activations: ActivationOrder = DYNAMIC_ACTIVATIONS
    smooth: SmoothOrder | None = None
    compensate: bool = False

    def __post_init__(self) -> None:
        """Refuses unknown methods, budgets that no weight has, and too few seeds for an error bar."""
        unknown = [m for m in self.methods if m not in COMPARED]
        if unknown or not self.methods:
            raise InputError(f"methods to compare are {', '.join(COMPARED)}; got {unknown or 'none'}")
        if not self.bits:
            raise InputError("comparing needs at least one budget: --bits 3.0,3.5,4.0")
        for bits in self.bits:
            BudgetOrder(bits=bits)
        for method in self.methods:
            if method not in (UNIFORM, *PEERS):
                refuse_blind(MEASURED.get(method, method), parse_formats(self.formats), importance_of(method))
        if self.n_fresh < 2:
            raise InputError(f"comparing needs at least two fresh seeds, got {self.n_fresh}")

    @property
    def in_order(self) -> tuple[str, ...]:
        """The methods, as they are always listed."""
        return tuple(m for m in COMPARED if m in self.methods)

    @property
    def search(self) -> SearchOrder:
        """The search of `gnn`."""
        return SearchOrder(self.n_trials, 3)

    def job(self, method: str, bits: float) -> Order:
        """The main job's order of one method at one budget; nothing of it is written."""
        return Order(
            self.source,
            None,
            BudgetOrder(bits=bits, bops=self.bops),
            method=method if method in METHODS else MEASURED.get(method, "error"),
            formats=self.formats,
            variant=self.variant,
            sampling=replace(self.sampling, n_check_seeds=self.n_fresh),
            compute=self.compute,
            check=False,
            search=self.search,
            importance=importance_of(method),
            ends=self.ends,
            streams=self.streams,
            activations=self.activations,
            smooth=self.smooth,
            compensate=self.compensate or None,
        )


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """A method at a budget: its recipe measured on the fresh seeds, and what it is ahead of the reference, paired.

    `bops` are bit operations of one sample and denoiser call, attention included [BOPs].
    `is_full` tells whether it uses at least 99.5 % of the budget. A peer has no recipe in Sedimo's formats; `formats`
    are then its own by layer.
    """

    method: str
    bits: float
    paper_bits: float
    stored_bits: float
    bops: int
    is_full: bool
    sqnr_db: Estimate
    ahead: Estimate | None
    recipe: Recipe | None
    formats: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_peer(self) -> bool:
        """Whether the method is another tool's, with formats of its own."""
        return self.recipe is None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows; `n_comparisons` paired differences were looked at, `notes` say what is missing or not as ordered.

    `costs` are those of finding a method's recipes at all budgets: what it used of measurements, each once, whoever
    made them and whenever, and its own computing; fits, smoothing and calibration, which all share, are left out.

    `agreement` is Kendall's tau between operations' costs by each method's table and by the measured ablation, at the
    formats nearest to the middle budget.
    """

    source: str
    reference: str
    seeds: str
    n_steps: int
    rows: tuple[ComparedRow, ...]
    costs: Mapping[str, Spent]
    n_comparisons: int
    agreement: Mapping[str, Estimate]
    notes: tuple[str, ...]

    def as_json(self) -> Mapping[str, object]:
        """Plain values; scripts may rely on the names (see docs/cli.md)."""
        plain: dict[str, object] = to_plain(self)
        return plain

    def as_page(self) -> ComparisonPage:
        """What the page tells."""
        lines = [
            ComparisonLine(
                r.method, r.bits, r.paper_bits, r.stored_bits, r.is_full, r.bops, r.sqnr_db, r.ahead, r.is_peer
            )
            for r in self.rows
        ]
        costs = [CostLine(method, spent, self.agreement.get(method)) for method, spent in self.costs.items()]
        facts = (self.source, self.reference, self.seeds, self.n_steps, self.n_comparisons)
        return ComparisonPage(*facts, lines, costs, self.notes)


@dataclass(frozen=True)
class _Decided:
    """A method's recipe at a budget (None: it has none there), and the table behind it, if it has one."""

    recipe: Recipe | PeerRecipe | None
    table: SensitivityTable | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """What a method decided at a budget, what it used for that, and the seconds of its own computing [s]."""

    decided: _Decided
    used: Ledger
    own_seconds: float


def compare_methods(order: CompareOrder, progress: Progress = SILENT) -> Comparison:
    """Every method's recipe at every budget on the same fresh seeds. Resumes in the study.

    Raises:
        InputError: the source cannot be sampled, or a budget that its formats do not allow.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    methods, missing = wanted_methods(order.in_order, everything=COMPARED)
    order = replace(order, methods=methods)
    opened = open_source(order.job(REFERENCE, min(order.bits)))
    opened.is_compensated = order.compensate
    with Study(order.store) as study:
        with study.ledger() as shared:
            smooth_source(opened, study, progress)
            bank = make_bank(opened, study, is_exact=True, progress=progress)
        opened.space = bank.space
        _refuse_impossible(order, bank.space, study)
        plan = opened.order.sampling.checking(opened.pipe)  # the same for all methods and budgets
        entries: dict[tuple[str, float], _Entry] = {}
        for bits, method in itertools.product(order.bits, order.in_order):
            opened.order = order.job(method, bits)
            entries[method, bits] = _accounted(opened, bank, study, method, progress)
        fresh = Measuring.on(opened.pipe, bank, study, plan, progress=progress)
        peers = [e.decided.recipe for e in entries.values() if isinstance(e.decided.recipe, PeerRecipe)]
        powers = measure_peers(opened.pipe, study, plan, peers, weights_digest=bank.weights_digest, progress=progress)
        rows = [row for bits in order.bits for row in _rows(bank, bits, _recipes_at(entries, bits), fresh, powers)]
    middle = sorted(order.bits)[len(order.bits) // 2]
    tables = {m: e.decided.table for (m, bits), e in entries.items() if bits == middle and e.decided.table is not None}
    return Comparison(
        source=opened.name,
        reference=_reference(order.in_order),
        seeds=f"{plan.seeds[0]} to {plan.seeds[-1]}",
        n_steps=plan.n_steps,
        rows=tuple(rows),
        costs={m: _cost([e for (name, _), e in entries.items() if name == m], shared) for m in order.in_order},
        n_comparisons=sum(row.ahead is not None for row in rows),
        agreement=agreement(tables, middle),
        notes=(
            *missing,
            *opened.rules,
            *(f"{m} at {b:g} bits: {note}" for (m, b), e in entries.items() for note in e.decided.notes),
        ),
    )


def _refuse_impossible(order: CompareOrder, space: SearchSpace, study: Study) -> None:
    """Refuses budgets that the formats do not allow, and a study of another space, before anything is measured."""
    for bits in order.bits:
        check_budget(order.job(REFERENCE, bits), space)
        if "gnn" in order.methods:
            refuse_other_space(study, space)
            draw_around(space, order.search, BudgetOrder(bits=bits))


def _accounted(opened: Opened, bank: Bank, study: Study, method: str, progress: Progress) -> _Entry:
    """What a method decides under the order that is open; its own seconds are those of the first time."""
    name = computing_name(method, opened.order)
    begin = time.monotonic()
    with study.ledger() as used:
        decided = _decide(opened, bank, study, method, progress)
    if name not in study.record_names():
        study.put_record(name, max(0.0, time.monotonic() - begin - used.measuring_seconds))
    return _Entry(decided, used, study.record(float, name))


def computing_name(method: str, order: Order) -> str:
    """Where a study keeps the seconds of a method's own computing under an order."""
    asked = {name: value for name, value in to_plain(order).items() if (name, value) not in _UNNAMED}
    return f"computing:{content_key([method, asked])[:16]}"


def _decide(opened: Opened, bank: Bank, study: Study, method: str, progress: Progress) -> _Decided:
    if method == UNIFORM:
        return _best_uniform(opened, bank, study, progress)
    if method == "gnn":
        measured, allocation = search_recipe(opened, study, progress)
        return _Decided(allocation.recipe, measured.table)
    if method in (DEFAULT, SIGNED):
        measured, allocation = decide_by_effects(opened, study, progress)
        return _Decided(allocation.recipe, measured.table)
    if method in PEERS:
        recipe, notes = decide_peer(opened, bank, study, method, progress)
        return _Decided(recipe, notes=notes)
    budget, rule = opened.order.budget, opened.order.rule
    if method == RANK_AVERAGE:
        table = rank_average([measure_table(opened, MEASURED[name], study, progress).table for name in AVERAGED])
    else:
        table = measure_table(opened, MEASURED[method], study, progress).table
    if method == PUBLISHED_LP:
        table = of_family(table, "uaq")
    return _Decided(allocated(table, budget, rule=rule).recipe, table)


def _best_uniform(opened: Opened, bank: Bank, study: Study, progress: Progress) -> _Decided:
    """The uniform recipe of about the budget's size, within its bit operations, that is best on the searched seeds.

    Where no format suits all decisions, those that cannot take one have what the rule `uniform:FORMAT` gives them.
    """
    space, errors, budget = bank.space, error_table(bank.space, bank.candidates), opened.order.budget
    most = budget.in_bits(space.params) + UNIFORM_SLACK_BITS
    most_bops = space.full_bops if budget.bops is None else budget.bops.resolved(space.full_bops)
    formats = space.common_formats or sorted({f for d in space.decisions for f in d.formats if f.is_quantized}, key=str)
    uniform = [allocated(errors, BudgetOrder(), rule=f"uniform:{f}") for f in formats]
    fitting = [u for u in uniform if u.paper_bits <= most and space.bops(u.recipe) <= most_bops]
    if not fitting:
        limit = "" if budget.bops is None else f" and {most_bops} bit operations"
        return _Decided(None, notes=(f"left out: no uniform format takes at most {most:.2f} bits per weight{limit}",))
    plan = opened.order.sampling.searching(opened.pipe)
    trials = Measuring.on(opened.pipe, bank, study, plan, progress=progress).trials([f.recipe for f in fitting])
    _, best = max(zip(trials, fitting, strict=True), key=lambda pair: pair[0].score)
    return _Decided(best.recipe, notes=best.notes)


def _recipes_at(entries: Mapping[tuple[str, float], _Entry], bits: float) -> dict[str, Recipe | PeerRecipe]:
    found = {m: entry.decided.recipe for (m, at), entry in entries.items() if at == bits}
    return {method: recipe for method, recipe in found.items() if recipe is not None}


def _rows(
    bank: Bank,
    bits: float,
    found: Mapping[str, Recipe | PeerRecipe],
    fresh: Measuring,
    of_peers: Mapping[str, NoisePowers],
) -> Iterator[ComparedRow]:
    own = {method: recipe for method, recipe in found.items() if isinstance(recipe, Recipe)}
    trials = zip(own, fresh.trials(list(own.values())), strict=True)
    powers = {method: trial.powers for method, trial in trials}
    powers |= {method: of_peers[r.key] for method, r in found.items() if isinstance(r, PeerRecipe)}
    reference = _reference(tuple(found))
    for method, recipe in found.items():
        paper_bits, stored_bits, bops = _size_of(bank, recipe)
        yield ComparedRow(
            method=method,
            bits=bits,
            paper_bits=paper_bits,
            stored_bits=stored_bits,
            bops=bops,
            is_full=paper_bits >= LEAST_USED * bits,
            sqnr_db=sqnr_estimates(summarize(powers[method]))["sqnr_db"],
            ahead=None if method == reference else paired_difference(powers[method], powers[reference]).estimate,
            recipe=recipe if isinstance(recipe, Recipe) else None,
            formats=recipe.formats if isinstance(recipe, PeerRecipe) else {},
        )


def _size_of(bank: Bank, recipe: Recipe | PeerRecipe) -> tuple[float, float, int]:
    """Paper bits and stored bits per weight, and bit operations."""
    if isinstance(recipe, PeerRecipe):
        return recipe.paper_bits, recipe.paper_bits, recipe.bops
    space = bank.space
    return space.paper_bits(recipe), 8 * bank.stored_bytes(recipe) / space.params, space.bops(recipe)


def _reference(methods: Sequence[str]) -> str:
    """What all others are compared with: first-order noise, or the first method that has a recipe at every budget."""
    if REFERENCE in methods:
        return REFERENCE
    return next((m for m in methods if m != UNIFORM), UNIFORM)


def _cost(entries: Sequence[_Entry], shared: Ledger) -> Spent:
    """What a method took at all budgets, without what all share."""
    measured = add_up(entry.used.without(shared) for entry in entries)
    return replace(measured, seconds=measured.seconds + sum(entry.own_seconds for entry in entries))
