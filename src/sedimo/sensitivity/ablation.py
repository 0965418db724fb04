"""Ablation: one unit (a decision, or a group of them) quantized alone, at a few formats, the others by scaling.

With a wide choice of formats probing all of them is too many. Each unit is probed at a few formats of each family,
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

from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.graph.model import Group
from sedimo.metrics.signal import NoisePowers
from sedimo.quant.formats import FP16, Format
from sedimo.sensitivity.agreement import Agreement, agreement
from sedimo.sensitivity.costs import EXACTLY_NOTHING, CostEstimate, build_table, geometric_mean_cost, mean_cost
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import Recipe, SearchSpace

Average = Literal["arithmetic", "geometric"]
DIVERGED = 1e6  # stands for the relative noise of a sample that became infinite
DEFAULT_BITS = (3.0, 4.5)


@dataclass(frozen=True, slots=True)
class AblationProbe:
    """A unit quantized alone: the format of each of its decisions, the rest at full precision."""

    unit: str
    choice: Mapping[str, Format]

    def recipe(self, space: SearchSpace) -> Recipe:
        """The recipe to be measured."""
        return space.recipe(self.choice)


@dataclass(frozen=True, slots=True)
class Measured:
    """A probe with the powers that were measured for it."""

    probe: AblationProbe
    powers: NoisePowers


def plan_probes(
    space: SearchSpace,
    candidates: Iterable[Candidate],
    *,
    near_bits: Sequence[float] = DEFAULT_BITS,
    groups: Sequence[Group] = (),
) -> tuple[AblationProbe, ...]:
    """The probes of every unit: for each family and each goal in `near_bits` the formats nearest to it in paper bits.

    Units are decisions, or the given groups (decisions outside all groups are units of their own); a decision of a
    group that lacks a family takes its best format of any. Choices that were planned already for a unit are left out.
    """
    fronts = {d: _fronts(found) for d, found in _by_decision(candidates).items()}
    probes = []
    for unit, decisions in _units(space, groups).items():
        known = [d for d in decisions if fronts[d]]
        planned: list[dict[str, Format]] = []
        for family in dict.fromkeys(f for d in known for f in fronts[d] if f is not None):
            for bits in near_bits:
                params = {d: space.decision_index[d].params for d in known}
                choice = {d: _nearest(fronts[d].get(family, fronts[d][None]), bits, params[d]) for d in known}
                if choice not in planned:
                    planned.append(choice)
                    probes.append(AblationProbe(unit, choice))
    return tuple(probes)


def plan_checks(
    space: SearchSpace, candidates: Iterable[Candidate], probes: Iterable[AblationProbe], *, n: int, seed: int = 0
) -> tuple[AblationProbe, ...]:
    """`n` random (decision, format) pairs that were not probed alone, to check the scaling on."""
    probed = {pair for p in probes if len(p.choice) == 1 for pair in p.choice.items()}
    pairs = [(c.decision, c.format) for c in candidates if c.format.is_quantized]
    free = sorted((d, str(f)) for d, f in pairs if (d, f) not in probed)
    drawn = random.Random(f"sedimo scaling check {seed}").sample(free, min(n, len(free)))
    return tuple(AblationProbe(d, {d: Format.parse(text)}) for d, text in drawn)


def ablation_table(
    space: SearchSpace,
    candidates: Sequence[Candidate],
    measured: Sequence[Measured],
    *,
    average: Average = "arithmetic",
    settings: Mapping[str, str] | None = None,
) -> SensitivityTable:
    """Costs of all candidates from the probes: measured where probed alone, scaled by weight error elsewhere.

    The noise of a probed group is shared among its decisions in proportion to their weight errors.

    Raises:
        InputError: a decision was not probed.
    """
    index = {(c.decision, c.format): c for c in candidates}
    points: dict[str, list[_Point]] = {d.name: [] for d in space.decisions}
    for one in measured:
        for decision, point in _shared(one, index, average).items():
            points[decision].append(point)

    def estimate(candidate: Candidate) -> CostEstimate:
        return _scaled(candidate, sorted(points[candidate.decision], key=lambda p: p.error))

    n_units = len({one.probe.unit for one in measured})
    known = {"n_probes": str(len(measured)), "n_units": str(n_units), "average": average, **(settings or {})}
    return build_table("ablation", space, candidates, estimate, known, sees_activations=True)


def check_scaling(
    table: SensitivityTable, measured: Sequence[Measured], *, average: Average = "arithmetic"
) -> Agreement:
    """Predicted against measured noise of pairs that were measured but not used for the table.

    Raises:
        InputError: fewer than three pairs, or a probe of several decisions.
    """
    predicted, found = [], []
    for one in measured:
        if len(one.probe.choice) != 1:
            raise InputError(f"scaling is checked on single decisions, {one.probe.unit} has {len(one.probe.choice)}")
        noise = mean_noise(one.powers, average).value
        cost = table.index[next(iter(one.probe.choice.items()))].cost
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


def _fronts(candidates: Sequence[Candidate]) -> dict[str | None, list[Candidate]]:
    """The front of each family, and under None that of all; empty where nothing can be quantized."""
    by_family: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.format != FP16:
            by_family.setdefault(_family(candidate.format), []).append(candidate)
    fronts: dict[str | None, list[Candidate]] = {family: _front(found) for family, found in by_family.items()}
    return {**fronts, None: _front(candidates)} if fronts else {}


def _front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Quantized candidates that no other beats in bytes and error, by growing bytes."""
    found: list[Candidate] = []
    for candidate in sorted((c for c in candidates if c.format != FP16), key=lambda c: (c.paper_bytes, c.error)):
        if not found or candidate.error < found[-1].error:
            found.append(candidate)
    return found


def _nearest(front: Sequence[Candidate], bits: float, params: int) -> Format:
    return min(front, key=lambda c: abs(8 * c.paper_bytes / params - bits)).format


def _units(space: SearchSpace, groups: Sequence[Group]) -> dict[str, tuple[str, ...]]:
    decisions_of: dict[str, list[str]] = {}
    for decision in space.decisions:
        for layer in decision.layers:
            decisions_of.setdefault(layer, []).append(decision.name)
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for group in groups:
        members = dict.fromkeys(d for layer in group.layers for d in decisions_of.get(layer, ()))
        free = tuple(d for d in members if d not in taken)
        if free:
            found[group.name] = free
            taken.update(free)
    return found | {d.name: (d.name,) for d in space.decisions if d.name not in taken}


def _shared(measured: Measured, index: Mapping[tuple[str, Format], Candidate], average: Average) -> dict[str, _Point]:
    noise = mean_noise(measured.powers, average)
    errors = {d: index[d, f].error for d, f in measured.probe.choice.items()}
    total = sum(errors.values())
    found = {}
    for decision, number_format in measured.probe.choice.items():
        share = errors[decision] / total if total > 0 else 1 / len(errors)
        estimate = CostEstimate(share * noise.value, share * noise.standard_error, noise.n)
        found[decision] = _Point(number_format, errors[decision], estimate)
    return found


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
