"""The table of a method: what is measured, and how well the scaling of its probes holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sedimo.allocation.fixed import allocate_given
from sedimo.allocation.problem import Allocation, read_budget
from sedimo.api.explaining import Seeds, explain
from sedimo.api.finals import hold_finals
from sedimo.api.hybrid import BlocksResult, measure_hybrid
from sedimo.api.opening import Opened, OpenedSource
from sedimo.api.planning import FITTED, N_SCALING_CHECKS, PARTS, SAMPLE_CHANNELS, MeasuredMethod, ablation_options
from sedimo.api.portfolio import FINAL_FACTOR, Noise, Portfolio, allocate_by_effects, hold_portfolio, predict
from sedimo.api.predicting import know
from sedimo.api.probing import LEAST_SAMPLES, Probe, ProbeMethod, attribute_measured, measure_probes, probe
from sedimo.api.refining import refine
from sedimo.api.searching import Measuring, search
from sedimo.bank import SILENT, Bank, Progress, fit_bank
from sedimo.errors import StateError
from sedimo.measurement.calibration import calibrate
from sedimo.measurement.moments import measure_moments
from sedimo.measurement.passes import activation_bits
from sedimo.measurement.study import Study
from sedimo.quant.activations import Activations
from sedimo.quant.compensation import Moments
from sedimo.quant.formats import Format
from sedimo.reporting.explanation import Explanation
from sedimo.reporting.prediction import Entrant
from sedimo.sensitivity.ablation import check_scaling, plan_checks
from sedimo.sensitivity.adjoint import Effects, effects_of
from sedimo.sensitivity.agreement import Agreement
from sedimo.sensitivity.combine import geometric_mean
from sedimo.sensitivity.error import error_table
from sedimo.sensitivity.table import SensitivityTable

MIN_CHECKS = 3


@dataclass(frozen=True)
class MeasuredTable:
    """A table with the bank that it is about.

    `scaling` compares measured with predicted noise of formats that the ablation did not probe; None when it probed
    all of them, or was not part of the method. `explanation` tells what a search by measured recipes has learned.
    `probes` are what the table was made from, `blocks` the curves that a hybrid recipe follows from. For method
    adjoint, `effects` are what it measured, `predicted` the relative noise `[n]` that they say of the recipe, and
    `entrants` the recipes that it was chosen among.
    """

    bank: Bank
    table: SensitivityTable
    scaling: Agreement | None = None
    explanation: Explanation | None = None
    probes: tuple[Probe, ...] = ()
    blocks: BlocksResult | None = None
    effects: Effects | None = None
    predicted: Noise | None = None
    entrants: tuple[Entrant, ...] = ()


def measure_table(
    opened: Opened, method: MeasuredMethod, study: Study, progress: Progress = SILENT, *, n_samples: int = 0
) -> MeasuredTable:
    """The bank and the table of a method, of as many samples as it needs unless there are `n_samples`.

    What the study holds already is not measured again.
    """
    parts = PARTS[method]
    bank = make_bank(opened, study, is_exact=not FITTED.isdisjoint(parts), progress=progress)
    if not parts:
        return MeasuredTable(bank, error_table(bank.space, bank.candidates))
    own = {**LEAST_SAMPLES, "adjoint": opened.order.sampling.n_adjoint}
    wanted = {name: n_samples or own.get(name, 0) for name in parts}
    probes = [_probe(opened, bank, name, study, progress, n_samples=n) for name, n in wanted.items()]
    tables = [attribute_measured(one, importance=opened.order.importance) for one in probes]
    scaling = _scaling(opened, probes[0], tables[0], study, progress) if parts[0] == "ablation" else None
    table = tables[0] if len(tables) == 1 else geometric_mean(*tables)
    first = probes[0].adjoint
    effects = None if first is None else effects_of(bank.candidates, first)
    return MeasuredTable(bank, table, scaling, probes=tuple(probes), effects=effects)


def make_bank(opened: OpenedSource, study: Study, *, is_exact: bool, progress: Progress = SILENT) -> Bank:
    """All candidates: fitted in full, or with errors estimated from some output channels; rounded as ordered."""
    channels, cache = None if is_exact else SAMPLE_CHANNELS, study.path.parent
    bank = fit_bank(opened.weights, opened.space, sample_channels=channels, cache=cache, progress=progress)
    widths = {layer: bits for d in bank.space.decisions if (bits := activation_bits(d)) for layer in d.layers}
    bank = bank.rounding(_rules(opened, widths, study, progress)) if widths else bank
    return bank.compensating(_moments(opened, bank, cache, progress)) if opened.is_compensated else bank


def _moments(opened: OpenedSource, bank: Bank, folder: Path, progress: Progress) -> Moments:
    """Of the inputs of all weights, on samples of their own: what is fitted to some is judged on others."""
    sampling = opened.order.sampling.compensating(opened.pipe)
    digest = opened.weights.digest
    return measure_moments(opened.pipe, bank.space, sampling, weights_digest=digest, folder=folder, progress=progress)


def _rules(
    opened: OpenedSource, widths: Mapping[str, Collection[int]], study: Study, progress: Progress
) -> Activations:
    wanted = opened.order.activations
    if wanted.calibration is None:
        return Activations(wanted.symmetric)
    return calibrate(
        opened.pipe,
        widths,
        opened.order.sampling.sampling_many(opened.pipe, wanted.n_samples),
        weights_digest=opened.weights.digest,
        options=wanted.calibration,
        study=study,
        progress=progress,
    )


def decide_by_effects(
    opened: Opened, study: Study, progress: Progress = SILENT, *, n_samples: int = 0
) -> tuple[MeasuredTable, Allocation]:
    """The recipe by signed effects on the final latents; with method `auto` the best of several rules'.

    Then exchanges that are measured, for as many minutes as were ordered.
    """
    order = opened.order
    measured = measure_table(opened, "adjoint", study, progress, n_samples=n_samples)
    bank, table, effects = measured.bank, measured.table, measured.effects
    if effects is None:
        raise StateError("the method adjoint ended without effects; this is a fault of Sedimo")
    searching = Measuring.on(opened.pipe, bank, study, order.sampling.searching(opened.pipe), progress=progress)
    final = order.sampling.deciding(opened.pipe).first(FINAL_FACTOR * order.sampling.n_seeds)
    deciding = Measuring.on(opened.pipe, bank, study, final, progress=progress)
    if order.method == "auto":
        found = hold_portfolio(table, effects, bank, order.budget, searching=searching, deciding=deciding)
    else:
        allocation = allocate_by_effects(table, effects, order.budget)
        found = Portfolio(allocation, predict(table, effects, bank, order.budget), ())
    if order.minutes is not None:
        wide = order.sampling.sampling_many(opened.pipe, n_samples or order.sampling.n_adjoint)
        searching = Measuring.on(opened.pipe, bank, study, wide, progress=progress)
        found = refine(found, table, effects, bank, order, searching=searching, deciding=deciding)
    return replace(measured, predicted=found.predicted, entrants=found.entrants), found.allocation


def search_recipe(opened: Opened, study: Study, progress: Progress = SILENT) -> tuple[MeasuredTable, Allocation]:
    """The recipe that a search by measured recipes finds, and what it has learned. Resumes in the study."""
    order, pipe = opened.order, opened.pipe
    bank = make_bank(opened, study, is_exact=True, progress=progress)
    plan = order.sampling.searching(pipe)
    known = know(pipe, opened.graph, bank, study, prior=order.search.prior, sampling=plan, progress=progress)
    on_search = Measuring.on(pipe, bank, study, plan, progress=progress)
    on_finals = Measuring.on(pipe, bank, study, order.sampling.deciding(pipe), progress=progress)
    found = hold_finals(known, search(known, on_search, order.search, order.budget), order.budget, on_finals)
    if not order.check:
        return MeasuredTable(bank, found.table), found.allocation
    seeds = Seeds(on_search, Measuring.on(pipe, bank, study, order.sampling.checking(pipe), progress=progress))
    explanation = explain(known, found, seeds, target=order.search.target)
    return MeasuredTable(bank, found.table, explanation=explanation), found.allocation


def hybrid_of(
    opened: Opened, number_format: Format, study: Study, progress: Progress = SILENT
) -> tuple[MeasuredTable, Allocation]:
    """One format for all but the blocks that noise enters through most; its table is that of weight error.

    Raises:
        InputError: as `measure_hybrid`.
    """
    order, bank = opened.order, make_bank(opened, study, is_exact=True, progress=progress)
    found = measure_hybrid(opened, bank, study, number_format, order.keeping, progress=progress)
    table = error_table(bank.space, bank.candidates)
    budget = read_budget(table.total_params, **order.budget.named(table.full_bops))
    allocation = allocate_given(table, bank.space.choice(found.recipe), budget, rule=order.method)
    return MeasuredTable(bank, table, blocks=found), allocation


def _probe(
    opened: Opened, bank: Bank, method: ProbeMethod, study: Study, progress: Progress, *, n_samples: int
) -> Probe:
    sampling = opened.order.sampling.sampling_many(opened.pipe, n_samples)
    options = ablation_options(opened)
    return probe(opened.pipe, bank, method, store=study, sampling=sampling, ablation=options, progress=progress)


def _scaling(
    opened: Opened, ablation: Probe, table: SensitivityTable, study: Study, progress: Progress
) -> Agreement | None:
    """Measures some formats that the ablation only scaled to, unless checks are not wanted."""
    bank, probed = ablation.bank, [one.probe for one in ablation.ablation]
    pairs = plan_checks(bank.space, bank.candidates, probed, n=N_SCALING_CHECKS)
    if not opened.order.check or len(pairs) < MIN_CHECKS:
        return None
    plan = (opened.order.sampling.searching(opened.pipe), progress)
    return check_scaling(table, measure_probes(opened.pipe, bank, study, pairs, plan))
