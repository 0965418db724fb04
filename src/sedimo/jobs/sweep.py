"""One knob over several values on SRC, on the same fresh seeds: what the papers leave open.

alpha        how much SmoothQuant moves into the weights; baseline: no smoothing
calibration  at how many steps static ranges are taken; baseline: dynamic ranges
threshold    how many blocks stay at 16 bits, by rank of gain; baseline: none
samples      how many samples local SQNR needs
schedulers   whether sensitivities depend on the noise scheduler

Example: sedimo sweep alpha zoo:cifar-dit --store runs/sweeps -o alpha.html
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

from sedimo.allocation.table import Cost
from sedimo.bank import Progress
from sedimo.errors import InputError
from sedimo.jobs.job import Job
from sedimo.jobs.settings import FORMATS, SAMPLING, open_lab
from sedimo.lab.bench import SourceSettings
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study
from sedimo.methods.hybrid import blocks_by_gain, changeable_blocks, hybrid_recipe, refuse_keeping_all
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Method, Task
from sedimo.methods.sqnr import SQNR
from sedimo.metrics.ranking import LEAST_RECIPES, prediction_quality
from sedimo.metrics.signal import SAME, SAME_UP_TO_ROUNDING, NoisePowers, mean_sqnr, paired_difference
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.schedulers import SCHEDULERS, scheduled, scheduler_named
from sedimo.quant.formats import FULL_BITS, Format
from sedimo.reporting.html import write_page
from sedimo.reporting.sweep import OTHER_SEEDS, Confirmation, Sweep, SweptRanks, SweptValue, highest_value, sweep_page
from sedimo.settings import REQUIRED, Checked, block, option, within
from sedimo.treatments.smoothing import DEFAULT_SHARE, SmoothingSettings, plan_smoothings
from sedimo.treatments.static_ranges import ACTIVATIONS, DYNAMIC_ACTIVATIONS, ActivationSettings, round_activations

Question = Literal["alpha", "calibration", "threshold", "samples", "schedulers"]
SIGNALS = {JACOBIAN.name: JACOBIAN, SQNR.name: SQNR}  # by which schedulers are compared
MOST_SAMPLES = 1024
_ROUNDS_INPUTS = ("alpha", "calibration")
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_VALUES: Mapping[Question, tuple[str, ...]] = {
    "alpha": ("0.5", "0.6", "0.7", "0.8", "0.9"),
    "samples": ("8", "16", "32", "64", "128"),
    "schedulers": SCHEDULERS,
}
_DECIBEL = 10 / math.log(10)  # per relative change of a power


def read_values(text: str) -> tuple[str, ...]:
    """Values from a text such as `1,2,5`."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if text and not found:
        raise InputError(f"--values are separated by commas, such as 1,2,5; got {text!r}")
    return found


