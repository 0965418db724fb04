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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sedimo.allocation.table import Cost
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.jobs.job import Job
from sedimo.jobs.settings import COMPARABLE, SAMPLING, one_format, open_lab, parts_of, treated
from sedimo.lab.bench import SourceSettings
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study
from sedimo.methods.hybrid import blocks_by_gain, changeable_blocks, hybrid_recipe, refuse_keeping_all
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Method, Task
from sedimo.methods.sqnr import LEAST_SAMPLES, SQNR
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.metrics.ranking import LEAST_RECIPES, prediction_quality
from sedimo.metrics.signal import SAME, SAME_UP_TO_ROUNDING, NoisePowers, mean_sqnr, paired_difference
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.schedulers import SCHEDULERS, exchanged, scheduler_named
from sedimo.progress import Progress
from sedimo.quant.formats import FULL_BITS, Format
from sedimo.reporting.figures import Axis, Heat, Plot, Series, named, only
from sedimo.reporting.html import write_page
from sedimo.reporting.page import Block, Figure, Items, Page, Row, Table, Text, columns, page_of, rows
from sedimo.reporting.words import name, number, said, verdict, with_error
from sedimo.settings import REQUIRED, Checked, block, option
from sedimo.treatments.smoothing import DEFAULT_SHARE, SmoothingSettings, check_share, plan_smoothings
from sedimo.treatments.static_ranges import ACTIVATIONS, DYNAMIC_ACTIVATIONS, ActivationSettings

Question = Literal["alpha", "calibration", "threshold", "samples", "schedulers"]
SIGNALS = {JACOBIAN.name: JACOBIAN, SQNR.name: SQNR}  # by which schedulers are compared
MOST_SAMPLES = 1024
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_DECIBEL = 10 / math.log(10)  # per relative change of a power
OTHER_SEEDS = ", other seeds"  # of a scheduler that is compared with itself
_HEIGHT, _ROW = 430, 74  # of a chart, and of a row of the matrix of schedulers [px]


