"""From what a job knows to the report's numbers."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from sedimo.allocation.combine import Agreement
from sedimo.allocation.effects import Effects
from sedimo.allocation.solve import decided_by, even_budgets, frontier
from sedimo.jobs.additivity import check_additivity, measure_random_recipes
from sedimo.jobs.check import NEAREST, Check, CheckedRecipe, pictures_of
from sedimo.jobs.explaining import explanation_of
from sedimo.jobs.judging import judge_prediction
from sedimo.lab.lab import Lab
from sedimo.lab.study import versions
from sedimo.lab.trajectory import TRAJECTORY_SAMPLES, TrajectoryProbe, probe_trajectory
from sedimo.methods.error import ERROR
from sedimo.methods.hybrid import BlockCurves, blocks_of
from sedimo.methods.method import Finding, Traits
from sedimo.methods.orthogonality import ImportanceOptions, OrthogonalityProbe
from sedimo.methods.portfolio import Portfolio
from sedimo.methods.sqnr import SqnrProbe
from sedimo.metrics.signal import sqnr_estimates
from sedimo.reporting.maps import (
    ChannelRanges,
    Maps,
    NoiseMap,
    Repetition,
    local_map,
    recipe_map,
    repetition,
    trajectory_lines,
)
from sedimo.reporting.page import Picture
from sedimo.reporting.summary import (
    DifferenceRow,
    Evidence,
    Provenance,
    RecipeKind,
    RecipeRow,
    Summary,
    frontier_points,
    reference_format,
    summarize,
)
from sedimo.runtime.writing import WrittenCheckpoint
from sedimo.treatments.learned_rounding import Reconstruction
from sedimo.treatments.smoothing_plan import Smoothing
from sedimo.treatments.treatment import Finished

N_FRONTIER_POINTS = 24
N_RANGES = 4  # smoothed layers whose ranges are drawn
FRONTIER_BITS_BEYOND = 3.0
N_SHOWN_CONDITIONS = 12


@dataclass(frozen=True)
class Circumstances:
    """How a job went: the check of its result, the command as it was typed, how long it took [s]."""

    check: Check | None
    command: str
    seconds: float


def find_evidence(
    lab: Lab, finding: Finding, traits: Traits, check: Check | None, finished: Finished | None, *, is_explained: bool
) -> Evidence:
    """What else is measured about the result, and what was found on the way; less where it is not sampled.

    What a search has learned is measured where it `is_explained`.
    """
    explanation = explanation_of(lab, finding) if is_explained else None
    additivity = None if check is None or not traits.n_random else _additivity(lab, finding, traits.n_random)
    prediction = None if finished is not None else judge_prediction(lab, finding, check, predicts=traits.is_noise)
    probe = None if check is None else _probe_result(lab, finding)
    portfolio = finding.of(Portfolio)
    return Evidence(
        agreement=additivity,
        agreement_of="random recipes of about this size" if additivity else "",
        scaling=finding.of(Agreement),
        explanation=explanation,
        maps=_maps(lab, finding, probe),
        rounding=finished.summary if isinstance(finished, Reconstruction) else None,
        prediction=prediction,
        entrants=() if portfolio is None else portfolio.entrants,
        recipes=() if check is None else recipe_rows(check, decided_by(finding.table.method, finding.decided.rule)),
        differences=() if check is None else difference_rows(check),
        pictures=() if check is None else tuple(Picture(*parts) for parts in pictures_of(check)),
    )


def _additivity(lab: Lab, finding: Finding, n: int) -> Agreement | None:
    """How well costs predict the noise of `n` random recipes."""
    trials = measure_random_recipes(lab, finding.bank.space, finding.decided.paper_bits, n=n)
    return check_additivity(finding.table, trials, finding.of(Effects))


def _probe_result(lab: Lab, finding: Finding) -> TrajectoryProbe:
    """The noise of the chosen recipe at all blocks and along the trajectory, on the first of the checked seeds."""
    blocks = tuple(blocks_of(finding.bank.space))
    return probe_trajectory(lab, finding.decided.recipe, lab.seeds.check.first(TRAJECTORY_SAMPLES), blocks)


def _maps(lab: Lab, finding: Finding, probe: TrajectoryProbe | None) -> Maps:
    """All maps of a job; those of the result if it was probed."""
    smoothing = lab.in_force(Smoothing)
    return Maps(
        recipe=None if probe is None else recipe_map(probe),
        trajectory=None if probe is None else trajectory_lines(probe),
        local=_local(finding),
        repetition=_repetition(finding),
        ranges=() if smoothing is None else _ranges(smoothing),
        blocks=finding.of(BlockCurves),
    )


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
    return (
        local_map(found, table, allocation.choice),
        local_map(found, table, everywhere, number_format=str(same)),
    )


def _repetition(finding: Finding) -> Repetition | None:
    found, options = finding.of(OrthogonalityProbe), finding.of(ImportanceOptions)
    if found is None or options is None:
        return None
    return repetition(found, finding.table, finding.decided.choice, options)


def summary_of(
    lab: Lab, finding: Finding, written: WrittenCheckpoint, evidence: Evidence, how: Circumstances
) -> Summary:
    """The numbers of a job's report; `evidence` is what was found out about the result besides it."""
    table, allocation = finding.table, finding.decided
    budgets = even_budgets(table, N_FRONTIER_POINTS, most_bits=allocation.bits + FRONTIER_BITS_BEYOND)
    found = replace(
        evidence,
        frontier=frontier_points(frontier(table, budgets, bops=allocation.budget_bops)),
        file_bytes=written.file_bytes,
        source_file_bytes=lab.source_bytes,
    )
    return summarize(
        table,
        allocation,
        model=lab.subject.name,
        shapes={d.name: d.shape for d in finding.bank.space.decisions},
        evidence=found,
        provenance=provenance(lab, finding, how),
    )


