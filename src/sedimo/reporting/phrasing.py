"""Sentences derived from a summary, for people who have not read the papers.

Every sentence states its numbers. Names stand between backticks; who shows the sentence turns them into code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from sedimo import methods
from sedimo.allocation.combine import Agreement
from sedimo.allocation.effects import SIGNED
from sedimo.methods.prediction import Prediction
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import decibel
from sedimo.quant.formats import FP16, FULL_BITS
from sedimo.reporting.page import Tile
from sedimo.reporting.summary import MEASURES, DecisionRow, DifferenceRow, Summary
from sedimo.reporting.words import (
    bits,
    byte_size,
    family_words,
    interval,
    joined,
    name,
    number,
    share,
    with_error,
)
from sedimo.treatments.learned_rounding import LearnedRounding

_N_SPARED = 3
_TINY_DB = 0.1
_LEAST_SHARE = 1e-5  # a smaller gap is said as this one


def noise_estimate_db(noise: Estimate) -> Estimate:
    """SQNR of an estimated noise power [dB], with its error by the derivative."""
    value = decibel(noise.value)
    if not math.isfinite(value) or not noise.standard_error > 0:
        return Estimate(value, noise.standard_error, -math.inf, math.inf, noise.n)
    error = 10 / math.log(10) * noise.standard_error / noise.value
    half = error * (noise.high - noise.low) / (2 * noise.standard_error)
    return Estimate(value, error, value - half, value + half, noise.n)


def headline(summary: Summary) -> str:
    """The answer in one sentence."""
    sizes = summary.sizes
    text = (
        f"{name(summary.model)} keeps {bits(round(sizes.paper_bits, 2))} of 16 bits per weight: its {sizes.n_layers} "
        f"weight layers shrink from {byte_size(sizes.fp16_bytes)} to {byte_size(sizes.stored_bytes)}"
    )
    sqnr = summary.measured("sqnr_db")
    if sqnr is None:
        return f"{text}."
    if math.isinf(sqnr.value):
        return f"{text}, and its output does not change at all."
    quality = f"{text}, and the noise in its output is {share(10 ** (-sqnr.value / 10))} of the signal"
    best = _best_uniform(summary)
    if best is not None and best.verdict == "better":
        return (
            f"{quality}, {number(best.difference.value, best.difference.standard_error)} dB better than {best.other}."
        )
    return f"{quality}."


def tiles(summary: Summary) -> tuple[Tile, ...]:
    """The four numbers of the first screen; which ones depends on what was measured."""
    sizes = summary.sizes
    found = [
        Tile(
            bits(round(sizes.paper_bits, 2)),
            "bits",
            "per weight, down from 16",
            f"in the papers' accounting; {bits(round(sizes.stored_bits, 2))} as stored",
        ),
        Tile(
            f"{number(sizes.ratio)}\N{MULTIPLICATION SIGN}",
            "smaller",
            f"{byte_size(sizes.fp16_bytes)} → {byte_size(sizes.stored_bytes)}",
            _file_note(summary),
        ),
        _signal_tile(summary),
        _last_tile(summary),
    ]
    return tuple(tile for tile in found if tile is not None)


def decision_sentences(summary: Summary) -> tuple[str, ...]:
    """What was decided: methods, extremes, and how sure it is that nothing better exists."""
    return tuple(
        s
        for s in (
            _methods_sentence(summary),
            _activations_sentence(summary),
            _range_sentence(summary),
            _certificate(summary),
            _rounding_sentence(summary.evidence.rounding),
        )
        if s is not None
    )


def reason_sentences(summary: Summary) -> tuple[str, ...]:
    """Why: layers that were spared, operations that gave most, where the remaining noise comes from."""
    found = [*_spared(summary), _thriftiest(summary), _concentration(summary), _next_bits(summary)]
    return tuple(sentence for sentence in found if sentence is not None)


def cost_sentences(summary: Summary) -> tuple[str, ...]:
    """What it cost: each difference with its verdict, and whether predictions can be trusted."""
    evidence = summary.evidence
    judged = (prediction_sentence(summary.evidence.prediction), _entrants_sentence(summary))
    found = [*filter(None, judged), *(difference_sentence(row) for row in evidence.differences)]
    if evidence.scaling is not None:
        found.append(
            "Not every format was measured; the costs of the others were scaled by weight error. "
            + _agreement_sentence(evidence.scaling, "formats of single layers that were measured to check this")
        )
    if evidence.agreement is not None:
        how = (
            "Effects of layers were added up with their signs. "
            if summary.choice.rule == SIGNED
            else "The costs were added up on the assumption that noise adds. "
        )
        found.append(how + _agreement_sentence(evidence.agreement, evidence.agreement_of))
    return tuple(found)


def warning_sentences(summary: Summary) -> tuple[str, ...]:
    """What a reader has to know before trusting the predicted figures; empty where they proved right."""
    found = summary.evidence.prediction
    return () if found is None else prediction_warnings(found)


def prediction_warnings(found: Prediction) -> tuple[str, ...]:
    """What to beware of where a prediction proved wrong."""
    if found.is_trusted or found.measured_db is None:
        return ()
    more = "more" if found.difference_db < 0 else "less"
    text = (
        f"The prediction is off by {number(abs(found.difference_db))} dB: the recipe has {more} noise than predicted. "
        "Predicted figures on this page, of single layers and of other budgets, are as uncertain."
    )
    if not found.blamed:
        return (text,)
    parts = [
        f"{name(b.decision)} at {name(b.format)} ({_decibels(b.predicted_db)} predicted, {_decibels(b.measured_db)} "
        "measured)"
        for b in found.blamed
    ]
    blamed = f"Of the decisions tried, these explain most of it; in brackets, what 16 bits would gain: {joined(parts)}."
    return text, blamed


def _decibels(value: float) -> str:
    return f"{number(value, 0.05, signed=True)} dB"


def prediction_sentence(found: Prediction | None) -> str:
    """What was predicted of a recipe, and what was measured."""
    if found is None or not math.isfinite(found.predicted_db.value):
        return ""
    text = f"Before it was measured, the recipe's SQNR was predicted to be {with_error(found.predicted_db)} dB"
    if found.measured_db is None:
        return f"{text}; it was not measured."
    return (
        f"{text}; measured on {found.measured_db.n} fresh seeds it is {with_error(found.measured_db)} dB, "
        f"{number(abs(found.difference_db), 0.05)} dB {'more' if found.difference_db > 0 else 'less'}."
    )


def _entrants_sentence(summary: Summary) -> str | None:
    entrants = summary.evidence.entrants
    if len(entrants) < 2:
        return None
    winner = next((e for e in entrants if e.is_winner), None)
    finalists = sum(e.final is not None for e in entrants)
    if winner is None or not finalists:
        return None
    return (
        f"{len(entrants)} recipes were measured, and {finalists} of them again on seeds that nothing was searched on; "
        f"{name(winner.name)} won."
    )


def _agreement_sentence(agreement: Agreement, pairs: str) -> str:
    return (
        f"Over {agreement.n} {pairs} the measured noise is {number(agreement.ratio)} times the predicted one on "
        f"average, the ranks agree by {number(agreement.srcc)} (1 is perfect), and tenfold predicted noise goes with "
        f"{number(10**agreement.slope)}-fold measured noise."
    )


def difference_sentence(row: DifferenceRow) -> str:
    """One paired comparison in words, with what its interval allows to say."""
    measure, difference = MEASURES[row.measure], row.difference
    size = with_error(Estimate(abs(difference.value), difference.standard_error, *_unsigned(difference), difference.n))
    better = (difference.value > 0) == measure.is_higher_better
    text = (
        f"{measure.title} is {size}{' ' + measure.unit if measure.unit else ''} {'better' if better else 'worse'} than "
        f"that of {row.other} on the same {difference.n} samples"
    )
    if row.verdict == "no difference shown":
        return (
            f"{text}; the 95 % interval ({interval(difference, measure.unit)}) holds zero, so no difference is shown."
        )
    return f"{text} (95 % interval {interval(difference, measure.unit)})."


def _cost_words(text: str) -> str:
    """What the costs of a method are."""
    found = next((one.words.cost for one in methods.METHODS if one.name == text.split(":")[0]), "")
    return found or f"the figure of the method {name(text)}"


def method_sentence(summary: Summary) -> str:
    """What the costs are, in one sentence."""
    choice = summary.choice
    parts = [_cost_words(part) for part in choice.method.split("+")]
    what = parts[0] if len(parts) == 1 else f"the geometric mean of {' and '.join(parts)}"
    tail = (
        " Lower is better. Errors of layers may add up or cancel, so a recipe is judged by the signed sum of effects."
        if choice.rule == SIGNED
        else " Lower is better, and costs of layers add up."
        if choice.is_noise
        else " Lower is better."
    )
    if choice.decided_by != choice.method:
        return f"{_given_sentence(choice.rule)} Costs of layers describe it and decided nothing; each is {what}.{tail}"
    return f"A layer's sensitivity ({name(choice.method)}) is {what}.{tail}"


def _given_sentence(rule: str) -> str:
    kind, _, number_format = rule.partition(":")
    if kind == "uniform":
        return f"The recipe was ordered: {name(number_format)} for all layers that can take it."
    if kind == "hybrid":
        return (
            f"The recipe has {name(number_format)} for all but the blocks that gain most by staying at 16 bits (below)."
        )
    return "The recipe was given."


def _signal_tile(summary: Summary) -> Tile | None:
    measured = summary.measured("sqnr_db")
    if measured is not None:
        return Tile(
            number(measured.value, measured.standard_error),
            "dB SQNR",
            "signal to quantization noise",
            f"95 % interval {interval(measured, 'dB')}; {measured.n} seeds" if interval(measured) else "",
        )
    if not summary.choice.is_noise:
        return None
    prediction = summary.evidence.prediction
    predicted = noise_estimate_db(summary.choice.cost) if prediction is None else prediction.predicted_db
    return Tile(
        number(predicted.value, predicted.standard_error),
        "dB, predicted",
        "signal to quantization noise",
        f"by {summary.choice.method}; not measured",
    )


def _last_tile(summary: Summary) -> Tile:
    best = _best_uniform(summary)
    if best is not None:
        d = best.difference
        value = number(d.value, d.standard_error, signed=True)
        return Tile(value, "dB", f"against {best.other}", f"95 % interval {interval(d, 'dB')}, same seeds")
    formats = len({d.format for d in summary.decisions})
    return Tile(
        str(summary.sizes.n_decisions), "decisions", f"among {formats} formats in use", _certificate(summary) or ""
    )


def _file_note(summary: Summary) -> str:
    sizes = summary.sizes
    if sizes.file_bytes is None:
        return f"the quantized layers, {sizes.n_decisions} decisions"
    before = f", was {byte_size(sizes.source_file_bytes)}" if sizes.source_file_bytes else ""
    return f"the quantized layers; whole file {byte_size(sizes.file_bytes)}{before}"


def _best_uniform(summary: Summary) -> DifferenceRow | None:
    rows = [r for r in summary.evidence.differences if r.measure == "sqnr_db" and "uniform" in r.other]
    return min(rows, key=lambda r: r.difference.value, default=None)


def _methods_sentence(summary: Summary) -> str:
    weights: Counter[str] = Counter()
    for row in summary.decisions:
        weights[family_words(row.format)] += row.params
    shares = {words: share(n / summary.sizes.params) for words, n in weights.most_common()}
    alone = shares.pop(family_words(FP16), None)
    served = [f"{words} serves {part}" for words, part in shares.items()]
    return f"Of the weights, {joined([*served, *([f'{alone} stay at 16 bits'] if alone else [])])}."


def _activations_sentence(summary: Summary) -> str | None:
    """How many layers round their inputs, and to how many bits; None when none does."""
    layers: Counter[int] = Counter()
    for row in summary.decisions:
        layers[row.format.activation_bits] += len(row.layers)
    if set(layers) == {FULL_BITS}:
        return None
    parts = [
        f"{n} layer{'s' if n > 1 else ''} to {width} bits" for width, n in sorted(layers.items()) if width != FULL_BITS
    ]
    rest = f"; {layers[FULL_BITS]} are not" if layers[FULL_BITS] else ""
    return f"Inputs are rounded, too: those of {joined(parts)}{rest}."


def _range_sentence(summary: Summary) -> str | None:
    groups = [g for g in summary.operations if g.params >= 0.01 * summary.sizes.params]
    if len(groups) < 2:
        return None
    low, high = (pick(groups, key=lambda g: g.paper_bits) for pick in (min, max))
    return (
        f"Among operations with at least 1 % of the weights, {name(low.name)} gets the fewest bits "
        f"({low.paper_bits:.2f} on average) and {name(high.name)} the most ({high.paper_bits:.2f})."
    )


def _rounding_sentence(found: LearnedRounding | None) -> str | None:
    if found is None:
        return None
    return (
        f"The rounding of uniform codes was learned block by block from {found.n_samples} samples of the model's own "
        f"trajectory: {found.n_learned} of {found.n_blocks} blocks use it, {share(found.changed_share)} of the weights "
        f"round the other way, and the squared error of a block's output is {number(found.error_ratio)} times that of "
        "nearest rounding (geometric mean, on the samples learned from). Uniform recipes are rounded to nearest."
    )


def _certificate(summary: Summary) -> str | None:
    choice = summary.choice
    if choice.status == "heuristic":
        return None
    what = "noise" if choice.is_noise else "cost"
    if choice.gap < 1e-9:
        return f"No other choice from these formats within the budget has less predicted {what}."
    bound = share(choice.gap) if choice.gap >= _LEAST_SHARE else share(_LEAST_SHARE)
    return f"No other choice within the budget can have {bound} less predicted {what}; that is proven."


def _spared(summary: Summary) -> Iterable[str]:
    """Up to three layers that keep most bits, with what fewer would do."""
    reference = summary.reference_format
    rows = [
        (row.format.bits, row.reference_db, row)
        for row in summary.decisions
        if row.reference_db is not None and row.format.bits > reference.bits and row.reference_db > 0
    ]
    for _, db, row in sorted(rows, key=lambda entry: entry[:2], reverse=True)[:_N_SPARED]:
        yield (
            f"{name(row.name)} keeps {row.format.bits} bits ({name(str(row.format))}), which takes "
            f"{byte_size(row.stored_bytes)} for {share(row.params / summary.sizes.params)} of the weights: "
            f"at {reference.bits} bits ({name(str(reference))}) it alone would add "
            f"{_added(row, db, summary.choice.cost.value)}."
        )


def _added(row: DecisionRow, db: float, total: float) -> str:
    """Noise added by one layer to the `total`, in decibels, or in percent where decibels would be tiny."""
    relative = 10 ** (db / 10) - 1
    if db < _TINY_DB:
        return f"{share(relative)} to the noise"
    error = 10 / math.log(10) * row.reference_standard_error / (total * (1 + relative))
    return f"{number(db, error)} dB of noise"


def _thriftiest(summary: Summary) -> str | None:
    shown = [g for g in summary.operations if g.cost_share is not None and g.params >= 0.02 * summary.sizes.params]
    if len(shown) < 2 or summary.choice.decided_by != summary.choice.method:  # fewest bits by no cost prove nothing
        return None
    best = min(shown, key=lambda g: g.paper_bits)
    return (
        f"{name(best.name)} can do with the fewest bits: {best.paper_bits:.2f} on average for "
        f"{share(best.params / summary.sizes.params)} of the weights, which cause {share(best.cost_share or 0.0)} "
        f"of the {'noise' if summary.choice.is_noise else 'cost'}."
    )


def _concentration(summary: Summary) -> str | None:
    shares = sorted((row.share for row in summary.decisions if row.share is not None), reverse=True)
    if not shares or len(shares) < 4:
        return None
    total, count = 0.0, 0
    while total < 0.5 and count < len(shares):
        total, count = total + shares[count], count + 1
    worst = max(summary.decisions, key=lambda row: row.share or 0.0)
    what = "noise" if summary.choice.is_noise else "cost"
    return (
        f"Half of the remaining {what} comes from {count} of {len(shares)} decisions; the largest single part, "
        f"{share(worst.share or 0.0)}, from {name(worst.name)} at {name(str(worst.format))}."
    )


def _next_bits(summary: Summary) -> str | None:
    choice, points = summary.choice, summary.evidence.frontier
    here = summary.sizes.paper_bits if choice.accounting == "paper" else summary.sizes.stored_bits
    is_limited = choice.budget_bits is not None or choice.budget_bops is not None
    if not is_limited or not choice.is_noise or not points or choice.cost.value <= 0:
        return None
    more = [p for p in points if p.bits > here + 0.2 and p.cost > 0]
    fewer = [p for p in points if p.bits < here - 0.2 and p.cost > 0]
    parts = []
    if more:
        p = min(more, key=lambda p: abs(p.bits - here - 0.5))
        gain = _apart(choice.cost.value, p.cost)
        what = f"lower the noise by {gain:.1f} dB" if gain >= _TINY_DB else "hardly lower the noise"
        parts.append(f"{bits(round(p.bits, 2))} bits would {what}")
    elif choice.budget_bops is not None:
        parts.append("more bits would not lower the noise")
    if fewer:
        p = min(fewer, key=lambda p: abs(p.bits - here + 0.5))
        loss = _apart(p.cost, choice.cost.value)
        parts.append(f"{bits(round(p.bits, 2))} bits would raise {'it' if parts else 'the noise'} by {loss:.1f} dB")
    within = "" if choice.budget_bops is None else " and under the same limit of bit operations"
    return f"By prediction{within}, {joined(parts)}." if parts else None


def _apart(larger: float, smaller: float) -> float:
    return 10 * math.log10(larger / smaller)


def _unsigned(difference: Estimate) -> tuple[float, float]:
    if difference.value >= 0:
        return difference.low, difference.high
    return -difference.high, -difference.low