def read_values(text: str) -> tuple[str, ...]:
    """Values from a text such as `1,2,5`."""
    if text and not parts_of(text):
        raise InputError(f"--values are separated by commas, such as 1,2,5; got {text!r}")
    return parts_of(text)


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
    n_fresh: int = option(16, "--fresh", check=COMPARABLE, help="Fresh seeds that every value is measured on.")
    share: float = option(
        DEFAULT_SHARE, "--smooth-share", check=check_share, help="alpha: share of the layers to smooth."
    )
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
        is_rounding = Format.parse(_QUESTIONS[self.question].number_format).activation_bits < FULL_BITS
        if is_rounding and self.format.activation_bits == FULL_BITS:
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
        return self.number_format or Format.parse(_QUESTIONS[self.question].number_format)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The values as text, each once; empty for all numbers of blocks."""
        if self.question == "calibration" and not self.values:
            n_steps = self.sampling.n_steps
            return (*(str(n) for n in _STEPS if n < n_steps), str(n_steps))
        return tuple(dict.fromkeys(self.values or _QUESTIONS[self.question].values))

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
        one_format(number_format),
        chosen={ACTIVATIONS.name: settings.activations},
        sampling=replace(settings.sampling, n_check_seeds=settings.n_fresh),
        progress=progress,
    )
    lab.refuse_unsampled("a sweep samples the pipeline")
    n_taking = sum(number_format in d.formats for d in lab.space.decisions)
    if n_taking < (LEAST_RECIPES if settings.question in ("samples", "schedulers") else 1):
        raise InputError(
            f"only {n_taking} layers of {lab.bench.name} can take {number_format}, too few for this question"
        )
    with Study(settings.store) as study:
        found = _QUESTIONS[settings.question].answer(lab.kept_in(study), settings)
    if settings.out is not None:
        write_page(sweep_page(found), settings.out)
    return found


def _alpha(lab: Lab, settings: SweepSettings) -> Sweep:
    rounding, notes = {ACTIVATIONS.name: settings.activations}, dict[str, str]()
    labs = {"none": treated(lab, rounding)}
    for plan in plan_smoothings(lab, settings.smoothing):
        labs[f"{plan.alpha:g}"] = treated(lab.treated(plan), rounding)
        notes[f"{plan.alpha:g}"] = f"{sum(any(layer.exponents) for layer in plan.layers.values())} layers smoothed"
    return _valued(lab, settings, labs, kept={}, notes=notes, tolerance=SAME_UP_TO_ROUNDING)


def _calibration(lab: Lab, settings: SweepSettings) -> Sweep:
    """Static ranges by the method that is set, or by least and greatest values."""
    wanted, n_all = settings.activations, settings.sampling.n_steps
    static = replace(wanted, ranges="min-max" if wanted.ranges == "dynamic" else wanted.ranges)
    rules = {"dynamic": ActivationSettings(symmetric=wanted.symmetric)}
    rules |= {f"all {n}" if n == n_all else str(n): replace(static, n_steps=n) for n in settings.counts}
    labs = {name: treated(lab, {ACTIVATIONS.name: rule}) for name, rule in rules.items()}
    return _valued(lab, settings, labs, kept={}, notes={})


def _threshold(lab: Lab, settings: SweepSettings) -> Sweep:
    number_format = settings.format
    counts = settings.counts or tuple(range(len(changeable_blocks(lab.space, number_format))))
    refuse_keeping_all(lab.space, number_format, counts[-1], remedy="Give smaller --values")
    if counts[-1] == 0:
        raise InputError("a sweep of the threshold needs a number of blocks above 0, which is the baseline")
    lab = treated(lab, {ACTIVATIONS.name: settings.activations})
    by_gain = blocks_by_gain(lab, number_format, lab.seeds.search)
    steps = [(0, 0), *pairwise(sorted({0, *counts}))]
    labs, kept = {str(n): lab for _, n in steps}, {str(n): by_gain[:n] for _, n in steps}
    notes = {str(n): ", ".join(by_gain[before:n]) for before, n in steps}
    return _valued(lab, settings, labs, kept=kept, notes=notes)


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
    for text in settings.texts:
        try:
            scheduler = scheduler_named(pipeline, text, plan.n_steps)
            with exchanged(pipeline, "scheduler", scheduler):
                lab.pipe.sample(replace(plan.first(1), n_steps=1))  # some steps lack arguments
            made[text] = scheduler
        except InputError as error:
            notes.append(f"left out: {error}")
    if len(made) < 2:
        raise InputError(f"fewer than two schedulers can be compared: {'; '.join(notes)}")
    first, stop = next(iter(made)), plan.seeds[-1] + 1
    others = lab.seeds.plan(range(stop, stop + len(plan.seeds)))
    found = {}
    for label, text, seeds in [*((text, text, plan) for text in made), (f"{first}{OTHER_SEEDS}", first, others)]:
        with exchanged(pipeline, "scheduler", made[text]):
            found[label] = _sensitivities(lab, settings, SIGNALS[settings.signal], seeds)
    return _ranked(lab, settings, found, [*combinations(found, 2)], [plan, others], tuple(notes))


def _sensitivities(lab: Lab, settings: SweepSettings, signal: Method[Any], plan: Sampling) -> list[Cost]:
    """What each decision costs at the format by a signal."""
    costs = signal.measure(lab, Task(signal.knobs(), on=plan)).table.costs
    return [cost for cost in costs if cost.format == settings.format]


def _valued(
    lab: Lab,
    settings: SweepSettings,
    labs: Mapping[str, Lab],
    *,
    kept: Mapping[str, Sequence[str]],
    notes: Mapping[str, str],
    tolerance: float = SAME,
) -> Sweep:
    """The SQNR in each lab with some blocks `kept` at 16 bits, paired with the first; the highest again."""
    spaces = {name: one.estimated.space for name, one in labs.items()}
    recipes = {name: hybrid_recipe(space, settings.format, kept.get(name, ())) for name, space in spaces.items()}

    def measured(name: str, plan: Sampling) -> NoisePowers:
        (trial,) = labs[name].measure([recipes[name]], plan)
        return trial.powers

    powers = {name: measured(name, lab.seeds.check) for name in labs}
    baseline, *others = labs
    ahead = {name: paired_difference(powers[name], powers[baseline], tolerance=tolerance).estimate for name in others}
    values = tuple(
        SweptValue(name, spaces[name].paper_bits(recipes[name]), mean_sqnr(power), ahead.get(name), notes.get(name, ""))
        for name, power in powers.items()
    )
    shown = [name for name in others if ahead[name].low > 0]  # to be ahead, if any are
    highest = max(shown or others, key=lambda name: ranked(ahead[name].value))
    # as many fresh seeds again, past those of all other plans: nothing was chosen on them
    n_ranges = max(LEAST_SAMPLES, settings.activations.n_samples)
    first = 1 + max(*lab.seeds.check.seeds, *lab.seeds.more(n_ranges).seeds)
    further = lab.seeds.plan(range(first, first + lab.seeds.settings.n_check_seeds))
    # the baseline first: the reference is then that of the untouched denoiser, not of an equal one up to rounding
    least, best = measured(baseline, further), measured(highest, further)
    again = paired_difference(best, least, tolerance=tolerance).estimate
    confirmed = Confirmation(highest, again, _span(further.seeds))
    return _sweep(lab, settings, [lab.seeds.check], len(others), values=values, confirmed=confirmed)


def _ranked(
    lab: Lab,
    settings: SweepSettings,
    found: Mapping[str, Sequence[Cost]],
    pairs: Sequence[tuple[str, str]],
    plans: Sequence[Sampling],
    notes: tuple[str, ...] = (),
) -> Sweep:
    """Rank correlations of pairs of sensitivities, and the mean standard error of each."""
    values = {label: [cost.cost for cost in costs] for label, costs in found.items()}
    ranks = {(a, b): prediction_quality(values[a], values[b]).srcc for a, b in pairs}
    errors = dict[str, float]()
    for label, costs in found.items():  # to first order [dB]
        known = [_DECIBEL * cost.standard_error / cost.cost for cost in costs if cost.cost > 0]
        errors[label] = sum(known) / len(known) if known else math.nan
    return _sweep(lab, settings, plans, len(pairs), ranks=ranks, errors=errors, notes=notes)


def _sweep(lab: Lab, settings: SweepSettings, plans: Sequence[Sampling], n_comparisons: int, **found: Any) -> Sweep:
    seeds = _span([seed for plan in plans for seed in plan.seeds])
    about = (settings.question, lab.bench.name, str(settings.format), seeds, plans[0].n_steps)
    return Sweep(*about, n_comparisons, **found)


def _span(seeds: Sequence[int]) -> str:
    return f"{min(seeds)} to {max(seeds)}"


@dataclass(frozen=True, slots=True)
class SweptValue:
    """A value of the knob with the SQNR that was measured at it [dB].

    `ahead` is what it is ahead of the baseline, paired [dB]; None for the baseline. `note` says what the value did.
    """

    value: str
    paper_bits: float
    sqnr_db: Estimate
    ahead: Estimate | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What the highest value is ahead of the baseline on further `seeds`, on which it was not chosen, paired [dB]."""

    value: str
    ahead: Estimate
    seeds: str


