"""What a trained predictor says of options and of variants of a group: scores, and costs that allocation can add.

A score is higher = better and has no unit: per hop the nodes' scores are standardised by the moments of the nodes that
they are used on, weighted by how well the hop ranked recipes it had not seen, and averaged over folds; the spread
over folds is its uncertainty. A hop that ranks worse than chance has weight 0 and is named.

A group's variants are fed to the network either in isolation (its own layers and what lies between them) or in
context: every other node stands as in a reference recipe. An embedding after m hops depends on what is at most m
edges upstream, so only that part of the graph is computed.

Costs of the noise network: around a reference recipe, the cost of an option is what taking it does to the total noise,
effects on other nodes included. The published network: its scores are calibrated on the training recipes, quality
against sum of scores and bits, and the term for bits is left out, because the budget already pays for bits.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), scores of operations and blocks; moments over the roots only and
    scores in context are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sedimo.allocation.table import SensitivityTable, build_table
from sedimo.allocation.variants import Variants, enumerate_variants
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.graph.model import Group
from sedimo.methods.predictor.features import (
    Candidates,
    Choices,
    Codes,
    GraphFeatures,
    Topology,
    Values,
    make_topology,
    picked,
)
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.model import NoiseNetwork, PaperNetwork
from sedimo.methods.predictor.study import Background
from sedimo.methods.predictor.training import Network, Predictor, TrainingSet
from sedimo.metrics.ranking import rank_correlation
from sedimo.quant.families.family import CostEstimate
from sedimo.settings import within
from sedimo.space import Recipe

NAME = "gnn"  # of the method whose costs these are
ScoresByName = dict[str, list[float]]
_MOMENT_RECIPES = 64  # of the training recipes give the moments
_HIGHEST = 5.0  # deviations above the mean, where stands what costs nothing at all (fp16)
_VARIANT_ROWS = 20_000  # nodes times variants computed at once
_BATCH = 256

refuse_confidence = within(least=0, most=10, hint="standard deviations")


@torch.no_grad()
def hop_moments(predictor: Predictor) -> Values:
    """Mean and deviation of scores of layers at hop 0, then of groups, over training recipes, `[F, M + 1, 2]`.

    A hop that no group has gets the moments of all layers.
    """
    data, n_hops = predictor.data, predictor.options.n_hops
    some = data.codes[:: max(1, data.n // _MOMENT_RECIPES)]
    rows, layers = torch.from_numpy(data.features.rows(some)), np.flatnonzero(data.features.decision >= 0)
    of_groups: dict[int, list[Values]] = {}  # of each hop, [F, T] of each group
    for group in data.features.graph.groups:
        if hop := min(group.hop, n_hops):
            of_groups.setdefault(hop, []).append(_root_scores(predictor, group, hop, some))
    found = np.zeros((len(predictor.folds), n_hops + 1, 2))
    for i, fold in enumerate(predictor.folds):
        for hop, h in enumerate(fold.network.hops(rows)):
            each = [scores[i] for scores in of_groups.get(hop, ())]
            scores = np.concatenate(each) if each else _scores_of(fold.network, h, rows, hop)[:, layers]
            used = scores[np.isfinite(scores)]
            found[i, hop] = used.mean(), max(float(used.std()), 1e-12)
    return found


@torch.no_grad()
def option_scores(predictor: Predictor, moments: Values) -> Values:
    """Scores of all options by hop 0 of each fold, which sees no neighbour, `[F, D, K]`; not a number for padding."""
    choices = predictor.data.choices
    rows = torch.from_numpy(predictor.data.features.row_options(choices.n_options))
    networks = (fold.network for fold in predictor.folds)
    each = [_scores_of(network, network.hops.embedding.whole_table()[rows], rows, 0) for network in networks]
    return np.where(choices.exists, _weighted(predictor, np.stack(each), moments, 0), np.nan)


def group_scores(predictor: Predictor, group: Group, moments: Values, *, reference: Codes | None = None) -> Values:
    """Scores of all variants of a group at its root, by the hop of the group (at most the last) of each fold, `[F, V]`.

    With `reference`, one row of codes `[D]`, the rest of the graph stands as there; without, the group is alone.
    """
    hop = min(group.hop, predictor.options.n_hops)
    return _weighted(predictor, _variant_scores(predictor, group, hop, reference), moments, hop)


def _variant_scores(predictor: Predictor, group: Group, hop: int, reference: Codes | None) -> Values:
    decisions, choice = variants_of(predictor.data, group)
    base = np.zeros_like(predictor.data.codes[0]) if reference is None else reference
    codes = np.repeat(base[None], len(choice), axis=0)
    codes[:, decisions] = choice
    return _root_scores(predictor, group, hop, codes, is_alone=reference is None)


def variants_of(data: TrainingSet, group: Group) -> tuple[list[int], Codes]:
    """A group's decisions `[w]`, and their options in every variant `[V, w]`."""
    features, known = data.features, data.choices.space.decisions
    decisions = list(dict.fromkeys(int(features.decision[features.place[layer]]) for layer in group.layers))
    return decisions, enumerate_variants({known[d].name: known[d].formats for d in decisions}).astype(np.int64)


