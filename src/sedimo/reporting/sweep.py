"""What a sweep found, and its page: one question, a picture, the same as a table, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sedimo.metrics.estimate import Estimate, ranked
from sedimo.reporting.figures import Axis, Chart, Heat, Plot, Series, named, only
from sedimo.reporting.page import Block, Figure, Items, Page, Row, Table, Text, columns, page_of, rows
from sedimo.reporting.words import name, number, said, verdict, with_error

OTHER_SEEDS = ", other seeds"  # of a scheduler that is compared with itself
_SCHEDULERS = "schedulers"  # the question that has a matrix
_HEIGHT = 430
_ROW = 74  # of the matrix [px]


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


@dataclass(frozen=True, slots=True)
class SweptRanks:
    """Rank correlation (Spearman) of the costs of `srcc.n` decisions, measured in two ways."""

    first: str
    second: str
    srcc: Estimate


@dataclass(frozen=True)
class Sweep:
    """The answer: `values` of a knob, the first of them the baseline, or `ranks` of sensitivities.

    `errors` are the standard errors of those sensitivities, as the mean over decisions [dB]. Values were measured on
    `seeds` in `n_steps`; `n_comparisons` were looked at, each with its own interval.
    The highest value is `confirmed` on further seeds.
    """

    question: str
    source: str
    number_format: str
    seeds: str
    n_steps: int
    n_comparisons: int
    values: tuple[SweptValue, ...] = ()
    ranks: tuple[SweptRanks, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    confirmed: Confirmation | None = None


@dataclass(frozen=True, slots=True)
class _Words:
    """What a question is called, its knob, how its answer came about, and a value of the knob in a sentence."""

    title: str
    knob: str
    about: str
    phrase: str = ""


_WORDS: Mapping[str, _Words] = {
    "alpha": _Words(
        "SmoothQuant's alpha",
        "alpha",
        "Alpha says how much of an input's range moves into the weights. For each alpha the same layers are smoothed, "
        "the format is fitted to the smoothed weights, and the result is compared with full precision; the baseline is "
        "not smoothed.",
        "alpha {}",
    ),
    "calibration": _Words(
        "One-step against multi-step calibration",
        "steps calibrated at",
        "Static ranges of activations are taken from so many steps of the model's own trajectory, from the first (most "
        "noise) on; the baseline has the range of each token or image instead.",
        "ranges from {} steps",
    ),
    "threshold": _Words(
        "How many blocks stay at 16 bits",
        "blocks at 16 bits",
        "Blocks are ranked by what each gains when it alone stays at 16 bits, on other seeds than these; then the "
        "first ones stay. The baseline keeps none.",
        "{} blocks at 16 bits",
    ),
    "samples": _Words(
        "Samples for local SQNR",
        "samples",
        "The noise of the format at each layer's own output, from sets of samples that share none, ranked against the "
        "largest set.",
    ),
    _SCHEDULERS: _Words(
        "Sensitivity under other noise schedulers",
        "scheduler",
        "The sensitivity of every decision, measured on the trajectories of each scheduler from the same noise. The "
        "same scheduler on other seeds shows what agreement sampling alone allows.",
    ),
}


def sweep_page(sweep: Sweep) -> Page:
    """All that a sweep tells, as a page."""
    s, words = sweep, _WORDS[sweep.question]
    about = (
        f"{words.about} All of it with {name(s.number_format)}, {s.n_steps} step{'' if s.n_steps == 1 else 's'}, seeds "
        f"{s.seeds}."
    )
    caption = (
        "Above, SQNR of the final latents, higher is better; below, what each value is ahead of the baseline on the "
        "same seeds, which is sharper because seeds differ more than values do. Bars are 95 % intervals of the mean "
        "over seeds."
    )
    if not s.values:
        bars = " Bars are 95 % intervals over the choice of decisions." if s.question == "samples" else ""
        caption = f"1 is the same order of decisions, 0 none.{bars}"
    chart = _chart(s, words.knob)
    return page_of(
        f"{words.title} on {s.source}",
        headline(s),
        Text(about),
        None if chart is None else Figure(chart, caption),
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
        rows((r.first, r.second, r.srcc, r.srcc.n) for r in sweep.ranks),
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
        baseline, value = sweep.values[0], _WORDS[sweep.question].phrase.format(f"`{highest.value}`")
        better = "" if highest.ahead.low > 0 else "nothing is shown to be better, "
        return (
            f"The baseline, `{baseline.value}`, has {with_error(baseline.sqnr_db, 'dB')}; {better}highest is {value}, "
            f"{with_error(highest.ahead, 'dB', signed=True)} on further seeds."
        )
    if sweep.question == _SCHEDULERS:
        again = next(r for r in sweep.ranks if r.second == f"{r.first}{OTHER_SEEDS}")
        between = (r for r in sweep.ranks if not r.second.endswith(OTHER_SEEDS))
        lowest = min(between, key=lambda r: ranked(r.srcc.value))
        return (
            f"Between schedulers the rank correlation is at least {number(lowest.srcc.value)} (`{lowest.first}` and "
            f"`{lowest.second}`); of `{again.first}` with itself on other seeds it is {number(again.srcc.value)}."
        )
    told = ", ".join(f"{number(r.srcc.value, r.srcc.standard_error)} from {r.first}" for r in sweep.ranks)
    return f"Rank correlation with {sweep.ranks[0].second} samples: {told} samples."


def highest_value(values: Sequence[SweptValue]) -> str:
    """The value that is most ahead of the baseline; of those that are shown to be ahead, if any are."""
    paired = [(v.value, v.ahead) for v in values if v.ahead is not None]
    shown = [(value, ahead) for value, ahead in paired if ahead.low > 0]
    return max(shown or paired, key=lambda pair: ranked(pair[1].value))[0]


def _chart(sweep: Sweep, knob: str) -> Chart | None:
    """SQNR at each value, and what each gains on the baseline; or how sensitivities agree, and their errors."""
    if sweep.question == _SCHEDULERS:
        return ranks_matrix([*sweep.errors], {(r.first, r.second): r.srcc.value for r in sweep.ranks})
    levels: tuple[tuple[float, str], ...] = ()
    if sweep.values:
        if not any(math.isfinite(v.sqnr_db.value) for v in sweep.values):
            return None
        above = {v.value: v.sqnr_db for v in sweep.values}
        below = {v.value: v.ahead for v in sweep.values if v.ahead is not None}
        scales = Axis("SQNR [dB]"), Axis("ahead of the\nbaseline [dB]")
        baseline, title, unit = sweep.values[0].sqnr_db.value, f"SQNR by {knob}", " dB"
        levels = ((baseline, "baseline"),) if math.isfinite(baseline) else ()
    else:
        above = {r.first: r.srcc for r in sweep.ranks}
        below = {one: only(error) for one, error in sweep.errors.items()}
        most = 1.1 * max(sweep.errors.values())
        scales = (
            Axis("rank correlation\nwith the largest set"),
            Axis("mean standard error\nof local SQNR [dB]", low=0.0, high=most),
        )
        title, unit = f"Agreement of sensitivities by {knob}", ""
    names = list(dict.fromkeys([*above, *below]))
    places = Axis(knob, named(names), are_turned=sum(map(len, names)) > 80)
    lines = (Series(tuple(found.get(one, only(math.nan)) for one in names)) for found in (above, below))
    panels = (
        Plot((next(lines),), places, scales[0], levels),
        Plot((next(lines),), places, scales[1], zero=bool(sweep.values)),
    )
    description = "; ".join(f"{one} {number(value.value)}{unit}" for one, value in above.items())
    return Chart("sweep", title, description, panels, _HEIGHT)


def ranks_matrix(names: Sequence[str], srcc: Mapping[tuple[str, str], float]) -> Chart:
    """Rank correlation of every two sensitivities as a matrix with its numbers; one that is none is left empty."""
    matrix, index = np.full((len(names), len(names)), math.nan), {one: i for i, one in enumerate(names)}
    np.fill_diagonal(matrix, 1.0)
    for (first, second), value in srcc.items():
        matrix[index[first], index[second]] = matrix[index[second], index[first]] = value
    places = Axis(ticks=named([one.replace(", ", ",\n") for one in names]))
    panel = Heat(
        matrix,
        places,
        places,
        "rank correlation",
        (math.floor(10 * float(np.nanmin(matrix))) / 10, 1.0),
        is_written=True,
    )
    description = "; ".join(f"{a} and {b} {number(value)}" for (a, b), value in srcc.items())
    return Chart("sweep", "Rank correlation of sensitivities", description, (panel,), 60 + _ROW * len(names))
