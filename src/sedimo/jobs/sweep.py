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
from types import MappingProxyType
from typing import Any, Literal, get_args

from sedimo.allocation.table import Cost
from sedimo.bank import SILENT, Progress
from sedimo.errors import InputError
from sedimo.jobs.job import Job
from sedimo.jobs.settings import FORMATS as ALL_FORMATS
from sedimo.jobs.settings import SAMPLING, open_lab
from sedimo.lab.bench import SourceSettings
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study, Trial
from sedimo.methods.blocks import changeable_blocks, hybrid_recipe, refuse_keeping_all
from sedimo.methods.hybrid import blocks_by_gain
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Method, Task
from sedimo.methods.sqnr import SQNR
from sedimo.metrics.ranking import LEAST_RECIPES, prediction_quality
from sedimo.metrics.signal import SAME, SAME_UP_TO_ROUNDING, mean_sqnr, paired_difference
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.schedulers import SCHEDULERS, scheduled, scheduler_named
from sedimo.quant.formats import FULL_BITS, Format
from sedimo.reporting.html import write_page
from sedimo.reporting.sweep import OTHER_SEEDS, Confirmation, Sweep, SweptRanks, SweptValue, highest_value, sweep_page
from sedimo.settings import REQUIRED, block, option
from sedimo.treatments.smoothing import DEFAULT_SHARE, SmoothingSettings, plan_smoothings
from sedimo.treatments.static_ranges import ACTIVATIONS, DYNAMIC_ACTIVATIONS, ActivationSettings, round_activations

