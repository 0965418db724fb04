"""Peers of a comparison: other people's searches over formats of their own, at the same bytes and seeds.

A peer is told the budget in its own count, which knows nothing of some scales; so its budget is found by bisection,
as near to ours as its choices come and never above.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sedimo.codec import content_key
from sedimo.lab.exchange import probed
from sedimo.lab.lab import Lab
from sedimo.lab.objective import measure, measure_reference
from sedimo.methods import modelopt
from sedimo.methods.error import describe
from sedimo.methods.method import Finding, Method, NoKnobs, Price, Task, Traits, Words
from sedimo.methods.modelopt import FORMATS, FULL, LOSS_SCALE, ModelOptScores, Scored
from sedimo.metrics.signal import NoisePowers
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import FP16, FULL_BITS
from sedimo.space import Decision, SearchSpace

GRADIENT_FACTOR = 3.0  # a pass with gradients, in plain ones
PEER_VERSION = 1
LEAST_USED = 0.995  # of a budget, for a recipe to count as of equal size
PRECISION_BITS = 1e-3  # of the budget that a peer is told


@dataclass(frozen=True, slots=True)
class PeerRecipe:
    """What a peer chose: the name of its own format of every layer, and what that takes.

    `paper_bits` counts codes and 16 bits per scale, which is also what is stored [bits per weight]; `bops` are bit
    operations of one sample and denoiser call, attention included [BOPs].
    """

    formats: Mapping[str, str]
    paper_bits: float
    bops: int

    @property
    def key(self) -> str:
        """Content key of the formats."""
        return content_key(self.formats)


@dataclass(frozen=True, slots=True)
class PeerTrial:
    """Noise and signal power of each seed of a plan, with a peer's weights."""

    powers: NoisePowers


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that a peer gives one format, each told as a decision (it knows no streams), and its score of each."""

    decisions: tuple[Decision, ...]
    scores: Mapping[str, float]

    @property
    def n_weights(self) -> int:
        """Weights, those of equal layers once."""
        return sum(d.params for d in self.decisions)


def wanted_methods(
    methods: Sequence[Method[Any]], *, everything: Sequence[Method[Any]]
) -> tuple[tuple[Method[Any], ...], tuple[str, ...]]:
    """The methods that can be compared, with a note on peers that are missing when everything was asked for.

    Raises:
        MissingExtraError: a peer is asked for by name and not installed.
    """
    peers = [m.name for m in methods if m.traits.is_peer]
    is_everything = {m.name for m in methods} == {m.name for m in everything}
    if peers and is_everything and not modelopt.is_installed():
        remedy = f"pip install 'sedimo[{modelopt.EXTRA}]'"
        note = f"{', '.join(peers)} left out: {modelopt.PACKAGE} is not installed; {remedy}"
        return tuple(m for m in methods if not m.traits.is_peer), (note,)
    if peers:
        modelopt.load()
    return tuple(methods), ()


def nearest_below(budget: float, solve: Callable[[float], PeerRecipe | None]) -> PeerRecipe | None:
    """The largest recipe of at most `budget` paper bits, found by bisection of the bits that a peer is told.

    `solve` gives a recipe for those, or None. Sizes need not grow with them everywhere: no recipe above the budget is
    ever taken.
    """
    least, most = min(f.effective_bits for f in FORMATS.values()), float(FULL_BITS)
    best: PeerRecipe | None = None
    while most - least > PRECISION_BITS:
        middle = (least + most) / 2
        found = solve(middle)
        if found is None or found.paper_bits > budget:
            most = middle
            continue
        least = middle
        best = found if best is None or found.paper_bits > best.paper_bits else best
    return best


def grouped(space: SearchSpace, scores: ModelOptScores, *, factor: float = 1.0) -> tuple[Group, ...]:
    """A peer's scores by weights, times a factor: layers of equal weights are scored together and counted once."""
    home = {layer: w for w in space.weights for layer in w.layers}
    found: list[Group] = []
    for scored in scores.groups:
        decisions = dict.fromkeys(home[layer] for layer in scored.layers)
        total = {name: factor * score for name, score in scored.scores.items()}
        for other in [g for g in found if not decisions.keys().isdisjoint(g.decisions)]:
            found.remove(other)
            decisions |= dict.fromkeys(other.decisions)
            total = {name: score + other.scores[name] for name, score in total.items() if name in other.scores}
        found.append(Group(tuple(decisions), total))
    return tuple(found)


def peer_recipe(space: SearchSpace, groups: Sequence[Group], chosen: Sequence[str] | None) -> PeerRecipe | None:
    """The recipe of one format per group, weights of no group at 16 bits; None where nothing was chosen."""
    if chosen is None:
        return None
    pairs = zip(groups, chosen, strict=True)
    names = dict.fromkeys(space.weights, FULL) | {d: name for group, name in pairs for d in group.decisions}
    n_bytes = sum(_n_bytes(d, name) for d, name in names.items())
    macs = sum(d.macs * (FULL_BITS if name == FULL else FORMATS[name].bits) for d, name in names.items())
    return PeerRecipe(
        formats={layer: name for d, name in names.items() for layer in d.layers},
        paper_bits=8 * n_bytes / space.params,
        bops=macs * FULL_BITS + space.attention_bops,
    )


