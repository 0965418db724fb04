"""What a job finds out about its result: comparisons, maps, what was predicted, and what a search has learned."""

from __future__ import annotations

import datetime
import math
import platform
from collections import Counter
from dataclasses import replace
from typing import Any

import psutil
import torch

from sedimo.allocation.budget import BudgetSettings, allocated
from sedimo.allocation.combine import Agreement
from sedimo.allocation.effects import Effects, expected_db
from sedimo.allocation.solve import Allocation, even_budgets, frontier
from sedimo.allocation.table import SensitivityTable
from sedimo.checkpoint.writing import WrittenCheckpoint
from sedimo.errors import InputError
from sedimo.jobs.check import Check, check_additivity, measure_random_recipes
from sedimo.lab.lab import Lab
from sedimo.lab.study import versions
from sedimo.lab.trajectory import TRAJECTORY_SAMPLES, probe_trajectory, sqnr_by_call
from sedimo.methods.error import ERROR, decided_by
from sedimo.methods.hybrid import BlockCurves, blocks_of
from sedimo.methods.method import Finding, Method
from sedimo.methods.orthogonality import ImportanceOptions, OrthogonalityProbe
from sedimo.methods.portfolio import Portfolio
from sedimo.methods.predictor.quality import Insight, bits_of, grouped, rate, rate_hops, telling_changes
from sedimo.methods.predictor.scoring import distributions
from sedimo.methods.predictor.study import Background
from sedimo.methods.search import Search, SearchSettings
from sedimo.methods.sqnr import SqnrProbe
from sedimo.metrics.estimate import Estimate, normal_estimate
from sedimo.metrics.signal import decibel, estimated_db, mean_sqnr, paired_difference
from sedimo.quant.formats import FP16
from sedimo.reporting.explanation import (
    CurveKind,
    CurvePoint,
    Explanation,
    FinalistRow,
    FormatShare,
    score_boxes,
    verdict_of,
)
from sedimo.reporting.measured_maps import (
    ChannelRanges,
    Maps,
    NoiseMap,
    TrajectoryLines,
    local_map,
    recipe_map,
    repetition,
)
from sedimo.reporting.summary import Blamed, Evidence, Prediction, Provenance, Summary, reference_format
from sedimo.space import compose
from sedimo.treatments.learned_rounding import Reconstruction
from sedimo.treatments.smoothing import Smoothing
from sedimo.treatments.treatment import Finished

N_FRONTIER_POINTS = 24
N_RANGES = 4  # smoothed layers whose ranges are drawn
FRONTIER_BITS_BEYOND = 3.0
N_SHOWN_CONDITIONS = 12
N_SUSPECTS = 8  # half of them by what they are predicted to add, half by their weight error
N_BLAMED = 3
GOAL_NAMES = {"sqnr_db": "SQNR [dB]", "sqnr_pooled_db": "pooled SQNR [dB]"}
CURVE_STEPS = (-0.4, -0.2, 0.2, 0.4, 0.7)  # bits beside the budget at which the curve is measured


def find_evidence(
    lab: Lab,
    finding: Finding,
    method: Method[Any],
    check: Check | None,
    finished: Finished | None,
    *,
    is_explained: bool,
) -> Evidence:
    """What else is measured about the result and, where it `is_explained`, about what a search has learned."""
    agreement, explanation, search = None, None, finding.of(Search)
    if is_explained and search is not None:
        explanation = explain(lab, finding.need(Background), search, target=finding.need(SearchSettings).target)
    measured = None if check is None else check.recipes[0].measures["sqnr_db"]
    if check is not None and method.n_random:
        space, about_bits = finding.bank.space, finding.decided.paper_bits
        trials = measure_random_recipes(lab, space, about_bits, n=method.n_random)
        agreement = check_additivity(finding.table, trials, finding.of(Effects))
    prediction = None if finished is not None else judge_prediction(lab, finding, measured, predicts=method.is_noise)
    name, portfolio = decided_by(finding.table.method, finding.decided.rule), finding.of(Portfolio)
    return Evidence(
        recipes=() if check is None else (replace(check.recipes[0], name=name), *check.recipes[1:]),
        agreement=agreement,
        agreement_of="random recipes of about this size",
        scaling=finding.of(Agreement),
        pictures=() if check is None else check.pictures,
        explanation=explanation,
        maps=_maps(lab, finding, is_probed=check is not None),
        rounding=finished.summary if isinstance(finished, Reconstruction) else None,
        prediction=prediction,
        entrants=() if portfolio is None else portfolio.entrants,
    )


