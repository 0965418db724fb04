"""Questions that the papers leave open, each answered by measuring a few values of one knob: the verb `sweep`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from types import MappingProxyType

from sedimo.api.hybrid import blocks_by_gain
from sedimo.api.measuring import make_bank
from sedimo.api.opening import Opened, open_source
from sedimo.api.order import ActivationOrder
from sedimo.api.probing import LEAST_SAMPLES, attribute_measured, probe
from sedimo.api.searching import Measuring
from sedimo.api.smoothing import plan_source, smooth_opened
from sedimo.api.sweep_order import Question, Signal, SweepOrder
from sedimo.bank import SILENT, Bank, Progress
from sedimo.errors import InputError
from sedimo.measurement.study import Study
from sedimo.measurement.trial import Trial
from sedimo.measurement.worker import References
from sedimo.metrics.signal import SAME, SAME_UP_TO_ROUNDING, paired_difference, sqnr_estimates, summarize
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.schedulers import scheduled, scheduler_named
from sedimo.reporting.sweep import OTHER_SEEDS, Confirmation, Sweep, SweptRanks, SweptValue, highest_value
from sedimo.sensitivity.blocks import changeable_blocks, hybrid_recipe, refuse_keeping_all
from sedimo.sensitivity.quality import LEAST_RECIPES, prediction_quality
from sedimo.sensitivity.table import Cost

_DECIBEL = 10 / math.log(10)  # per relative change of a power


@dataclass(frozen=True)
class _Work:
    """What a question is answered with: a source made ready for the format, its order, and where results are kept.

    No value changes what the denoiser computes at full precision, so `references` are sampled once for all.
    """

    opened: Opened
    order: SweepOrder
    study: Study
    progress: Progress
    references: References = field(default_factory=dict)

    @property
    def fresh(self) -> Sampling:
        """The seeds that values are measured on."""
        return self.order.sampling.checking(self.opened.pipe)

    @property
    def further(self) -> Sampling:
        """As many seeds again, past those of all other plans: nothing was chosen on them."""
        sampling, pipe = self.order.sampling, self.opened.pipe
        n_ranges = max(LEAST_SAMPLES["sqnr"], self.order.activations.n_samples)
        first = 1 + max(*self.fresh.seeds, *sampling.sampling_many(pipe, n_ranges).seeds)
        return sampling.plan(pipe, range(first, first + sampling.n_check_seeds))

    def bank(self, *, is_exact: bool = False) -> Bank:
        """The bank of the weights and the rules for activations that are in force."""
        return make_bank(self.opened, self.study, is_exact=is_exact, progress=self.progress)

    def measuring(self, bank: Bank, plan: Sampling) -> Measuring:
        """Measuring recipes on a plan, where the study lacks them."""
        sources = (self.opened.pipe, bank, self.study, plan)
        return Measuring.on(*sources, references=self.references, progress=self.progress)

    def everywhere(self, plan: Sampling, note: str = "") -> _Measured:
        """The format everywhere, measured on a plan with what is in force."""
        bank = self.bank()
        recipe = hybrid_recipe(bank.space, self.order.format, [])
        (trial,) = self.measuring(bank, plan).trials([recipe])
        return _Measured(bank.space.paper_bits(recipe), trial, note)

    def sensitivities(self, bank: Bank, signal: Signal, plan: Sampling) -> dict[str, Cost]:
        """What each decision costs at the format by a signal."""
        found = probe(self.opened.pipe, bank, signal, store=self.study, sampling=plan, progress=self.progress)
        return {c.decision: c for c in attribute_measured(found).costs if c.format == self.order.format}


@dataclass(frozen=True)
class _Measured:
    """A value's recipe, measured."""

    paper_bits: float
    trial: Trial
    note: str = ""


Measure = Callable[[str, Sampling], _Measured]  # a value of the knob, on a plan


