"""Ablation: one decision quantized alone, at a few formats, the others by scaling.

With a wide choice of formats probing all of them is too many. Each decision is probed at a few formats of each family,
near those in play: families put different noise on the output at the same weight error. Between two probed formats
of its family a format's noise is interpolated in the logarithm of weight error; outside them it is taken
proportional to weight error, r = c * error. How well that holds is checked on a sample of measured pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sedimo.allocation.combine import Agreement, agreement
from sedimo.allocation.table import (
    EXACTLY_NOTHING,
    CostEstimate,
    SensitivityTable,
    build_table,
    geometric_mean_cost,
    mean_cost,
)
from sedimo.bank import Bank, Candidate
from sedimo.errors import InputError
from sedimo.lab.lab import Lab, seconds_of_estimates
from sedimo.lab.trials import CallTiming, plan_campaign
from sedimo.methods.method import Finding, Method, NoKnobs, Price, Task, Traits, Words, plan_of
from sedimo.metrics.signal import NoisePowers
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import FP16, Format
from sedimo.space import Recipe, SearchSpace

Average = Literal["arithmetic", "geometric"]
DIVERGED = 1e6  # stands for the relative noise of a sample that became infinite
DEFAULT_BITS = (3.0, 4.5)
NAME = "ablation"
N_SCALING_CHECKS = 12  # formats measured to see how well the others are scaled
MIN_CHECKS = 3


@dataclass(frozen=True, slots=True)
class AblationProbe:
    """A decision quantized alone, the rest at full precision."""

    decision: str
    format: Format

    def recipe(self, space: SearchSpace) -> Recipe:
        """The recipe to be measured."""
        return space.recipe({self.decision: self.format})


@dataclass(frozen=True, slots=True)
class Measured:
    """A probe with the powers that were measured for it."""

    probe: AblationProbe
    powers: NoisePowers


def plan_probes(
    space: SearchSpace, candidates: Iterable[Candidate], *, near_bits: Sequence[float] = DEFAULT_BITS
) -> tuple[AblationProbe, ...]:
    """The probes of every decision: of each family the formats nearest to each goal in `near_bits` in paper bits."""
    by_decision = _by_decision(candidates)
    probes = (
        AblationProbe(decision.name, _nearest(front, bits, decision.params))
        for decision in space.decisions
        for front in _fronts(by_decision[decision.name])
        for bits in near_bits
    )
    return tuple(dict.fromkeys(probes))


def plan_checks(
    space: SearchSpace, candidates: Iterable[Candidate], probes: Iterable[AblationProbe], *, n: int, seed: int = 0
) -> tuple[AblationProbe, ...]:
    """`n` random (decision, format) pairs that were not probed alone, to check the scaling on."""
    probed = {(p.decision, p.format) for p in probes}
    pairs = [(c.decision, c.format) for c in candidates if c.format.is_quantized]
    free = sorted((d, str(f)) for d, f in pairs if (d, f) not in probed)
    drawn = random.Random(f"sedimo scaling check {seed}").sample(free, min(n, len(free)))
    return tuple(AblationProbe(d, Format.parse(text)) for d, text in drawn)


def measure_probes(lab: Lab, on: Sampling, probes: Sequence[AblationProbe]) -> tuple[Measured, ...]:
    """Each probe as a trial, on the seeds of a plan."""
    trials = lab.measure([one.recipe(lab.any_bank.space) for one in probes], on)
    return tuple(Measured(one, trial.powers) for one, trial in zip(probes, trials, strict=True))


def ablation_table(
    space: SearchSpace,
    candidates: Sequence[Candidate],
    measured: Sequence[Measured],
    *,
    average: Average = "arithmetic",
    settings: Mapping[str, str] | None = None,
) -> SensitivityTable:
    """Costs of all candidates from the probes: measured where probed alone, scaled by weight error elsewhere.

    Raises:
        InputError: a decision was not probed.
    """
    index = {(c.decision, c.format): c for c in candidates}
    points: dict[str, list[_Point]] = {d.name: [] for d in space.decisions}
    for one in measured:
        probe = one.probe
        error = index[probe.decision, probe.format].error
        points[probe.decision].append(_Point(probe.format, error, mean_noise(one.powers, average)))

    def estimate(candidate: Candidate) -> CostEstimate:
        return _scaled(candidate, sorted(points[candidate.decision], key=lambda p: p.error))

    n_units = len({one.probe.decision for one in measured})
    known = {"n_probes": str(len(measured)), "n_units": str(n_units), "average": average, **(settings or {})}
    return build_table(NAME, space, candidates, estimate, known, sees_activations=True)


def check_scaling(
    table: SensitivityTable, measured: Sequence[Measured], *, average: Average = "arithmetic"
) -> Agreement:
    """Predicted against measured noise of pairs that were measured but not used for the table.

    Raises:
        InputError: fewer than three pairs.
    """
    predicted, found = [], []
    for one in measured:
        noise = mean_noise(one.powers, average).value
        cost = table.index[one.probe.decision, one.probe.format].cost
        if noise > 0 and cost > 0:
            predicted.append(cost)
            found.append(noise)
    return agreement(predicted, found)


def mean_noise(powers: NoisePowers, average: Average = "arithmetic") -> CostEstimate:
    """Mean relative noise over samples; a sample that diverged counts with 1e6."""
    ratio = np.minimum(powers.ratio, DIVERGED)
    return mean_cost(ratio) if average == "arithmetic" else geometric_mean_cost(ratio)


@dataclass(frozen=True, slots=True)
class _Point:
    """Measured noise of a decision at a format of a known weight error."""

    format: Format
    error: float
    noise: CostEstimate


def _by_decision(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        found.setdefault(candidate.decision, []).append(candidate)
    return found


def _family(number_format: Format) -> str:
    """Formats that differ in bits alone."""
    return f"{number_format.family} g{number_format.group_size} a{number_format.activation_bits}"


def _fronts(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """The front of each family; none where nothing can be quantized."""
    by_family: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.format != FP16:
            by_family.setdefault(_family(candidate.format), []).append(candidate)
    return [_front(found) for found in by_family.values()]


def _front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Quantized candidates that no other beats in bytes and error, by growing bytes."""
    found: list[Candidate] = []
    for candidate in sorted((c for c in candidates if c.format != FP16), key=lambda c: (c.paper_bytes, c.error)):
        if not found or candidate.error < found[-1].error:
            found.append(candidate)
    return found


