"""What people are told of a predictor: how good it is beside honest rivals, and sentences about changes of a recipe.

Rivals are what bits, weight errors, tables and plain regression know already. All are judged on recipes that they were
not trained on. Each rival gives a quantity per recipe, and a line from it to the goal is fitted on the training recipes
of the fold, so that errors have the goal's unit.

The sentences say what the predictor expects of changes that are easy to say, to be measured. The records are those of
a report; what contradicts itself is refused when it is made or read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from sedimo.allocation.effects import Effects, expected_db
from sedimo.allocation.solve import Allocation
from sedimo.allocation.table import SensitivityTable
from sedimo.errors import InputError
from sedimo.methods.error import ERROR
from sedimo.methods.predictor.features import Choices, Codes, Values, picked
from sedimo.methods.predictor.noise_model import fit_noise_model
from sedimo.methods.predictor.study import Background
from sedimo.methods.predictor.training import Predictor, TrainingSet
from sedimo.metrics.estimate import NORMAL_95, Estimate
from sedimo.metrics.ranking import prediction_quality, quality_difference
from sedimo.quant.formats import Format
from sedimo.space import Decision, Recipe, SearchSpace

Fit = Callable[[Codes, Values], Callable[[Codes], Values]]
Verdict = Literal["confirmed", "refuted", "open", "not measured"]
MINE, SIGNED_EFFECTS = "this predictor", "signed effects"
RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
OVERALL, EXTRA = "all", "extra recipes in the band"  # subsets of held-out recipes
HALF_BAND = 0.25  # bits on both sides
MIN_IN_BAND = 8  # recipes that a rank correlation in a band needs
N_BOOTSTRAP_OF_FOLD = 200
N_CHANGES = 8
_LEAST_DB = 0.05  # a change that is predicted to be smaller says nothing


@dataclass(frozen=True, slots=True)
class PredictorRow:
    """How well a predictor, or an honest baseline, orders `n` recipes that it was not trained on.

    `subset` is `OVERALL`, or a band in words that read after "within": "3.4 to 3.6 bits". `mae` is in the unit of
    the target, `seconds` is for fitting. `is_used` marks the predictor whose scores the report shows; `advantage` is
    that one's `srcc` less the one of this row, on the same recipes and resamples, when known.
    """

    predictor: str
    subset: str
    n: int
    srcc: Estimate
    kendall_tau: Estimate
    ndcg_at_10: Estimate
    mae: Estimate
    seconds: float | None = None
    is_used: bool = False
    advantage: Estimate | None = None


@dataclass(frozen=True, slots=True)
class FoldRow:
    """Quality of the used predictor on one held-out part of the trials, read out after `hop` steps of the graph.

    `subset` says which recipes of that part: all, or those in a band of bits.
    """

    fold: int
    hop: int
    subset: str
    srcc: Estimate
    kendall_tau: Estimate
    ndcg_at_10: Estimate
    mae: Estimate


@dataclass(frozen=True, slots=True)
class Insight:
    """A sentence about what matters, with the change of quality [dB] that it predicts and that was measured.

    The change is that of the whole recipe's quality when `decisions` go from one format to the other; positive is
    better. The interval of the prediction is endless where nothing is known of its error.
    """

    sentence: str
    decisions: tuple[str, ...]
    from_format: str
    to_format: str
    predicted_db: float
    predicted_low: float = -math.inf
    predicted_high: float = math.inf
    measured: Estimate | None = None
    verdict: Verdict = "not measured"

    def __post_init__(self) -> None:
        if (self.measured is None) != (self.verdict == "not measured"):
            raise InputError(
                f"the verdict of an insight must be 'not measured' exactly when there is no measurement, got "
                f"{self.verdict!r} with {self.measured} in {self.sentence!r}"
            )


def rate(
    predictor: Predictor, background: Background, *, extra: TrainingSet | None = None, around: float | None = None
) -> tuple[PredictorRow, ...]:
    """The predictor and all rivals on the same held-out recipes: all, those around some bits, and extra ones."""
    data, table = predictor.data, background.table
    truth, mine, further = predictor.options.truth(data), predictor.cross_validated(), data.codes[:0]
    subsets = {name: np.flatnonzero(held) for name, held in _subsets(data, around).items()}
    if extra is not None:
        truth, further = np.concatenate([truth, predictor.options.truth(extra)]), extra.codes
        mine = np.concatenate([mine, predictor.predict(further)])
        subsets[EXTRA] = np.arange(data.n, len(truth))
    said = {MINE: mine} | predict_by_rivals(
        replace(data, quality=truth[: data.n]),
        further,
        tests=[fold.test for fold in predictor.folds],
        costs={} if table.method == ERROR.name else {table.method: background.prior()},
        errors=data.choices.array(lambda d, f: background.candidates[d.name, f].error),
        effects=background.effects,
    )
    rows = []
    for subset, kept in subsets.items():
        for name, values in said.items():
            q = prediction_quality(values[kept], truth[kept])
            ahead = None if name == MINE else quality_difference(mine[kept], values[kept], truth[kept])
            row = PredictorRow(
                name, subset, q.n, q.srcc, q.kendall_tau, q.ndcg_at_10, q.mae, is_used=name == MINE, advantage=ahead
            )
            rows.append(row)
    return tuple(rows)


def rate_hops(predictor: Predictor, around: float) -> tuple[FoldRow, ...]:
    """How well each hop of each fold orders the fold's own test recipes, all and those around some bits."""
    truth, rows = predictor.options.truth(predictor.data), []
    for index, fold in enumerate(predictor.folds):
        for subset, held in _subsets(predictor.data, around).items():
            chosen = held[fold.test]
            if chosen.sum() < MIN_IN_BAND:
                continue
            for hop, scores in enumerate(fold.hop_scores):
                q = prediction_quality(scores[chosen], truth[fold.test][chosen], n_bootstrap=N_BOOTSTRAP_OF_FOLD)
                rows.append(FoldRow(index, hop, subset, q.srcc, q.kendall_tau, q.ndcg_at_10, q.mae))
    return tuple(rows)


