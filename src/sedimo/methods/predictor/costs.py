"""From a trained predictor to costs that allocation can add.

The noise network: around a reference recipe, the cost of an option is what taking it does to the total noise, effects
on other nodes included. The published network: its scores are calibrated on the training recipes, quality against sum
of scores and bits, and the term for bits is left out, because the budget already pays for bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from sedimo.allocation.table import CostEstimate, SensitivityTable, build_table
from sedimo.allocation.variant_table import GroupVariants, VariantTable, build_variant_table, variant_sizes
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.methods.predictor.choices import Choices, Codes, Values, picked
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.model import NoiseNetwork, network_input
from sedimo.methods.predictor.noise_model import NoiseModel
from sedimo.methods.predictor.scoring import GroupNoise, HopQuality, Scores, disjoint_groups, group_scores
from sedimo.methods.predictor.study import Background
from sedimo.methods.predictor.training import FoldModel, Predictor, TrainingSet
from sedimo.quant.formats import Format
from sedimo.space import Recipe

_BATCH = 256
Candidates = Mapping[tuple[str, Format], Candidate]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Quality = offset + slope * (sum of scores) + per_bit * bits on the training recipes.

    `r2` is the share of variance explained, `srcc` the rank correlation of that sum with quality, `n` recipes.
    """

    offset: float
    slope: float
    per_bit: float
    r2: float
    srcc: float
    n: int


def calibrate(scores: Values, bits: Values, quality: Values) -> Calibration:
    """Least squares of quality `[T]` on sums of scores `[T]` and average bits `[T]`.

    Raises:
        InputError: fewer than four recipes.
    """
    if len(quality) < 4:
        raise InputError(f"a calibration needs at least four recipes, got {len(quality)}")
    design = np.stack([np.ones_like(scores), scores, bits], axis=1)
    found = np.linalg.lstsq(design, quality, rcond=None)[0]
    fitted = design @ found
    total = float(((quality - quality.mean()) ** 2).sum())
    r2 = 1 - float(((quality - fitted) ** 2).sum()) / total if total > 0 else 0.0
    srcc = float(stats.spearmanr(scores, quality).statistic) if np.ptp(scores) > 0 and total > 0 else 0.0
    return Calibration(float(found[0]), float(found[1]), float(found[2]), r2, srcc, len(quality))


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

    Raises:
        InputError: a predictor of another preset.
    """
    each = np.stack([_changed_totals(fold, predictor, reference) for fold in predictor.folds])  # [F, D, K]
    mean, spread = each.mean(axis=0), each.std(axis=0, ddof=1)
    fitted = np.stack([_noise(fold).deviation for fold in predictor.folds]).mean(axis=0)
    fitted = np.where(np.isfinite(fitted), fitted, 0.0)
    scale = _scale(predictor, reference, float(picked(mean, reference[None]).sum())) if is_decibel else 1.0
    floored = np.maximum(mean, 1e-6 * float(mean[predictor.choices.exists].max()))
    known = {"n_recipes": str(_n_recipes(predictor)), "confidence": f"{confidence:g}"}
    return options_table(
        predictor.choices,
        candidates,
        scale * (floored + confidence * spread) * np.exp(confidence * fitted),
        errors=scale * np.hypot(spread, floored * fitted),
        settings=known,
    )


def options_table(
    choices: Choices,
    candidates: Candidates,
    costs: Values,
    *,
    errors: Values,
    settings: Mapping[str, str],
    method: str = "gnn",
) -> SensitivityTable:
    """A table of costs `[D, K]` with standard errors `[D, K]`; fp16 costs nothing."""
    place = {(d.name, f): (i, k) for i, d in enumerate(choices.space.decisions) for k, f in enumerate(d.formats)}
    n = int(settings.get("n_recipes", "0"))

    def estimate(candidate: Candidate) -> CostEstimate:
        where = place[candidate.decision, candidate.format]
        return CostEstimate(float(costs[where]), float(errors[where]), n)

    return build_table(method, choices.space, candidates.values(), estimate, settings, sees_activations=True)


def score_table(choices: Choices, candidates: Candidates, scores: Scores, calibration: Calibration) -> SensitivityTable:
    """Costs from the scores of options: the quality that an option loses against the decision's best."""
    mean, spread = (np.where(choices.exists, values, 0.0) for values in (scores.mean, scores.spread))
    slope = max(calibration.slope, 0.0)
    best = np.where(choices.exists, mean, -np.inf).max(axis=1, keepdims=True)
    known = {"n_recipes": str(calibration.n), "r2": f"{calibration.r2:.3f}"}
    return options_table(choices, candidates, slope * (best - mean), errors=slope * spread, settings=known)


def calibrated_table(
    predictor: Predictor, candidates: Candidates, data: TrainingSet, scores: Scores, *, confidence: float, goal: Goal
) -> tuple[SensitivityTable, Calibration]:
    """The table of a predictor, around the best training recipe, and the calibration of its scores by option.

    Costs depend on the recipe around which they are taken; a search takes them again around its own result.

    Raises:
        InputError: costs that are not finite.
    """
    sums = picked(np.nan_to_num(scores.mean), data.codes).sum(axis=1)
    calibration = calibrate(sums, data.choices.paper_bits(data.codes), data.quality)
    if predictor.options.preset == "paper":
        return score_table(data.choices, candidates, scores, calibration), calibration
    best = data.codes[int(data.quality.argmax())]
    is_decibel = str(goal) == "sqnr_db"
    table = noise_table(predictor, candidates, best, confidence=confidence, is_decibel=is_decibel)
    if not all(math.isfinite(cost.cost) for cost in table.costs):
        raise InputError("the predictor's costs are not finite; the trials hold diverged recipes only")
    return table, calibration


