"""From orthogonality to a table: how many bits the layers deserve that repeat others least.

A layer's gamma at timestep t is the mean of its row of the matrix without the diagonal: how much its output repeats
those of other layers. Its importance is

    theta = sum over t of w_t exp(-beta gamma_t),    w_t proportional to exp(tau (1 - progress_t)),

divided by the largest, with progress from 0 (the first, noisiest step) to 1. The published objective to be maximised,
the sum of theta times bits, becomes a cost by counting the bits that a format lacks to 16. It is linear, so its optimum
gives most layers the fewest or the most bits that there are. The objective `noise`, ours, is the sum of theta times
relative weight error instead: every bit less then costs about four times what the last one did.

Sources:
    Ma et al. 2023, OMPQ (arXiv 2109.07865): exponential importance of the row sum, whose beta is ours divided by the
    number of other layers. MPQ-Diff (arXiv 2412.00144): exponential weights over timesteps; tau is our name for what
    it does not give. The bits that a family wastes (below) are ours: the published programme knows one family.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import logsumexp

from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.measurement.orthogonality import OrthogonalityProbe
from sedimo.quant.formats import FULL_BITS
from sedimo.sensitivity.costs import CostEstimate, build_table
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import Decision, SearchSpace

UNITS = {"bits": "missing bits, weighted by importance", "noise": "weight error, weighted by importance"}
MAX_WASTE = 0.99  # of a bit: a worse family is still better than one bit less
Objective = Literal["bits", "noise"]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ImportanceOptions:
    """Knobs of the importance.

    `beta` is how sharply importance falls with repetition (0: all layers alike); `tau` how much more early, noisy
    timesteps count than late ones (0: alike; negative: late ones more). `tail_mean` takes for each layer the mean of
    the importances from it to the last layer, as the published programme does. `objective` is what theta multiplies:
    missing `bits`, as published, or weight `noise`.
    """

    beta: float = 10.0
    tau: float = 0.0
    tail_mean: bool = False
    objective: Objective = "bits"

    def __post_init__(self) -> None:
        """Refuses knobs that mean nothing."""
        if not (math.isfinite(self.tau) and math.isfinite(self.beta) and self.beta >= 0):
            raise InputError(f"beta must be a number of at least 0 and tau a number, got {self.beta} and {self.tau}")
        if self.objective not in get_args(Objective):
            raise InputError(f"the objective of importances is 'bits' or 'noise', got {self.objective!r}")


DEFAULT_IMPORTANCE = ImportanceOptions()


@dataclass(frozen=True)
class Importance:
    """theta `[L]` of `layers` with jackknife errors; `per_step` `[T, L]` is exp(-beta gamma_t). The largest are 1.

    Of `constant` layers (the same for all samples at every timestep) and of `unread` ones (samples cannot be told apart
    in their outputs) nothing is known; they have the mean of the others. `unused` layers, never called, have 0.
    """

    layers: tuple[str, ...]
    theta: Values
    standard_error: Values
    per_step: Values
    step_weights: Values
    constant: tuple[str, ...]
    unused: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def importance(probe: OrthogonalityProbe, options: ImportanceOptions = DEFAULT_IMPORTANCE) -> Importance:
    """The importance of every layer.

    Raises:
        InputError: no timestep at which two layers' outputs differ between samples.
    """
    known = _known(probe)
    if not known.any():
        raise InputError("orthogonality compares layers, but at no timestep two of them differ between samples")
    unknown = [name for i, name in enumerate(probe.layers) if not known[:, i].any()]
    unused = tuple(name for name in unknown if all(name in part.unused for part in probe.parts))
    unread = tuple(name for name in unknown if any(name in part.unread for part in probe.parts))
    constant = tuple(name for name in unknown if name not in unused and name not in unread)
    is_used = np.array([name not in unused for name in probe.layers])
    logs = _log_step_weights(len(probe.parts), options.tau)
    replicates = np.array([part.replicates for part in probe.parts])  # [T, R, L]
    sums = probe.sums
    theta = _theta(sums, known, logs, options) * is_used
    thetas = np.stack([_theta(replicates[:, r], known, logs, options) for r in range(replicates.shape[1])]) * is_used
    n = len(thetas)
    error = np.sqrt((n - 1) / n * ((thetas - thetas.mean(axis=0)) ** 2).sum(axis=0))
    gamma = np.where(known, _gamma(sums, known), np.nan)
    per_step = np.exp(-options.beta * (gamma - np.nanmin(gamma)))
    return Importance(probe.layers, theta, error, per_step, np.exp(logs), constant, unused, unread)


def orthogonality_table(
    space: SearchSpace,
    candidates: Iterable[Candidate],
    probe: OrthogonalityProbe,
    options: ImportanceOptions = DEFAULT_IMPORTANCE,
) -> SensitivityTable:
    """Cost = theta times (16 - bits of the format + bits that its family wastes), or theta times weight error.

    Where activations are quantized, the bits that they lack to 16 count like those of the weights, theta times
    (32 - b_w - b_a): this is ours, because the published objective has weights alone. A stream of a layer has the
    layer's theta times its share of the layer's weights: a layer whose streams agree costs what it would cost whole.

    The bits that a family wastes against the best one of equal bits are half the binary logarithm of the ratio of
    their weight errors, at most almost one: so families differ, and of one family alone the costs are the published
    objective.

    Raises:
        InputError: a decision none of whose layers was probed.
    """
    candidates = tuple(candidates)
    found, place = importance(probe, options), {name: i for i, name in enumerate(probe.layers)}
    best = _least_errors(candidates)
    thetas = {d.name: _of_decision(d, found, place) for d in space.decisions}

    def estimate(candidate: Candidate) -> CostEstimate:
        theta, error = thetas[candidate.decision]
        if options.objective == "noise":
            return CostEstimate(theta * candidate.error, error * candidate.error, probe.n_samples)
        least = best.get((candidate.decision, candidate.format.bits), 0.0)
        missing = FULL_BITS - candidate.format.bits + _wasted(candidate.error, least)
        missing += FULL_BITS - candidate.format.activation_bits
        return CostEstimate(theta * missing, error * missing, probe.n_samples)

    settings = {
        "beta": f"{options.beta:g}",
        "tau": f"{options.tau:g}",
        "tail_mean": str(options.tail_mean),
        "objective": options.objective,
        "n_samples": str(probe.n_samples),
        "n_timesteps": str(len(probe.parts)),
        "constant_layers": ", ".join(found.constant) or "none",
        "unused_layers": ", ".join(found.unused) or "none",
        "unread_layers": ", ".join(found.unread) or "none",
    }
    is_joint = options.objective == "bits"
    unit = UNITS[options.objective]
    return build_table("orthogonality", space, candidates, estimate, settings, unit=unit, sees_activations=is_joint)


def converged(probe: OrthogonalityProbe, options: ImportanceOptions = DEFAULT_IMPORTANCE) -> Mapping[int, float]:
    """Rank correlation of importances from fewer timesteps with those from all, by number of timesteps.

    It is not a number where fewer timesteps, or all, rank nothing: no two layers differ between samples there, or all
    are alike.
    """
    everything, n = importance(probe, options).theta, len(probe.parts)
    found = {}
    for k in range(1, n + 1):
        chosen = sorted({round(i) for i in np.linspace(0, n - 1, k)}) if k > 1 else [n // 2]
        part = replace(probe, parts=tuple(probe.parts[i] for i in chosen))
        theta = importance(part, options).theta if _known(part).any() else np.ones(len(everything))
        can_rank = np.ptp(theta) > 0 and np.ptp(everything) > 0
        found[k] = float(stats.spearmanr(theta, everything).statistic) if can_rank else math.nan
    return found


def _known(probe: OrthogonalityProbe) -> npt.NDArray[np.bool_]:
    """Which layers' outputs differ between samples, `[T, L]`; one such layer alone has nothing to be compared with."""
    known = np.array([[name not in part.unknown for name in probe.layers] for part in probe.parts], dtype=bool)
    known[known.sum(axis=1) < 2] = False
    return known


