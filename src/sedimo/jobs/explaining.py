"""The explanation of a search, for the report: scores, rivals, the measured curve, verified sentences."""

from __future__ import annotations

from collections.abc import Iterable

from sedimo.allocation.budget import BudgetSettings, allocated
from sedimo.errors import InputError
from sedimo.lab.lab import Lab
from sedimo.lab.study import Trial
from sedimo.methods.method import Finding
from sedimo.methods.predictor.changes import bits_of, grouped, telling_changes
from sedimo.methods.predictor.quality import ALL, MINE, Band, Rating, rate, rate_hops
from sedimo.methods.predictor.scoring import distributions
from sedimo.methods.predictor.study import Background
from sedimo.methods.search import Search, SearchSettings
from sedimo.metrics.estimate import NORMAL_95, mean_estimate
from sedimo.metrics.signal import mean_sqnr, paired_difference
from sedimo.reporting.explanation import (
    OVERALL,
    CurveKind,
    CurvePoint,
    Explanation,
    FinalistRow,
    FoldRow,
    FormatShare,
    Insight,
    PredictorRow,
    RefineRound,
    score_boxes,
    verdict_of,
)
from sedimo.space import SearchSpace

GOAL_NAMES = {"sqnr_db": "SQNR [dB]", "sqnr_pooled_db": "pooled SQNR [dB]"}
CURVE_STEPS = (-0.4, -0.2, 0.2, 0.4, 0.7)  # bits beside the budget at which the curve is measured


def explanation_of(lab: Lab, finding: Finding) -> Explanation | None:
    """What a search by measured recipes has learned; None where there was none."""
    search, background, settings = finding.of(Search), finding.of(Background), finding.of(SearchSettings)
    if search is None or background is None or settings is None:
        return None
    return explain(lab, background, search, target=settings.target)


def explain(lab: Lab, background: Background, search: Search, *, target: str) -> Explanation:
    """All that the report tells of a search. Measures the curve on the search's seeds, the sentences on the check's."""
    band = Band.around(search.allocation.paper_bits)
    operations, blocks, notes = distributions(search.predictor, background, search.data)
    return Explanation(
        predictor=f"graph network, preset {search.predictor.options.preset}",
        target=GOAL_NAMES.get(target, target),
        n_trials=len(search.trials),
        objective=search.trials[0].setting.objective,
        operation_boxes=score_boxes(operations),
        block_boxes=score_boxes(blocks),
        format_shares=format_shares(search),
        predictors=predictor_rows(rate(search.predictor, search.data, background, band=band)),
        folds=fold_rows(search, band),
        curve=curve(lab, search),
        insights=insights(lab, search),
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
            mean_sqnr(f.trial.powers),
            None if f.trial.powers is chosen else paired_difference(chosen, f.trial.powers).estimate,
        )
        for f in search.finalists
    )


def predictor_rows(ratings: Iterable[Rating]) -> tuple[PredictorRow, ...]:
    """The predictor and its rivals, with what the predictor is ahead of each."""
    return tuple(
        PredictorRow(
            predictor=r.predictor,
            subset=_subset(r.subset),
            n=r.quality.n,
            srcc=r.quality.srcc,
            kendall_tau=r.quality.kendall_tau,
            ndcg_at_10=r.quality.ndcg_at_10,
            mae=r.quality.mae,
            is_used=r.predictor == MINE,
            advantage=r.ahead,
        )
        for r in ratings
    )


def fold_rows(search: Search, band: Band) -> tuple[FoldRow, ...]:
    """Quality per fold and hop on the fold's own test recipes, and on those of them within a band of bits."""
    return tuple(
        FoldRow(r.fold, r.hop, _subset(r.subset), q.srcc, q.kendall_tau, q.ndcg_at_10, q.mae)
        for r in rate_hops(search.predictor, search.data, band)
        for q in (r.quality,)
    )


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


def insights(lab: Lab, search: Search) -> tuple[Insight, ...]:
    """The most telling changes of the chosen recipe, measured on the seeds of the check against the recipe itself."""
    changes = telling_changes(search.predictor, search.table, search.allocation)
    recipes = [search.allocation.recipe, *(change.recipe for change in changes)]
    base, *trials = lab.measure(recipes, lab.seeds.check)
    found = []
    for change, trial in zip(changes, trials, strict=True):
        measured = paired_difference(trial.powers, base.powers).estimate
        half = NORMAL_95 * change.error_db
        found.append(
            Insight(
                change.sentence,
                change.decisions,
                change.from_format,
                change.to_format,
                change.predicted_db,
                change.predicted_db - half,
                change.predicted_db + half,
                measured,
                verdict_of(change.predicted_db, measured),
            )
        )
    return tuple(found)


def curve(lab: Lab, search: Search) -> tuple[CurvePoint, ...]:
    """Measured quality against bits: the predictor's recipes at several budgets, random and uniform recipes."""
    space, bits = search.data.choices.space, search.allocation.paper_bits
    mine = [search.allocation.recipe]
    for step in CURVE_STEPS:
        try:
            mine.append(allocated(search.table, BudgetSettings(bits=bits + step)).recipe)
        except InputError:
            continue  # below what the formats can make
    uniform = {f"uniform {f}": space.uniform(f) for f in space.common_formats}
    trials = lab.measure([*mine, *uniform.values()], lab.seeds.search)
    points = [_point(space, "this method", t, "this") for t in trials[: len(mine)]]
    points += [_point(space, n, t, "uniform") for n, t in zip(uniform, trials[len(mine) :], strict=True)]
    random = {t.key: t for t in search.trials[: search.n_random]}
    points += [_point(space, "random", t, "random") for t in random.values()]
    return tuple(points)


def _point(space: SearchSpace, name: str, trial: Trial, kind: CurveKind) -> CurvePoint:
    measured = mean_sqnr(trial.powers)
    return CurvePoint(name, kind, space.paper_bits(trial.recipe), measured)


def _subset(name: str) -> str:
    return OVERALL if name == ALL else name
