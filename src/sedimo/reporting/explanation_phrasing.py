"""What the predictor learned, in sentences: how far to trust it, what it found, what was left when measured.

As everywhere in the report, names stand between backticks and every claim has its interval beside it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from sedimo.metrics.estimate import NORMAL_95, Estimate
from sedimo.reporting.explanation import OVERALL, Explanation, Insight, PredictorRow, Verdict
from sedimo.reporting.phrasing import name
from sedimo.reporting.rounding import interval, number

Standing = Literal["above", "open", "below"]
MARKS: dict[Verdict, str] = {"confirmed": "✓", "refuted": "✗", "open": "?", "not measured": "–"}  # noqa: RUF001
OBJECTIVES = {
    "final_latents": "at the final latents",
    "path": "along the whole path of denoising",
    "step": "at single steps of denoising",
    "fid": "on sets of finished images",
}
_MAX_NAMES = 3
_NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])")  # whole parts of a dotted name


def statement(explanation: Explanation) -> tuple[str, ...]:
    """Which predictor, on how many trials, how well it ranks recipes, and whether it beats its baselines."""
    where = OBJECTIVES.get(explanation.objective, f"by the objective {name(explanation.objective)}")
    first = (
        f"All scores and predictions come from {name(explanation.predictor)}, which learned to predict "
        f"{explanation.target} {where} from {explanation.n_trials:,} measured recipes."
    )
    used = _used(explanation.predictors)
    if not used:
        return (first, "How well it ranks recipes that it has not seen was not measured.")
    return (first, _quality_sentence(used), *(_standing_sentence(row, explanation.predictors) for row in used))


def tally(insights: Sequence[Insight]) -> str:
    """How many predictions were put to the test, and how they fared."""
    found = Counter(insight.verdict for insight in insights)
    n_tested = len(insights) - found["not measured"]
    if n_tested == 0:
        return "None of these predictions was put to the test by measuring it."
    counts = [f"{found[v]} {words}" for v, words in _OUTCOMES.items() if found[v]]
    tested = f"Of these {len(insights)} predictions, {n_tested} {'was' if n_tested == 1 else 'were'}"
    if n_tested == len(insights):
        tested = "This prediction was" if n_tested == 1 else f"All {n_tested} predictions were"
    return f"{tested} put to the test by measuring that very change: {', '.join(counts)}."


def standing(used: PredictorRow, baseline: PredictorRow) -> Standing:
    """Whether two rank correlations can be told apart.

    By the 95 % interval of their difference on the same recipes; without it, by whether their own intervals overlap,
    which asks for more than it must.
    """
    difference = baseline.advantage
    if difference is not None:
        return "above" if difference.low > 0 else "below" if difference.high < 0 else "open"
    if used.srcc.low > baseline.srcc.high:
        return "above"
    return "below" if used.srcc.high < baseline.srcc.low else "open"


def subsets(rows: Sequence[PredictorRow]) -> tuple[str, ...]:
    """The subsets that occur, all recipes first."""
    return tuple(sorted(dict.fromkeys(row.subset for row in rows), key=lambda subset: subset != OVERALL))


def where(subset: str) -> str:
    """A subset as the end of a sentence."""
    return "over all recipes" if subset == OVERALL else f"within {subset}"


def correlation(estimate: Estimate) -> str:
    """A figure with its interval in brackets: `0.72 (0.60 to 0.80)`."""
    limits = interval(estimate)
    text = number(estimate.value, estimate.standard_error)
    return f"{text} ({limits})" if limits else text


def change(insight: Insight) -> str:
    """What was changed, decisions that differ in numbers only taken together.

    Example:
        >>> change(Insight("", ("blocks.0.to_q", "blocks.1.to_q"), "kmc3", "uaq8", 1.0))
        '`blocks.*.to_q` (2): `kmc3` → `uaq8`'
    """
    like: dict[str, list[str]] = {}
    for decision in insight.decisions:
        like.setdefault(_NUMBERS.sub("*", decision), []).append(decision)
    texts = [name(m[0]) if len(m) == 1 else f"{name(k)} ({len(m)})" for k, m in like.items()]
    n_more = sum(len(members) for members in list(like.values())[_MAX_NAMES:])
    shown = ", ".join(texts[:_MAX_NAMES]) + (f" and {n_more} more" if n_more else "")
    formats = f"{name(insight.from_format)} → {name(insight.to_format)}"
    return f"{shown}: {formats}" if shown else formats


def predicted(insight: Insight) -> str:
    """The predicted change with its interval [dB]."""
    spread = (insight.predicted_high - insight.predicted_low) / (2 * NORMAL_95)
    error = spread if math.isfinite(spread) and spread > 0 else math.nan
    return decibels(Estimate(insight.predicted_db, error, insight.predicted_low, insight.predicted_high, 0))


def decibels(estimate: Estimate, *, is_change: bool = True) -> str:
    """A figure in decibels with its interval: `+1.2 dB (0.8 to 1.6)`."""
    text = f"{number(estimate.value, estimate.standard_error, signed=is_change)}\N{NARROW NO-BREAK SPACE}dB"
    limits = interval(estimate)
    return f"{text} ({limits})" if limits else text


_OUTCOMES: dict[Verdict, str] = {
    "confirmed": "confirmed",
    "refuted": "refuted (it went the other way)",
    "open": "open (the measurement shows no change)",
}


def _used(rows: Sequence[PredictorRow]) -> list[PredictorRow]:
    """The used predictor's rows that have a rank correlation, all recipes first."""
    order = subsets(rows)
    found = [row for row in rows if row.is_used and not math.isnan(row.srcc.value)]
    return sorted(found, key=lambda row: order.index(row.subset))


def _quality_sentence(used: Sequence[PredictorRow]) -> str:
    parts = [f"{correlation(row.srcc)} {where(row.subset)} (n = {row.n})" for row in used]
    return (
        f"On recipes that it had not seen, its rank correlation is {' and '.join(parts)}; 1 would be the true order, "
        "0 is guessing."
    )


def _standing_sentence(row: PredictorRow, rows: Sequence[PredictorRow]) -> str:
    """Against the strongest baseline of the same recipes."""
    others = [r for r in rows if r.subset == row.subset and not r.is_used and not math.isnan(r.srcc.value)]
    place = where(row.subset)
    if not others:
        return f"No baseline was measured {place}."
    best = max(others, key=lambda r: r.srcc.value)
    among = f", the strongest of {len(others)} baselines" if len(others) > 1 else ""
    rival = f"that of {name(best.predictor)}, {correlation(best.srcc)}{among}"
    gained = f" (difference {_difference(best.advantage)})" if best.advantage is not None else ""
    start = f"{_capital(place)}, its {number(row.srcc.value, row.srcc.standard_error)} is"
    found = standing(row, best)
    if found == "above":
        return f"{start} above {rival}{gained}."
    if found == "below":
        return f"{start} below {rival}{gained}: the simpler rule ranks better there."
    side = "higher" if row.srcc.value > best.srcc.value else "not higher"
    reason = "the interval of the difference holds zero" if gained else "the intervals overlap"
    return f"{start} {side} than {rival}{gained}; {reason}, so no advantage is shown there."


def _difference(estimate: Estimate) -> str:
    limits = interval(estimate)
    text = number(estimate.value, estimate.standard_error, signed=True)
    return f"{text}, {limits}" if limits else text


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