def _subsets(data: TrainingSet, around: float | None) -> dict[str, npt.NDArray[np.bool_]]:
    """All recipes `[T]`, and those around some bits, if they are enough."""
    subsets = {OVERALL: np.ones(data.n, dtype=bool)}
    if around is not None:
        bits, low, high = data.choices.paper_bits(data.codes), around - HALF_BAND, around + HALF_BAND
        inside = (bits >= low) & (bits <= high)
        if inside.sum() >= MIN_IN_BAND:
            subsets[f"{low:.2f} to {high:.2f} bits"] = inside
    return subsets


def predict_by_rivals(
    data: TrainingSet,
    extra: Codes,
    *,
    tests: Sequence[Codes],
    costs: Mapping[str, Values],
    errors: Values,
    effects: Effects | None = None,
) -> dict[str, Values]:
    """What all rivals say of each training recipe by the fold that left it out, then of extra ones, `[T + U]`.

    The folds' test recipes are `tests`; what is said of extra recipes is the mean over folds. `costs` of tables by
    name and relative weight errors are `[D, K]`.
    """
    choices = data.choices
    fits: dict[str, Fit] = {
        "average bits": _line(choices.paper_bits),
        "weight error, summed": _line(partial(_summed, 1, errors)),
        "ridge on one-hot choices": _ridge(choices),
        **{f"{name} costs, summed": _line(partial(_summed, 10, values)) for name, values in costs.items()},
        **({} if effects is None else {SIGNED_EFFECTS: _line(partial(_signed, choices, effects))}),
        "noise model, no graph": lambda c, y: fit_noise_model(choices, data.prior, c, y).predict,
    }
    found = {name: np.zeros(data.n + len(extra)) for name in fits}
    for test in tests:
        training = np.setdiff1d(np.arange(data.n), test)
        for name, fit in fits.items():
            predict = fit(data.codes[training], data.quality[training])
            found[name][test] = predict(data.codes[test])
            if len(extra):
                found[name][data.n :] += predict(extra) / len(tests)
    return found


def _summed(factor: int, costs: Values, codes: Codes) -> Values:
    return np.asarray(-factor * np.log10(picked(costs, codes).sum(axis=1) + 1e-12))


def _signed(choices: Choices, effects: Effects, codes: Codes) -> Values:
    """SQNR of each recipe by the mean square of the sum of its effects [dB]."""
    recipes = map(choices.choice, codes)
    return np.array([expected_db(effects.noise(choice), effects.shape[1]).value for choice in recipes])


def _line(quantity: Callable[[Codes], Values]) -> Fit:
    def fit(codes: Codes, target: Values) -> Callable[[Codes], Values]:
        x = quantity(codes)
        slope, offset = np.polyfit(x, target, 1) if np.ptp(x) > 0 else (0.0, float(target.mean()))
        return lambda other: offset + slope * quantity(other)

    return fit


