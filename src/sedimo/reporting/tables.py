"""The rows of the report's tables, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sedimo.metrics.estimate import Estimate, normal_estimate
from sedimo.reporting.phrasing import cost_sentences
from sedimo.reporting.prediction import Entrant
from sedimo.reporting.rounding import MINUS, bits, byte_size, count, interval, number, share, with_error
from sedimo.reporting.summary import MEASURES, DecisionRow, DifferenceRow, RecipeRow, Step, Summary
from sedimo.reporting.theme import bit_level

_WIDE_SHARE = 0.12  # narrower parts of the bar have no text
_VERDICTS = {"better": "better", "worse": "worse", "open": "no difference shown"}


@dataclass(frozen=True, slots=True)
class BarPart:
    """One part of the bar of all weights."""

    level: int
    weight: float
    text: str
    is_wide: bool


@dataclass(frozen=True, slots=True)
class DecisionLine:
    """One line of the table of all decisions."""

    name: str
    shared: int
    format: str
    level: int
    shape: str
    stored: str
    cost: str
    share: str
    larger: str
    smaller: str


@dataclass(frozen=True, slots=True)
class Value:
    """A figure and the number of samples behind it."""

    text: str
    n: int


@dataclass(frozen=True, slots=True)
class RecipeLine:
    """One line of the comparison."""

    name: str
    bits: str
    stored: str
    values: tuple[Value, ...]
    note: str
    is_this: bool


@dataclass(frozen=True, slots=True)
class DifferenceLine:
    """One line of the paired differences."""

    other: str
    measure: str
    value: str
    interval: str
    n: int
    verdict: str
    words: str


@dataclass(frozen=True, slots=True)
class EntrantLine:
    """One line of the recipes that the result was chosen among."""

    name: str
    stored: str
    predicted: str
    searched: str
    final: str
    is_winner: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the part about costs shows."""

    is_shown: bool
    sentences: tuple[str, ...]
    measures: tuple[Value, ...]
    rows: tuple[RecipeLine, ...]
    differences: tuple[DifferenceLine, ...]
    entrants: tuple[EntrantLine, ...]
    has_notes: bool
    has_beside: bool
    bops_limit: str
    agreement: str


def bits_bar(summary: Summary) -> tuple[BarPart, ...]:
    """The share of the weights at each number of bits."""
    weights: dict[int, int] = {}
    for row in summary.decisions:
        weights[row.format.bits] = weights.get(row.format.bits, 0) + row.params
    parts = [(n, weights[n] / summary.sizes.params) for n in sorted(weights)]
    return tuple(BarPart(bit_level(n), part, f"{n} bits {share(part)}", part >= _WIDE_SHARE) for n, part in parts)


def decision_lines(summary: Summary) -> tuple[DecisionLine, ...]:
    """All decisions in the order of the denoiser."""
    return tuple(_decision_line(row) for row in summary.decisions)


def comparison(summary: Summary) -> Comparison:
    """Measured recipes, paired differences and whether costs add up."""
    evidence = summary.evidence
    shown = _shown_recipes(evidence.recipes)
    measures = [m for m in MEASURES if any(m in row.measures for row in shown)]
    common = {m: _common_n([row.measures[m] for row in shown if m in row.measures]) for m in measures}
    agreement = evidence.agreement
    return Comparison(
        is_shown=bool(shown or evidence.differences or agreement or evidence.pictures or len(evidence.frontier) > 1),
        sentences=cost_sentences(summary),
        measures=tuple(Value(_title(m), common[m]) for m in measures),
        rows=tuple(_recipe_line(row, common) for row in shown) if measures else (),
        differences=tuple(_difference_line(row) for row in evidence.differences),
        entrants=tuple(_entrant_line(one) for one in evidence.entrants),
        has_notes=any(row.note for row in shown),
        has_beside=bool(evidence.beside_frontier),
        bops_limit="" if summary.choice.budget_bops is None else count(summary.choice.budget_bops),
        agreement=f"{agreement.n} {evidence.agreement_of}." if agreement else "",
    )