@dataclass(frozen=True)
class SweepSettings(Checked):
    """One question about one format; `calibration` replaces the number of steps in `activations`."""

    question: Question = option(REQUIRED, metavar="QUESTION", help="What to find out.")
    source: SourceSettings = block(REQUIRED, "Source")
    store: Path = option(REQUIRED, "--store", help="Folder of the study.")
    values: tuple[str, ...] = option(
        (), "--values", parse=read_values, help="Values, separated by commas; default: the question's usual ones."
    )
    number_format: Format | None = option(
        None, "--format", parse=Format.parse, help="Format of all layers; default: uaq8a8, or uaq4 without activations."
    )
    n_fresh: int = option(
        16,
        "--fresh",
        check=within("a sweep needs at least two fresh seeds", least=2),
        help="Fresh seeds that every value is measured on.",
    )
    share: float = option(DEFAULT_SHARE, "--smooth-share", help="alpha: share of the layers to smooth.")
    signal: str = option(
        JACOBIAN.name, "--signal", choices=tuple(SIGNALS), help="schedulers: the sensitivity that is compared."
    )
    activations: ActivationSettings = block(DYNAMIC_ACTIVATIONS, "Activations")
    out: Path | None = option(None, "-o", "--out", help="File for the page.")
    sampling: SamplingSettings = block(SAMPLING, "Sampling")

    def check_together(self) -> None:
        """Refuses values that the question does not have, and a format that it says nothing about."""
        if not self.format.is_quantized:
            raise InputError(f"a sweep needs a format that changes weights, got {self.format}")
        if self.question in _ROUNDS_INPUTS and self.format.activation_bits == FULL_BITS:
            raise InputError(f"{self.question} is about rounded activations: give a format with their bits, as uaq8a8")
        if self.question == "schedulers":
            if len(self.texts) < 2 or not {*self.texts} <= {*SCHEDULERS}:
                got = ", ".join(self.texts)
                raise InputError(f"two or more of the schedulers {', '.join(SCHEDULERS)} are compared, got {got}")
        elif self.question == "alpha":
            if not self.smoothing:
                raise InputError("a sweep of alpha needs a value above 0, which is the baseline: --values 0.5,0.7,0.9")
        else:
            self._check_counts()

    def _check_counts(self) -> None:
        counts, n_steps = self.counts, self.sampling.n_steps
        least, most, listed = min(counts, default=0), max(counts, default=0), ", ".join(map(str, counts))
        if self.question == "samples":
            if len(counts) < 2 or least < 2 or most > MOST_SAMPLES:
                raise InputError(f"two or more numbers of samples from 2 to {MOST_SAMPLES} are compared, got {listed}")
            if any(more < 2 * fewer for fewer, more in pairwise(counts)):
                raise InputError(
                    "each number of samples must be at least twice the one before, so that none shares samples with "
                    f"another; got {listed}"
                )
        if self.question == "calibration" and (least < 1 or most > n_steps):
            raise InputError(f"ranges are calibrated at 1 to {n_steps} steps (--steps), got {listed}")
        if self.question == "threshold" and least < 0:
            raise InputError(f"the number of blocks at 16 bits must not be negative, got {least}")

    @property
    def format(self) -> Format:
        """The format that the question is asked about."""
        return self.number_format or Format.parse("uaq8a8" if self.question in _ROUNDS_INPUTS else "uaq4")

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The values as text, each once; empty for all numbers of blocks."""
        if self.question == "calibration" and not self.values:
            n_steps = self.sampling.n_steps
            return (*(str(n) for n in _STEPS if n < n_steps), str(n_steps))
        return tuple(dict.fromkeys(self.values or _VALUES.get(self.question, ())))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The values as whole numbers, ascending."""
        try:
            return tuple(sorted({int(text) for text in self.texts}))
        except ValueError as error:
            raise InputError(f"values of {self.question} are whole numbers, got {', '.join(self.texts)}") from error

    @cached_property
    def smoothing(self) -> tuple[SmoothingSettings, ...]:
        """How to smooth at each alpha, ascending; 0 is the baseline and left out."""
        try:
            alphas = sorted({float(text) for text in self.texts} - {0.0})
        except ValueError as error:
            raise InputError(f"values of alpha are numbers such as 0.7, got {', '.join(self.texts)}") from error
        return tuple(SmoothingSettings(alpha, self.share) for alpha in alphas)


def run(settings: SweepSettings, progress: Progress) -> Sweep:
    """Answers a question, on a page if there is a place for it. Resumes; the pipeline is given back as it was."""
    number_format = settings.format
    lab = open_lab(
        settings.source,
        FORMATS,
        chosen={ACTIVATIONS.name: settings.activations},
        sampling=replace(settings.sampling, n_check_seeds=settings.n_fresh),
        progress=progress,
        text=f"{number_format},fp16",
        streams=False,
    )
    lab.refuse_unsampled("a sweep samples the pipeline")
    n_taking = sum(number_format in d.formats for d in lab.space.decisions)
    if n_taking < (LEAST_RECIPES if settings.question in ("samples", "schedulers") else 1):
        raise InputError(
            f"only {n_taking} layers of {lab.subject.name} can take {number_format}, too few for this question"
        )
    with Study(settings.store) as study:
        found = _ANSWERS[settings.question](lab.kept_in(study), settings)
    if settings.out is not None:
        write_page(sweep_page(found), settings.out)
    return found