def argmax_recipes(
    predictor: Predictor, background: Background, scores: Scores, qualities: Sequence[Sequence[HopQuality]]
) -> dict[str, Recipe]:
    """The recipes of best scores of single options, and of the variants of groups in isolation.

    Source: Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628): argmax per operation and per block, without a budget.
    """
    choices, graph = predictor.choices, background.graph
    operations = np.where(choices.exists, scores.mean, -np.inf).argmax(axis=1)
    grouped = operations.copy()
    for group in disjoint_groups(predictor, graph, background.groups):
        found = group_scores(predictor, graph, group, qualities)
        grouped[list(found.decisions)] = found.choice[found.scores.mean.argmax()]
    return {"operations": choices.recipe(operations), "groups": choices.recipe(grouped)}


def refuse_confidence(confidence: float) -> None:
    """Refuses a margin of costs that is no sensible number of standard deviations.

    Raises:
        InputError: below 0, above 10, or no number.
    """
    if not 0 <= confidence <= 10:
        raise InputError(f"the confidence is a number of standard deviations from 0 to 10, got {confidence}")


def noise_variant_table(
    predictor: Predictor, groups: Sequence[GroupNoise], candidates: Candidates, *, confidence: float = 0.0
) -> VariantTable:
    """Costs of all variants of all groups: what their layers add to the noise, in the network's unit.

    With `confidence` k, a cost is what it may be k standard deviations above: the spread over folds, and what the
    noise models do not know of the variant's options on average.
    """
    choices = predictor.choices
    deviation = np.stack([_noise(fold).deviation for fold in predictor.folds]).mean(axis=0)
    rows = []
    for group in groups:
        mean = group.noise.mean(axis=0)
        relative = np.sqrt(
            (group.noise.std(axis=0, ddof=1) / np.maximum(mean, 1e-300)) ** 2 + _unknown(group, deviation) ** 2
        )
        rows.append(_variants(choices, group, candidates, mean * np.exp(confidence * relative), mean * relative))
    return build_variant_table("gnn", choices.space, rows)


def _unknown(group: GroupNoise, deviation: Values) -> Values:
    """Mean deviation of the options of each variant, `[V]`."""
    options = deviation[np.array(group.decisions)[None], group.choice]
    found: Values = np.where(np.isfinite(options), options, 0.0).mean(axis=1)
    return found


def _variants(
    choices: Choices, group: GroupNoise, candidates: Candidates, cost: Values, error: Values
) -> GroupVariants:
    decisions = [choices.space.decisions[d] for d in group.decisions]
    paper, stored, bops = variant_sizes(decisions, group.choice.astype(np.int8), candidates=candidates)
    return GroupVariants(
        group=group.group,
        decisions=tuple(d.name for d in decisions),
        formats=tuple(d.formats for d in decisions),
        choice=group.choice.astype(np.int8),
        cost=cost,
        standard_error=error,
        paper_bytes=paper,
        stored_bytes=stored,
        bops=bops,
    )


def _noise(fold: FoldModel) -> NoiseModel:
    if fold.noise is None:
        raise InputError("the preset 'paper' has scores, not noise: use its score table")
    return fold.noise


def _n_recipes(predictor: Predictor) -> int:
    return sum(len(fold.test) for fold in predictor.folds)


def _scale(predictor: Predictor, reference: Codes, total: float) -> float:
    """From the network's unit to relative noise power, at the reference."""
    predicted = float(predictor.predict(reference[None])[0])
    return math.exp(-predicted * math.log(10) / 10) / total


@torch.no_grad()
def _changed_totals(fold: FoldModel, predictor: Predictor, reference: Codes) -> Values:
    """Own contribution at the reference plus the change of the total when an option is taken instead, `[D, K]`."""
    choices, network = predictor.choices, fold.network
    if not isinstance(network, NoiseNetwork):
        raise InputError("the preset 'paper' has scores, not noise: use its score table")
    network.eval()
    own = _contributions(network, predictor, reference[None])[0]
    rows, where = [], []
    for d, k in zip(*np.nonzero(choices.exists), strict=True):
        changed = reference.copy()
        changed[d] = k
        rows.append(changed)
        where.append((d, k))
    totals = np.concatenate(
        [
            _contributions(network, predictor, np.array(rows[first : first + _BATCH])).sum(axis=1)
            for first in range(0, len(rows), _BATCH)
        ]
    )
    found = np.zeros((choices.n_decisions, choices.n_options))
    for (d, k), total in zip(where, totals, strict=True):
        found[d, k] = own[d] + total - own.sum()
    return found


def _contributions(network: NoiseNetwork, predictor: Predictor, codes: Codes) -> Values:
    batch = network_input(predictor.features, codes)
    embeddings = network(batch).embeddings
    found: Values = network.contributions(batch.rows, embeddings[-1], len(embeddings) - 1).double().numpy()
    return found
