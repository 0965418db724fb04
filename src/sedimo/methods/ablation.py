"""Ablation: one decision quantized alone, at a few formats, the others by scaling.

With a wide choice of formats probing all of them is too many. Each decision is probed at a few formats of each family,
near those in play: families put different noise on the output at the same weight error. Between two probed formats
of its family a format's noise is interpolated in the logarithm of weight error; outside them it is taken
proportional to weight error, r = c * error. How well that holds is checked on a sample of measured pairs.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sedimo.allocation.combine import Agreement, agreement
from sedimo.allocation.table import EXACTLY_NOTHING, SensitivityTable, build_table, mean_cost
from sedimo.bank import Bank, Candidate
from sedimo.errors import InputError
from sedimo.lab.lab import Lab, seconds_of_estimates
from sedimo.lab.measuring import CallTiming
from sedimo.methods.method import N_RANDOM, Finding, Method, NoKnobs, Price, Task, Words, plan_of, price_of_trials
from sedimo.metrics.signal import NoisePowers
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.families.family import CostEstimate
from sedimo.quant.formats import FP16, Format
from sedimo.space import SearchSpace

DIVERGED = 1e6  # stands for the relative noise of a sample that became infinite
DEFAULT_BITS = (3.0, 4.5)
NAME = "ablation"
N_SCALING_CHECKS = 12  # formats measured to see how well the others are scaled
MIN_CHECKS = 3
Probe = tuple[str, Format]  # a decision quantized alone, the rest at full precision


def plan_probes(
    space: SearchSpace, candidates: Iterable[Candidate], *, near_bits: Sequence[float] = DEFAULT_BITS
) -> tuple[Probe, ...]:
    """The probes of every decision: of each family the formats nearest to each goal in `near_bits` in paper bits."""
    families: dict[str, dict[str, list[Candidate]]] = {}
    for c in candidates:
        if c.format != FP16:
            families.setdefault(c.decision, {}).setdefault(_family(c.format), []).append(c)
    probes = (
        (d.name, min(front, key=lambda c: abs(8 * c.paper_bytes / d.params - bits)).format)
        for d in space.decisions
        for front in map(_front, families.get(d.name, {}).values())
        for bits in near_bits
    )
    return tuple(dict.fromkeys(probes))


def plan_checks(candidates: Iterable[Candidate], probes: Iterable[Probe], *, n: int) -> tuple[Probe, ...]:
    """`n` random (decision, format) pairs that were not probed alone, to check the scaling on."""
    pairs = [(c.decision, c.format) for c in candidates if c.format.is_quantized]
    free = sorted((d, str(f)) for d, f in set(pairs) - set(probes))
    drawn = random.Random("sedimo scaling check 0").sample(free, min(n, len(free)))
    return tuple((d, Format.parse(text)) for d, text in drawn)


def measure_probes(lab: Lab, on: Sampling, probes: Sequence[Probe]) -> dict[Probe, NoisePowers]:
    """The noise of each probe, which is a trial, on the seeds of a plan."""
    trials = lab.measure([lab.any_bank.space.recipe(dict([probe])) for probe in probes], on)
    return {one: trial.powers for one, trial in zip(probes, trials, strict=True)}


def ablation_table(
    space: SearchSpace, candidates: Sequence[Candidate], found: Mapping[Probe, NoisePowers]
) -> SensitivityTable:
    """Costs of all candidates from the probes: measured where probed alone, scaled by weight error elsewhere."""
    index = {(c.decision, c.format): c for c in candidates}
    points: dict[str, list[tuple[Candidate, CostEstimate]]] = {}
    for (decision, number_format), powers in found.items():
        points.setdefault(decision, []).append((index[decision, number_format], mean_noise(powers)))

    def estimate(candidate: Candidate) -> CostEstimate:
        if candidate.decision not in points:
            raise InputError(f"{candidate.decision} was not probed; measure all probes first")
        return _scaled(candidate, sorted(points[candidate.decision], key=lambda point: point[0].error))

    settings = {"n_probes": str(len(found)), "n_units": str(len({d for d, _ in found})), "average": "arithmetic"}
    return build_table(NAME, space, candidates, estimate, settings, sees_activations=True)


def check_scaling(table: SensitivityTable, found: Mapping[Probe, NoisePowers]) -> Agreement:
    """Predicted against measured noise of pairs that were measured but not used for the table, three at least."""
    pairs = [(table.index[probe].cost, mean_noise(powers).value) for probe, powers in found.items()]
    both = [(cost, noise) for cost, noise in pairs if noise > 0 and cost > 0]
    return agreement([cost for cost, _ in both], [noise for _, noise in both])


def mean_noise(powers: NoisePowers) -> CostEstimate:
    """Mean relative noise over samples; a sample that diverged counts with 1e6."""
    return mean_cost(np.minimum(powers.ratio, DIVERGED))


def _family(number_format: Format) -> str:
    """Formats that differ in bits alone."""
    return f"{number_format.family} g{number_format.group_size} a{number_format.activation_bits}"


def _front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Candidates that no other beats in bytes and error, by growing bytes."""
    found: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.paper_bytes, c.error)):
        if not found or candidate.error < found[-1].error:
            found.append(candidate)
    return found


def _scaled(candidate: Candidate, points: Sequence[tuple[Candidate, CostEstimate]]) -> CostEstimate:
    """The noise at a candidate's weight error, from measured ones of its decision by growing error."""
    for c, noise in points:
        if c.format == candidate.format:
            return noise
    usable = [(c, noise) for c, noise in points if c.error > 0 and noise.value > 0]
    if not usable or candidate.error <= 0:
        return EXACTLY_NOTHING
    usable = [(c, noise) for c, noise in usable if _family(c.format) == _family(candidate.format)] or usable
    error, errors = candidate.error, [c.error for c, _ in usable]
    upper = bisect_left(errors, error)
    if upper == 0 or error >= errors[-1]:
        outermost, near = usable[0 if upper == 0 else -1]
        value = near.value * error / outermost.error
    else:
        (a, low), (b, high) = usable[upper - 1 : upper + 1]
        near = low if error - a.error <= b.error - error else high
        position = math.log(error / a.error) / math.log(b.error / a.error)
        value = low.value * (high.value / low.value) ** position
    return CostEstimate(value, value * near.standard_error / near.value, near.n)


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
    recipes = (bank.space.recipe(dict([probe])) for probe in probes)
    distinct = {recipe.key: recipe for recipe in recipes}
    campaign = price_of_trials(distinct.values(), len(lab.seeds.search.seeds), timing, 4 * lab.space.params)
    fitted = sum(lab.space.decision_index[decision].params for decision, _ in probes)
    fit = 0.0 if is_fitted else seconds_of_estimates(lab) + fitted * lab.seconds_per_fit
    checks = N_SCALING_CHECKS * timing.n_calls
    return campaign + Price(checks * timing.seconds_per_call + fit, checks)


def ablate(lab: Lab, task: Task[NoKnobs], bank: Bank) -> Finding:
    """Costs of the candidates of a bank; some formats that were only scaled to are measured, where that is checked."""
    on, near = plan_of(lab, task), near_bits(lab, task)
    probes = plan_probes(bank.space, bank.candidates, near_bits=near)
    found = Finding(bank, ablation_table(bank.space, bank.candidates, measure_probes(lab, on, probes)))
    pairs = plan_checks(bank.candidates, probes, n=N_SCALING_CHECKS)
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
    is_noise=True,
    n_random=N_RANDOM,
    price=price_of_ablation,
    price_of_prior=price_of_probes,
    measure=lambda lab, task: ablate(lab, task, lab.estimated),
)