def _nearest(front: Sequence[Candidate], bits: float, params: int) -> Format:
    return min(front, key=lambda c: abs(8 * c.paper_bytes / params - bits)).format


def _scaled(candidate: Candidate, points: Sequence[_Point]) -> CostEstimate:
    """The noise at a candidate's weight error, from points by growing error."""
    if not points:
        raise InputError(f"{candidate.decision} was not probed; measure all probes first")
    for point in points:
        if point.format == candidate.format:
            return point.noise
    usable = [p for p in points if p.error > 0 and p.noise.value > 0]
    if not usable or candidate.error <= 0:
        return EXACTLY_NOTHING
    usable = [p for p in usable if _family(p.format) == _family(candidate.format)] or usable
    low, high = _neighbours(candidate.error, usable)
    near = low if candidate.error - low.error <= high.error - candidate.error else high
    if low.error == high.error:
        value = low.noise.value * candidate.error / low.error
    else:
        position = math.log(candidate.error / low.error) / math.log(high.error / low.error)
        value = low.noise.value * (high.noise.value / low.noise.value) ** position
    return CostEstimate(value, value * near.noise.standard_error / near.noise.value, near.noise.n)


def _neighbours(error: float, points: Sequence[_Point]) -> tuple[_Point, _Point]:
    """The points on both sides of an error; twice the outermost one when it lies outside."""
    if error <= points[0].error:
        return points[0], points[0]
    if error >= points[-1].error:
        return points[-1], points[-1]
    upper = next(i for i, p in enumerate(points) if p.error >= error)
    return points[upper - 1], points[upper]


def near_bits(lab: Lab, task: Task[NoKnobs]) -> tuple[float, ...]:
    """Around which bits to probe: half a bit below and a bit above the budget, where it limits the size."""
    if not task.budget.has_size:
        return DEFAULT_BITS
    bits = task.budget.in_bits(lab.space.params)
    return max(2.2, bits - 0.5), bits + 1.0


def price_of_probes(space: SearchSpace, timing: CallTiming) -> Price:
    """An upper limit, known without weights: two formats of every family of every decision."""
    families = [len({(f.family, f.group_size) for f in d.formats if f.is_quantized}) for d in space.decisions]
    n_calls = timing.n_calls * (1 + len(DEFAULT_BITS) * sum(families))
    return Price(timing.seconds_per_call * n_calls, n_calls)


def price_of_ablation(lab: Lab, task: Task[NoKnobs], *, is_fitted: bool = False) -> Price:
    """The probes and the checks of their scaling; formats that are probed are fitted, others estimated."""
    bank, timing = lab.estimated, lab.time_calls(lab.seeds.search)
    probes = plan_probes(bank.space, bank.candidates, near_bits=near_bits(lab, task))
    campaign = plan_campaign(
        [one.recipe(bank.space) for one in probes],
        study=None,
        setting=lab.setting(lab.seeds.search, weights_digest=lab.weights.digest),
        timing=timing,
        weights_bytes=4 * lab.space.params,
    )
    fitted = sum(lab.space.decision_index[one.decision].params for one in probes)
    fit = 0.0 if is_fitted else seconds_of_estimates(lab) + fitted * lab.seconds_per_fit
    checks = N_SCALING_CHECKS * timing.n_calls
    seconds = campaign.seconds + checks * timing.seconds_per_call + fit
    return Price(seconds, campaign.n_calls + checks, campaign.memory_bytes, campaign.disk_bytes)


def ablate(lab: Lab, task: Task[NoKnobs], bank: Bank) -> Finding:
    """Costs of the candidates of a bank; some formats that were only scaled to are measured, where that is checked."""
    on, near = plan_of(lab, task), near_bits(lab, task)
    probes = plan_probes(bank.space, bank.candidates, near_bits=near)
    found = Finding(bank, ablation_table(bank.space, bank.candidates, measure_probes(lab, on, probes)))
    pairs = plan_checks(bank.space, bank.candidates, probes, n=N_SCALING_CHECKS)
    if not task.is_checked or len(pairs) < MIN_CHECKS:
        return found
    return found.with_evidence(check_scaling(found.table, measure_probes(lab, lab.seeds.search, pairs)))


ABLATION = Method(
    name=NAME,
    words=Words(
        summary="noise measured with one layer quantized at a time, at a few formats, the others by scaling",
        cost="the noise measured when it alone is quantized",
        sees="all that a layer alone does to the final latents, of whatever order",
        misses="what errors of layers do together; formats between those probed are scaled by weight error",
    ),
    traits=Traits(is_prior=True),
    price=price_of_ablation,
    price_of_prior=price_of_probes,
    measure=lambda lab, task: ablate(lab, task, lab.estimated),
)
