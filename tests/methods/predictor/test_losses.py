"""Ranking losses: soft ranks against a quadratic programme, lambdas against the published formula, gradients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.metrics import ndcg_score

from sedimo.errors import InputError
from sedimo.methods.predictor.training import lambda_rank_loss, ranking_loss, soft_rank, srcc_loss
from tolerances import FLOAT32_FORMULA, FLOAT64_FORMULA, FLOAT64_SUM

SOLVER = 1e-5  # SLSQP stops there


def random_pair(n, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.normal(size=n), dtype=dtype, requires_grad=True)
    return scores, torch.tensor(rng.integers(0, 5, size=n), dtype=dtype)


def number(tensor):
    return tensor.detach().item()


def gradient(loss, scores):
    (found,) = torch.autograd.grad(loss, scores)
    return found


# --- soft ranks ---


def nearest_in_permutahedron(point):
    """By its inequalities: every k coordinates sum up to at least 1 + ... + k, and all n to n (n + 1) / 2."""
    n = len(point)
    subsets = [list(s) for k in range(1, n) for s in itertools.combinations(range(n), k)]
    constraints = [
        {"type": "ineq", "fun": lambda r: np.array([r[s].sum() - len(s) * (len(s) + 1) / 2 for s in subsets])},
        {"type": "eq", "fun": lambda r: r.sum() - n * (n + 1) / 2},
    ]
    start = np.full(n, (n + 1) / 2)
    found = optimize.minimize(
        lambda r: np.square(r - point).sum(), start, jac=lambda r: 2 * (r - point), constraints=constraints, tol=1e-12
    )
    return found.x


@pytest.mark.parametrize("n", [1, 2, 4, 6])
@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
def test_soft_ranks_solve_the_quadratic_programme(n, strength):
    for seed in range(3):
        scores = 2 * np.random.default_rng(seed).normal(size=n)
        found = soft_rank(torch.tensor(scores), strength)
        assert found.numpy() == pytest.approx(nearest_in_permutahedron(scores / strength), abs=SOLVER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_strength_gives_hard_ranks_exactly(dtype):
    scores = torch.tensor([0.5, -3.0, 7.0, 0.25, 6.0], dtype=dtype)
    ranks = soft_rank(scores, 1e-6)
    assert ranks.dtype == dtype
    assert ranks.tolist() == [3, 1, 5, 2, 4]


def test_large_strength_pools_all():
    scores, strength = torch.tensor([0.5, -3.0, 7.0]).double(), 1e9
    spread = float(scores.max() - scores.min())
    assert soft_rank(scores, strength).numpy() == pytest.approx([2, 2, 2], abs=spread / strength)


def test_equal_scores_share_their_rank():
    assert soft_rank(torch.tensor([5.0, 1.0, 5.0, 5.0]), 1e-3).tolist() == [3, 1, 3, 3]


def test_ranks_follow_their_scores_and_keep_their_sum():
    scores, _ = random_pair(50)
    ranks, order = soft_rank(scores, 0.05).detach(), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert soft_rank(scores[order], 0.05).detach().numpy() == pytest.approx(ranks[order].numpy(), abs=FLOAT64_SUM)
    assert number(ranks.sum()) == pytest.approx(50 * 51 / 2, rel=FLOAT64_SUM)


@pytest.mark.parametrize("strength", [0.05, 0.3, 2.0])
def test_gradient_of_soft_ranks_is_exact(strength):
    scores, _ = random_pair(8)
    assert torch.autograd.gradcheck(lambda s: soft_rank(s, strength), (scores,))


def test_gradient_is_identity_less_the_mean_of_the_pool():
    scores = torch.tensor([9.0, 0.2, 0.0, 0.4], dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda s: soft_rank(s, 0.5), scores)
    pool = (torch.eye(3, dtype=torch.float64) - 1 / 3) / 0.5
    expected = torch.zeros(4, 4).double()
    expected[1:, 1:] = pool
    assert jacobian.numpy() == pytest.approx(expected.numpy(), abs=FLOAT64_FORMULA)


# --- rank correlation ---


def test_srcc_loss_with_small_strength_is_spearman_with_ties_in_the_targets():
    scores, targets = random_pair(30)
    expected = 1 - stats.spearmanr(scores.detach(), targets).statistic
    assert number(srcc_loss(scores, targets, 1e-4)) == pytest.approx(expected, abs=FLOAT64_SUM)


def test_srcc_loss_with_large_strength_is_pearson_of_scores_and_ranks():
    scores, targets = random_pair(30)
    expected = 1 - stats.pearsonr(scores.detach(), stats.rankdata(targets)).statistic
    assert number(srcc_loss(scores, targets, 1e4).detach()) == pytest.approx(expected, abs=FLOAT64_FORMULA)


def test_srcc_loss_ranks_the_targets_too():
    scores, targets = random_pair(30)
    assert number(srcc_loss(scores, targets)) == number(srcc_loss(scores, torch.exp(3 * targets)))


@pytest.mark.parametrize(("factor", "shift"), [(1e-6, 0.0), (1e6, 0.0), (3.0, 1e3)])
def test_srcc_loss_depends_neither_on_scale_nor_on_shift(factor, shift):
    scores, targets = random_pair(30)
    assert number(srcc_loss(factor * scores + shift, targets)) == pytest.approx(
        number(srcc_loss(scores, targets)), abs=FLOAT64_FORMULA
    )


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_gradient_of_srcc_loss_is_exact(strength):
    scores, targets = random_pair(10, seed=3)
    assert torch.autograd.gradcheck(lambda s: srcc_loss(s, targets, strength), (scores,))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_constant_scores_move_towards_the_ranks(value):
    scores = torch.full((7,), value, requires_grad=True)
    targets = torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0, 0.0, 5.0])
    loss = srcc_loss(scores, targets)
    found = gradient(loss, scores)
    assert number(loss) == pytest.approx(1)
    assert number(found.norm()) == pytest.approx(1, abs=FLOAT32_FORMULA)
    assert stats.spearmanr(-found, targets).statistic == pytest.approx(1)
    assert number(srcc_loss(scores.detach() - found, targets, 1e-3)) < 0.01


@pytest.mark.parametrize("strength", [1e-12, 1.0, 1e15])
def test_srcc_loss_stays_finite(strength):
    scores = torch.tensor([1.0, 1.0 + 1e-6, 1.0, 2.0], requires_grad=True)
    loss = srcc_loss(scores, torch.tensor([1.0, 2.0, 3.0, 4.0]), strength)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient(loss, scores)).all()


@pytest.mark.parametrize("n", [1, 4])
def test_constant_targets_ask_for_nothing(n):
    scores, _ = random_pair(n)
    loss = srcc_loss(scores, torch.ones(n).double())
    assert number(loss) == 1
    assert gradient(loss, scores).abs().max() == 0


# --- LambdaRank ---


def ndcg(order, gains, k):
    """NDCG@k of recipes in this order, best first."""
    discounts = [1 / math.log2(place + 2) if place < k else 0 for place in range(len(order))]
    ideal = sum(g * d for g, d in zip(sorted(gains, reverse=True), discounts, strict=True))
    return sum(gains[i] * d for i, d in zip(order, discounts, strict=True)) / ideal


def published_lambdas(scores, targets, *, sigma, k, gain):
    """Burges 2010, equation 6 with S = 1: what is added to the gradient of i, and taken from that of j."""
    gains = [2**r - 1 if gain == "exponential" else r for r in targets]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    lambdas = np.zeros(len(scores))
    for i, j in itertools.permutations(range(len(scores)), 2):
        if targets[i] > targets[j]:
            swapped = [{i: j, j: i}.get(item, item) for item in order]
            change = abs(ndcg(swapped, gains, k) - ndcg(order, gains, k))
            pull = -sigma / (1 + math.exp(sigma * (scores[i] - scores[j]))) * change
            lambdas[i] += pull
            lambdas[j] -= pull
    return lambdas


@pytest.mark.parametrize("gain", ["exponential", "linear"])
@pytest.mark.parametrize("truncation", [None, 1, 3])
@pytest.mark.parametrize("sigma", [1.0, 2.5])
def test_gradient_is_the_published_lambdas(gain, truncation, sigma):
    scores, targets = random_pair(8)
    loss = lambda_rank_loss(scores, targets, sigma=sigma, truncation=truncation, gain=gain)
    expected = published_lambdas(scores.tolist(), targets.tolist(), sigma=sigma, k=truncation or 8, gain=gain)
    assert gradient(loss, scores).numpy() == pytest.approx(expected, abs=FLOAT64_SUM)
    assert np.abs(expected).max() > 0.01


def test_value_is_the_weighted_logistic_loss_of_a_pair():
    scores, targets = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
    change = (3 - 1) * (1 - 1 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert number(lambda_rank_loss(scores, targets)) == pytest.approx(change * math.log(1 + math.e))


@pytest.mark.parametrize("kind", ["srcc", "lambda_rank", "hybrid"])
def test_descent_improves_the_order(kind):
    scores, targets = random_pair(20, seed=4)
    before = ndcg_score([targets.numpy()], [scores.detach().numpy()])
    optimizer, losses = torch.optim.Adam([scores], lr=0.05), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = ranking_loss(kind, scores, targets, gain="linear")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert before < 0.9
    assert ndcg_score([targets.numpy()], [scores.detach().numpy()]) > 0.99
    assert losses[-1] < losses[0] / 2


def test_equal_targets_have_no_pairs():
    scores, _ = random_pair(5)
    for value in (0.0, 2.0):
        loss = lambda_rank_loss(scores, torch.full((5,), value).double())
        assert number(loss) == 0
        assert gradient(loss, scores).abs().max() == 0


def test_highest_relevance_and_far_scores_stay_finite():
    scores = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    loss = lambda_rank_loss(scores, torch.tensor([60.0, 0.0, 59.0]))
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient(loss, scores)).all()


# --- by name ---


def test_hybrid_is_the_sum_and_none_is_nothing():
    scores, targets = random_pair(12)
    srcc, ranks, hybrid, none = (ranking_loss(k, scores, targets) for k in ("srcc", "lambda_rank", "hybrid", "none"))
    assert number(srcc) == number(srcc_loss(scores, targets)) > 0
    assert number(ranks) == number(lambda_rank_loss(scores, targets)) > 0
    assert number(hybrid) == pytest.approx(number(srcc + ranks), rel=FLOAT64_SUM)
    assert number(none) == 0
    assert gradient(none, scores).abs().max() == 0


def test_options_reach_the_losses():
    scores, targets = random_pair(12)
    found = ranking_loss("hybrid", scores, targets, truncation=4, gain="linear")
    expected = srcc_loss(scores, targets) + lambda_rank_loss(scores, targets, truncation=4, gain="linear")
    assert number(found) == pytest.approx(number(expected), rel=FLOAT64_SUM)


@pytest.mark.parametrize("kind", ["srcc", "lambda_rank", "hybrid", "none"])
def test_loss_is_a_scalar_of_the_type_of_the_scores(kind):
    scores, targets = random_pair(12, dtype=torch.float32)
    loss = ranking_loss(kind, scores, targets.to(torch.int64))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    assert gradient(loss, scores).dtype == torch.float32


# --- refusals ---

ONE, TWO = torch.ones(1), torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: soft_rank(TWO, 0.0), "strength must be positive and finite, got 0"),
        (lambda: soft_rank(TWO, math.nan), "strength must be positive"),
        (lambda: soft_rank(1e300 * TWO.double(), 1e-300), "Choose a larger one"),
        (lambda: soft_rank(TWO[None]), r"vector of real numbers, got \(1, 2\)"),
        (lambda: soft_rank(torch.ones(0)), r"vector of real numbers, got \(0,\)"),
        (lambda: soft_rank(torch.tensor([1, 2])), "of torch.int64"),
        (lambda: soft_rank(TWO / 0), "scores must be finite"),
        (lambda: srcc_loss(TWO, ONE), r"one target, got \(2,\) scores and \(1,\) targets"),
        (lambda: srcc_loss(TWO, TWO / 0), "targets must be finite"),
        (lambda: srcc_loss(ONE, ONE, -1.0), "strength must be positive"),
        (lambda: lambda_rank_loss(TWO, TWO - 2), "at least 0, got -1"),
        (lambda: lambda_rank_loss(TWO, TWO - 2, gain="linear"), "at least 0, got -1"),
        (lambda: lambda_rank_loss(TWO, 31 * TWO), "at most 60, got 62"),
        (lambda: lambda_rank_loss(TWO, TWO, gain="cubic"), "exponential, linear, got 'cubic'"),
        (lambda: lambda_rank_loss(TWO, TWO, sigma=0.0), "sigma must be positive"),
        (lambda: lambda_rank_loss(TWO, TWO, truncation=0), "at least 1 place, got 0"),
        (lambda: ranking_loss("mse", TWO, TWO), "srcc, lambda_rank, hybrid, none, got 'mse'"),
        (lambda: ranking_loss("none", TWO, ONE), "one target"),
    ],
)
def test_refusals_name_rule_and_value(call, rule):
    with pytest.raises(InputError, match=rule):
        call()


def test_linear_gain_takes_high_relevances():
    assert number(lambda_rank_loss(TWO, 1000 * TWO, gain="linear")) > 0
