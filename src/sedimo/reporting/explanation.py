"""What a predictor trained on measured recipes knows about a denoiser, as records: the report's explanation.

A predictor gives a score to every choice (a decision at a format). Scores say where quality is lost, baselines
say whether the predictor is worth listening to, and insights were measured afterwards, each by itself. Nothing
here trains, predicts or draws; every part may be empty, and the report then leaves it out. Names of fields are those
of `--json`. What contradicts itself is refused when it is made or read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate
from sedimo.quant.formats import Format

CurveKind = Literal["this", "random", "uniform"]
Verdict = Literal["confirmed", "refuted", "open", "not measured"]
OVERALL = "all"  # the subset that holds every held-out recipe
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True)
class ScoreBox:
    """Five numbers of `n` scores (higher = better); `low` and `high` are the 5 % and the 95 % quantile."""

    name: str
    n: int
    low: float
    q25: float
    median: float
    q75: float
    high: float

    def __post_init__(self) -> None:
        """Refuses what cannot be a distribution."""
        if self.n < 1:
            raise InputError(f"the box of {self.name!r} must stand for at least one score, got n = {self.n}")
        numbers = (self.low, self.q25, self.median, self.q75, self.high)
        if any(not one <= other for one, other in pairwise(numbers)):
            raise InputError(f"the quantiles of {self.name!r} must not fall, got {numbers}")


@dataclass(frozen=True, slots=True)
class FormatShare:
    """The formats of the chosen recipe on one operation: number of layers per format, weights, bits per weight."""

    operation: str
    counts: Mapping[str, int]
    params: int
    paper_bits: float

    def __post_init__(self) -> None:
        """Checks the formats."""
        for text in self.counts:
            Format.parse(text)
        if self.n_layers < 1 or min(self.counts.values()) < 0:
            raise InputError(f"the operation {self.operation!r} must have layers, got {dict(self.counts)}")

    @property
    def n_layers(self) -> int:
        """Layers of the operation."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class PredictorRow:
    """How well a predictor, or an honest baseline, orders `n` recipes that it was not trained on.

    `subset` is `OVERALL`, or a band in words that read after "within": "3.4 to 3.6 bits". `mae` is in the unit of
    the target, `seconds` is for fitting. `is_used` marks the predictor whose scores the report shows; `advantage` is
    that one's `srcc` less the one of this row, on the same recipes and resamples, when known.
    """

    predictor: str
    subset: str
    n: int
    srcc: Estimate
    kendall_tau: Estimate
    ndcg_at_10: Estimate
    mae: Estimate
    seconds: float | None = None
    is_used: bool = False
    advantage: Estimate | None = None


@dataclass(frozen=True, slots=True)
class FoldRow:
    """Quality of the used predictor on one held-out part of the trials, read out after `hop` steps of the graph.

    `subset` says which recipes of that part: all, or those in a band of bits.
    """

    fold: int
    hop: int
    subset: str
    srcc: Estimate
    kendall_tau: Estimate
    ndcg_at_10: Estimate
    mae: Estimate


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A recipe that was really measured [dB]; points of kind `this` or of one name form a line."""

    name: str
    kind: CurveKind
    bits: float
    measured: Estimate


@dataclass(frozen=True, slots=True)
class Insight:
    """A sentence about what matters, with the change of quality [dB] that it predicts and that was measured.

    The change is that of the whole recipe's quality when `decisions` go from one format to the other; positive is
    better. The interval of the prediction is endless where nothing is known of its error.
    """

    sentence: str
    decisions: tuple[str, ...]
    from_format: str
    to_format: str
    predicted_db: float
    predicted_low: float = -math.inf
    predicted_high: float = math.inf
    measured: Estimate | None = None
    verdict: Verdict = "not measured"

    def __post_init__(self) -> None:
        """Holds verdict and measurement together."""
        if (self.measured is None) != (self.verdict == "not measured"):
            raise InputError(
                f"the verdict of an insight must be 'not measured' exactly when there is no measurement, got "
                f"{self.verdict!r} with {self.measured} in {self.sentence!r}"
            )


@dataclass(frozen=True, slots=True)
class RefineRound:
    """A round of measuring what the predictor thinks best: trials so far, the best one, what was predicted for it."""

    round: int
    n_trials: int
    best_db: Estimate
    predicted_db: float


@dataclass(frozen=True, slots=True)
class FinalistRow:
    """A recipe that could have been chosen, measured on the seeds of the final [dB].

    `behind` is what the chosen one is ahead of it, paired; None for the chosen one itself.
    """

    name: str
    paper_bits: float
    measured: Estimate
    behind: Estimate | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that the report's explanation tells.

    `predictor` was trained on `n_trials` measured recipes to predict `target` ("SQNR [dB]"), measured on
    `objective` (the trials' objective, such as `final_latents`). `operation_boxes`, `block_boxes` and `format_shares`
    are in the order of the denoiser.
    """

    predictor: str
    target: str
    n_trials: int
    objective: str
    operation_boxes: tuple[ScoreBox, ...] = ()
    block_boxes: tuple[ScoreBox, ...] = ()
    format_shares: tuple[FormatShare, ...] = ()
    predictors: tuple[PredictorRow, ...] = ()
    folds: tuple[FoldRow, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    insights: tuple[Insight, ...] = ()
    rounds: tuple[RefineRound, ...] = ()
    finalists: tuple[FinalistRow, ...] = ()
    notes: tuple[str, ...] = ()


def score_boxes(values_by_name: Mapping[str, Sequence[float]]) -> tuple[ScoreBox, ...]:
    """The distribution of the scores of each name, in the order of the mapping.

    Quantiles are interpolated linearly; beside an endless score, the nearer of the two is taken.

    Example:
        >>> score_boxes({"to_q": [1.0, 2.0, 3.0]})
        (ScoreBox(name='to_q', n=3, low=1.1, q25=1.5, median=2.0, q75=2.5, high=2.9),)

    Raises:
        InputError: a name without scores, or a score that is not a number.
    """
    found = []
    for name, values in values_by_name.items():
        ordered = np.sort(np.asarray(values, dtype=np.float64))
        if not ordered.size or np.isnan(ordered).any():
            raise InputError(f"the scores of {name!r} must be numbers, at least one, got {list(values)[:5]}")
        places = np.array(_QUANTILES) * (len(ordered) - 1)
        between = np.interp(places, np.arange(len(ordered)), ordered)
        nearest = ordered[np.floor(places + 0.5).astype(int)]
        found.append(ScoreBox(name, len(ordered), *np.where(np.isfinite(between), between, nearest).tolist()))
    return tuple(found)


def verdict_of(predicted_db: float, measured: Estimate | None) -> Verdict:
    """Whether a measured change went the way that was predicted; open when its 95 % interval holds zero.

    Example:
        >>> verdict_of(0.8, Estimate(1.1, 0.2, 0.7, 1.5, 64))
        'confirmed'
    """
    if measured is None:
        return "not measured"
    if predicted_db == 0 or math.isnan(predicted_db) or not (measured.low > 0 or measured.high < 0):
        return "open"
    return "confirmed" if (measured.low > 0) == (predicted_db > 0) else "refuted"
