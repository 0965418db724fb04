"""What was predicted of the result beside what was measured, and, where they disagree, the decisions to blame."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from sedimo.allocation.problem import Allocation
from sedimo.api.additivity import NO_NOISE
from sedimo.api.checking import Check
from sedimo.api.measuring import MeasuredTable
from sedimo.api.opening import Opened
from sedimo.api.searching import Measuring
from sedimo.bank import SILENT, Progress
from sedimo.measurement.study import Study
from sedimo.metrics.estimate import Estimate, normal_estimate
from sedimo.metrics.signal import decibel, sqnr_estimates, summarize
from sedimo.quant.formats import FP16, Format
from sedimo.reporting.prediction import Blamed, Prediction
from sedimo.sensitivity.adjoint import expected_db
from sedimo.space import compose

NO_PREDICTION = NO_NOISE | {"sqnr"}  # which looks at the outputs of layers
N_SUSPECTS = 8  # half of them by what they are predicted to add, half by their weight error
N_BLAMED = 3


def judge_prediction(
    opened: Opened,
    measured: MeasuredTable,
    allocation: Allocation,
    check: Check | None,
    study: Study,
    progress: Progress = SILENT,
) -> Prediction | None:
    """The prediction of the chosen recipe beside the check on fresh seeds, if there was one.

    None for a method that predicts no noise of final latents.

    Where they are far apart, some suspects go back to 16 bits, one after the other, and the recipe is measured again.

    Raises:
        Interrupted: Ctrl-C; what was measured is kept.
    """
    if measured.table.method in NO_PREDICTION:
        return None
    if measured.effects is None or measured.predicted is None:
        predicted = _as_db(normal_estimate(allocation.objective, allocation.standard_error))
    else:
        predicted = expected_db(measured.predicted, measured.effects.shape[1])
    if check is None:
        return Prediction(predicted, None)
    found = Prediction(predicted, sqnr_estimates(summarize(check.this.signals.powers))["sqnr_db"])
    if found.is_trusted:
        return found
    return replace(found, blamed=_blamed(opened, measured, allocation, study, progress))


def _as_db(noise: Estimate) -> Estimate:
    """SQNR of a sum of costs [dB], with its error by the derivative."""
    value = decibel(noise.value)
    if not math.isfinite(value):
        return Estimate(value, 0.0, value, value, noise.n)
    return normal_estimate(value, 10 / math.log(10) * noise.standard_error / noise.value)


def _blamed(
    opened: Opened, measured: MeasuredTable, allocation: Allocation, study: Study, progress: Progress
) -> tuple[Blamed, ...]:
    bank, table = measured.bank, measured.table
    suspects = _suspects(measured, allocation.choice)
    recipes = [compose({**allocation.choice, name: FP16}, table.layers, table.streams) for name in suspects]
    plan = opened.order.sampling.searching(opened.pipe)
    trials = Measuring.on(opened.pipe, bank, study, plan, progress=progress).trials([allocation.recipe, *recipes])
    scores = [trial.score for trial in trials]
    found = [
        Blamed(
            name, str(allocation.choice[name]), _predicted_gain(measured, allocation.choice, name), score - scores[0]
        )
        for name, score in zip(suspects, scores[1:], strict=True)
    ]
    found.sort(key=lambda one: -abs(one.measured_db - one.predicted_db))
    return tuple(found[:N_BLAMED])


def _suspects(measured: MeasuredTable, choice: Mapping[str, Format]) -> list[str]:
    """The decisions that are predicted to add most, and those whose weights changed most."""
    changed = [name for name, number_format in choice.items() if number_format.is_quantized]
    errors = {name: measured.bank.index[name, choice[name]].error for name in changed}
    costs = {name: measured.table.index[name, choice[name]].cost for name in changed}
    by_cost, by_error = (sorted(changed, key=lambda name: -values[name]) for values in (costs, errors))
    half = N_SUSPECTS // 2
    return list(dict.fromkeys([*by_cost[:half], *by_error]))[:N_SUSPECTS]


def _predicted_gain(measured: MeasuredTable, choice: Mapping[str, Format], name: str) -> float:
    """What the recipe is predicted to gain without the noise of one decision [dB]."""
    if measured.effects is None:
        costs = {d: measured.table.index[key].cost for d, key in zip(choice, choice.items(), strict=True)}
        whole = math.fsum(costs.values())
        return decibel(whole - costs[name]) - decibel(whole)
    before, after = (measured.effects.noise(c) for c in (choice, {**choice, name: FP16}))
    n_directions = measured.effects.shape[1]
    return expected_db(after, n_directions).value - expected_db(before, n_directions).value