@dataclass(frozen=True)
class Sweep:
    """The answer: `values` of a knob, the first of them the baseline, of which the highest is `confirmed`; or `ranks`.

    `ranks` are rank correlations (Spearman) of the costs of decisions, measured in two ways, `errors` the standard
    errors of those costs, as the mean over decisions [dB]. `n_comparisons` were looked at, each with its own interval.
    """

    question: str
    source: str
    number_format: str
    seeds: str
    n_steps: int
    n_comparisons: int
    values: tuple[SweptValue, ...] = ()
    ranks: Mapping[tuple[str, str], Estimate] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    confirmed: Confirmation | None = None

    def as_json(self) -> object:
        """Plain values by name."""
        ranks = [{"first": first, "second": second, "srcc": srcc} for (first, second), srcc in self.ranks.items()]
        return to_plain({**vars(self), "ranks": ranks})


@dataclass(frozen=True, slots=True)
class _Question:
    """How it is answered, its usual format and values, and what people read.

    That is what it is called, its knob, how its answer came about, and a value of the knob in a sentence.
    """

    answer: Callable[[Lab, SweepSettings], Sweep]
    number_format: str
    values: tuple[str, ...]
    title: str
    knob: str
    about: str
    phrase: str = ""


_QUESTIONS: Mapping[str, _Question] = {
    "alpha": _Question(
        _alpha,
        "uaq8a8",
        ("0.5", "0.6", "0.7", "0.8", "0.9"),
        "SmoothQuant's alpha",
        "alpha",
        "Alpha says how much of an input's range moves into the weights. For each alpha the same layers are smoothed, "
        "the format is fitted to the smoothed weights, and the result is compared with full precision; the baseline is "
        "not smoothed.",
        "alpha {}",
    ),
    "calibration": _Question(
        _calibration,
        "uaq8a8",
        (),  # as many as the trajectory has steps
        "One-step against multi-step calibration",
        "steps calibrated at",
        "Static ranges of activations are taken from so many steps of the model's own trajectory, from the first (most "
        "noise) on; the baseline has the range of each token or image instead.",
        "ranges from {} steps",
    ),
    "threshold": _Question(
        _threshold,
        "uaq4",
        (),  # all numbers of blocks
        "How many blocks stay at 16 bits",
        "blocks at 16 bits",
        "Blocks are ranked by what each gains when it alone stays at 16 bits, on other seeds than these; then the "
        "first ones stay. The baseline keeps none.",
        "{} blocks at 16 bits",
    ),
    "samples": _Question(
        _samples,
        "uaq4",
        ("8", "16", "32", "64", "128"),
        "Samples for local SQNR",
        "samples",
        "The noise of the format at each layer's own output, from sets of samples that share none, ranked against the "
        "largest set.",
    ),
    "schedulers": _Question(
        _schedulers,
        "uaq4",
        SCHEDULERS,
        "Sensitivity under other noise schedulers",
        "scheduler",
        "The sensitivity of every decision, measured on the trajectories of each scheduler from the same noise. The "
        "same scheduler on other seeds shows what agreement sampling alone allows.",
    ),
}


