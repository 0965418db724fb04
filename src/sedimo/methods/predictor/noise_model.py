"""Noise powers add, quality follows their logarithm: a predictor of recipes with a measured prior.

y = a - b g(S),  S = n0 + sum over decisions of c_i exp(delta_i),  g(S) = (S^p - 1) / p  (the logarithm for p = 0)

c_i is a prior cost of the option that decision i takes (first-order noise, an ablation, or weight error). The
corrections delta are sums of effects of operation types, blocks, formats, methods of an operation, decisions and single
options, each normal around 0. How strong each kind of effect is, and how noisy y is, follows from the trials themselves
(empirical Bayes). The posterior is taken as normal around its mode (Laplace), so that every prediction and every cost
has an uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from sedimo.errors import InputError
from sedimo.methods.predictor.features import Choices, Codes, Values, picked
from sedimo.quant.formats import Format
from sedimo.space import Decision

DECIBEL = 10 / math.log(10)
MIN_TRIALS = 8
_START_DEVIATION = {"operation": 0.5, "block": 0.3, "format": 0.2, "method": 0.3, "decision": 0.5, "option": 0.2}
_LEAST_DEVIATION, _MOST_DEVIATION = 0.02, 2.0
_LINK_DEVIATION = np.array([30.0, 0.5, 2.0, 0.3])  # of a [target units], log b, log n0, p, around their start
_N_EVIDENCE, _N_STEPS = 12, 30
_CONVERGED = 1e-4
_TINY = 1e-12


class NoiseModel:
    """A fitted predictor: the normal distribution around the mode, of effects, of costs, of predictions.

    Attributes:
        log_costs: `[D, K]`, the logarithm of each option's contribution to the noise.
        deviation: `[D, K]`, its standard deviation given the trials.
        offset, slope, floor, power: a, b > 0, n0 > 0 and p of the formula.
        unit: the total noise S that counts 1.
        residual: the standard deviation of what the formula leaves unexplained, in target units.
        strengths: how much each kind of effect corrects the prior (standard deviation of a logarithm).
    """

    def __init__(self, problem: _Problem, state: Values, strengths: Mapping[str, float], residual: float) -> None:
        self._problem, self._state = problem, state
        self.strengths, self.residual, self.unit = strengths, residual, problem.unit
        self.offset, log_slope, log_floor, self.power = map(float, state[-4:])
        self.slope, self.floor = math.exp(log_slope), math.exp(log_floor) * self.unit
        self.log_costs = problem.log_costs(state) + math.log(problem.unit)
        self._variance = problem.prior_variance(strengths)
        self._scaled = problem.jacobian(state, problem.codes)[1] / residual
        self._factor = _whitener(self._scaled, self._variance)
        whitened = (self._factor @ self._scaled) * self._variance  # [T, P + 4]
        known = np.zeros((len(whitened), *problem.numbers.shape[1:]))
        for kind in problem.numbers:
            known += whitened[:, kind]
        spread = self._variance[problem.numbers].sum(axis=0) - (known**2).sum(axis=0)
        self.deviation: Values = np.sqrt(np.maximum(spread, 0.0))

    def predict(self, codes: Codes) -> Values:
        """The target of recipes `[T, D]`, `[T]`."""
        total = np.exp(picked(self.log_costs, codes)).sum(axis=1)
        return np.asarray(self.offset - self.slope * _curve(np.log((total + self.floor) / self.unit), self.power))

    def uncertainty(self, codes: Codes, *, minus: Codes | None = None) -> Values:
        """Deviation of the target of recipes `[T, D]`, or of its difference to others, without the residual, `[T]`."""
        gradients = self._problem.jacobian(self._state, codes)[1]
        if minus is not None:
            gradients = gradients - self._problem.jacobian(self._state, minus)[1]
        known = gradients * self._variance @ self._scaled.T @ self._factor.T
        spread = (gradients**2 * self._variance).sum(axis=1) - (known**2).sum(axis=1)
        return np.asarray(np.sqrt(np.maximum(spread, 0.0)))

    def draw(self, generator: np.random.Generator) -> Values:
        """Log costs `[D, K]` drawn from the posterior, as plausible as the mode given the trials.

        By Matheron's rule: a draw of the prior, corrected by what the trials say of it.
        """
        prior = generator.standard_normal(len(self._variance)) * np.sqrt(self._variance)
        seen = self._scaled @ prior + generator.standard_normal(len(self._scaled))
        gain = self._factor.T @ (self._factor @ seen)
        effects = prior - self._variance * (self._scaled.T @ gain)
        return np.asarray(self.log_costs + effects[:-4][self._problem.numbers].sum(axis=0))


def fit_noise_model(choices: Choices, prior: Values, codes: Codes, target: Values) -> NoiseModel:
    """Fits the model to recipes `[T, D]` with targets `[T]` (higher = better).

    `prior` `[D, K]` are costs >= 0; an option of cost 0 (fp16) stays free of noise.
    """
    target = np.asarray(target, dtype=np.float64)
    if len(target) < MIN_TRIALS or len(codes) != len(target):
        raise InputError(f"a predictor needs at least {MIN_TRIALS} measured recipes, got {len(target)}")
    if not np.isfinite(target).all() or np.ptp(target) == 0:
        raise InputError("the targets of the recipes must be finite and not all equal")
    if not (np.isfinite(prior[choices.exists]).all() and (prior[choices.exists] >= 0).all()):
        raise InputError("the costs of a prior must be finite and not negative")
    problem = _Problem(choices, prior, codes, target)
    state, strengths, residual = problem.start, dict(_START_DEVIATION), 0.3 * float(target.std())
    for _ in range(_N_EVIDENCE):
        state = problem.maximise(state, strengths, residual)
        before = (*strengths.values(), residual)
        strengths, residual = problem.evidence(state, strengths, residual)
        if max(abs(math.log(a / b)) for a, b in zip((*strengths.values(), residual), before, strict=True)) < 0.02:
            break
    return NoiseModel(problem, problem.maximise(state, strengths, residual), strengths, residual)


def effects_of(choices: Choices) -> dict[str, Codes]:
    """For each kind of effect the number of the effect that each option has, `[D, K]`."""

    def numbered(name: Callable[[Decision, Format], str]) -> Codes:
        known: dict[str, int] = {}
        return choices.array(lambda d, f: known.setdefault(name(d, f), len(known))).astype(np.int64)

    return {
        "operation": numbered(lambda d, f: d.operation),
        "block": numbered(lambda d, f: d.block),
        "format": numbered(lambda d, f: str(f)),
        "method": numbered(lambda d, f: f"{d.operation} {f.family} {f.group_size}"),
        "decision": numbered(lambda d, f: d.name),
        "option": numbered(lambda d, f: f"{d.name} {f}"),
    }


class _Problem:
    """The model's function, its derivatives, and the steps of its fit. Logarithms of costs are about their unit.

    A state holds all unknowns, `[P + 4]`: effects, and the link (a, log b, log n0, p).
    """

    def __init__(self, choices: Choices, prior: Values, codes: Codes, target: Values) -> None:
        self.codes, self.target = codes, target
        with np.errstate(divide="ignore"):
            log_prior = np.where(choices.exists, np.log(prior), -np.inf)
        start = np.exp(picked(log_prior, codes)).sum(axis=1)
        if not (start > 0).any():
            raise InputError("recipes without any quantized decision cannot train a predictor")
        start = np.where(start > 0, start, start[start > 0].min())  # a recipe without noise stands at the floor
        self.unit = float(np.exp(np.log(start).mean()))
        start = start / self.unit
        self._log_prior = log_prior - math.log(self.unit)
        kinds = effects_of(choices)
        sizes = [int(numbers.max()) + 1 for numbers in kinds.values()]
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._slices = {k: slice(int(o), int(o) + n) for k, o, n in zip(kinds, offsets, sizes, strict=True)}
        self.numbers = np.stack([n + o for n, o in zip(kinds.values(), offsets, strict=True)])  # [F, D, K]
        log = DECIBEL * np.log(start)  # the link starts as the line from this to the target
        slope = -float(np.polyfit(log, target, 1)[0]) if np.ptp(log) > 0 else 0.0
        slope = max(slope, 0.3 * float(target.std() / max(log.std(), 0.3)))
        link = [float((target + slope * log).mean()), math.log(slope), math.log(float(start.min())) - 2.0, 0.0]
        self.start = np.concatenate([np.zeros(sum(sizes)), link])

    def log_costs(self, state: Values) -> Values:
        return np.asarray(self._log_prior + state[:-4][self.numbers].sum(axis=0))

    def value(self, state: Values) -> Values:
        total = np.exp(picked(self.log_costs(state), self.codes)).sum(axis=1) + math.exp(state[-2])
        return np.asarray(state[-4] - math.exp(state[-3]) * _curve(np.log(total), state[-1]))

    def jacobian(self, state: Values, codes: Codes) -> tuple[Values, Values]:
        """Prediction `[T]` and its derivatives `[T, P + 4]`."""
        powers = np.exp(picked(self.log_costs(state), codes))
        a, b, n0, p = state[-4], math.exp(state[-3]), math.exp(state[-2]), state[-1]
        total = powers.sum(axis=1) + n0
        log = np.log(total)
        slope = -b * DECIBEL * np.exp(p * log)  # derivative by log S
        curve = _curve(log, p)
        by_power = DECIBEL * (log**2 / 2 if abs(p) < 1e-6 else (log * np.exp(p * log) - np.expm1(p * log) / p) / p)
        found = np.zeros((len(codes), len(state)))
        shares = powers / total[:, None] * slope[:, None]
        rows = np.arange(len(codes))[:, None]
        for column in self.numbers[:, np.arange(codes.shape[1])[None], codes]:
            np.add.at(found, (rows, column), shares)
        found[:, -4:] = np.stack([np.ones(len(codes)), -b * curve, slope * n0 / total, -b * by_power], axis=1)
        return a - b * curve, found

    def prior_variance(self, strengths: Mapping[str, float]) -> Values:
        found = np.empty(len(self.start))
        for kind, where in self._slices.items():
            found[where] = strengths[kind] ** 2
        found[-4:] = _LINK_DEVIATION**2
        return found

    def maximise(self, state: Values, strengths: Mapping[str, float], residual: float) -> Values:
        """The mode of the posterior, by damped Gauss-Newton steps in the space of the trials."""
        variance = self.prior_variance(strengths)

        def energy_of(at: Values) -> float:
            misfit = (self.target - self.value(at)) / residual
            return 0.5 * float((misfit**2).sum() + ((at - self.start) ** 2 / variance).sum())

        damping, current = 1e-3, energy_of(state)
        for _ in range(_N_STEPS):
            prediction, jacobian = self.jacobian(state, self.codes)
            scaled = jacobian / residual
            gradient = scaled.T @ ((self.target - prediction) / residual) - (state - self.start) / variance
            moved = _moved(state, scaled, variance / (1 + damping), gradient)
            while (energy := energy_of(moved)) > current and damping < 1e6:
                damping *= 6
                moved = _moved(state, scaled, variance / (1 + damping), gradient)
            if energy > current:
                break
            is_done = current - energy < _CONVERGED * (1 + abs(current))
            state, current, damping = moved, energy, max(damping / 6, 1e-9)
            if is_done:
                break
        return state

    def evidence(
        self, state: Values, strengths: Mapping[str, float], residual: float
    ) -> tuple[dict[str, float], float]:
        """Strengths and residual that make the trials most likely, one step of expectation-maximisation."""
        variance = self.prior_variance(strengths)
        prediction, jacobian = self.jacobian(state, self.codes)
        spread = posterior_variance(jacobian / residual, variance)
        found = {}
        for kind, where in self._slices.items():
            squares = state[where] ** 2 + spread[where]
            found[kind] = float(np.clip(math.sqrt(squares.mean()), _LEAST_DEVIATION, _MOST_DEVIATION))
        n_known = float((1 - spread / variance).sum())  # parameters that the trials determine
        freedom = max(len(self.target) - n_known, 0.1 * len(self.target))
        error = math.sqrt(float(((self.target - prediction) ** 2).sum()) / freedom)
        return found, max(error, 1e-3 * float(self.target.std()))


def _moved(state: Values, scaled: Values, variance: Values, gradient: Values) -> Values:
    """The state after a step (diag(1 / variance) + J^T J)^-1 gradient, through the trials (Woodbury), cut if long."""
    direct = variance * gradient
    correction = np.linalg.solve(_covariance(scaled, variance), scaled @ direct)
    step = direct - variance * (scaled.T @ correction)
    limit = max(1.0, float(np.abs(step[:-4]).max()), float(np.abs(step[-3:]).max()) / 0.5)
    return np.asarray(state + step / limit)


def posterior_variance(scaled: Values, variance: Values) -> Values:
    """Variance of each parameter `[P]` given derivatives `[T, P]` in units of the residual."""
    whitened = (_whitener(scaled, variance) @ scaled) * variance
    return np.asarray(np.maximum(variance - (whitened**2).sum(axis=0), _TINY))


def _curve(log: Values, power: float) -> Values:
    """The curve g at a total whose logarithm is given, in decibels."""
    return np.asarray(DECIBEL * (log if abs(power) < _TINY else np.expm1(power * log) / power))


def _whitener(scaled: Values, variance: Values) -> Values:
    """Inverse of the Cholesky factor of the trials' covariance, `[T, T]`."""
    return np.linalg.inv(np.linalg.cholesky(_covariance(scaled, variance)))


def _covariance(scaled: Values, variance: Values) -> Values:
    return np.asarray((scaled * variance) @ scaled.T + np.eye(len(scaled)))
