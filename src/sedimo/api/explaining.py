"""The explanation of a search, for the report: scores, rivals, the measured curve, verified sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from sedimo.api.insights import bits_of, grouped, insights
from sedimo.api.order import BudgetOrder
from sedimo.api.predicting import BAND_HALF_WIDTH, MIN_IN_BAND, Known, PredictorReport, band_name, judge
from sedimo.api.searching import MAX_VARIANTS, Measuring, Search, allocated
from sedimo.errors import InputError
from sedimo.graph.groups import split_groups
from sedimo.measurement.trial import Trial
from sedimo.metrics.estimate import mean_estimate
from sedimo.metrics.signal import paired_difference, sqnr_estimates, summarize
from sedimo.reporting.explanation import (
    OVERALL,
    CurveKind,
    CurvePoint,
    Explanation,
    FinalistRow,
    FoldRow,
    FormatShare,
    PredictorRow,
    RefineRound,
    score_boxes,
)
from sedimo.sensitivity.choices import Values
from sedimo.sensitivity.gnn.scoring import (
    disjoint_groups,
    group_scores,
    hop_qualities,
    most_common,
    option_scores,
)
from sedimo.sensitivity.quality import prediction_quality

TARGET_NAMES = {"sqnr_db": "SQNR [dB]", "sqnr_pooled_db": "pooled SQNR [dB]"}
CURVE_STEPS = (-0.4, -0.2, 0.2, 0.4, 0.7)  # bits beside the budget at which the curve is measured
N_BOOTSTRAP_OF_FOLD = 200


@dataclass(frozen=True)
class Seeds:
    """Where trials are measured: on the seeds of the search, and on fresh ones for what is stated."""

    search: Measuring
    fresh: Measuring


def explain(known: Known, search: Search, seeds: Seeds, *, target: str) -> Explanation:
    """All that the report tells of a search. Measures the curve on the search's seeds, the sentences on fresh ones."""
    bits = search.allocation.paper_bits
    band = (bits - BAND_HALF_WIDTH, bits + BAND_HALF_WIDTH)
    report = judge(search.predictor, search.data, known, band=band)
    operations, blocks, notes = score_distributions(known, search)
    preset = search.predictor.options.preset
    return Explanation(
        predictor=f"graph network, preset {preset}",
        target=TARGET_NAMES.get(target, target),
        n_trials=len(search.trials),
        objective=seeds.search.setting.objective,
        operation_boxes=score_boxes(operations),
        block_boxes=score_boxes(blocks),
        format_shares=format_shares(search),
        predictors=predictor_rows(report),
        folds=fold_rows(search, band),
        curve=curve(known, search, seeds.search),
        insights=insights(search, seeds.fresh),
        rounds=tuple(
            RefineRound(r.index + 1, r.n_trials, mean_estimate(r.best.powers.sqnr_db), r.predicted)
            for r in search.rounds
        ),
        finalists=finalist_rows(search),
        notes=notes,
    )


def finalist_rows(search: Search) -> tuple[FinalistRow, ...]:
    """The finalists, and what the chosen one is ahead of each, paired on the seeds of the final."""
    chosen = next((f.trial.powers for f in search.finalists if f.trial.recipe == search.allocation.recipe), None)
    if chosen is None:
        return ()
    space = search.data.choices.space
    return tuple(
        FinalistRow(
            f.name,
            space.paper_bits(f.trial.recipe),
            sqnr_estimates(summarize(f.trial.powers))["sqnr_db"],
            None if f.trial.powers is chosen else paired_difference(chosen, f.trial.powers).estimate,
        )
        for f in search.finalists
    )


def score_distributions(
    known: Known, search: Search
) -> tuple[dict[str, list[float]], dict[str, list[float]], tuple[str, ...]]:
    """Scores of options by operation, scores of group variants by block, and notes about hops without worth."""
    qualities = hop_qualities(search.predictor, known.graph, search.data.codes)
    options, _ = option_scores(search.predictor, qualities)
    operations: dict[str, list[float]] = {}
    for row, decision in zip(options, known.space.decisions, strict=True):
        operations.setdefault(decision.operation, []).extend(row[np.isfinite(row)].tolist())
    blocks: dict[str, list[float]] = {}
    reference, agreed = most_common(search.data.codes, search.data.quality), list[float]()
    groups = split_groups(known.graph, n_options=known.choices.n_options, max_variants=MAX_VARIANTS)
    for group in disjoint_groups(search.predictor, known.graph, groups):
        found = group_scores(search.predictor, known.graph, group, qualities, reference=reference)
        alone = group_scores(search.predictor, known.graph, group, qualities)
        agreed.append(_rank_correlation(found.scores.mean, alone.scores.mean))
        blocks.setdefault(found.block or "outside blocks", []).extend(found.scores.mean.tolist())
    useless = [
        f"hop {hop} of fold {fold} ranked its test recipes no better than chance ({q.srcc:+.2f}) and has no weight"
        for fold, row in enumerate(qualities)
        for hop, q in enumerate(row)
        if q.srcc <= 0
    ]
    least = min(agreed, default=1.0)
    compared = f"scores of group variants in isolation and in context agree: least rank correlation {least:.3f}"
    return operations, blocks, (compared, *useless)