def _maps(lab: Lab, finding: Finding, *, is_probed: bool) -> Maps:
    """All maps of a job; those of the result, on the first of the checked seeds, if it is to be probed."""
    smoothing, repeating, choice = lab.in_force(Smoothing), finding.of(OrthogonalityProbe), finding.decided.choice
    maps = Maps(
        local=_local(finding),
        repetition=None
        if repeating is None
        else repetition(repeating, finding.table, choice, finding.need(ImportanceOptions)),
        ranges=() if smoothing is None else _ranges(smoothing),
        blocks=finding.of(BlockCurves),
    )
    if not is_probed:
        return maps
    on, names = lab.seeds.check.first(TRAJECTORY_SAMPLES), tuple(blocks_of(finding.bank.space))
    noise = probe_trajectory(lab, finding.decided.recipe, on, names)
    lines = TrajectoryLines(noise.timesteps, *map(sqnr_by_call, (noise.step, noise.path, noise.latents)))
    return replace(maps, recipe=recipe_map(noise), trajectory=lines)


def _ranges(smoothing: Smoothing) -> tuple[ChannelRanges, ...]:
    """Of the smoothed layers whose channels were most unequal, the ranges before and after."""
    spread = {name: max(one.exponents) - min(one.exponents) for name, one in smoothing.layers.items()}
    shown = sorted((name for name in spread if name in smoothing.ranges), key=lambda name: -spread[name])[:N_RANGES]
    pairs = [(name, smoothing.ranges[name], smoothing.ranges_after(name)) for name in shown]
    return tuple(ChannelRanges(name, a.low, a.high, b.low, b.high) for name, a, b in pairs)


def _local(finding: Finding) -> tuple[NoiseMap, ...]:
    """Local noise at the chosen formats, and with the same format everywhere, which compares the blocks themselves."""
    found, table, allocation = finding.of(SqnrProbe), finding.table, finding.decided
    if found is None:
        return ()
    same = reference_format(table, allocation)
    everywhere = {name: same for name in table.layers if (name, same) in table.index}
    chosen = local_map(found, table, allocation.choice)
    return chosen, local_map(found, table, everywhere, number_format=str(same))


def summary_of(
    lab: Lab,
    finding: Finding,
    written: WrittenCheckpoint,
    evidence: Evidence,
    check: Check | None,
    *,
    command: str,
    seconds: float,
) -> Summary:
    """The numbers of a job's report: what it found, `evidence` about it, the command as typed, how long it took [s]."""
    table, allocation = finding.table, finding.decided
    sampling = {"steps": str(lab.seeds.settings.n_steps), **table.settings, **_drawn(lab)}
    processor = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "CPU"
    return Summary(
        lab.bench.name,
        table,
        allocation,
        {d.name: d.shape for d in finding.bank.space.decisions},
        replace(
            evidence,
            frontier=frontier_points(table, allocation, most_bits=allocation.bits + FRONTIER_BITS_BEYOND),
            file_bytes=written.file_bytes,
            source_file_bytes=lab.source_bytes,
        ),
        Provenance(
            command=command,
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            seeds=_seeds(lab, finding, check),
            sampling=dict(sorted(sampling.items())),  # as a saved record gives them back
            versions=dict(sorted(versions().items())),
            machine=f"{platform.system()} {platform.machine()}, {processor}, {psutil.cpu_count()} cores",
            seconds={"the whole job": round(seconds)},
            notes=(*finding.bank.space.notes, *lab.rules),
        ),
    )