def _ridge(choices: Choices) -> Fit:
    """Ridge regression; the penalty is the one of least generalised cross-validation error on the training recipes."""

    def design(codes: Codes) -> Values:
        return np.asarray(np.eye(choices.n_options)[codes].reshape(len(codes), -1))

    def fit(codes: Codes, target: Values) -> Callable[[Codes], Values]:
        x, mean = design(codes), float(target.mean())
        centre = x.mean(axis=0)
        u, singular, vt = np.linalg.svd(x - centre, full_matrices=False)
        along = u.T @ (target - mean)

        def error(penalty: float) -> float:
            shrunk = singular**2 / (singular**2 + penalty)
            rest = target - mean - u @ (shrunk * along)
            return float((rest**2).mean() / (1 - (shrunk.sum() + 1) / len(target)) ** 2)

        penalty = min(RIDGES, key=error)
        weights = vt.T @ (singular / (singular**2 + penalty) * along)
        return lambda other: mean + (design(other) - centre) @ weights

    return fit


def telling_changes(predictor: Predictor, table: SensitivityTable, allocation: Allocation) -> dict[Insight, Recipe]:
    """Changes of an operation or block whose predicted effect is largest, and the changed recipes, to be measured."""
    space = predictor.data.choices.space
    layers = {f"every `{name}` layer": members for name, members in grouped(space, lambda d: d.operation).items()}
    blocks = grouped(space, lambda d: f"block `{d.block}`" if d.block else "the layers outside all blocks")
    fewer, more = (partial(_step, table, sign) for sign in (-1, 1))
    kinds = (
        ("Fewer bits", layers, fewer, 3),
        ("More bits", layers, more, 2),
        ("Fewer bits", blocks, fewer, 2),
        ("Another method", layers, partial(_other_method, table), 1),
    )
    recipes: dict[Insight, Recipe] = {}
    found: list[Insight] = []
    mildest: Insight | None = None
    for number, (kind, groups, other, n) in enumerate(kinds):
        made = [_change(predictor, allocation, f"{kind} for {what}", m, other) for what, m in groups.items()]
        recipes |= (known := dict(one for one in made if one is not None))
        changes = sorted(known, key=lambda c: -abs(c.predicted_db))
        found += [c for c in changes if abs(c.predicted_db) >= _LEAST_DB][:n]
        if not number:
            mildest = max((c for c in changes if c.predicted_db < 0), key=lambda c: c.predicted_db, default=None)
    unique = {recipes[c].key: c for c in (*found, mildest) if c is not None}
    return {c: recipes[c] for c in list(unique.values())[:N_CHANGES]}


def _change(
    predictor: Predictor,
    allocation: Allocation,
    what: str,
    members: Sequence[Decision],
    other: Callable[[Decision, Format], Format | None],
) -> tuple[Insight, Recipe] | None:
    """What happens where some decisions go to other formats; None where they have none."""
    choices, choice = predictor.data.choices, allocation.choice
    moves = {d.name: f for d in members if (f := other(d, choice[d.name])) is not None}
    if not moves:
        return None
    recipe = choices.space.recipe({**choice, **moves})
    before, after = choices.codes([allocation.recipe]), choices.codes([recipe])
    each = predictor.predict_each(np.concatenate([before, after]))
    effects = each[:, 1] - each[:, 0]
    # an error is that between folds, and what the noise models do not know
    unknowns = [n.noise.uncertainty(after, minus=before)[0] for n in predictor.noise_networks] or [0.0]
    predicted = float(effects.mean())
    half = NORMAL_95 * math.hypot(float(effects.std(ddof=1)), float(np.mean(unknowns)))
    share = 100 * sum(d.params for d in members) / choices.space.params
    sentence = (
        f"{what} ({bits_of(members, choice):.2f} bits per weight now, {allocation.paper_bits:.2f} overall; "
        f"{share:.1f} % of the weights) {'costs' if predicted < 0 else 'gains'} about {abs(predicted):.1f} dB."
    )
    old, new = _texts(choice[name] for name in moves), _texts(moves.values())
    return Insight(sentence, tuple(moves), old, new, predicted, predicted - half, predicted + half), recipe


def _step(table: SensitivityTable, sign: int, decision: Decision, present: Format) -> Format | None:
    """The best format with the next smaller or larger number of bits."""
    widths = [f.bits for f in decision.formats if sign * (f.bits - present.bits) > 0]
    width = min(widths, key=lambda bits: sign * bits, default=None)
    able = (f for f in decision.formats if f.bits == width)
    return min(able, key=lambda f: table.index[decision.name, f].cost, default=None)


def _other_method(table: SensitivityTable, decision: Decision, present: Format) -> Format | None:
    same = [f for f in decision.formats if f.bits == present.bits and f.family != present.family]
    return max(same, key=lambda f: table.index[decision.name, f].cost, default=None)


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
