"""What was predicted of the result beside what was measured, and, where they disagree, the decisions to blame."""

from __future__ import annotations

import math
from dataclasses import replace

from sedimo.allocation.effects import Effects, expected_db
from sedimo.jobs.check import Check
from sedimo.lab.lab import Lab
from sedimo.methods.method import Finding
from sedimo.methods.portfolio import Portfolio
from sedimo.methods.prediction import Blamed, Prediction
from sedimo.metrics.estimate import Estimate, normal_estimate
from sedimo.metrics.signal import decibel, mean_sqnr
from sedimo.quant.formats import FP16
from sedimo.space import compose

N_SUSPECTS = 8  # half of them by what they are predicted to add, half by their weight error
N_BLAMED = 3


def judge_prediction(lab: Lab, finding: Finding, check: Check | None, *, predicts: bool) -> Prediction | None:
    """The prediction of the chosen recipe beside the check on fresh seeds, if there was one.

    None where costs that do not predict (`predicts`) noise of final latents are all that there is.

    Where they are far apart, some suspects go back to 16 bits, one after the other, and the recipe is measured again.

    Raises:
        Interrupted: Ctrl-C; what was measured is kept.
    """
    predicted = predicted_db(finding, predicts=predicts)
    if predicted is None or check is None:
        return None if predicted is None else Prediction(predicted, None)
    found = Prediction(predicted, mean_sqnr(check.this.signals.powers))
    return found if found.is_trusted else replace(found, blamed=_blamed(lab, finding))


def predicted_db(finding: Finding, *, predicts: bool) -> Estimate | None:
    """Mean SQNR that is predicted of the recipe [dB], by signed effects, or by its costs if they predict."""
    portfolio = finding.of(Portfolio)
    if portfolio is not None:
        return portfolio.sqnr_db
    if not predicts:
        return None
    allocation = finding.decided
    return _as_db(normal_estimate(allocation.objective, allocation.standard_error))


def _as_db(noise: Estimate) -> Estimate:
    """SQNR of a sum of costs [dB], with its error by the derivative."""
    value = decibel(noise.value)
    if not math.isfinite(value):
        return Estimate(value, 0.0, value, value, noise.n)
    return normal_estimate(value, 10 / math.log(10) * noise.standard_error / noise.value)


def _blamed(lab: Lab, finding: Finding) -> tuple[Blamed, ...]:
    table, allocation = finding.table, finding.decided
    suspects = _suspects(finding)
    recipes = [compose({**allocation.choice, name: FP16}, table.layers, table.streams) for name in suspects]
    scores = [trial.score for trial in lab.measure([allocation.recipe, *recipes], lab.seeds.search)]
    found = [
        Blamed(name, str(allocation.choice[name]), _predicted_gain(finding, name), score - scores[0])
        for name, score in zip(suspects, scores[1:], strict=True)
    ]
    found.sort(key=lambda one: -abs(one.measured_db - one.predicted_db))
    return tuple(found[:N_BLAMED])


def _suspects(finding: Finding) -> list[str]:
    """The decisions that are predicted to add most, and those whose weights changed most."""
    choice = finding.decided.choice
    changed = [name for name, number_format in choice.items() if number_format.is_quantized]
    errors = {name: finding.bank.index[name, choice[name]].error for name in changed}
    costs = {name: finding.table.index[name, choice[name]].cost for name in changed}
    by_cost, by_error = (sorted(changed, key=lambda name: -values[name]) for values in (costs, errors))
    half = N_SUSPECTS // 2
    return list(dict.fromkeys([*by_cost[:half], *by_error]))[:N_SUSPECTS]


def _predicted_gain(finding: Finding, name: str) -> float:
    """What the recipe is predicted to gain without the noise of one decision [dB]."""
    choice, effects = finding.decided.choice, finding.of(Effects)
    if effects is None:
        costs = {d: finding.table.index[key].cost for d, key in zip(choice, choice.items(), strict=True)}
        whole = math.fsum(costs.values())
        return decibel(whole - costs[name]) - decibel(whole)
    before, after = (effects.noise(c) for c in (choice, {**choice, name: FP16}))
    n_directions = effects.shape[1]
    return expected_db(after, n_directions).value - expected_db(before, n_directions).value