def frontier_points(
    table: SensitivityTable, allocation: Allocation, *, most_bits: float | None = None
) -> tuple[tuple[float, float], ...]:
    """Bits and cost of the best recipes at even steps of bits, within the same bit operations."""
    budgets = even_budgets(table, N_FRONTIER_POINTS, most_bits=most_bits)
    return tuple((a.bits, a.objective) for a in frontier(table, budgets, bops=allocation.budget_bops))


def _seeds(lab: Lab, finding: Finding, check: Check | None) -> str:
    settings = lab.seeds.settings
    is_measured = finding.table.method != ERROR.name or finding.of(BlockCurves) is not None
    last = settings.first_seed + settings.n_seeds - 1
    text = f"searched on {settings.first_seed} to {last}" if is_measured else "none used for the search"
    return text if check is None else f"{text}; checked on {check.seeds[0]} to {check.seeds[-1]}"


def _drawn(lab: Lab) -> dict[str, str]:
    """What the samples were told to show, and how strongly: a default may not be what the model was made for."""
    if lab.why_not_sampled() is not None:
        return {}
    plan = lab.seeds.search
    shown, n_more = ", ".join(plan.conditions[:N_SHOWN_CONDITIONS]), len(plan.conditions) - N_SHOWN_CONDITIONS
    shown += f" and {n_more} more" if n_more > 0 else ""
    guidance = "the pipeline's own" if plan.guidance is None else f"{plan.guidance:g}"
    return {"conditions": shown or "none", "guidance": guidance}


def judge_prediction(lab: Lab, finding: Finding, measured: Estimate | None, *, predicts: bool) -> Prediction | None:
    """The predicted SQNR of the chosen recipe beside that on fresh seeds, if it was measured [dB].

    Where they are far apart, some suspects go back to 16 bits, one after the other, and the recipe is measured again.
    None where there are but costs that do not predict noise of final latents (`predicts`).
    """
    portfolio, allocation = finding.of(Portfolio), finding.decided
    if portfolio is not None:
        predicted = portfolio.sqnr_db
    elif predicts:
        predicted = estimated_db(normal_estimate(allocation.objective, allocation.standard_error))
    else:
        return None
    found = Prediction(predicted, measured)
    return found if found.is_trusted else replace(found, blamed=_blamed(lab, finding))


def _blamed(lab: Lab, finding: Finding) -> tuple[Blamed, ...]:
    table, allocation = finding.table, finding.decided
    suspects = _suspects(finding)
    recipes = [compose({**allocation.choice, name: FP16}, table.layers, table.streams) for name in suspects]
    scores = [trial.score for trial in lab.measure([allocation.recipe, *recipes], lab.seeds.search)]
    found = [
        Blamed(name, str(allocation.choice[name]), _predicted_gain(finding, name), score - scores[0])
        for name, score in zip(suspects, scores[1:], strict=True)
    ]
    found.sort(key=lambda one: -abs(one.measured_db - one.predicted_db))
    return tuple(found[:N_BLAMED])


def _suspects(finding: Finding) -> list[str]:
    """The decisions that are predicted to add most, and those whose weights changed most."""
    choice = finding.decided.choice
    changed = [name for name, number_format in choice.items() if number_format.is_quantized]
    errors = {name: finding.bank.index[name, choice[name]].error for name in changed}
    costs = {name: finding.table.index[name, choice[name]].cost for name in changed}
    by_cost, by_error = (sorted(changed, key=lambda name: -values[name]) for values in (costs, errors))
    half = N_SUSPECTS // 2
    return list(dict.fromkeys([*by_cost[:half], *by_error]))[:N_SUSPECTS]


def _predicted_gain(finding: Finding, name: str) -> float:
    """What the recipe is predicted to gain without the noise of one decision [dB]."""
    choice, effects = finding.decided.choice, finding.of(Effects)
    if effects is None:
        costs = {d: finding.table.index[key].cost for d, key in zip(choice, choice.items(), strict=True)}
        whole = math.fsum(costs.values())
        return decibel(whole - costs[name]) - decibel(whole)
    before, after = (effects.noise(c) for c in (choice, {**choice, name: FP16}))
    n_directions = effects.shape[1]
    return expected_db(after, n_directions).value - expected_db(before, n_directions).value