Question = Literal["alpha", "calibration", "threshold", "samples", "schedulers"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
SIGNALS = {JACOBIAN.name: JACOBIAN, SQNR.name: SQNR}  # by which schedulers are compared
FORMATS: Mapping[Question, str] = {
    "alpha": "uaq8a8",
    "calibration": "uaq8a8",
    "threshold": "uaq4",
    "samples": "uaq4",
    "schedulers": "uaq4",
}
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
    """Values from a text such as `1,2,5`.

    Raises:
        InputError: nothing between the commas.
    """
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if text and not found:
        raise InputError(f"--values are separated by commas, such as 1,2,5; got {text!r}")
    return found


@dataclass(frozen=True)
class SweepSettings:
    """One question about one format. Without `values`, the usual ones; `number_format` None: the question's usual one.

    `share` of the layers is smoothed for `alpha`. `activations` say how inputs are rounded; `calibration` replaces the
    number of steps there. `signal` is what `schedulers` compares. Values are measured on `n_fresh` seeds; ranges are
    calibrated on `activations.n_samples` others.
    """

    question: Question = option(REQUIRED, metavar="QUESTION", help="What to find out.")
    source: SourceSettings = block(REQUIRED, "Source")
    store: Path = option(REQUIRED, "--store", help="Folder of the study.")
    values: tuple[str, ...] = option(
        (), "--values", parse=read_values, help="Values, separated by commas; default: the question's usual ones."
    )
    number_format: Format | None = option(
        None,
        "--format",
        parse=Format.parse,
        help="Format of all layers; default: uaq8a8, or uaq4 without activations.",
    )
    n_fresh: int = option(16, "--fresh", help="Fresh seeds that every value is measured on.")
    share: float = option(DEFAULT_SHARE, "--smooth-share", help="alpha: share of the layers to smooth.")
    signal: str = option(
        JACOBIAN.name,
        "--signal",
        choices=tuple(SIGNALS),
        help="schedulers: the sensitivity that is compared.",
    )
    activations: ActivationSettings = block(DYNAMIC_ACTIVATIONS, "Activations")
    out: Path | None = option(None, "-o", "--out", help="File for the page.")
    sampling: SamplingSettings = block(SAMPLING, "Sampling")

    def __post_init__(self) -> None:
        """Refuses an unknown question, values that it does not have, and a format that it says nothing about."""
        if self.question not in QUESTIONS:
            raise InputError(f"the question must be one of {', '.join(QUESTIONS)}, got {self.question!r}")
        if self.signal not in SIGNALS:
            raise InputError(f"schedulers are compared by {', '.join(SIGNALS)}, got {self.signal!r}")
        if not self.format.is_quantized:
            raise InputError(f"a sweep needs a format that changes weights, got {self.format}")
        if self.question in _ROUNDS_INPUTS and self.format.activation_bits == FULL_BITS:
            raise InputError(f"{self.question} is about rounded activations: give a format with their bits, as uaq8a8")
        if self.n_fresh < 2:
            raise InputError(f"a sweep needs at least two fresh seeds, got {self.n_fresh}")
        self._check_values()

    def _check_values(self) -> None:
        if self.question == "schedulers":
            _check_names(self.texts)
        elif self.question == "samples":
            _check_samples(self.counts)
        elif self.question == "calibration":
            _check_steps(self.counts, self.sampling.n_steps)
        elif self.question == "alpha":
            _check_alphas(self.smoothing)
        elif any(count < 0 for count in self.counts):
            raise InputError(f"the number of blocks at 16 bits must not be negative, got {min(self.counts)}")

    @property
    def format(self) -> Format:
        """The format that the question is asked about."""
        return self.number_format or Format.parse(FORMATS[self.question])

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The values as text, each once; empty for all numbers of blocks."""
        if self.question == "calibration" and not self.values:
            n_steps = self.sampling.n_steps
            return (*(str(n) for n in _STEPS if n < n_steps), str(n_steps))
        return tuple(dict.fromkeys(self.values or _VALUES.get(self.question, ())))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The values as whole numbers, ascending.

        Raises:
            InputError: one that is none.
        """
        try:
            return tuple(sorted({int(text) for text in self.texts}))
        except ValueError as error:
            raise InputError(f"values of {self.question} are whole numbers, got {', '.join(self.texts)}") from error

    @cached_property
    def smoothing(self) -> tuple[SmoothingSettings, ...]:
        """How to smooth at each alpha, ascending; 0 is the baseline and left out.

        Raises:
            InputError: an alpha that is none.
        """
        try:
            alphas = sorted({float(text) for text in self.texts} - {0.0})
        except ValueError as error:
            raise InputError(f"values of alpha are numbers such as 0.7, got {', '.join(self.texts)}") from error
        return tuple(SmoothingSettings(alpha, self.share) for alpha in alphas)

    def calibrated(self, n_steps: int) -> ActivationSettings:
        """Static ranges from so many steps, by the method that is set, or by least and greatest values."""
        ranges = self.activations.ranges
        return replace(self.activations, ranges="min-max" if ranges == "dynamic" else ranges, n_steps=n_steps)


def _check_names(names: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in SCHEDULERS]
    if unknown or len(names) < 2:
        raise InputError(f"two or more of the schedulers {', '.join(SCHEDULERS)} are compared, got {', '.join(names)}")


def _check_samples(counts: tuple[int, ...]) -> None:
    if len(counts) < 2 or counts[0] < 2 or counts[-1] > MOST_SAMPLES:
        raise InputError(f"two or more numbers of samples from 2 to {MOST_SAMPLES} are compared, got {_listed(counts)}")
    if any(more < 2 * fewer for fewer, more in pairwise(counts)):
        raise InputError(
            f"each number of samples must be at least twice the one before, so that none shares samples with another; "
            f"got {_listed(counts)}"
        )


def _check_steps(counts: tuple[int, ...], n_steps: int) -> None:
    if counts[0] < 1 or counts[-1] > n_steps:
        raise InputError(f"ranges are calibrated at 1 to {n_steps} steps (--steps), got {_listed(counts)}")


def _check_alphas(wanted: tuple[SmoothingSettings, ...]) -> None:
    if not wanted:
        raise InputError("a sweep of alpha needs a value above 0, which is the baseline: --values 0.5,0.7,0.9")


def _listed(counts: tuple[int, ...]) -> str:
    return ", ".join(map(str, counts))


@dataclass(frozen=True)
class _Sweeping:
    """What a question is answered with: a lab on the format, and the settings."""

    lab: Lab
    settings: SweepSettings

    @property
    def further(self) -> Sampling:
        """As many fresh seeds again, past those of all other plans: nothing was chosen on them."""
        seeds = self.lab.seeds
        n_ranges = max(SQNR.traits.least_samples, self.settings.activations.n_samples)
        first = 1 + max(*seeds.check.seeds, *seeds.more(n_ranges).seeds)
        return seeds.plan(range(first, first + seeds.settings.n_check_seeds))

    def everywhere(self, lab: Lab, plan: Sampling, note: str = "") -> _Measured:
        """The format everywhere, measured on a plan in a lab."""
        recipe = hybrid_recipe(lab.estimated.space, self.settings.format, [])
        (trial,) = lab.measure([recipe], plan)
        return _Measured(lab.estimated.space.paper_bits(recipe), trial, note)

    def sensitivities(self, signal: Method[Any], plan: Sampling) -> dict[str, Cost]:
        """What each decision costs at the format by a signal."""
        task = Task(signal.knobs(), on=plan)
        costs = signal.measure(self.lab, task).table.costs
        return {c.decision: c for c in costs if c.format == self.settings.format}


@dataclass(frozen=True)
class _Measured:
    """A value's recipe, measured."""

    paper_bits: float
    trial: Trial
    note: str = ""


Measure = Callable[[str, Sampling], _Measured]  # a value of the knob, on a plan


def sweep(settings: SweepSettings, progress: Progress = SILENT) -> Sweep:
    """Answers a question. Resumes in the study; the pipeline is given back as it was.

    Raises:
        InputError: the source cannot be sampled, no layer can take the format, more blocks than there are, or fewer
            than two schedulers that the pipeline can take.
        Interrupted: Ctrl-C; what was measured is kept, the same call goes on.
    """
    number_format = settings.format
    lab = open_lab(
        settings.source,
        ALL_FORMATS,
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
        return _ANSWERS[settings.question](_Sweeping(lab.kept_in(study), settings))


def _alpha(work: _Sweeping) -> Sweep:
    rounded = _rounding(work.lab, work.settings.activations)
    plans = plan_smoothings(work.lab, work.settings.smoothing)
    labs = {f"{plan.alpha:g}": _rounding(work.lab.treated(plan), work.settings.activations) for plan in plans}
    n_changed = {f"{p.alpha:g}": sum(any(layer.exponents) for layer in p.layers.values()) for p in plans}

    def measure(name: str, plan: Sampling) -> _Measured:
        if name not in labs:
            return work.everywhere(rounded, plan)
        return work.everywhere(labs[name], plan, f"{n_changed[name]} layers smoothed")

    return _valued(work, ["none", *labs], measure, tolerance=SAME_UP_TO_ROUNDING)


def _rounding(lab: Lab, settings: ActivationSettings) -> Lab:
    """The lab with activations rounded as they are to be."""
    rules = round_activations(lab, settings)
    return lab if rules is None else lab.treated(rules)


def _calibration(work: _Sweeping) -> Sweep:
    settings, n_all = work.settings, work.settings.sampling.n_steps
    rules = {"dynamic": ActivationSettings(symmetric=settings.activations.symmetric)}
    rules |= {f"all {n}" if n == n_all else str(n): settings.calibrated(n) for n in settings.counts}
    labs: dict[str, Lab] = {}

    def measure(name: str, plan: Sampling) -> _Measured:
        if name not in labs:
            labs[name] = _rounding(work.lab, rules[name])
        return work.everywhere(labs[name], plan)

    return _valued(work, [*rules], measure)


def _threshold(work: _Sweeping) -> Sweep:
    settings, space, number_format = work.settings, work.lab.space, work.settings.format
    counts = settings.counts or tuple(range(len(changeable_blocks(space, number_format))))
    refuse_keeping_all(space, number_format, counts[-1], remedy="Give smaller --values")
    if counts[-1] == 0:
        raise InputError("a sweep of the threshold needs a number of blocks above 0, which is the baseline")
    lab = _rounding(work.lab, settings.activations)
    space = lab.estimated.space
    by_gain = blocks_by_gain(lab, number_format, lab.seeds.search)
    counts = (0, *(n for n in counts if n))
    before = dict(zip(counts[1:], counts, strict=False))

    def measure(name: str, plan: Sampling) -> _Measured:
        n = int(name)
        recipe = hybrid_recipe(space, number_format, by_gain[:n])
        (trial,) = lab.measure([recipe], plan)
        return _Measured(space.paper_bits(recipe), trial, ", ".join(by_gain[before.get(n, 0) : n]))

    return _valued(work, [*map(str, counts)], measure)


def _samples(work: _Sweeping) -> Sweep:
    """Local SQNR from sets of samples that share none: n of them begin n after the first seed."""
    seeds, counts = work.lab.seeds, work.settings.counts
    first = seeds.settings.first_seed
    plans = {str(n): seeds.plan(range(first + n, first + 2 * n)) for n in counts}
    found = {name: work.sensitivities(SQNR, plan) for name, plan in plans.items()}
    largest = str(counts[-1])
    return _ranked(work, found, [(name, largest) for name in found if name != largest], [*plans.values()])


def _schedulers(work: _Sweeping) -> Sweep:
    pipeline, plan, notes = work.lab.pipe.pipeline, work.lab.seeds.check, list[str]()
    made: dict[str, object] = {}
    for name in work.settings.texts:
        try:
            scheduler = scheduler_named(pipeline, name, plan.n_steps)
            with scheduled(pipeline, scheduler):
                work.lab.pipe.sample(replace(plan.first(1), n_steps=1))  # some steps lack arguments
            made[name] = scheduler
        except InputError as error:
            notes.append(f"left out: {error}")
    if len(made) < 2:
        raise InputError(f"fewer than two schedulers can be compared: {'; '.join(notes)}")
    first, stop = next(iter(made)), plan.seeds[-1] + 1
    others = work.lab.seeds.plan(range(stop, stop + len(plan.seeds)))
    runs = [*((name, name, plan) for name in made), (f"{first}{OTHER_SEEDS}", first, others)]
    found = {}
    for label, name, seeds in runs:
        with scheduled(pipeline, made[name]):
            found[label] = work.sensitivities(SIGNALS[work.settings.signal], seeds)
    return _ranked(work, found, list(combinations(found, 2)), [plan, others], notes)


_ANSWERS: Mapping[Question, Callable[[_Sweeping], Sweep]] = {
    "alpha": _alpha,
    "calibration": _calibration,
    "threshold": _threshold,
    "samples": _samples,
    "schedulers": _schedulers,
}


def _valued(work: _Sweeping, names: Sequence[str], measure: Measure, tolerance: float = SAME) -> Sweep:
    """The values with their SQNR, each paired with the first, which is the baseline; the highest is measured again."""
    found = {name: measure(name, work.lab.seeds.check) for name in names}
    baseline, values = names[0], []
    for name, one in found.items():
        powers = one.trial.powers
        ahead = paired_difference(powers, found[baseline].trial.powers, tolerance=tolerance).estimate
        sqnr = mean_sqnr(powers)
        values.append(SweptValue(name, one.paper_bits, sqnr, None if name == baseline else ahead, one.note))
    highest = highest_value(values)
    # the baseline first: the reference is then that of the untouched denoiser, not of an equal one up to rounding
    least, best = (measure(name, work.further).trial.powers for name in (baseline, highest))
    ahead = paired_difference(best, least, tolerance=tolerance).estimate
    confirmed = Confirmation(highest, ahead, _span(work.further.seeds))
    answer = _sweep(work, [work.lab.seeds.check], n_comparisons=len(values) - 1, values=tuple(values))
    return replace(answer, confirmed=confirmed)


def _ranked(
    work: _Sweeping,
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
    work: _Sweeping,
    plans: Sequence[Sampling],
    *,
    n_comparisons: int,
    values: tuple[SweptValue, ...] = (),
    ranks: tuple[SweptRanks, ...] = (),
    errors: Mapping[str, float] = MappingProxyType({}),
    notes: tuple[str, ...] = (),
) -> Sweep:
    return Sweep(
        question=work.settings.question,
        source=work.lab.subject.name,
        number_format=str(work.settings.format),
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


def run(settings: SweepSettings, progress: Progress) -> Sweep:
    """Answers, and writes the page if there is a place for it."""
    found = sweep(settings, progress)
    if settings.out is not None:
        write_page(sweep_page(found), settings.out)
    return found


JOB = Job(__doc__, SweepSettings, run, sweep_page)
