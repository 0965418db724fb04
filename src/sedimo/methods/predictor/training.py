"""Training a predictor in folds: each test fold is untouched, early stopping looks at a part of the other folds.

Preset `paper` is the published network, loss and schedule. Preset `fast` starts each fold's network from a noise model
of the same recipes, and needs a few dozen epochs. Both are stopped when a validation part of the training recipes is
predicted no better any more.

Besides the squared error there are losses that reward the right order of recipes: soft rank correlation and
LambdaRank. The released code of Qua2SeDiMo wrote LambdaRank's gradient beside the loss, where the optimiser erased it,
took its places from the targets, and correlated soft ranks with targets that were not ranked. Here each loss is a real
scalar whose gradient reaches the scores, computed on the CPU in float64, where the ranks are found, and returned in
the type and on the device of the scores.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from scipy import optimize, stats
from torch.nn import functional as F

from sedimo.errors import InputError
from sedimo.methods.predictor.features import Choices, Codes, GraphFeatures, Values
from sedimo.methods.predictor.model import NoiseNetwork, PaperNetwork
from sedimo.methods.predictor.noise_model import fit_noise_model
from sedimo.metrics.ranking import rank_correlation
from sedimo.progress import SILENT, Progress

logger = logging.getLogger(__name__)

Preset = Literal["fast", "paper"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
RankingLoss = Literal["srcc", "lambda_rank", "hybrid", "none"]
Gain = Literal["exponential", "linear"]
Network = NoiseNetwork | PaperNetwork
MIN_RECIPES = 20
RELEVANCE = 50.0  # of the best recipe, as published
LOWEST_SHARE = 0.2  # of the recipes have relevance 0, as published
HIGHEST_RELEVANCE = 60  # gains of 2^60 - 1 leave one recipe that matters; beyond 1023 float64 overflows
_PREDICT_BATCH = 256


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How a predictor is trained.

    `n_epochs` is the most; training ends when `patience` epochs have brought nothing on the validation part, which is
    `validation_share` of each fold's training recipes. `ranking` is the loss on the order, weighted by
    `ranking_weight` and averaged over hops; `gain` and `truncation` are those of LambdaRank.
    """

    preset: Preset = "fast"
    n_folds: int = 5
    seed: int = 12345
    n_hops: int = 2
    n_epochs: int = 80
    patience: int = 15
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    validation_share: float = 0.15
    ranking: RankingLoss = "srcc"
    ranking_weight: float = 0.1
    gain: Gain = "linear"
    truncation: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise InputError(f"the preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.n_hops < 1 or not 0 < self.validation_share < 1 or self.ranking not in get_args(RankingLoss):
            raise InputError("one hop or more, a validation share between 0 and 1 and a known ranking loss are needed")
        if self.n_folds < 2 or self.n_epochs < 1 or self.patience < 1 or self.batch_size < 2:
            raise InputError("at least two folds, one epoch, patience of one and batches of two are needed")

    @property
    def is_paper(self) -> bool:
        """Whether the network, its loss and what it predicts, the target's term for size included, are as published."""
        return self.preset == "paper"

    def truth(self, data: TrainingSet) -> Values:
        """What is predicted of recipes, `[T]`."""
        return data.target if self.is_paper else data.quality


FAST = TrainingOptions()
PAPER = TrainingOptions(
    preset="paper",
    n_hops=4,
    n_epochs=10_000,
    patience=300,
    batch_size=128,
    weight_decay=1e-6,
    clip=5.0,
    ranking="hybrid",
    ranking_weight=1.0,
    gain="exponential",
)


@dataclass(frozen=True)
class TrainingSet:
    """Measured recipes as numbers; of quality and target, higher is better."""

    features: GraphFeatures
    choices: Choices
    prior: Values  # costs of all options that the noise model starts from [D, K]
    codes: Codes  # [T, D]
    quality: Values  # without any term for size [T]
    target: Values  # the whole target [T]

    @property
    def n(self) -> int:
        """Number of recipes, T."""
        return len(self.codes)


@dataclass(frozen=True)
class FoldModel:
    """The network of one fold, and what it says of its test recipes."""

    network: Network
    test: Codes  # [n]
    predicted: Values  # in the target's unit [n]
    hop_scores: Values  # rank recipes by each hop [M + 1, n]
    hop_srcc: Values  # how well they do
    n_epochs: int  # to the best validation loss
    unit: tuple[float, float]  # what the network's 0 and 1 stand for: offset and scale


@dataclass(frozen=True)
class Predictor:
    """The networks of all folds and what they were trained on; what they say together is their mean."""

    options: TrainingOptions
    data: TrainingSet
    folds: tuple[FoldModel, ...]

    @property
    def noise_networks(self) -> list[NoiseNetwork]:
        """The networks, unless they are the published ones."""
        return [fold.network for fold in self.folds if isinstance(fold.network, NoiseNetwork)]

    def predict(self, codes: Codes) -> Values:
        """Mean prediction of recipes `[T, D]`, `[T]`."""
        return np.asarray(self.predict_each(codes).mean(axis=0))

    def predict_each(self, codes: Codes) -> Values:
        """Prediction of every fold, `[F, T]`."""
        return np.stack([_run(f.network, self.data.features, codes, f.unit)[0] for f in self.folds])

    def cross_validated(self) -> Values:
        """For each of the training recipes the prediction by the fold that has not seen it, `[n]`."""
        found = np.full(self.data.n, np.nan)
        for fold in self.folds:
            found[fold.test] = fold.predicted
        return found


def train_predictor(data: TrainingSet, options: TrainingOptions = FAST, *, progress: Progress = SILENT) -> Predictor:
    """One network per fold; recipes are shuffled by the options' seed."""
    if data.n < MIN_RECIPES:
        raise InputError(f"a predictor needs at least {MIN_RECIPES} measured recipes, got {data.n}: explore more")
    if not np.isfinite(data.target).all() or np.ptp(data.target) == 0:
        raise InputError("the targets of the recipes must be finite and not all equal")
    shuffled = np.random.default_rng(options.seed).permutation(data.n)
    progress.start(options.n_folds, "training the predictor")
    folds = []
    for index, test in enumerate(np.array_split(shuffled, options.n_folds)):
        folds.append(_train_fold(data, options, index, np.sort(test)))
        progress.advance(1)
    progress.done()
    return Predictor(options, data, tuple(folds))


@torch.no_grad()
def _run(network: Network, features: GraphFeatures, codes: Codes, unit: tuple[float, float]) -> tuple[Values, Values]:
    """Predictions `[T]` in a unit, and hop scores `[M + 1, T]`, of a trained network."""
    network.eval()
    starts = range(0, len(codes), _PREDICT_BATCH)
    found = [network(torch.from_numpy(features.rows(codes[i : i + _PREDICT_BATCH]))) for i in starts]
    predicted: Values = unit[0] + unit[1] * torch.cat([prediction for prediction, _ in found]).double().numpy()
    return predicted, torch.cat([torch.stack(scores) for _, scores in found], dim=1).double().numpy()


def relevance(target: Values, reference: Values) -> Values:
    """Targets as relevances 0 to 50 by the reference's 20 % quantile and maximum.

    Source: Mills et al. 2024, released code: the worst fifth counts nothing, the best 50.
    """
    low, high = _ends(reference)
    return np.asarray(RELEVANCE * np.clip((target - low) / max(high - low, 1e-12), 0.0, 1.0))


def _ends(target: Values) -> tuple[float, float]:
    """The targets that have the least and the greatest relevance."""
    return float(np.quantile(target, LOWEST_SHARE)), float(target.max())


def _train_fold(data: TrainingSet, options: TrainingOptions, index: int, test: Codes) -> FoldModel:
    generator = np.random.default_rng([options.seed, index])
    others = generator.permutation(np.setdiff1d(np.arange(data.n), test))
    n_validation = max(3, round(options.validation_share * len(others)))
    validation, training = others[:n_validation], others[n_validation:]
    network: Network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed + index)
        if options.is_paper:
            network = PaperNetwork(data.features, n_hops=options.n_hops)
        else:
            noise = fit_noise_model(data.choices, data.prior, data.codes[training], data.quality[training])
            network = NoiseNetwork(data.features, noise, n_hops=options.n_hops)
        n_epochs = _train(network, data, options, training=training, validation=validation, generator=generator)
    low, high = _ends(data.target[training])
    unit = (low, (high - low) / RELEVANCE) if options.is_paper else (0.0, 1.0)
    predicted, hop_scores = _run(network, data.features, data.codes[test], unit)
    truth = options.truth(data)[test]
    hop_srcc = [rank_correlation(scores, truth) if len(truth) > 2 else 0.0 for scores in hop_scores]
    return FoldModel(network, test, predicted, hop_scores, np.array(hop_srcc), n_epochs, unit)