def _decision_line(row: DecisionRow) -> DecisionLine:
    return DecisionLine(
        name=row.name,
        shared=len(row.layers) - 1,
        format=str(row.format),
        level=bit_level(row.format.bits),
        shape="\N{MULTIPLICATION SIGN}".join(map(str, row.shape)),
        stored=byte_size(row.stored_bytes),
        cost=with_error(normal_estimate(row.cost, row.standard_error, row.n)),
        share="" if row.share is None else share(row.share),
        larger=_step(row.larger),
        smaller=_step(row.smaller),
    )


def _step(step: Step | None) -> str:
    if step is None:
        return ""
    change = number(step.cost_change, signed=True) if step.noise_db is None else _relative(step.noise_db)
    size = byte_size(step.stored_bytes_change)
    return f"{step.format}: {change}, {'' if step.stored_bytes_change < 0 else '+'}{size}"


def _relative(noise_db: float) -> str:
    """A change of the noise in percent, with its sign."""
    change = 10 ** (noise_db / 10) - 1
    return f"{'+' if change > 0 else MINUS}{share(abs(change))}"


def _shown_recipes(recipes: Sequence[RecipeRow]) -> list[RecipeRow]:
    """This one first; of the random ones the best, which stands for the rest."""
    random = [row for row in recipes if row.kind == "random" and "sqnr_db" in row.measures]
    best = max(random, key=lambda row: row.measures["sqnr_db"].value, default=None)
    others = [row for row in recipes if row.kind not in ("this", "random")]
    first = [row for row in recipes if row.kind == "this"]
    if best is not None:
        name = f"best of {len(random)} random recipes" if len(random) > 1 else best.name
        others.append(RecipeRow(name, "random", best.paper_bits, best.stored_bits, best.measures, best.note))
    return [*first, *others]


def _common_n(estimates: Sequence[Estimate]) -> int:
    """The number of samples if all have the same, else 0: then every value tells its own."""
    found = {estimate.n for estimate in estimates}
    return found.pop() if len(found) == 1 else 0


def _recipe_line(row: RecipeRow, common: Mapping[str, int]) -> RecipeLine:
    values = tuple(
        Value(with_error(row.measures[m]), 0 if n else row.measures[m].n) if m in row.measures else Value("", 0)
        for m, n in common.items()
    )
    stored = "" if row.stored_bits is None else bits(round(row.stored_bits, 2))
    is_this = row.kind == "this"
    name = f"{row.name} (this report)" if is_this else row.name
    return RecipeLine(name, bits(round(row.paper_bits, 2)), stored, values, row.note, is_this)


def _difference_line(row: DifferenceRow) -> DifferenceLine:
    measure, difference = MEASURES[row.measure], row.difference
    value = number(difference.value, difference.standard_error, signed=True)
    return DifferenceLine(
        other=f"{row.other} (best of {row.n_comparisons})" if row.n_comparisons > 1 else row.other,
        measure=_title(row.measure),
        value=value,
        interval=interval(difference, measure.unit),
        n=difference.n,
        verdict=row.verdict,
        words=_VERDICTS[row.verdict],
    )


def _entrant_line(one: Entrant) -> EntrantLine:
    return EntrantLine(
        name=one.name,
        stored=bits(round(one.stored_bits, 2)),
        predicted="" if one.predicted_db is None else number(one.predicted_db, 0.5),
        searched=with_error(one.searched),
        final="" if one.final is None else with_error(one.final),
        is_winner=one.is_winner,
    )


def _title(measure: str) -> str:
    found = MEASURES[measure]
    arrow = "↑" if found.is_higher_better else "↓"
    return f"{found.title}{f' [{found.unit}]' if found.unit else ''} {arrow}"