def most_common(data: TrainingSet, *, share: float = 0.25) -> Codes:
    """The option that each decision takes most often among the best `share` of the recipes, `[D]`."""
    best = np.argsort(-data.quality)[: max(1, round(share * data.n))]
    return np.array([np.bincount(column).argmax() for column in data.codes[best].T], dtype=np.int64)


def distributions(predictor: Predictor, background: Background) -> tuple[ScoresByName, ScoresByName, tuple[str, ...]]:
    """Scores of options by operation, scores of group variants by block, and notes about hops without worth."""
    moments = hop_moments(predictor)
    operations: ScoresByName = {}
    for row, decision in zip(option_scores(predictor, moments).mean(axis=0), background.space.decisions, strict=True):
        operations.setdefault(decision.operation, []).extend(row[np.isfinite(row)].tolist())
    blocks: ScoresByName = {}
    reference, least = most_common(predictor.data), 1.0
    for group in background.groups:
        found = group_scores(predictor, group, moments, reference=reference).mean(axis=0)
        alone = group_scores(predictor, group, moments).mean(axis=0)
        least = min(least, rank_correlation(found, alone, of_constant=1.0))
        block = background.graph.layer_index[group.layers[0]].block
        blocks.setdefault(block or "outside blocks", []).extend(found.tolist())
    useless = [
        f"hop {hop} of fold {i} ranked its test recipes no better than chance ({srcc:+.2f}) and has no weight"
        for i, fold in enumerate(predictor.folds)
        for hop, srcc in enumerate(fold.hop_srcc)
        if srcc <= 0
    ]
    compared = f"scores of group variants in isolation and in context agree: least rank correlation {least:.3f}"
    return operations, blocks, (compared, *useless)


def _weighted(predictor: Predictor, raw: Values, moments: Values, hop: int) -> Values:
    """Raw scores of each fold `[F, ...]`, standardised and weighted."""
    shape = (-1, *[1] * (raw.ndim - 1))
    mean, deviation = (moments[:, hop, i].reshape(shape) for i in (0, 1))
    weight = np.array([max(fold.hop_srcc[hop], 0.0) for fold in predictor.folds]).reshape(shape)
    return np.asarray(np.minimum((raw - mean) / deviation, _HIGHEST) * weight)


def _scores_of(network: Network, h: torch.Tensor, rows: torch.Tensor, hop: int) -> Values:
    """Scores of nodes `[G, n]` from their embeddings `[G, n, C]` and rows."""
    scores = h.abs().sum(dim=2) if isinstance(network, PaperNetwork) else -network.log_contributions(rows, h, hop)
    return np.asarray(scores.double().numpy())