def _rank_correlation(first: Values, second: Values) -> float:
    return 1.0 if np.ptp(first) == 0 or np.ptp(second) == 0 else float(stats.spearmanr(first, second).statistic)


def predictor_rows(report: PredictorReport) -> tuple[PredictorRow, ...]:
    """The predictor and its rivals, with what the predictor is ahead of each."""
    found = []
    for name, subset, quality in report.rows:
        found.append(
            PredictorRow(
                predictor=name,
                subset=OVERALL if subset == "all" else subset,
                n=quality.n,
                srcc=quality.srcc,
                kendall_tau=quality.kendall_tau,
                ndcg_at_10=quality.ndcg_at_10,
                mae=quality.mae,
                is_used=name == "this predictor",
                advantage=report.differences.get((name, subset)),
            )
        )
    return tuple(found)


def fold_rows(search: Search, band: tuple[float, float]) -> tuple[FoldRow, ...]:
    """Quality per fold and hop on the fold's own test recipes, and on those of them within a band of bits."""
    truth = search.data.target if search.predictor.has_sizes else search.data.quality
    bits = search.data.choices.paper_bits(search.data.codes)
    found = []
    for index, fold in enumerate(search.predictor.folds):
        everything = np.ones(len(fold.test), dtype=bool)
        inside = (bits[fold.test] >= band[0]) & (bits[fold.test] <= band[1])
        for subset, chosen in ((OVERALL, everything), (band_name(band), inside)):
            if chosen.sum() < MIN_IN_BAND:
                continue
            for hop, scores in enumerate(fold.hop_scores):
                q = prediction_quality(scores[chosen], truth[fold.test][chosen], n_bootstrap=N_BOOTSTRAP_OF_FOLD)
                found.append(FoldRow(index, hop, subset, q.srcc, q.kendall_tau, q.ndcg_at_10, q.mae))
    return tuple(found)


def format_shares(search: Search) -> tuple[FormatShare, ...]:
    """The chosen formats by operation."""
    choice = search.allocation.choice
    found = []
    for name, members in grouped(search.data.choices.space, lambda d: d.operation).items():
        counts: dict[str, int] = {}
        for decision in members:
            text = str(choice[decision.name])
            counts[text] = counts.get(text, 0) + len(decision.layers)
        params = sum(d.params for d in members)
        found.append(FormatShare(name, counts, params, bits_of(members, choice)))
    return tuple(found)


def curve(known: Known, search: Search, measuring: Measuring) -> tuple[CurvePoint, ...]:
    """Measured quality against bits: the predictor's recipes at several budgets, random and uniform recipes."""
    space, bits = known.space, search.allocation.paper_bits
    mine = [search.allocation.recipe]
    for step in CURVE_STEPS:
        try:
            mine.append(allocated(search.table, BudgetOrder(bits=bits + step)).recipe)
        except InputError:
            continue  # below what the formats can make
    uniform = {f"uniform {f}": space.uniform(f) for f in space.common_formats}
    trials = measuring.trials([*mine, *uniform.values()])
    points = [_point(known, "this method", t, "this") for t in trials[: len(mine)]]
    points += [_point(known, n, t, "uniform") for n, t in zip(uniform, trials[len(mine) :], strict=True)]
    random = {t.key: t for t in search.trials[: search.n_random]}
    points += [_point(known, "random", t, "random") for t in random.values()]
    return tuple(points)


def _point(known: Known, name: str, trial: Trial, kind: CurveKind) -> CurvePoint:
    measured = sqnr_estimates(summarize(trial.powers))["sqnr_db"]
    return CurvePoint(name, kind, known.space.paper_bits(trial.recipe), measured)