@dataclass(frozen=True)
class _Case:
    """A value of the knob: the format in a lab everywhere but in the blocks that are `kept` at 16 bits."""

    lab: Lab
    kept: Sequence[str] = ()
    note: str = ""


def _rounding(lab: Lab, settings: ActivationSettings) -> Lab:
    """The lab with activations rounded as they are to be."""
    rules = round_activations(lab, settings)
    return lab if rules is None else lab.treated(rules)


def _alpha(lab: Lab, settings: SweepSettings) -> Sweep:
    cases = {"none": _Case(_rounding(lab, settings.activations))}
    for plan in plan_smoothings(lab, settings.smoothing):
        n_changed = sum(any(layer.exponents) for layer in plan.layers.values())
        smoothed = _rounding(lab.treated(plan), settings.activations)
        cases[f"{plan.alpha:g}"] = _Case(smoothed, note=f"{n_changed} layers smoothed")
    return _valued(lab, settings, cases, tolerance=SAME_UP_TO_ROUNDING)


def _calibration(lab: Lab, settings: SweepSettings) -> Sweep:
    """Static ranges by the method that is set, or by least and greatest values."""
    wanted, n_all = settings.activations, settings.sampling.n_steps
    static = replace(wanted, ranges="min-max" if wanted.ranges == "dynamic" else wanted.ranges)
    rules = {"dynamic": ActivationSettings(symmetric=wanted.symmetric)}
    rules |= {f"all {n}" if n == n_all else str(n): replace(static, n_steps=n) for n in settings.counts}
    return _valued(lab, settings, {name: _Case(_rounding(lab, rule)) for name, rule in rules.items()})


def _threshold(lab: Lab, settings: SweepSettings) -> Sweep:
    number_format = settings.format
    counts = settings.counts or tuple(range(len(changeable_blocks(lab.space, number_format))))
    refuse_keeping_all(lab.space, number_format, counts[-1], remedy="Give smaller --values")
    if counts[-1] == 0:
        raise InputError("a sweep of the threshold needs a number of blocks above 0, which is the baseline")
    lab = _rounding(lab, settings.activations)
    by_gain = blocks_by_gain(lab, number_format, lab.seeds.search)
    counts = tuple(sorted({0, *counts}))
    steps = [(0, 0), *pairwise(counts)]
    cases = {str(n): _Case(lab, by_gain[:n], ", ".join(by_gain[before:n])) for before, n in steps}
    return _valued(lab, settings, cases)


def _samples(lab: Lab, settings: SweepSettings) -> Sweep:
    """Local SQNR from sets of samples that share none: n of them begin n after the first seed."""
    first = lab.seeds.settings.first_seed
    plans = {str(n): lab.seeds.plan(range(first + n, first + 2 * n)) for n in settings.counts}
    found = {name: _sensitivities(lab, settings, SQNR, plan) for name, plan in plans.items()}
    *others, largest = plans
    return _ranked(lab, settings, found, [(name, largest) for name in others], [*plans.values()])


def _schedulers(lab: Lab, settings: SweepSettings) -> Sweep:
    pipeline, plan, notes = lab.pipe.pipeline, lab.seeds.check, list[str]()
    made: dict[str, object] = {}
    for name in settings.texts:
        try:
            scheduler = scheduler_named(pipeline, name, plan.n_steps)
            with scheduled(pipeline, scheduler):
                lab.pipe.sample(replace(plan.first(1), n_steps=1))  # some steps lack arguments
            made[name] = scheduler
        except InputError as error:
            notes.append(f"left out: {error}")
    if len(made) < 2:
        raise InputError(f"fewer than two schedulers can be compared: {'; '.join(notes)}")
    first, stop = next(iter(made)), plan.seeds[-1] + 1
    others = lab.seeds.plan(range(stop, stop + len(plan.seeds)))
    found = {}
    for label, name, seeds in [*((name, name, plan) for name in made), (f"{first}{OTHER_SEEDS}", first, others)]:
        with scheduled(pipeline, made[name]):
            found[label] = _sensitivities(lab, settings, SIGNALS[settings.signal], seeds)
    return _ranked(lab, settings, found, [*combinations(found, 2)], [plan, others], tuple(notes))