def explain(lab: Lab, background: Background, search: Search, *, target: str) -> Explanation:
    """All that the report tells of a search. Measures the curve on the search's seeds, the sentences on the check's."""
    operations, blocks, notes = distributions(search.predictor, background)
    return Explanation(
        predictor=f"graph network, preset {search.predictor.options.preset}",
        target=GOAL_NAMES.get(target, target),
        n_trials=len(search.trials),
        objective=search.trials[0].setting.objective,
        operation_boxes=score_boxes(operations),
        block_boxes=score_boxes(blocks),
        format_shares=format_shares(search),
        predictors=rate(search.predictor, background, around=search.allocation.paper_bits),
        folds=rate_hops(search.predictor, search.allocation.paper_bits),
        curve=curve(lab, search),
        insights=insights(lab, search),
        rounds=search.rounds,
        finalists=finalist_rows(search),
        notes=notes,
    )


def finalist_rows(search: Search) -> tuple[FinalistRow, ...]:
    """The finalists, and what the chosen one is ahead of each, paired on the seeds of the final."""
    trials = search.finalists
    chosen = next((one.powers for one in trials.values() if one.recipe == search.allocation.recipe), None)
    if chosen is None:
        return ()
    space = search.predictor.data.choices.space
    return tuple(
        FinalistRow(
            name,
            space.paper_bits(one.recipe),
            mean_sqnr(one.powers),
            None if one.powers is chosen else paired_difference(chosen, one.powers).estimate,
        )
        for name, one in trials.items()
    )


def format_shares(search: Search) -> tuple[FormatShare, ...]:
    """The chosen formats by operation."""
    choice = search.allocation.choice
    found = []
    for name, members in grouped(search.predictor.data.choices.space, lambda d: d.operation).items():
        counts = Counter[str]()
        for decision in members:
            counts[str(choice[decision.name])] += len(decision.layers)
        params = sum(d.params for d in members)
        found.append(FormatShare(name, counts, params, bits_of(members, choice)))
    return tuple(found)


def insights(lab: Lab, search: Search) -> tuple[Insight, ...]:
    """The most telling changes of the chosen recipe, measured on the seeds of the check against the recipe itself."""
    changes = telling_changes(search.predictor, search.table, search.allocation)
    base, *trials = lab.measure([search.allocation.recipe, *changes.values()], lab.seeds.check)
    found = []
    for insight, trial in zip(changes, trials, strict=True):
        measured = paired_difference(trial.powers, base.powers).estimate
        found.append(replace(insight, measured=measured, verdict=verdict_of(insight.predicted_db, measured)))
    return tuple(found)


def curve(lab: Lab, search: Search) -> tuple[CurvePoint, ...]:
    """Measured quality against bits: the predictor's recipes at several budgets, random and uniform recipes."""
    space, bits = search.predictor.data.choices.space, search.allocation.paper_bits
    mine = [search.allocation.recipe]
    for step in CURVE_STEPS:
        try:
            mine.append(allocated(search.table, BudgetSettings(bits=bits + step)).recipe)
        except InputError:
            continue  # below what the formats can make
    formats, random = space.common_formats, {t.key: t for t in search.trials[: search.n_random]}
    trials = lab.measure([*mine, *map(space.uniform, formats)], lab.seeds.search)
    names: list[tuple[str, CurveKind]] = [("this method", "this")] * len(mine)
    names += [(f"uniform {f}", "uniform") for f in formats]
    names += [("random", "random")] * len(random)
    return tuple(
        CurvePoint(name, kind, space.paper_bits(trial.recipe), mean_sqnr(trial.powers))
        for (name, kind), trial in zip(names, [*trials, *random.values()], strict=True)
    )