@torch.no_grad()
def _root_scores(predictor: Predictor, group: Group, hop: int, codes: Codes, *, is_alone: bool = False) -> Values:
    """Scores of recipes `[F, V]`: the norm of the root's embedding, or what the group's layers add to the noise."""
    features = predictor.data.features
    nodes, topology = _upstream(features, group, hop, is_alone=is_alone)
    root, *layers = np.searchsorted(nodes, [features.place[name] for name in (group.root, *group.layers)])
    size, found = max(1, _VARIANT_ROWS // len(nodes)), []
    for network in (fold.network for fold in predictor.folds):
        table, scores = network.hops.embedding.whole_table(), []
        for first in range(0, len(codes), size):
            rows = torch.from_numpy(features.rows(codes[first : first + size])[:, nodes])
            h = table[rows]
            for i in range(hop):
                h = network.hops.further(i, h, topology)
            each = _scores_of(network, h, rows, hop)
            if isinstance(network, PaperNetwork):
                scores.append(each[:, root])
                continue
            with np.errstate(divide="ignore"):  # all layers at fp16 add nothing
                scores.append(-np.log(np.exp(-each[:, layers]).sum(axis=1)))
        found.append(np.concatenate(scores))
    return np.stack(found)


def _upstream(features: GraphFeatures, group: Group, hop: int, *, is_alone: bool) -> tuple[Codes, Topology]:
    """The nodes that a group's scores at a hop depend on, ascending, and the edges between them."""
    members = {features.place[name] for name in (group.root, *group.layers)}
    upstream, edge = members, members
    for _ in range(hop):
        edge = {a for a, b in features.graph.edges if b in edge}
        upstream = upstream | edge
    if is_alone:
        upstream = {n for n in upstream if n in members or features.decision[n] < 0}
    local = {n: i for i, n in enumerate(sorted(upstream))}
    edges = [(local[a], local[b]) for a, b in features.graph.edges if a in local and b in local]
    return np.array(list(local)), make_topology(len(local), edges)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Quality = offset + slope * (sum of scores) + per_bit * bits, and how well that holds for `n` recipes."""

    offset: float
    slope: float
    per_bit: float
    r2: float
    srcc: float
    n: int


def calibrate(scores: Values, bits: Values, quality: Values) -> Calibration:
    """Least squares of quality `[T]` on sums of scores `[T]` and average bits `[T]`."""
    if len(quality) < 4:
        raise InputError(f"a calibration needs at least four recipes, got {len(quality)}")
    design = np.stack([np.ones_like(scores), scores, bits], axis=1)
    found = np.linalg.lstsq(design, quality, rcond=None)[0]
    rest = float(((quality - design @ found) ** 2).sum())
    total = float(((quality - quality.mean()) ** 2).sum())
    r2 = 1 - rest / total if total > 0 else 0.0
    offset, slope, per_bit = found.tolist()
    return Calibration(offset, slope, per_bit, r2, rank_correlation(scores, quality), len(quality))


def noise_table(
    predictor: Predictor,
    candidates: Candidates,
    reference: Codes,
    *,
    confidence: float = 0.0,
    is_decibel: bool = True,
) -> SensitivityTable:
    """Costs of all options around a reference recipe `[D]`, by the noise network.

    With `confidence` k, a cost is what it may be k standard deviations above: options that the trials say little of
    are avoided. Costs sum to the predicted relative noise of the reference if the target is SQNR in decibels.
    """
    choices, fitted = predictor.data.choices, _mean_deviation(predictor)
    each = np.stack([_changed_totals(n, predictor.data, reference) for n in predictor.noise_networks])  # [F, D, K]
    mean, spread = each.mean(axis=0), each.std(axis=0, ddof=1)
    scale = 1.0
    if is_decibel:  # from the network's unit to relative noise power, at the reference
        predicted = float(predictor.predict(reference[None])[0])
        scale = math.exp(-predicted * math.log(10) / 10) / float(picked(mean, reference[None]).sum())
    floored = np.maximum(mean, 1e-6 * float(mean[choices.exists].max()))
    return options_table(
        choices,
        candidates,
        scale * (floored + confidence * spread) * np.exp(confidence * fitted),
        errors=scale * np.hypot(spread, floored * fitted),
        settings={"n_recipes": str(predictor.data.n), "confidence": f"{confidence:g}"},
    )


def _mean_deviation(predictor: Predictor) -> Values:
    """The mean deviation `[D, K]` of the noise models that the networks start from."""
    if not predictor.noise_networks:
        raise InputError("the preset 'paper' has scores, not noise: use its score table")
    mean = np.stack([network.noise.deviation for network in predictor.noise_networks]).mean(axis=0)
    return np.where(np.isfinite(mean), mean, 0.0)


@torch.no_grad()
def _changed_totals(network: NoiseNetwork, data: TrainingSet, reference: Codes) -> Values:
    """Own contribution at the reference plus the change of the total when an option is taken instead, `[D, K]`."""

    def contributions(codes: Codes) -> Values:
        rows = torch.from_numpy(data.features.rows(codes))
        embeddings = network.hops(rows)
        return np.asarray(network.contributions(rows, embeddings[-1], len(embeddings) - 1).double().numpy())

    decisions, options = np.nonzero(data.choices.exists)
    changed = np.repeat(reference[None], len(decisions), axis=0)
    changed[np.arange(len(changed)), decisions] = options
    totals = [contributions(changed[i : i + _BATCH]).sum(axis=1) for i in range(0, len(changed), _BATCH)]
    own, found = contributions(reference[None])[0], np.zeros(data.choices.exists.shape)
    found[decisions, options] = own[decisions] + np.concatenate(totals) - own.sum()
    return found


def options_table(
    choices: Choices,
    candidates: Candidates,
    costs: Values,
    *,
    errors: Values,
    settings: Mapping[str, str],
    method: str = NAME,
) -> SensitivityTable:
    """A table of costs `[D, K]` with standard errors `[D, K]`; fp16 costs nothing."""
    n = int(settings.get("n_recipes", "0"))

    def estimate(candidate: Candidate) -> CostEstimate:
        where = choices.places[candidate.decision, candidate.format]
        return CostEstimate(float(costs[where]), float(errors[where]), n)

    return build_table(method, choices.space, candidates.values(), estimate, settings, sees_activations=True)


def score_table(choices: Choices, candidates: Candidates, scores: Values, calibration: Calibration) -> SensitivityTable:
    """Costs from the scores of options `[F, D, K]`: the quality that an option loses against the decision's best."""
    mean, spread = (np.where(choices.exists, v, 0.0) for v in (scores.mean(axis=0), scores.std(axis=0, ddof=1)))
    slope = max(calibration.slope, 0.0)
    best = np.where(choices.exists, mean, -np.inf).max(axis=1, keepdims=True)
    known = {"n_recipes": str(calibration.n), "r2": f"{calibration.r2:.3f}"}
    return options_table(choices, candidates, slope * (best - mean), errors=slope * spread, settings=known)


def calibrated_table(
    predictor: Predictor, candidates: Candidates, scores: Values, *, confidence: float, goal: Goal
) -> tuple[SensitivityTable, Calibration]:
    """The table of a predictor, around the best training recipe, and the calibration of its scores by option.

    Costs depend on the recipe around which they are taken; a search takes them again around its own result.
    """
    data = predictor.data
    sums = picked(np.nan_to_num(scores.mean(axis=0)), data.codes).sum(axis=1)
    calibration = calibrate(sums, data.choices.paper_bits(data.codes), data.quality)
    if predictor.options.is_paper:
        return score_table(data.choices, candidates, scores, calibration), calibration
    best = data.codes[int(data.quality.argmax())]
    table = noise_table(predictor, candidates, best, confidence=confidence, is_decibel=str(goal) == "sqnr_db")
    if not all(math.isfinite(cost.cost) for cost in table.costs):
        raise InputError("the predictor's costs are not finite; the trials hold diverged recipes only")
    return table, calibration


def argmax_recipes(predictor: Predictor, background: Background, scores: Values, moments: Values) -> dict[str, Recipe]:
    """The recipes of best scores of single options, and of the variants of groups in isolation.

    Source: Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628): argmax per operation and per block, without a budget.
    """
    choices = predictor.data.choices
    operations = np.where(choices.exists, scores.mean(axis=0), -np.inf).argmax(axis=1)
    grouped = operations.copy()
    for group in background.groups:
        decisions, choice = variants_of(predictor.data, group)
        grouped[decisions] = choice[group_scores(predictor, group, moments).mean(axis=0).argmax()]
    return {"operations": choices.recipe(operations), "groups": choices.recipe(grouped)}


def noise_of_variants(
    predictor: Predictor,
    groups: Sequence[Group],
    reference: Codes,
    table: SensitivityTable,
    *,
    confidence: float = 0.0,
) -> list[Variants]:
    """Costs of all variants of all groups: what their layers add to the noise, in the network's unit.

    The noise is that by the last hop, the rest of the graph as in `reference` `[D]`. With `confidence` k, a cost is
    what it may be k standard deviations above: the spread over folds, and what the noise models do not know of the
    variant's options on average. Sizes are those of `table`.
    """
    space, deviation, found = predictor.data.choices.space, _mean_deviation(predictor), []
    for group in groups:
        members, choice = variants_of(predictor.data, group)
        noise = np.exp(-_variant_scores(predictor, group, predictor.options.n_hops, reference))  # [F, V]
        mean, unknown = noise.mean(axis=0), deviation[np.array(members), choice].mean(axis=1)
        relative = np.sqrt((noise.std(axis=0, ddof=1) / np.maximum(mean, 1e-300)) ** 2 + unknown**2)
        formats = {space.decisions[d].name: space.decisions[d].formats for d in members}
        cost, error = mean * np.exp(confidence * relative), mean * relative
        found.append(table.group(group.name, formats, choice, cost, error))
    return found