_ANSWERS: Mapping[Question, Callable[[Lab, SweepSettings], Sweep]] = {
    "alpha": _alpha,
    "calibration": _calibration,
    "threshold": _threshold,
    "samples": _samples,
    "schedulers": _schedulers,
}


def _sensitivities(lab: Lab, settings: SweepSettings, signal: Method[Any], plan: Sampling) -> list[Cost]:
    """What each decision costs at the format by a signal."""
    costs = signal.measure(lab, Task(signal.knobs(), on=plan)).table.costs
    return [cost for cost in costs if cost.format == settings.format]


def _valued(lab: Lab, settings: SweepSettings, cases: Mapping[str, _Case], tolerance: float = SAME) -> Sweep:
    """The values with their SQNR, each paired with the first, which is the baseline; the highest is measured again."""
    spaces = {name: case.lab.estimated.space for name, case in cases.items()}
    recipes = {name: hybrid_recipe(spaces[name], settings.format, case.kept) for name, case in cases.items()}

    def measured(name: str, plan: Sampling) -> NoisePowers:
        (trial,) = cases[name].lab.measure([recipes[name]], plan)
        return trial.powers

    powers = {name: measured(name, lab.seeds.check) for name in cases}
    baseline, *others = cases
    ahead = {name: paired_difference(powers[name], powers[baseline], tolerance=tolerance).estimate for name in others}
    values = tuple(
        SweptValue(name, spaces[name].paper_bits(recipes[name]), mean_sqnr(powers[name]), ahead.get(name), case.note)
        for name, case in cases.items()
    )
    highest = highest_value(values)
    # as many fresh seeds again, past those of all other plans: nothing was chosen on them
    n_ranges = max(SQNR.traits.least_samples, settings.activations.n_samples)
    first = 1 + max(*lab.seeds.check.seeds, *lab.seeds.more(n_ranges).seeds)
    further = lab.seeds.plan(range(first, first + lab.seeds.settings.n_check_seeds))
    # the baseline first: the reference is then that of the untouched denoiser, not of an equal one up to rounding
    least, best = measured(baseline, further), measured(highest, further)
    again = paired_difference(best, least, tolerance=tolerance).estimate
    answer = _sweep(lab, settings, [lab.seeds.check], len(others))
    return replace(answer, values=values, confirmed=Confirmation(highest, again, _span(further.seeds)))


def _ranked(
    lab: Lab,
    settings: SweepSettings,
    found: Mapping[str, Sequence[Cost]],
    pairs: Sequence[tuple[str, str]],
    plans: Sequence[Sampling],
    notes: tuple[str, ...] = (),
) -> Sweep:
    """Rank correlations of pairs of sensitivities, and the mean standard error of each."""
    costs = {name: [cost.cost for cost in one] for name, one in found.items()}
    ranks = tuple(SweptRanks(a, b, prediction_quality(costs[a], costs[b]).srcc) for a, b in pairs)
    errors = dict[str, float]()
    for name, one in found.items():  # to first order [dB]
        known = [_DECIBEL * cost.standard_error / cost.cost for cost in one if cost.cost > 0]
        errors[name] = sum(known) / len(known) if known else math.nan
    return replace(_sweep(lab, settings, plans, len(pairs)), ranks=ranks, errors=errors, notes=notes)


def _sweep(lab: Lab, settings: SweepSettings, plans: Sequence[Sampling], n_comparisons: int) -> Sweep:
    """A sweep that is to be filled."""
    seeds = _span([seed for plan in plans for seed in plan.seeds])
    return Sweep(settings.question, lab.subject.name, str(settings.format), seeds, plans[0].n_steps, n_comparisons)


def _span(seeds: Sequence[int]) -> str:
    return f"{min(seeds)} to {max(seeds)}"


JOB = Job(__doc__, SweepSettings, run, sweep_page)