def sweep_page(sweep: Sweep) -> Page:
    """All that a sweep tells, as a page."""
    s, words = sweep, _QUESTIONS[sweep.question]
    about = (
        f"{words.about} All of it with {name(s.number_format)}, {s.n_steps} step{'' if s.n_steps == 1 else 's'}, seeds "
        f"{s.seeds}."
    )
    return page_of(
        f"{words.title} on {s.source}",
        headline(s),
        Text(about),
        _figure(s, words.knob),
        *(_values(s, words.knob) if s.values else _ranks(s, words.knob)),
        Items(s.notes),
        name="answer",
        part=words.title,
    )


def _values(sweep: Sweep, knob: str) -> Iterator[Block]:
    n = sweep.n_comparisons
    titles = columns(
        knob, ("paper bits", "fine bits"), "SQNR [dB]", "ahead of the baseline [dB]", ("verdict", "verdict")
    )
    if any(v.note for v in sweep.values):
        titles += columns("kept besides" if sweep.question == "threshold" else "what it did")
    lines = ((v.value, v.paper_bits, v.sqnr_db, v.ahead, verdict(v.ahead), v.note) for v in sweep.values)
    yield Table(
        titles,
        tuple(Row(line[: len(titles)], line[3] is None) for line in lines),
        f"{n} paired difference{'' if n == 1 else 's'} to the baseline, each with its own 95 % interval: of so many, "
        f"{0.05 * n:.1f} would miss zero by chance alone. The highest of several is flattered by having been chosen: "
        "see below.",
    )
    if (again := sweep.confirmed) is not None:
        text, limits = said(again.ahead)
        yield Text(
            f"Measured again on seeds {again.seeds}, on which nothing was chosen, {name(again.value)} is *{text} dB* "
            f"{limits} ahead of the baseline."
        )


def _ranks(sweep: Sweep, knob: str) -> Iterator[Block]:
    n = sweep.n_comparisons
    yield Table(
        columns(knob, "against", "rank correlation", "decisions"),
        rows((first, second, srcc, srcc.n) for (first, second), srcc in sweep.ranks.items()),
        f"{n} rank correlation{'' if n == 1 else 's'} (Spearman) of sensitivities, each with its own 95 % interval "
        "over the choice of decisions.",
    )
    yield Table(
        columns(knob, "mean standard error [dB]"),
        rows(sweep.errors.items()),
        "Standard error of a decision's sensitivity over samples, mean over decisions.",
    )


