"""Plain sentences about a recipe, derived from the predictor and each verified by measuring that very change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sedimo.allocation.problem import Allocation
from sedimo.api.searching import Measuring, Search
from sedimo.metrics.estimate import NORMAL_95
from sedimo.metrics.signal import paired_difference
from sedimo.quant.formats import Format
from sedimo.reporting.explanation import Insight, verdict_of
from sedimo.sensitivity.choices import Choices, Codes
from sedimo.space import Decision, Recipe, SearchSpace

N_INSIGHTS = 8
_LEAST_DB = 0.05  # a change that is predicted to be smaller says nothing
_Other = Callable[[Decision, Format, Search], Format | None]


@dataclass(frozen=True)
class Change:
    """Some decisions of a recipe at other formats, and what that is for."""

    sentence: str
    decisions: tuple[str, ...]
    from_format: str
    to_format: str
    recipe: Recipe
    predicted_db: float
    error_db: float


def insights(search: Search, measuring: Measuring) -> tuple[Insight, ...]:
    """The most telling changes of the chosen recipe, measured on the seeds of `measuring` against the recipe itself."""
    changes = telling_changes(search)
    chosen = search.allocation.recipe
    trials = measuring.trials([chosen, *(change.recipe for change in changes)])
    base = trials[0]
    found = []
    for change, trial in zip(changes, trials[1:], strict=True):
        measured = paired_difference(trial.powers, base.powers).estimate
        half = NORMAL_95 * change.error_db
        found.append(
            Insight(
                change.sentence,
                change.decisions,
                change.from_format,
                change.to_format,
                change.predicted_db,
                change.predicted_db - half,
                change.predicted_db + half,
                measured,
                verdict_of(change.predicted_db, measured),
            )
        )
    return tuple(found)


def telling_changes(search: Search) -> tuple[Change, ...]:
    """Changes whose predicted effect is largest: bits taken from an operation or block, given to one, other methods."""
    space = search.data.choices.space
    operations, blocks = grouped(space, lambda d: d.operation), grouped(space, _place)
    layers = {f"every `{name}` layer": members for name, members in operations.items()}
    taken = [_changed(search, f"Fewer bits for {what}", members, _smaller) for what, members in layers.items()]
    given = [_changed(search, f"More bits for {what}", members, _larger) for what, members in layers.items()]
    blocks_taken = [_changed(search, f"Fewer bits for {what}", members, _smaller) for what, members in blocks.items()]
    methods = [_changed(search, f"Another method for {what}", m, _other_method) for what, m in layers.items()]
    found: list[Change] = []
    for kind, n in ((taken, 3), (given, 2), (blocks_taken, 2), (methods, 1)):
        known = [change for change in kind if change is not None and abs(change.predicted_db) >= _LEAST_DB]
        found += sorted(known, key=lambda c: -abs(c.predicted_db))[:n]
    mild = [c for c in taken if c is not None and c.predicted_db < 0]
    if mild:
        found.append(max(mild, key=lambda c: c.predicted_db))
    unique = {change.recipe.key: change for change in found}
    return tuple(unique.values())[:N_INSIGHTS]


def _changed(search: Search, what: str, members: Sequence[Decision], other: _Other) -> Change | None:
    choices, allocation = search.data.choices, search.allocation
    moves = {d.name: f for d in members if (f := other(d, allocation.choice[d.name], search)) is not None}
    if not moves:
        return None
    before = choices.codes([allocation.recipe])
    recipe = choices.space.recipe({**allocation.choice, **moves})
    each = search.predictor.predict_each(np.concatenate([before, choices.codes([recipe])]))
    effects = each[:, 1] - each[:, 0]
    predicted, error = float(effects.mean()), _error(search, before, choices.codes([recipe]), effects)
    olds = [allocation.choice[name] for name in moves]
    sentence = _sentence(what, predicted, _bits(allocation, members, choices))
    return Change(sentence, tuple(moves), _texts(olds), _texts(moves.values()), recipe, predicted, error)


def _smaller(decision: Decision, present: Format, search: Search) -> Format | None:
    return _step(decision, present, search, -1)


def _larger(decision: Decision, present: Format, search: Search) -> Format | None:
    return _step(decision, present, search, 1)


def _other_method(decision: Decision, present: Format, search: Search) -> Format | None:
    same = [f for f in decision.formats if f.bits == present.bits and f.family != present.family]
    return max(same, key=lambda f: search.table.index[decision.name, f].cost, default=None)


def _step(decision: Decision, present: Format, search: Search, sign: int) -> Format | None:
    """The best format with the next smaller or larger number of bits."""
    widths = [f.bits for f in decision.formats if sign * (f.bits - present.bits) > 0]
    if not widths:
        return None
    width = max(widths) if sign < 0 else min(widths)
    return min(
        (f for f in decision.formats if f.bits == width), key=lambda f: search.table.index[decision.name, f].cost
    )


def _error(search: Search, before: Codes, after: Codes, effects: np.ndarray) -> float:
    """Standard deviation of a predicted difference: between folds, and what the noise models do not know."""
    spread = float(effects.std(ddof=1))
    models = [fold.noise for fold in search.predictor.folds if fold.noise is not None]
    unknown = float(np.mean([m.difference_deviation(before, after)[0] for m in models])) if models else 0.0
    return math.hypot(spread, unknown)


def _sentence(what: str, predicted: float, bits: str) -> str:
    verb = "costs" if predicted < 0 else "gains"
    return f"{what} ({bits}) {verb} about {abs(predicted):.1f} dB."


def _bits(allocation: Allocation, members: Sequence[Decision], choices: Choices) -> str:
    mine = bits_of(members, allocation.choice)
    share = 100 * sum(d.params for d in members) / choices.space.params
    return f"{mine:.2f} bits per weight now, {allocation.paper_bits:.2f} overall; {share:.1f} % of the weights"


def _place(decision: Decision) -> str:
    return f"block `{decision.block}`" if decision.block else "the layers outside all blocks"


def _texts(formats: Iterable[Format]) -> str:
    found = list(dict.fromkeys(map(str, formats)))
    return found[0] if len(found) == 1 else f"{', '.join(found[:3])}{' ...' if len(found) > 3 else ''}"


def bits_of(members: Sequence[Decision], choice: Mapping[str, Format]) -> float:
    """Average paper bits of some decisions [bits]."""
    return 8 * sum(d.paper_bytes(choice[d.name]) for d in members) / sum(d.params for d in members)


def grouped(space: SearchSpace, key: Callable[[Decision], str]) -> Mapping[str, list[Decision]]:
    """Decisions by a name, in the space's order."""
    found: dict[str, list[Decision]] = {}
    for decision in space.decisions:
        found.setdefault(key(decision), []).append(decision)
    return found
