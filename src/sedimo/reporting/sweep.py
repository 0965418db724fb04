"""What a sweep found, and its page: one question, a picture, the same as a table, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from sedimo.codec import to_plain
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.pipelines.folder import write_file
from sedimo.reporting.comparison import verdict
from sedimo.reporting.explanation_tables import figure
from sedimo.reporting.html import Theme, page
from sedimo.reporting.rounding import number, with_error
from sedimo.reporting.sweep_charts import ranks_chart, ranks_matrix, values_chart

OTHER_SEEDS = ", other seeds"  # of a scheduler that is compared with itself
_SCHEDULERS = "schedulers"  # the question that has a matrix


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
    values: tuple[SweptValue, ...]
    ranks: tuple[SweptRanks, ...]
    errors: Mapping[str, float]
    notes: tuple[str, ...]
    confirmed: Confirmation | None = None

    def as_json(self) -> Mapping[str, object]:
        """Plain values; scripts may rely on the names (see docs/cli.md)."""
        plain: dict[str, object] = to_plain(self)
        return plain


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


def write_sweep(sweep: Sweep, path: Path) -> None:
    """Writes the page; an existing file is replaced at once or not at all."""
    write_file(path, render_sweep(sweep).encode())


def render_sweep(sweep: Sweep, *, theme: Theme | None = None) -> str:
    """The page as HTML text; `theme` fixes light or dark, which is otherwise the reader's setting."""
    words = _WORDS[sweep.question]
    values = [
        (v.value, f"{v.paper_bits:.3f}", figure(v.sqnr_db), v.ahead and figure(v.ahead), verdict(v.ahead), v.note)
        for v in sweep.values
    ]
    return page(
        "sweep.html.j2",
        {
            "s": sweep,
            "theme": theme,
            "words": words,
            "headline": headline(sweep),
            "chart": Markup(_chart(sweep, words.knob)),  # texts in it are escaped
            "values": values,
            "again": sweep.confirmed and figure(sweep.confirmed.ahead),
            "has_notes": any(v.note for v in sweep.values),
            "ranks": [(r.first, r.second, figure(r.srcc), r.srcc.n) for r in sweep.ranks],
            "errors": [(name, number(error)) for name, error in sweep.errors.items()],
        },
    )


def headline(sweep: Sweep) -> str:
    """The answer in a sentence."""
    if sweep.confirmed is not None:
        return _confirmed_value(sweep, sweep.confirmed)
    if sweep.question == _SCHEDULERS:
        return _least_agreement(sweep)
    told = ", ".join(f"{number(r.srcc.value, r.srcc.standard_error)} from {r.first}" for r in sweep.ranks)
    return f"Rank correlation with {sweep.ranks[0].second} samples: {told} samples."


def highest_value(values: Sequence[SweptValue]) -> str:
    """The value that is most ahead of the baseline; of those that are shown to be ahead, if any are."""
    paired = [(v.value, v.ahead) for v in values if v.ahead is not None]
    shown = [(value, ahead) for value, ahead in paired if ahead.low > 0]
    return max(shown or paired, key=lambda pair: ranked(pair[1].value))[0]


def _confirmed_value(sweep: Sweep, confirmed: Confirmation) -> str:
    """The baseline, and what the value that is highest beside it is worth on seeds on which it was not chosen."""
    baseline = sweep.values[0]
    start = f"The baseline, `{baseline.value}`, has {with_error(baseline.sqnr_db, 'dB')}"
    value = _WORDS[sweep.question].phrase.format(f"`{confirmed.value}`")
    ahead = f"{with_error(confirmed.ahead, 'dB', signed=True)} on further seeds"
    if confirmed.ahead.low > 0:
        return f"{start}; highest is {value}, {ahead}."
    return f"{start}; nothing is shown to be better, highest is {value}, {ahead}."


def _least_agreement(sweep: Sweep) -> str:
    """Which two schedulers differ most, beside what another choice of seeds does."""
    again = next(r for r in sweep.ranks if r.second == f"{r.first}{OTHER_SEEDS}")
    lowest = min((r for r in sweep.ranks if not r.second.endswith(OTHER_SEEDS)), key=lambda r: ranked(r.srcc.value))
    return (
        f"Between schedulers the rank correlation is at least {number(lowest.srcc.value)} (`{lowest.first}` and "
        f"`{lowest.second}`); of `{again.first}` with itself on other seeds it is {number(again.srcc.value)}."
    )


def _chart(sweep: Sweep, knob: str) -> str:
    if sweep.values:
        ahead = [v.ahead for v in sweep.values]
        return values_chart([v.value for v in sweep.values], [v.sqnr_db for v in sweep.values], ahead, knob=knob)
    if sweep.question == _SCHEDULERS:
        return ranks_matrix([*sweep.errors], {(r.first, r.second): r.srcc.value for r in sweep.ranks})
    return ranks_chart(sweep.errors, {r.first: r.srcc for r in sweep.ranks}, knob=knob)