def sweep(order: SweepOrder, progress: Progress = SILENT) -> Sweep:
    """Answers the question of an order. Resumes in the study; the pipeline is given back as it was.

    Raises:
        InputError: the source cannot be sampled, no layer can take the format, more blocks than there are, or fewer
            than two schedulers that the pipeline can take.
        Interrupted: Ctrl-C; what was measured is kept, the same order goes on.
    """
    opened = open_source(order.job)
    obstacle = opened.why_not_sampled()
    if obstacle is not None:
        raise InputError(f"a sweep samples the pipeline, but {obstacle}")
    n_taking = sum(order.format in d.formats for d in opened.space.decisions)
    if n_taking < (LEAST_RECIPES if order.question in ("samples", "schedulers") else 1):
        raise InputError(f"only {n_taking} layers of {opened.name} can take {order.format}, too few for this question")
    with Study(order.store) as study:
        return _ANSWERS[order.question](_Work(opened, order, study, progress))


def _alpha(work: _Work) -> Sweep:
    plans = plan_source(work.opened, work.order.smoothing, work.study, work.progress)
    smoothings = {f"{smoothing.alpha:g}": smoothing for smoothing in plans}

    def measure(name: str, plan: Sampling) -> _Measured:
        if name not in smoothings:
            return work.everywhere(plan)
        undo = smooth_opened(work.opened, smoothings[name])
        try:
            n_changed = sum(any(layer.exponents) for layer in smoothings[name].layers.values())
            return work.everywhere(plan, f"{n_changed} layers smoothed")
        finally:
            undo()

    return _valued(work, ["none", *smoothings], measure, tolerance=SAME_UP_TO_ROUNDING)


def _calibration(work: _Work) -> Sweep:
    order, n_all = work.order, work.order.sampling.n_steps
    rules = {"dynamic": ActivationOrder(order.activations.symmetric)}
    rules |= {f"all {n}" if n == n_all else str(n): order.calibrated(n) for n in order.counts}

    def measure(name: str, plan: Sampling) -> _Measured:
        work.opened.order = replace(order.job, activations=rules[name])
        return work.everywhere(plan)

    return _valued(work, [*rules], measure)


def _threshold(work: _Work) -> Sweep:
    order, space, number_format = work.order, work.opened.space, work.order.format
    counts = order.counts or tuple(range(len(changeable_blocks(space, number_format))))
    refuse_keeping_all(space, number_format, counts[-1], remedy="Give smaller --values")
    if counts[-1] == 0:
        raise InputError("a sweep of the threshold needs a number of blocks above 0, which is the baseline")
    bank = work.bank()
    searched = work.order.sampling.searching(work.opened.pipe)
    by_gain = blocks_by_gain(bank.space, number_format, work.measuring(bank, searched))
    counts = (0, *(n for n in counts if n))
    before = dict(zip(counts[1:], counts, strict=False))

    def measure(name: str, plan: Sampling) -> _Measured:
        n = int(name)
        recipe = hybrid_recipe(bank.space, number_format, by_gain[:n])
        (trial,) = work.measuring(bank, plan).trials([recipe])
        return _Measured(bank.space.paper_bits(recipe), trial, ", ".join(by_gain[before.get(n, 0) : n]))

    return _valued(work, [*map(str, counts)], measure)


def _samples(work: _Work) -> Sweep:
    """Local SQNR from sets of samples that share none: n of them begin n after the first seed."""
    sampling, counts, bank = work.order.sampling, work.order.counts, work.bank(is_exact=True)
    first = sampling.first_seed
    plans = {str(n): sampling.plan(work.opened.pipe, range(first + n, first + 2 * n)) for n in counts}
    found = {name: work.sensitivities(bank, "sqnr", plan) for name, plan in plans.items()}
    largest = str(counts[-1])
    return _ranked(work, found, [(name, largest) for name in found if name != largest], [*plans.values()])