def measure_peers(lab: Lab, on: Sampling, recipes: Sequence[PeerRecipe]) -> dict[str, NoisePowers]:
    """Noise of peers' recipes on the seeds of a plan, by key: their weights in the same denoiser. Resumes in the study.

    Raises:
        Interrupted: Ctrl-C; what was measured is kept.
    """
    distinct = {recipe.key: recipe for recipe in recipes}
    if not distinct:
        return {}
    pipe, setting = lab.pipe, lab.setting(on, weights_digest=lab.weights.digest)
    reference = functools.cache(lambda: measure_reference("final_latents", pipe, on))
    named = {"peer trial": PEER_VERSION, "setting": setting, **modelopt.identity()}

    def trial(recipe: PeerRecipe) -> PeerTrial:
        compared = reference()  # at full precision, so before the weights are exchanged
        with probed(pipe.denoiser, modelopt.quantized_weights(pipe.denoiser, recipe.formats)):
            return PeerTrial(measure(pipe, compared)[0])

    def works() -> Iterator[tuple[str, Callable[[], PeerTrial]]]:
        for key, recipe in distinct.items():
            yield content_key({**named, "recipe": key}), functools.partial(trial, recipe)

    found = lab.parts().each(PeerTrial, "recipes of peers", len(distinct), works())
    return {key: one.powers for key, one in zip(distinct, found, strict=True)}


def _solved(groups: Sequence[Group], effective_bits: float) -> tuple[str, ...] | None:
    return modelopt.solve([Scored(g.n_weights, g.scores) for g in groups], effective_bits)


def _why_not(lab: Lab, task: Task[NoKnobs]) -> str:
    """Why a peer cannot take part: orders that it has no word for."""
    if task.budget.bops is not None:
        return "it knows no budget of bit operations"
    if lab.subject.ends is not None:
        return "it decides on first and last layers as on all others"
    if any(f.activation_bits < FULL_BITS for d in lab.space.decisions for f in d.formats):
        return "its formats are of weights alone"
    if lab.is_changed:
        return "it is compared on the source as it is, not smoothed"
    return ""


def _n_bytes(decision: Decision, name: str) -> int:
    if name == FULL:
        return decision.paper_bytes(FP16)
    return FORMATS[name].n_bytes(decision.shape)


def _price(lab: Lab, _task: Task[NoKnobs]) -> Price:
    """A trajectory, its calls again with gradients, and every layer's output with every format."""
    timing = lab.time_calls(lab.seeds.search)
    seconds = timing.n_calls * timing.seconds_per_call * (1 + GRADIENT_FACTOR + len(FORMATS))
    return Price(seconds, 2 * timing.n_calls)


def _measure(lab: Lab, task: Task[NoKnobs]) -> Finding:
    """The peer's scores, on the searched seeds; the table, of weight error in our formats, only describes."""
    found, reason = describe(lab.any_bank), _why_not(lab, task)
    if reason:
        return replace(found, notes=(f"left out: {reason}",))
    shapes = {layer: w.shape for w in found.bank.space.weights for layer in w.layers}
    return found.with_evidence(modelopt.measure_scores(lab, shapes, lab.seeds.search))


def _decide(finding: Finding, budget: float, *, scale: float) -> Finding:
    """The peer's recipe under so many paper bits, as evidence, with notes on it."""
    scores, space = finding.of(ModelOptScores), finding.bank.space
    if scores is None:
        return finding
    groups = grouped(space, scores, factor=(scale / LOSS_SCALE) ** 2)
    found = nearest_below(budget, lambda bits: peer_recipe(space, groups, _solved(groups, bits)))
    if found is None:
        note = f"left out: its linear programme finds no recipe of at most {budget:.2f} bits per weight"
        return replace(finding, notes=(note,))
    if found.paper_bits < LEAST_USED * budget:
        note = f"its linear programme leaves {1 - found.paper_bits / budget:.1%} of the budget unused"
        finding = replace(finding, notes=(note,))
    return finding.with_evidence(found)


def _decide_scaled(lab: Lab, task: Task[NoKnobs], finding: Finding) -> Finding:
    return _decide(finding, task.budget.in_bits(lab.space.params), scale=LOSS_SCALE)


def _decide_unscaled(lab: Lab, task: Task[NoKnobs], finding: Finding) -> Finding:
    return _decide(finding, task.budget.in_bits(lab.space.params), scale=1.0)


MODELOPT = Method(
    name="modelopt",
    words=Words(
        summary="NVIDIA ModelOpt's gradient scores and linear programme, in its own formats",
        source="nvidia-modelopt 0.47, auto_quantize",
        sees="first-order noise of the denoiser's output in its formats",
        misses="formats of codebooks; its costs are not shown",
    ),
    traits=Traits(is_noise=False, n_random=0, is_described=True, is_peer=True),
    price=_price,
    measure=_measure,
    decide=_decide_scaled,
)
MODELOPT_UNSCALED = replace(
    MODELOPT,
    name="modelopt-unscaled",
    words=replace(MODELOPT.words, summary="modelopt with the bare loss, whose scores lie below its solver's tolerance"),
    decide=_decide_unscaled,
)
