"""Sentences derived from a summary, for people who have not read the papers.

Every sentence states its numbers. Names stand between backticks; who shows the sentence turns them into code.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

from sedimo import methods
from sedimo.allocation.combine import Agreement
from sedimo.allocation.effects import SIGNED
from sedimo.allocation.table import Cost
from sedimo.methods.uniform import UNIFORM
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import estimated_db
from sedimo.quant.formats import FP16, FULL_BITS
from sedimo.reporting.page import Tile
from sedimo.reporting.summary import Prediction, Summary
from sedimo.reporting.words import (
    bits,
    byte_size,
    family_words,
    interval,
    joined,
    name,
    number,
    share,
    verdict,
    with_error,
)

_N_SPARED = 3
_TINY_DB = 0.1
_LEAST_SHARE = 1e-5  # a smaller gap is said as this one


def headline(summary: Summary) -> str:
    """The answer in one sentence."""
    text = (
        f"{name(summary.model)} keeps {bits(summary.allocation.paper_bits)} of 16 bits per weight: its "
        f"{summary.n_layers} weight layers shrink from {byte_size(summary.full_bytes)} to "
        f"{byte_size(summary.stored_bytes)}"
    )
    sqnr = summary.sqnr_db
    if sqnr is None:
        return f"{text}."
    if math.isinf(sqnr.value):
        return f"{text}, and its output does not change at all."
    quality = f"{text}, and the noise in its output is {share(10 ** (-sqnr.value / 10))} of the signal"
    best = _best_uniform(summary)
    if best is not None and verdict(best[1]) == "better":
        return f"{quality}, {number(best[1].value, best[1].standard_error)} dB better than {best[0]}."
    return f"{quality}."


def tiles(summary: Summary) -> tuple[Tile, ...]:
    """The four numbers of the first screen; which ones depends on what was measured."""
    before, after, evidence = summary.full_bytes, summary.stored_bytes, summary.evidence
    if evidence.file_bytes is None:
        file = f", {len(summary.chosen)} decisions"
    else:
        was = f", was {byte_size(evidence.source_file_bytes)}" if evidence.source_file_bytes else ""
        file = f"; whole file {byte_size(evidence.file_bytes)}{was}"
    paper, stored = bits(summary.allocation.paper_bits), bits(summary.allocation.stored_bits)
    times, sizes = f"{number(before / after)}\N{MULTIPLICATION SIGN}", f"{byte_size(before)} → {byte_size(after)}"
    return (
        Tile(paper, "bits", "per weight, down from 16", f"in the papers' accounting; {stored} as stored"),
        Tile(times, "smaller", sizes, f"the quantized layers{file}"),
        *_signal_tile(summary),
        _last_tile(summary),
    )


def _signal_tile(summary: Summary) -> Iterator[Tile]:
    found, prediction, unit, note = summary.sqnr_db, summary.evidence.prediction, "dB SQNR", ""
    if found is not None:
        limits = interval(found, "dB")
        note = f"95 % interval {limits}; {found.n} seeds" if limits else ""
    elif summary.is_noise:
        found = estimated_db(summary.cost) if prediction is None else prediction.predicted_db
        unit, note = "dB, predicted", f"by {summary.table.method}; not measured"
    if found is not None:
        yield Tile(number(found.value, found.standard_error), unit, "signal to quantization noise", note)


def _last_tile(summary: Summary) -> Tile:
    if (best := _best_uniform(summary)) is not None:
        other, ahead = best
        value = number(ahead.value, ahead.standard_error, signed=True)
        return Tile(value, "dB", f"against {other}", f"95 % interval {interval(ahead, 'dB')}, same seeds")
    decisions, formats = len(summary.chosen), len({c.format for c in summary.chosen})
    return Tile(str(decisions), "decisions", f"among {formats} formats in use", "".join(_certificate(summary)))


def _best_uniform(summary: Summary) -> tuple[str, Estimate] | None:
    """The strongest uniform recipe, and what the result is ahead of it."""
    uniform = [rival for rival in summary.evidence.differences if UNIFORM.name in rival[0]]
    return min(uniform, key=lambda rival: rival[1].value, default=None)


def decision_sentences(summary: Summary) -> tuple[str, ...]:
    """What was decided: methods, extremes, and how sure it is that nothing better exists."""
    weights: Counter[str] = Counter()
    for cost in summary.chosen:
        weights[family_words(cost.format)] += summary.params([cost])
    shares = {words: share(n / summary.table.total_params) for words, n in weights.most_common()}
    alone = shares.pop(family_words(FP16), None)
    served = [f"{words} serves {part}" for words, part in shares.items()]
    methods = f"Of the weights, {joined([*served, *([f'{alone} stay at 16 bits'] if alone else [])])}."
    return (methods, *_inputs(summary), *_range(summary), *_certificate(summary), *_rounding(summary))


def _inputs(summary: Summary) -> Iterator[str]:
    """How many layers round their inputs, and to how many bits."""
    layers: Counter[int] = Counter()
    for cost in summary.chosen:
        layers[cost.format.activation_bits] += len(summary.table.layers[cost.decision])
    left = layers.pop(FULL_BITS, 0)
    if layers:
        parts = [f"{n} layer{'s' if n > 1 else ''} to {width} bits" for width, n in sorted(layers.items())]
        yield f"Inputs are rounded, too: those of {joined(parts)}{f'; {left} are not' if left else ''}."


def _range(summary: Summary) -> Iterator[str]:
    found = {n: summary.paper_bits(g) for n, g in summary.operations.items() if summary.params_share(g) >= 0.01}
    if len(found) > 1:
        low, high = (pick(found, key=found.__getitem__) for pick in (min, max))
        yield (
            f"Among operations with at least 1 % of the weights, {name(low)} gets the fewest bits "
            f"({found[low]:.2f} on average) and {name(high)} the most ({found[high]:.2f})."
        )


def _certificate(summary: Summary) -> Iterator[str]:
    allocation = summary.allocation
    if allocation.status == "heuristic":
        return
    if allocation.gap < 1e-9:
        yield f"No other choice from these formats within the budget has less predicted {summary.cost_name}."
    else:
        bound = share(max(allocation.gap, _LEAST_SHARE))
        yield f"No other choice within the budget can have {bound} less predicted {summary.cost_name}; that is proven."


def _rounding(summary: Summary) -> Iterator[str]:
    found = summary.evidence.rounding
    if found is not None:
        yield (
            f"The rounding of uniform codes was learned block by block from {found.n_samples} samples of the model's "
            f"own trajectory: {found.n_learned} of {found.n_blocks} blocks use it, {share(found.changed_share)} of the "
            "weights round the other way, and the squared error of a block's output is "
            f"{number(found.error_ratio)} times that of nearest rounding (geometric mean, on the samples learned "
            "from). Uniform recipes are rounded to nearest."
        )


def method_sentence(summary: Summary) -> str:
    """What the costs are, in one sentence."""
    method, rule = summary.table.method, summary.allocation.rule
    about = {one.name: one.words for one in methods.METHODS}
    parts = []
    for part in method.split("+"):
        words = about.get(part.split(":")[0])
        parts.append((words and words.cost) or f"the figure of the method {name(part)}")
    what = parts[0] if len(parts) == 1 else f"the geometric mean of {' and '.join(parts)}"
    tail = " Lower is better."
    if rule == SIGNED:
        tail += " Errors of layers may add up or cancel, so a recipe is judged by the signed sum of effects."
    elif summary.is_noise:
        tail = " Lower is better, and costs of layers add up."
    if summary.decided_by == method:
        return f"A layer's sensitivity ({name(method)}) is {what}.{tail}"
    kind, _, number_format = rule.partition(":")
    given = about[kind].given.format(name(number_format)) if kind in about else ""
    given = given or "The recipe was given."
    return f"{given} Costs of layers describe it and decided nothing; each is {what}.{tail}"


def reason_sentences(summary: Summary) -> tuple[str, ...]:
    """Why: layers that were spared, operations that gave most, where the remaining noise comes from."""
    return (*_spared(summary), *_thriftiest(summary), *_concentration(summary), *_next_bits(summary))


def _spared(summary: Summary) -> Iterator[str]:
    """Up to three layers that keep most bits, with what fewer would do."""
    at, rows = summary.reference, []
    for cost in summary.chosen:
        other = summary.at_reference(cost)
        db = None if other is None else summary.noise_db(cost, other)
        if other is not None and db is not None and cost.format.bits > at.bits and db > 0:
            rows.append((cost.format.bits, db, cost, other))
    for n_bits, db, cost, other in sorted(rows, key=lambda row: row[:2], reverse=True)[:_N_SPARED]:
        yield (
            f"{name(cost.decision)} keeps {n_bits} bits ({name(cost.format)}), which takes "
            f"{byte_size(cost.stored_bytes)} for {share(summary.params_share([cost]))} of the weights: at {at.bits} "
            f"bits ({name(at)}) it alone would add {_added(other, db, summary.cost.value)}."
        )


def _added(cost: Cost, db: float, total: float) -> str:
    """Noise added by one layer to the `total`, in decibels, or in percent where decibels would be tiny."""
    relative = 10 ** (db / 10) - 1
    if db < _TINY_DB:
        return f"{share(relative)} to the noise"
    error = 10 / math.log(10) * cost.standard_error / (total * (1 + relative))
    return f"{number(db, error)} dB of noise"


def _thriftiest(summary: Summary) -> Iterator[str]:
    shown = {n: g for n, g in summary.operations.items() if summary.params_share(g) >= 0.02}
    if len(shown) < 2 or summary.decided_by != summary.table.method:  # fewest bits by no cost prove nothing
        return
    best = min(shown, key=lambda n: summary.paper_bits(shown[n]))
    part = summary.share(shown[best])
    if part is not None:
        yield (
            f"{name(best)} can do with the fewest bits: {summary.paper_bits(shown[best]):.2f} on average for "
            f"{share(summary.params_share(shown[best]))} of the weights, which cause {share(part)} of the "
            f"{summary.cost_name}."
        )


def _concentration(summary: Summary) -> Iterator[str]:
    shares = {c: part for c in summary.chosen if (part := summary.share([c])) is not None}
    if len(shares) < 4:
        return
    ranked = sorted(shares.values(), reverse=True)
    count = 1 + sum(part < 0.5 for part in itertools.accumulate(ranked[:-1]))
    worst = max(shares, key=shares.__getitem__)
    yield (
        f"Half of the remaining {summary.cost_name} comes from {count} of {len(shares)} decisions; the largest single "
        f"part, {share(shares[worst])}, from {name(worst.decision)} at {name(worst.format)}."
    )


def _next_bits(summary: Summary) -> Iterator[str]:
    allocation, cost = summary.allocation, summary.cost.value
    is_limited = allocation.budget_bytes is not None or allocation.budget_bops is not None
    if not is_limited or not summary.is_noise or cost <= 0:
        return
    points = [point for point in summary.evidence.frontier if point[1] > 0]
    more = [point for point in points if point[0] > allocation.bits + 0.2]
    fewer = [point for point in points if point[0] < allocation.bits - 0.2]
    parts = []
    if more:
        n_bits, noise = min(more, key=lambda point: abs(point[0] - allocation.bits - 0.5))
        gain = 10 * math.log10(cost / noise)
        what = f"lower the noise by {gain:.1f} dB" if gain >= _TINY_DB else "hardly lower the noise"
        parts.append(f"{bits(n_bits)} bits would {what}")
    elif allocation.budget_bops is not None and summary.evidence.frontier:
        parts.append("more bits would not lower the noise")
    if fewer:
        n_bits, noise = min(fewer, key=lambda point: abs(point[0] - allocation.bits + 0.5))
        loss = 10 * math.log10(noise / cost)
        parts.append(f"{bits(n_bits)} bits would raise {'it' if parts else 'the noise'} by {loss:.1f} dB")
    within = "" if allocation.budget_bops is None else " and under the same limit of bit operations"
    if parts:
        yield f"By prediction{within}, {joined(parts)}."


def cost_sentences(summary: Summary) -> tuple[str, ...]:
    """What it cost: each difference with its verdict, and whether predictions can be trusted."""
    evidence, entrants = summary.evidence, summary.evidence.entrants
    found = [*prediction_sentence(evidence.prediction)]
    n_finalists = sum(one.final is not None for one in entrants)
    winner = next((one.name for one in entrants if one.is_winner), None)
    if len(entrants) > 1 and winner is not None and n_finalists:
        found.append(
            f"{len(entrants)} recipes were measured, and {n_finalists} of them again on seeds that nothing was "
            f"searched on; {name(winner)} won."
        )
    found += [difference_sentence(*difference) for difference in evidence.differences]
    if evidence.scaling is not None:
        found.append(
            "Not every format was measured; the costs of the others were scaled by weight error. "
            + _agreement_sentence(evidence.scaling, "formats of single layers that were measured to check this")
        )
    if evidence.agreement is not None:
        how = (
            "Effects of layers were added up with their signs. "
            if summary.allocation.rule == SIGNED
            else "The costs were added up on the assumption that noise adds. "
        )
        found.append(how + _agreement_sentence(evidence.agreement, evidence.agreement_of))
    return tuple(found)


def prediction_sentence(found: Prediction | None) -> Iterator[str]:
    """What was predicted of a recipe, and what was measured."""
    if found is None or not math.isfinite(found.predicted_db.value):
        return
    text = f"Before it was measured, the recipe's SQNR was predicted to be {with_error(found.predicted_db)} dB"
    if found.measured_db is None:
        yield f"{text}; it was not measured."
    else:
        yield (
            f"{text}; measured on {found.measured_db.n} fresh seeds it is {with_error(found.measured_db)} dB, "
            f"{number(abs(found.difference_db), 0.05)} dB {'more' if found.difference_db > 0 else 'less'}."
        )


def prediction_warnings(found: Prediction | None) -> tuple[str, ...]:
    """What to beware of where a prediction proved wrong."""
    if found is None or found.is_trusted or found.measured_db is None:
        return ()
    more = "more" if found.difference_db < 0 else "less"
    text = (
        f"The prediction is off by {number(abs(found.difference_db))} dB: the recipe has {more} noise than predicted. "
        "Predicted figures on this page, of single layers and of other budgets, are as uncertain."
    )
    parts = [
        f"{name(b.decision)} at {name(b.format)} ({number(b.predicted_db, 0.05, signed=True)} dB predicted, "
        f"{number(b.measured_db, 0.05, signed=True)} dB measured)"
        for b in found.blamed
    ]
    blamed = "Of the decisions tried, these explain most of it; in brackets, what 16 bits would gain: "
    return (text, f"{blamed}{joined(parts)}.") if parts else (text,)


def difference_sentence(other: str, ahead: Estimate) -> str:
    """One paired comparison in words, with what its interval allows to say."""
    low, high = (ahead.low, ahead.high) if ahead.value >= 0 else (-ahead.high, -ahead.low)
    size = with_error(Estimate(abs(ahead.value), ahead.standard_error, low, high, ahead.n))
    better, limits = "better" if ahead.value > 0 else "worse", interval(ahead, "dB")
    text = f"SQNR is {size} dB {better} than that of {other} on the same {ahead.n} samples"
    if verdict(ahead) == "no difference shown":
        return f"{text}; the 95 % interval ({limits}) holds zero, so no difference is shown."
    return f"{text} (95 % interval {limits})."


def _agreement_sentence(agreement: Agreement, pairs: str) -> str:
    return (
        f"Over {agreement.n} {pairs} the measured noise is {number(agreement.ratio)} times the predicted one on "
        f"average, the ranks agree by {number(agreement.srcc)} (1 is perfect), and tenfold predicted noise goes with "
        f"{number(10**agreement.slope)}-fold measured noise."
    )
