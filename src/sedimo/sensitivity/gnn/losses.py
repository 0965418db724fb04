"""Losses that reward the right order of recipes: soft rank correlation and LambdaRank.

Each is a real scalar whose gradient reaches the scores. The released code of Qua2SeDiMo wrote LambdaRank's gradient
beside the loss, where the optimiser erased it, took its places from the targets, and correlated soft ranks with
targets that were not ranked. Everything is computed on the CPU in float64, where the ranks are found, and returned
in the type and on the device of the scores.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from scipy import optimize, stats
from torch.nn import functional as F

from sedimo.errors import InputError
from sedimo.sensitivity.quality import Gain

RankingLoss = Literal["srcc", "lambda_rank", "hybrid", "none"]

HIGHEST_RELEVANCE = 60  # gains of 2^60 - 1 leave one recipe that matters; beyond 1023 float64 overflows


def soft_rank(scores: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Differentiable ranks `[n]` of scores `[n]`, ascending: the highest score has a rank near n.

    The point of the permutahedron of (1, ..., n) that is nearest to scores / strength. Scores that lie at least
    `strength` apart get their hard ranks and no gradient; closer ones are pooled, and within a pool soft ranks differ
    as scores / strength do. The sum is always n (n + 1) / 2. The gradient is exact: (identity - averaging within
    pools) / strength.

    Example:
        >>> soft_rank(torch.tensor([0.3, 5.0, 0.1]))
        tensor([1.6000, 3.0000, 1.4000])

    Raises:
        InputError: scores are not a vector of finite real numbers, or strength is not positive.

    Source: Blondel, Teboul, Berthet and Djolonga 2020, "Fast differentiable sorting and ranking", propositions 3
    (projection by isotonic regression) and 4 (its Jacobian), with quadratic regularisation.
    """
    _check_positive(strength, "strength")
    _check_scores(scores)
    spread = scores.to("cpu", torch.float64) / strength
    if not bool(torch.isfinite(spread).all()):
        raise InputError(f"scores / strength must be finite, got a strength of {strength}. Choose a larger one.")
    ordered, order = torch.sort(spread, stable=True)
    places = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    pools = _pools((ordered - places).detach().numpy())
    # scores - isotonic(scores - places), written so that a pool of one score gives its place without rounding
    ranks = _pool_means(places, pools) + (ordered - _pool_means(ordered, pools))
    return ranks[torch.argsort(order)].to(scores)