def headline(sweep: Sweep) -> str:
    """The answer in a sentence, which says of what was chosen what it is worth on seeds on which it was not chosen."""
    if (highest := sweep.confirmed) is not None:
        baseline, value = sweep.values[0], _QUESTIONS[sweep.question].phrase.format(f"`{highest.value}`")
        better = "" if highest.ahead.low > 0 else "nothing is shown to be better, "
        return (
            f"The baseline, `{baseline.value}`, has {with_error(baseline.sqnr_db, 'dB')}; {better}highest is {value}, "
            f"{with_error(highest.ahead, 'dB', signed=True)} on further seeds."
        )
    if sweep.question == "schedulers":
        values = {pair: srcc.value for pair, srcc in sweep.ranks.items()}
        itself = next((one, again) for one, again in values if again == f"{one}{OTHER_SEEDS}")
        lowest = min((p for p in values if not p[1].endswith(OTHER_SEEDS)), key=lambda pair: ranked(values[pair]))
        return (
            f"Between schedulers the rank correlation is at least {number(values[lowest])} (`{lowest[0]}` and "
            f"`{lowest[1]}`); of `{itself[0]}` with itself on other seeds it is {number(values[itself])}."
        )
    told = (f"{number(r.value, r.standard_error)} from {fewer}" for (fewer, _), r in sweep.ranks.items())
    return f"Rank correlation with {next(iter(sweep.ranks))[1]} samples: {', '.join(told)} samples."


def _figure(sweep: Sweep, knob: str) -> Figure | None:
    """SQNR at each value, and what each gains on the baseline; or how sensitivities agree, and their errors."""
    same = "1 is the same order of decisions, 0 none."
    if sweep.question == "schedulers":
        return ranks_matrix([*sweep.errors], {pair: srcc.value for pair, srcc in sweep.ranks.items()}, same)
    levels: tuple[tuple[float, str], ...] = ()
    if sweep.values:
        if not any(math.isfinite(v.sqnr_db.value) for v in sweep.values):
            return None
        above = {v.value: v.sqnr_db for v in sweep.values}
        below = {v.value: v.ahead for v in sweep.values if v.ahead is not None}
        scales = Axis("SQNR [dB]"), Axis("ahead of the\nbaseline [dB]")
        baseline, title, unit = sweep.values[0].sqnr_db.value, f"SQNR by {knob}", " dB"
        levels = ((baseline, "baseline"),) if math.isfinite(baseline) else ()
        caption = (
            "Above, SQNR of the final latents, higher is better; below, what each value is ahead of the baseline on "
            "the same seeds, which is sharper because seeds differ more than values do. Bars are 95 % intervals of the "
            "mean over seeds."
        )
    else:
        above = {first: srcc for (first, _), srcc in sweep.ranks.items()}
        below = {one: only(error) for one, error in sweep.errors.items()}
        errors = Axis("mean standard error\nof local SQNR [dB]", low=0.0, high=1.1 * max(sweep.errors.values()))
        scales = Axis("rank correlation\nwith the largest set"), errors
        title, unit = f"Agreement of sensitivities by {knob}", ""
        caption = f"{same} Bars are 95 % intervals over the choice of decisions."
    names = list(dict.fromkeys([*above, *below]))
    places = Axis(knob, named(names), are_turned=sum(map(len, names)) > 80)
    upper, lower = (Series(tuple(found.get(one, only(math.nan)) for one in names)) for found in (above, below))
    panels = Plot((upper,), places, scales[0], levels), Plot((lower,), places, scales[1], zero=bool(sweep.values))
    description = "; ".join(f"{one} {number(value.value)}{unit}" for one, value in above.items())
    return Figure("sweep", title, description, panels, _HEIGHT, caption)


def ranks_matrix(names: Sequence[str], srcc: Mapping[tuple[str, str], float], caption: str) -> Figure:
    """Rank correlation of every two sensitivities as a matrix with its numbers; one that is none is left empty."""
    matrix, index = np.full((len(names), len(names)), math.nan), {one: i for i, one in enumerate(names)}
    np.fill_diagonal(matrix, 1.0)
    for (first, second), value in srcc.items():
        matrix[index[first], index[second]] = matrix[index[second], index[first]] = value
    places = Axis(ticks=named([one.replace(", ", ",\n") for one in names]))
    limits = math.floor(10 * float(np.nanmin(matrix))) / 10, 1.0
    panel = Heat(matrix, places, places, "rank correlation", limits, is_written=True)
    description = "; ".join(f"{a} and {b} {number(value)}" for (a, b), value in srcc.items())
    return Figure("sweep", "Rank correlation of sensitivities", description, (panel,), 60 + _ROW * len(names), caption)


JOB = Job(__doc__, SweepSettings, run, sweep_page)