def _train(
    network: Network,
    data: TrainingSet,
    options: TrainingOptions,
    *,
    training: Codes,
    validation: Codes,
    generator: np.random.Generator,
) -> int:
    """Number of epochs to the least validation loss; the network ends as it was then."""
    wanted = relevance(data.target, data.target[training]) if options.is_paper else data.quality
    targets = torch.from_numpy(wanted).float()
    scale = 1.0 if options.is_paper else float(data.quality[training].std())
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.n_epochs)
    # parts of about one size: batch normalisation needs more than one graph, ranks more than a few
    n_batches = max(1, round(len(training) / options.batch_size))

    def said(recipes: Codes) -> tuple[torch.Tensor, list[torch.Tensor]]:
        found: tuple[torch.Tensor, list[torch.Tensor]] = network(
            torch.from_numpy(data.features.rows(data.codes[recipes]))
        )
        return found

    @torch.no_grad()
    def validated() -> float:
        network.eval()
        prediction, hop_scores = said(validation)
        each = [prediction] if options.is_paper else hop_scores[1:]
        return float(torch.stack([(one - targets[validation]).square().mean() for one in each]).mean())

    best, best_epoch, best_state = validated(), 0, copy.deepcopy(network.state_dict())
    for epoch in range(1, options.n_epochs + 1):
        network.train()
        for batch in np.array_split(generator.permutation(training), n_batches):
            loss = _loss(options, *said(batch), targets[batch], scale)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip)
            optimiser.step()
        schedule.step()
        if (current := validated()) < best:
            best, best_epoch, best_state = current, epoch, copy.deepcopy(network.state_dict())
        elif epoch - best_epoch >= options.patience:
            break
    network.load_state_dict(best_state)
    logger.info("best of the epochs: %d, validation loss %.4g", best_epoch, best)
    return best_epoch


