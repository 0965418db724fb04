"""The lines of the explanation's tables, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sedimo.metrics.estimate import Estimate
from sedimo.reporting.explanation import (
    OVERALL,
    Explanation,
    FinalistRow,
    FoldRow,
    Insight,
    PredictorRow,
    RefineRound,
    Verdict,
)
from sedimo.reporting.explanation_phrasing import MARKS, change, decibels, predicted, subsets
from sedimo.reporting.rounding import duration, interval, number


@dataclass(frozen=True, slots=True)
class InsightLine:
    """One finding: its verdict with a mark, the sentence, the change behind it, both figures."""

    verdict: Verdict
    mark: str
    sentence: str
    change: str
    predicted: str
    measured: str
    n: int

    @property
    def style(self) -> str:
        """The verdict as the name of a style."""
        return self.verdict.replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and its interval, both as text; the interval may be empty."""

    text: str
    interval: str


@dataclass(frozen=True, slots=True)
class PredictorLine:
    """One predictor or baseline on one subset."""

    predictor: str
    subset: str
    n: int
    figures: tuple[Figure, ...]
    time: str
    is_used: bool


@dataclass(frozen=True, slots=True)
class FoldLine:
    """One fold at one hop, on one subset of its recipes."""

    fold: int
    hop: int
    subset: str
    n: int
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class RoundLine:
    """One round of refinement."""

    round: int
    n_trials: str
    best: Figure
    predicted: str


@dataclass(frozen=True, slots=True)
class FinalistLine:
    """One finalist; `behind` is None for the chosen one."""

    name: str
    bits: str
    measured: Figure
    behind: Figure | None


def insight_lines(insights: Sequence[Insight]) -> tuple[InsightLine, ...]:
    """The findings in their order."""
    return tuple(
        InsightLine(
            verdict=insight.verdict,
            mark=MARKS[insight.verdict],
            sentence=insight.sentence,
            change=change(insight),
            predicted=predicted(insight),
            measured="" if insight.measured is None else decibels(insight.measured),
            n=0 if insight.measured is None else insight.measured.n,
        )
        for insight in insights
    )


def predictor_lines(rows: Sequence[PredictorRow]) -> tuple[PredictorLine, ...]:
    """Subset by subset, all recipes first; in each the best rank correlation on top."""
    order = subsets(rows)
    ordered = sorted(rows, key=lambda row: (order.index(row.subset), *_rank(row.srcc.value)))
    return tuple(
        PredictorLine(
            predictor=row.predictor,
            subset=_subset(row.subset),
            n=row.n,
            figures=tuple(figure(e) for e in (row.srcc, row.kendall_tau, row.ndcg_at_10, row.mae)),
            time="" if row.seconds is None else duration(row.seconds),
            is_used=row.is_used,
        )
        for row in ordered
    )


def fold_lines(rows: Sequence[FoldRow]) -> tuple[FoldLine, ...]:
    """Fold by fold, hop by hop."""
    ordered = sorted(rows, key=lambda row: (row.subset != OVERALL, row.subset, row.fold, row.hop))
    return tuple(
        FoldLine(
            fold=row.fold,
            hop=row.hop,
            subset=_subset(row.subset),
            n=row.srcc.n,
            figures=tuple(figure(e) for e in (row.srcc, row.kendall_tau, row.ndcg_at_10, row.mae)),
        )
        for row in ordered
    )


def round_lines(rounds: Sequence[RefineRound]) -> tuple[RoundLine, ...]:
    """Round by round."""
    return tuple(
        RoundLine(r.round, f"{r.n_trials:,}", figure(r.best_db), _plain(r.predicted_db))
        for r in sorted(rounds, key=lambda r: r.round)
    )


def finalist_lines(finalists: Sequence[FinalistRow]) -> tuple[FinalistLine, ...]:
    """The finalists, best first."""
    return tuple(
        FinalistLine(
            f.name,
            number(f.paper_bits),
            figure(f.measured),
            None if f.behind is None else figure(f.behind),
        )
        for f in sorted(finalists, key=lambda f: _rank(f.measured.value))
    )


def has_times(explanation: Explanation) -> bool:
    """Whether the time of fitting is known of any predictor."""
    return any(row.seconds is not None for row in explanation.predictors)


def _subset(name: str) -> str:
    return "all recipes" if name == OVERALL else name


def figure(estimate: Estimate) -> Figure:
    """An estimate as text; a dash where there is none."""
    if math.isnan(estimate.value):
        return Figure("\N{EN DASH}", "")
    return Figure(number(estimate.value, estimate.standard_error), interval(estimate))


def _plain(value: float) -> str:
    return "\N{EN DASH}" if math.isnan(value) else number(value)


def _rank(value: float) -> tuple[bool, float]:
    return math.isnan(value), -value