def _schedulers(work: _Work) -> Sweep:
    pipeline, plan, notes = work.opened.pipe.pipeline, work.fresh, list[str]()
    made: dict[str, object] = {}
    for name in work.order.texts:
        try:
            scheduler = scheduler_named(pipeline, name, plan.n_steps)
            with scheduled(pipeline, scheduler):
                work.opened.pipe.sample(replace(plan.first(1), n_steps=1))  # some steps lack arguments
            made[name] = scheduler
        except InputError as error:
            notes.append(f"left out: {error}")
    if len(made) < 2:
        raise InputError(f"fewer than two schedulers can be compared: {'; '.join(notes)}")
    bank, first = work.bank(is_exact=True), next(iter(made))
    stop = plan.seeds[-1] + 1
    others = work.order.sampling.plan(work.opened.pipe, range(stop, stop + len(plan.seeds)))
    runs = [*((name, name, plan) for name in made), (f"{first}{OTHER_SEEDS}", first, others)]
    found = {}
    for label, name, seeds in runs:
        with scheduled(pipeline, made[name]):
            found[label] = work.sensitivities(bank, work.order.signal, seeds)
    return _ranked(work, found, list(combinations(found, 2)), [plan, others], notes)


_ANSWERS: Mapping[Question, Callable[[_Work], Sweep]] = {
    "alpha": _alpha,
    "calibration": _calibration,
    "threshold": _threshold,
    "samples": _samples,
    "schedulers": _schedulers,
}


def _valued(work: _Work, names: Sequence[str], measure: Measure, tolerance: float = SAME) -> Sweep:
    """The values with their SQNR, each paired with the first, which is the baseline; the highest is measured again."""
    found = {name: measure(name, work.fresh) for name in names}
    baseline, values = names[0], []
    for name, one in found.items():
        powers = one.trial.powers
        ahead = paired_difference(powers, found[baseline].trial.powers, tolerance=tolerance).estimate
        sqnr = sqnr_estimates(summarize(powers))["sqnr_db"]
        values.append(SweptValue(name, one.paper_bits, sqnr, None if name == baseline else ahead, one.note))
    highest = highest_value(values)
    best, least = (measure(name, work.further).trial.powers for name in (highest, baseline))
    ahead = paired_difference(best, least, tolerance=tolerance).estimate
    confirmed = Confirmation(highest, ahead, _span(work.further.seeds))
    answer = _sweep(work, [work.fresh], n_comparisons=len(values) - 1, values=tuple(values))
    return replace(answer, confirmed=confirmed)


def _ranked(
    work: _Work,
    found: Mapping[str, Mapping[str, Cost]],
    pairs: Sequence[tuple[str, str]],
    plans: Sequence[Sampling],
    notes: Sequence[str] = (),
) -> Sweep:
    """Rank correlations of pairs of sensitivities, and the mean standard error of each."""
    costs = {name: [cost.cost for cost in one.values()] for name, one in found.items()}
    ranks = tuple(SweptRanks(a, b, prediction_quality(costs[a], costs[b]).srcc) for a, b in pairs)
    errors = {name: _mean_error([*one.values()]) for name, one in found.items()}
    return _sweep(work, plans, ranks=ranks, errors=errors, n_comparisons=len(pairs), notes=tuple(notes))


def _mean_error(costs: Sequence[Cost]) -> float:
    """Mean over decisions of the standard error of the local noise, to first order [dB]."""
    errors = [_DECIBEL * cost.standard_error / cost.cost for cost in costs if cost.cost > 0]
    return sum(errors) / len(errors) if errors else math.nan


def _sweep(
    work: _Work,
    plans: Sequence[Sampling],
    *,
    n_comparisons: int,
    values: tuple[SweptValue, ...] = (),
    ranks: tuple[SweptRanks, ...] = (),
    errors: Mapping[str, float] = MappingProxyType({}),
    notes: tuple[str, ...] = (),
) -> Sweep:
    return Sweep(
        question=work.order.question,
        source=work.opened.name,
        number_format=str(work.order.format),
        seeds=_span([seed for plan in plans for seed in plan.seeds]),
        n_steps=plans[0].n_steps,
        n_comparisons=n_comparisons,
        values=values,
        ranks=ranks,
        errors=errors,
        notes=notes,
    )


def _span(seeds: Sequence[int]) -> str:
    return f"{min(seeds)} to {max(seeds)}"