def _loss(
    options: TrainingOptions,
    prediction: torch.Tensor,
    hop_scores: list[torch.Tensor],
    wanted: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Squared error plus the mean over hops of the ranking loss.

    With `fast` every hop predicts the quality, so that every hop has a squared error.

    Source: Mills et al. 2024, Qua2SeDiMo, loss of the predictor.
    """
    said = [prediction] if options.is_paper else hop_scores
    squared = torch.stack([((one - wanted) / scale).square().mean() for one in said]).mean()
    if options.ranking == "none":
        return squared
    # of relevances at most 4 where gains are exponential
    ranks = wanted / RELEVANCE * 4 if options.is_paper else wanted - wanted.min()
    losses = [
        ranking_loss(options.ranking, scores, ranks, truncation=options.truncation, gain=options.gain)
        for scores in hop_scores
    ]
    return squared + options.ranking_weight * torch.stack(losses).mean()


def soft_rank(scores: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Differentiable ranks `[n]` of scores `[n]`, ascending: the highest score has a rank near n.

    The point of the permutahedron of (1, ..., n) that is nearest to scores / strength. Scores that lie at least
    `strength` apart get their hard ranks and no gradient; closer ones are pooled, and within a pool soft ranks differ
    as scores / strength do. The sum is always n (n + 1) / 2. The gradient is exact: (identity - averaging within
    pools) / strength.

    Example:
        >>> soft_rank(torch.tensor([0.3, 5.0, 0.1]))
        tensor([1.6000, 3.0000, 1.4000])

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
    bounds = optimize.isotonic_regression((ordered - places).detach().numpy()).blocks
    sizes = torch.from_numpy(np.diff(bounds))
    pools = torch.repeat_interleave(sizes)

    def means(values: torch.Tensor) -> torch.Tensor:
        return (torch.zeros(len(sizes), dtype=values.dtype).index_add(0, pools, values) / sizes)[pools]

    # scores - isotonic(scores - places), written so that a pool of one score gives its place without rounding
    ranks = means(places) + (ordered - means(ordered))
    return ranks[torch.argsort(order)].to(scores)


def srcc_loss(scores: torch.Tensor, targets: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """1 - Pearson correlation of the soft ranks of scores `[n]` and the average ranks of targets `[n]`: 0 to 2.

    The scores are first shifted and scaled to the mean and standard deviation of the ranks 1..n, so that the loss
    does not depend on their scale and `strength` means the same for all scales and n: evenly spread scores are
    ranked hard below 1 and pooled above. Towards 0 the loss becomes 1 - SRCC, without gradient; for large strengths it
    becomes 1 - Pearson correlation of the scores with the ranks, with gradients for all.

    Constant scores have a loss of 1 and the gradient, of norm 1, that moves them towards the ranks of the targets
    (that of the loss has no limit there). Constant targets ask for nothing: a loss of 1 and no gradient.
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

    Source: Burges 2010, "From RankNet to LambdaRank to LambdaMART: an overview", section 4; as a loss: Wang, Li,
    Golbandi, Bendersky and Najork 2018, "The LambdaLoss framework for ranking metric optimization".
    """
    _check_positive(sigma, "sigma")
    _check_pair(scores, targets)
    if truncation is not None and truncation < 1:
        raise InputError(f"truncation must be at least 1 place, got {truncation}. Leave it out to count all places.")
    relevance = targets.detach().to("cpu", torch.float64)
    values, gains = scores.to("cpu", torch.float64), _gains(relevance, gain)
    places = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    discounts = torch.where(places <= (truncation or len(scores)), 1 / torch.log2(places + 1), 0.0)
    best = torch.sort(gains, descending=True).values @ discounts
    own = torch.empty_like(discounts)
    own[torch.argsort(values.detach(), descending=True, stable=True)] = discounts
    changes = (gains[:, None] - gains[None, :]) * (own[:, None] - own[None, :])
    weights = changes.abs() / best.clamp_min(torch.finfo(torch.float64).tiny)
    weights = torch.where(relevance[:, None] > relevance[None, :], weights, 0.0)  # [n, n]
    margins = values[:, None] - values[None, :]
    return -(weights * F.logsigmoid(sigma * margins)).sum().to(scores)


def ranking_loss(
    kind: RankingLoss,
    scores: torch.Tensor,
    targets: torch.Tensor,
    *,
    truncation: int | None = None,
    gain: Gain = "exponential",
) -> torch.Tensor:
    """The ranking loss of that name: `hybrid` is the sum of `srcc` and `lambda_rank`, `none` is 0."""
    if kind not in get_args(RankingLoss):
        raise InputError(f"a ranking loss is one of {', '.join(get_args(RankingLoss))}, got {kind!r}")
    _check_pair(scores, targets)
    loss = 0 * scores.sum()
    if kind in ("srcc", "hybrid"):
        loss = loss + srcc_loss(scores, targets)
    if kind in ("lambda_rank", "hybrid"):
        loss = loss + lambda_rank_loss(scores, targets, truncation=truncation, gain=gain)
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
