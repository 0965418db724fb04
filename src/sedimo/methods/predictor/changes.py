"""Plain sentences about a recipe: what its predictor says of changes that are easy to say, to be measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sedimo.allocation.problem import Allocation
from sedimo.allocation.table import SensitivityTable
from sedimo.methods.predictor.choices import Codes, Values
from sedimo.methods.predictor.training import Predictor
from sedimo.quant.formats import Format
from sedimo.space import Decision, Recipe, SearchSpace

N_CHANGES = 8
_LEAST_DB = 0.05  # a change that is predicted to be smaller says nothing
_Other = Callable[[SensitivityTable, Decision, Format], Format | None]


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


def telling_changes(predictor: Predictor, table: SensitivityTable, allocation: Allocation) -> tuple[Change, ...]:
    """Changes whose predicted effect is largest: bits taken from an operation or block, given to one, other methods."""
    space = predictor.choices.space
    view = _View(predictor, table, allocation)
    operations, blocks = grouped(space, lambda d: d.operation), grouped(space, _place)
    layers = {f"every `{name}` layer": members for name, members in operations.items()}
    taken = [view.changed(f"Fewer bits for {what}", members, _smaller) for what, members in layers.items()]
    given = [view.changed(f"More bits for {what}", members, _larger) for what, members in layers.items()]
    blocks_taken = [view.changed(f"Fewer bits for {what}", members, _smaller) for what, members in blocks.items()]
    methods = [view.changed(f"Another method for {what}", m, _other_method) for what, m in layers.items()]
    found: list[Change] = []
    for kind, n in ((taken, 3), (given, 2), (blocks_taken, 2), (methods, 1)):
        clear = [change for change in kind if change is not None and abs(change.predicted_db) >= _LEAST_DB]
        found += sorted(clear, key=lambda c: -abs(c.predicted_db))[:n]
    mild = [c for c in taken if c is not None and c.predicted_db < 0]
    if mild:
        found.append(max(mild, key=lambda c: c.predicted_db))
    unique = {change.recipe.key: change for change in found}
    return tuple(unique.values())[:N_CHANGES]


@dataclass(frozen=True)
class _View:
    """A recipe as its predictor sees it."""

    predictor: Predictor
    table: SensitivityTable
    allocation: Allocation

    def changed(self, what: str, members: Sequence[Decision], other: _Other) -> Change | None:
        """What happens where some decisions go to other formats; None where they have none."""
        choices, choice = self.predictor.choices, self.allocation.choice
        moves = {d.name: f for d in members if (f := other(self.table, d, choice[d.name])) is not None}
        if not moves:
            return None
        recipe = choices.space.recipe({**choice, **moves})
        before, after = choices.codes([self.allocation.recipe]), choices.codes([recipe])
        each = self.predictor.predict_each(np.concatenate([before, after]))
        effects = each[:, 1] - each[:, 0]
        predicted, error = float(effects.mean()), self._error(before, after, effects)
        olds = [choice[name] for name in moves]
        sentence = _sentence(what, predicted, self._bits(members))
        return Change(sentence, tuple(moves), _texts(olds), _texts(moves.values()), recipe, predicted, error)

    def _error(self, before: Codes, after: Codes, effects: Values) -> float:
        """Standard deviation of a predicted difference: between folds, and what the noise models do not know."""
        spread = float(effects.std(ddof=1))
        models = [fold.noise for fold in self.predictor.folds if fold.noise is not None]
        unknown = float(np.mean([m.difference_deviation(before, after)[0] for m in models])) if models else 0.0
        return math.hypot(spread, unknown)

    def _bits(self, members: Sequence[Decision]) -> str:
        mine = bits_of(members, self.allocation.choice)
        share = 100 * sum(d.params for d in members) / self.predictor.choices.space.params
        return f"{mine:.2f} bits per weight now, {self.allocation.paper_bits:.2f} overall; {share:.1f} % of the weights"


def _smaller(table: SensitivityTable, decision: Decision, present: Format) -> Format | None:
    return _step(table, decision, present, -1)


def _larger(table: SensitivityTable, decision: Decision, present: Format) -> Format | None:
    return _step(table, decision, present, 1)


def _other_method(table: SensitivityTable, decision: Decision, present: Format) -> Format | None:
    same = [f for f in decision.formats if f.bits == present.bits and f.family != present.family]
    return max(same, key=lambda f: table.index[decision.name, f].cost, default=None)


def _step(table: SensitivityTable, decision: Decision, present: Format, sign: int) -> Format | None:
    """The best format with the next smaller or larger number of bits."""
    widths = [f.bits for f in decision.formats if sign * (f.bits - present.bits) > 0]
    if not widths:
        return None
    width = max(widths) if sign < 0 else min(widths)
    return min((f for f in decision.formats if f.bits == width), key=lambda f: table.index[decision.name, f].cost)


def _sentence(what: str, predicted: float, bits: str) -> str:
    verb = "costs" if predicted < 0 else "gains"
    return f"{what} ({bits}) {verb} about {abs(predicted):.1f} dB."


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
