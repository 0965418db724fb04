"""Peers of a comparison: other people's searches over formats of their own, at the same bytes and seeds.

A peer is told the budget in its own count, which knows nothing of some scales; so its budget is found by bisection,
as near to ours as its choices come and never above.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sedimo.api.opening import Opened
from sedimo.api.order import Order
from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import content_key
from sedimo.measurement import modelopt
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.modelopt import FORMATS, FULL, ModelOptScores, Scored
from sedimo.measurement.objective import measure, measure_reference
from sedimo.measurement.parts import Parts
from sedimo.measurement.probe import probed
from sedimo.measurement.study import Study
from sedimo.measurement.worker import setting_of
from sedimo.metrics.signal import NoisePowers
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.quant.formats import FP16, FULL_BITS, parse_formats
from sedimo.space import Decision, SearchSpace

PEERS: Mapping[str, float] = {"modelopt": modelopt.LOSS_SCALE, "modelopt-unscaled": 1.0}  # factor on the loss
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


def wanted_methods(methods: Sequence[str], *, everything: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The methods that can be compared, with a note on peers that are missing when everything was asked for.

    Raises:
        MissingExtraError: a peer is asked for by name and not installed.
    """
    peers = [m for m in methods if m in PEERS]
    if peers and set(methods) == set(everything) and not modelopt.is_installed():
        remedy = f"pip install 'sedimo[{modelopt.EXTRA}]'"
        note = f"{', '.join(peers)} left out: {modelopt.PACKAGE} is not installed; {remedy}"
        return tuple(m for m in methods if m not in PEERS), (note,)
    if peers:
        modelopt.load()
    return tuple(methods), ()


def decide_peer(
    opened: Opened, bank: Bank, study: Study, method: str, progress: Progress = SILENT
) -> tuple[PeerRecipe | None, tuple[str, ...]]:
    """The peer's recipe under the order's paper bits, and notes on it; None where it has none.

    Its scores are measured on the searched seeds and kept in the study.

    Raises:
        MissingExtraError: the peer is not installed.
    """
    reason = _why_not(opened.order)
    if reason:
        return None, (f"left out: {reason}",)
    space, budget = bank.space, opened.order.budget.in_bits(bank.space.params)
    scores = modelopt.measure_scores(
        opened.pipe,
        {layer: w.shape for w in space.weights for layer in w.layers},
        opened.order.sampling.searching(opened.pipe),
        weights_digest=bank.weights_digest,
        study=study,
        progress=progress,
    )
    groups = grouped(space, scores, factor=(PEERS[method] / modelopt.LOSS_SCALE) ** 2)
    found = nearest_below(budget, lambda bits: peer_recipe(space, groups, _solved(groups, bits)))
    if found is None:
        return None, (f"left out: its linear programme finds no recipe of at most {budget:.2f} bits per weight",)
    if found.paper_bits >= LEAST_USED * budget:
        return found, ()
    return found, (f"its linear programme leaves {1 - found.paper_bits / budget:.1%} of the budget unused",)


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


def measure_peers(
    pipe: DiffusersPipeline,
    study: Study,
    plan: Sampling,
    recipes: Sequence[PeerRecipe],
    *,
    weights_digest: str,
    progress: Progress = SILENT,
) -> dict[str, NoisePowers]:
    """Noise of peers' recipes on the seeds of a plan, by key: their weights in the same denoiser. Resumes in the study.

    Raises:
        Interrupted: Ctrl-C; what was measured is kept.
    """
    distinct = {recipe.key: recipe for recipe in recipes}
    if not distinct:
        return {}
    kept, setting = Parts(pipe, study), setting_of(pipe, plan, weights_digest=weights_digest)
    reference = functools.cache(lambda: measure_reference("final_latents", pipe, plan))
    named = {"peer trial": PEER_VERSION, "setting": setting, **modelopt.identity()}
    found: dict[str, NoisePowers] = {}
    progress.start(len(distinct), "recipes of peers")
    with graceful_interrupt() as stop:
        for key, recipe in distinct.items():

            def trial(recipe: PeerRecipe = recipe) -> PeerTrial:
                compared = reference()  # at full precision, so before the weights are exchanged
                with probed(pipe.denoiser, modelopt.quantized_weights(pipe.denoiser, recipe.formats)):
                    return PeerTrial(measure(pipe, compared).powers)

            found[key] = kept.part(PeerTrial, content_key({**named, "recipe": key}), trial).powers
            progress.advance(1)
            kept.check(stop)
    progress.done()
    return found


def _solved(groups: Sequence[Group], effective_bits: float) -> tuple[str, ...] | None:
    return modelopt.solve([Scored(g.n_weights, g.scores) for g in groups], effective_bits)


def _why_not(order: Order) -> str:
    """Why a peer cannot take part: orders that it has no word for."""
    if order.budget.bops is not None:
        return "it knows no budget of bit operations"
    if order.ends is not None:
        return "it decides on first and last layers as on all others"
    if any(f.activation_bits < FULL_BITS for f in parse_formats(order.formats)):
        return "its formats are of weights alone"
    if order.smooth is not None:
        return "it is compared on the source as it is, not smoothed"
    return ""


def _n_bytes(decision: Decision, name: str) -> int:
    if name == FULL:
        return decision.paper_bytes(FP16)
    return FORMATS[name].n_bytes(decision.shape)