def _log_step_weights(n: int, tau: float) -> Values:
    """Logarithms of weights over timesteps, whose sum is 1."""
    logs = tau * (1.0 - np.linspace(0.0, 1.0, n))
    found: Values = logs - logsumexp(logs)
    return found


def _gamma(sums: Values, known: npt.NDArray[np.bool_]) -> Values:
    """Mean correlation with the other layers that differ between samples, `[T, L]`."""
    others = np.maximum(known.sum(axis=1, keepdims=True) - 1, 1)
    found: Values = sums / others
    return found


def _theta(sums: Values, known: npt.NDArray[np.bool_], log_weights: Values, options: ImportanceOptions) -> Values:
    """In logarithms up to the end, so that no beta and no tau leaves nothing of all layers."""
    is_known = known.any(axis=0)
    shares = np.where(known, log_weights[:, None], -np.inf)[:, is_known]
    each = -options.beta * _gamma(sums, known)[:, is_known]
    logs = logsumexp(shares + each, axis=0) - logsumexp(shares, axis=0)
    theta = np.ones(known.shape[1])
    theta[is_known] = np.exp(logs - logs.max())
    theta[~is_known] = theta[is_known].mean()
    if options.tail_mean:
        theta = np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1)
    found: Values = theta / theta.max()
    return found


def _wasted(error: float, least: float) -> float:
    """Bits that a family wastes against the one of least weight error; against an exact one all that it may."""
    if error <= least:
        return 0.0
    return min(0.5 * math.log2(error / least), MAX_WASTE) if least > 0 else MAX_WASTE


def _least_errors(candidates: Iterable[Candidate]) -> dict[tuple[str, int], float]:
    """Least weight error of the families of equal bits, by (decision, bits)."""
    found: dict[tuple[str, int], float] = {}
    for c in candidates:
        if c.format.is_quantized:
            key = c.decision, c.format.bits
            found[key] = min(found.get(key, math.inf), c.error)
    return found


def _of_decision(decision: Decision, found: Importance, place: Mapping[str, int]) -> tuple[float, float]:
    """Mean importance of a decision's layers that are used, and the mean of their errors; of a stream, its share."""
    probed = [layer for layer in decision.layers if layer in place]
    if not probed:
        raise InputError(f"the probe has no layer of {decision.name}; measure it again for this space")
    rows = [place[layer] for layer in probed if layer not in found.unused]
    if not rows:
        return 0.0, 0.0
    return decision.share * float(found.theta[rows].mean()), decision.share * float(found.standard_error[rows].mean())