def srcc_loss(scores: torch.Tensor, targets: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """1 - Pearson correlation of the soft ranks of scores `[n]` and the average ranks of targets `[n]`: 0 to 2.

    The scores are first shifted and scaled to the mean and standard deviation of the ranks 1..n, so that the loss
    does not depend on their scale and `strength` means the same for all scales and n: evenly spread scores are
    ranked hard below 1 and pooled above. Towards 0 the loss becomes 1 - SRCC, without gradient; for large strengths it
    becomes 1 - Pearson correlation of the scores with the ranks, with gradients for all.

    Constant scores have a loss of 1 and the gradient, of norm 1, that moves them towards the ranks of the targets
    (that of the loss has no limit there). Constant targets ask for nothing: a loss of 1 and no gradient.

    Raises:
        InputError: no pair of equally long finite vectors, or strength is not positive.
    """
    _check_positive(strength, "strength")
    _check_pair(scores, targets)
    n = len(scores)
    ideal = torch.from_numpy(stats.rankdata(targets.detach().double().cpu().numpy())) - (n + 1) / 2
    ideal = F.normalize(ideal, dim=0)
    values = scores.to("cpu", torch.float64)
    centred = values - values.mean()
    length = torch.linalg.vector_norm(centred)
    if bool(length <= torch.finfo(scores.dtype).eps * torch.linalg.vector_norm(values)):
        return (1 - centred @ ideal).to(scores)
    standardised = centred / length * math.sqrt(n * (n**2 - 1) / 12)
    ranks = soft_rank(standardised, strength) - (n + 1) / 2
    return (1 - F.normalize(ranks, dim=0) @ ideal).to(scores)


def lambda_rank_loss(
    scores: torch.Tensor,
    targets: torch.Tensor,
    *,
    sigma: float = 1.0,
    truncation: int | None = None,
    gain: Gain = "exponential",
) -> torch.Tensor:
    """LambdaRank of scores `[n]` for the relevances `targets` `[n]`, whose gradient is the published lambdas.

    The sum of |delta NDCG_ij| log(1 + exp(-sigma (s_i - s_j))) over the pairs with target i above target j, where
    |delta NDCG_ij| is the change of NDCG when i and j swap their places in the predicted order, taken as constant.
    Places beyond `truncation` count nothing: the measure is NDCG@truncation, and pairs with no place above it have no
    weight. A gain is 2^r - 1 (`exponential`) or r (`linear`). Equal scores take places in the order given. Equal
    targets ask for nothing: a loss of 0.

    Raises:
        InputError: no pair of equally long finite vectors; targets below 0, or above 60 for an exponential gain;
            sigma that is not positive, truncation below 1.

    Source: Burges 2010, "From RankNet to LambdaRank to LambdaMART: an overview", section 4; as a loss: Wang, Li,
    Golbandi, Bendersky and Najork 2018, "The LambdaLoss framework for ranking metric optimization".
    """
    _check_positive(sigma, "sigma")
    _check_pair(scores, targets)
    if truncation is not None and truncation < 1:
        raise InputError(f"truncation must be at least 1 place, got {truncation}. Leave it out to count all places.")
    relevance = targets.detach().to("cpu", torch.float64)
    values = scores.to("cpu", torch.float64)
    weights = _swap_weights(values.detach(), _gains(relevance, gain), truncation or len(scores))
    weights = torch.where(relevance[:, None] > relevance[None, :], weights, 0.0)  # [n, n]
    margins = values[:, None] - values[None, :]
    return -(weights * F.logsigmoid(sigma * margins)).sum().to(scores)


def ranking_loss(
    kind: RankingLoss,
    scores: torch.Tensor,
    targets: torch.Tensor,
    *,
    strength: float = 1.0,
    sigma: float = 1.0,
    truncation: int | None = None,
    gain: Gain = "exponential",
) -> torch.Tensor:
    """The ranking loss of that name: `hybrid` is the sum of `srcc` and `lambda_rank`, `none` is 0.

    Raises:
        InputError: an unknown name, or what the loss refuses.
    """
    if kind not in get_args(RankingLoss):
        raise InputError(f"a ranking loss is one of {', '.join(get_args(RankingLoss))}, got {kind!r}")
    _check_pair(scores, targets)
    loss = 0 * scores.sum()
    if kind in ("srcc", "hybrid"):
        loss = loss + srcc_loss(scores, targets, strength)
    if kind in ("lambda_rank", "hybrid"):
        loss = loss + lambda_rank_loss(scores, targets, sigma=sigma, truncation=truncation, gain=gain)
    return loss


def _check_positive(value: float, name: str) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be positive and finite, got {value}")


def _check_scores(scores: torch.Tensor) -> None:
    if scores.ndim != 1 or len(scores) == 0 or not scores.is_floating_point():
        raise InputError(f"scores must be a vector of real numbers, got {tuple(scores.shape)} of {scores.dtype}")
    if not bool(torch.isfinite(scores).all()):
        raise InputError("scores must be finite, got infinity or not a number. Has the training diverged?")


def _check_pair(scores: torch.Tensor, targets: torch.Tensor) -> None:
    _check_scores(scores)
    if targets.shape != scores.shape:
        raise InputError(
            f"each score needs one target, got {tuple(scores.shape)} scores and {tuple(targets.shape)} targets"
        )
    if not bool(torch.isfinite(targets).all()):
        raise InputError("targets must be finite, got infinity or not a number. Leave diverged recipes out.")


def _pools(values: np.ndarray) -> torch.Tensor:
    """Which pool each of the values `[n]` falls into when they are made ascending by averaging neighbours."""
    bounds = optimize.isotonic_regression(values).blocks
    return torch.from_numpy(np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)))


def _pool_means(values: torch.Tensor, pools: torch.Tensor) -> torch.Tensor:
    sizes = torch.bincount(pools)
    return (torch.zeros(len(sizes), dtype=values.dtype).index_add(0, pools, values) / sizes)[pools]


def _gains(relevance: torch.Tensor, gain: Gain) -> torch.Tensor:
    """Gains, divided by the highest: NDCG does not depend on their scale."""
    lowest, highest = float(relevance.min()), float(relevance.max())
    if gain not in get_args(Gain):
        raise InputError(f"gain must be one of {', '.join(get_args(Gain))}, got {gain!r}")
    if lowest < 0:
        raise InputError(f"a relevance must be at least 0, got {lowest}. Subtract the lowest target from all.")
    if gain == "exponential" and highest > HIGHEST_RELEVANCE:
        raise InputError(
            f"an exponential gain takes relevances of at most {HIGHEST_RELEVANCE}, got {highest}. "
            "Scale the targets down, or choose the linear gain."
        )
    gains = torch.expm1(relevance * math.log(2)) if gain == "exponential" else relevance
    return gains / gains.max() if highest > 0 else gains


def _swap_weights(scores: torch.Tensor, gains: torch.Tensor, truncation: int) -> torch.Tensor:
    """By how much NDCG@truncation changes when two recipes swap their predicted places, `[n, n]`."""
    places = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    discounts = torch.where(places <= truncation, 1 / torch.log2(places + 1), 0.0)
    best = torch.sort(gains, descending=True).values @ discounts
    own = torch.empty_like(discounts)
    own[torch.argsort(scores, descending=True, stable=True)] = discounts
    changes = (gains[:, None] - gains[None, :]) * (own[:, None] - own[None, :])
    return changes.abs() / best.clamp_min(torch.finfo(torch.float64).tiny)