def recipe_rows(check: Check, method: str) -> tuple[RecipeRow, ...]:
    """The result, called by what decided it, and its rivals with their measures."""
    kinds: dict[str, RecipeKind] = {NEAREST: "method"}
    return _row(method, "this", check.this), *(_row(r.name, kinds.get(r.name, "uniform"), r) for r in check.rivals)


def difference_rows(check: Check) -> tuple[DifferenceRow, ...]:
    """The paired differences as estimates."""
    return tuple(DifferenceRow(name, "sqnr_db", d.estimate) for name, d in check.differences.items())


def provenance(lab: Lab, finding: Finding, how: Circumstances) -> Provenance:
    """How the numbers came about, in words."""
    settings, check = lab.seeds.settings, how.check
    searched = f"{settings.first_seed} to {settings.first_seed + settings.n_seeds - 1}"
    is_measured = finding.table.method != ERROR.name or finding.of(BlockCurves) is not None
    seeds = f"searched on {searched}" if is_measured else "none used for the search"
    if check is not None:
        seeds += f"; checked on {check.seeds[0]} to {check.seeds[-1]}"
    return Provenance(
        command=how.command,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seeds=seeds,
        sampling=_sorted({"steps": str(settings.n_steps), **finding.table.settings, **_drawn(lab)}),
        versions=_sorted(versions()),
        machine=f"{platform.system()} {platform.machine()}, {_processor()}",
        seconds={"the whole job": round(how.seconds)},
        notes=(*finding.bank.space.notes, *lab.subject.rules),
    )


def _drawn(lab: Lab) -> dict[str, str]:
    """What the samples were told to show, and how strongly: a default may not be what the model was made for."""
    if lab.why_not_sampled() is not None:
        return {}
    plan = lab.seeds.search
    told = plan.conditions
    shown = ", ".join(told[:N_SHOWN_CONDITIONS]) + (
        f" and {len(told) - N_SHOWN_CONDITIONS} more" if len(told) > N_SHOWN_CONDITIONS else ""
    )
    guidance = "the pipeline's own" if plan.guidance is None else f"{plan.guidance:g}"
    return {"conditions": shown or "none", "guidance": guidance}


def _row(name: str, kind: RecipeKind, recipe: CheckedRecipe) -> RecipeRow:
    found = {"sqnr_db": sqnr_estimates(recipe.signals.sqnr)["sqnr_db"], "psnr_db": recipe.signals.psnr}
    return RecipeRow(name, kind, recipe.paper_bits, recipe.stored_bits, found)


def _sorted(facts: Mapping[str, str]) -> dict[str, str]:
    """In the order in which a saved record gives them back."""
    return dict(sorted(facts.items()))


def _processor() -> str:
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "CPU"
    return f"{name}, {psutil.cpu_count()} cores"
