"""From what a job knows to the report's numbers."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from sedimo.allocation.fixed import decided_by
from sedimo.allocation.frontier import even_budgets, frontier
from sedimo.allocation.problem import Allocation
from sedimo.api.checking import NEAREST, Check, CheckedRecipe, pictures_of
from sedimo.api.opening import Opened
from sedimo.api.verbs import N_FRONTIER_POINTS
from sedimo.measurement.worker import versions
from sedimo.metrics.signal import sqnr_estimates
from sedimo.reporting.building import frontier_points, summarize
from sedimo.reporting.explanation import Explanation
from sedimo.reporting.maps import NO_MAPS, Maps
from sedimo.reporting.prediction import Entrant, Prediction
from sedimo.reporting.summary import (
    DifferenceRow,
    Evidence,
    LearnedRounding,
    Picture,
    Provenance,
    RecipeKind,
    RecipeRow,
    Summary,
)
from sedimo.runtime.writing import WrittenCheckpoint
from sedimo.sensitivity.agreement import Agreement
from sedimo.sensitivity.table import SensitivityTable

FRONTIER_BITS_BEYOND = 3.0
N_SHOWN_CONDITIONS = 12


@dataclass(frozen=True)
class Found:
    """What a job has found out about its result besides the result; each may be absent."""

    check: Check | None
    additivity: Agreement | None = None
    scaling: Agreement | None = None
    explanation: Explanation | None = None
    maps: Maps = NO_MAPS
    rounding: LearnedRounding | None = None
    prediction: Prediction | None = None
    entrants: tuple[Entrant, ...] = ()


def summary_of(
    opened: Opened,
    decided: tuple[SensitivityTable, Allocation],
    written: WrittenCheckpoint,
    evidence: Found,
    facts: Mapping[str, str],
) -> Summary:
    """The numbers of a job's report; `facts` are `command` and `seconds`."""
    check, additivity = evidence.check, evidence.additivity
    table, allocation = decided
    found = Evidence(
        agreement=additivity,
        agreement_of="random recipes of about this size" if additivity else "",
        scaling=evidence.scaling,
        explanation=evidence.explanation,
        maps=evidence.maps,
        rounding=evidence.rounding,
        prediction=evidence.prediction,
        entrants=evidence.entrants,
        recipes=() if check is None else recipe_rows(check, decided_by(table.method, allocation.rule)),
        differences=() if check is None else difference_rows(check),
        frontier=frontier_points(
            frontier(
                table,
                even_budgets(table, N_FRONTIER_POINTS, most_bits=allocation.bits + FRONTIER_BITS_BEYOND),
                bops=allocation.budget_bops,
            )
        ),
        pictures=() if check is None else tuple(Picture(*parts) for parts in pictures_of(check)),
        file_bytes=written.file_bytes,
        source_file_bytes=sum(f.stat().st_size for f in opened.weights_files),
    )
    return summarize(
        table,
        allocation,
        model=opened.name,
        shapes={d.name: d.shape for d in opened.space.decisions},
        evidence=found,
        provenance=provenance(opened, table, check, facts),
    )


def recipe_rows(check: Check, method: str) -> tuple[RecipeRow, ...]:
    """The result, called by what decided it, and its rivals with their measures."""
    kinds: dict[str, RecipeKind] = {NEAREST: "method"}
    return _row(method, "this", check.this), *(_row(r.name, kinds.get(r.name, "uniform"), r) for r in check.rivals)


def difference_rows(check: Check) -> tuple[DifferenceRow, ...]:
    """The paired differences as estimates."""
    return tuple(DifferenceRow(name, "sqnr_db", d.estimate) for name, d in check.differences.items())


def provenance(opened: Opened, table: SensitivityTable, check: Check | None, facts: Mapping[str, str]) -> Provenance:
    """How the numbers came about, in words."""
    sampling = opened.order.sampling
    searched = f"{sampling.first_seed} to {sampling.first_seed + sampling.n_seeds - 1}"
    is_measured = table.method != "error" or opened.order.hybrid_format is not None
    seeds = f"searched on {searched}" if is_measured else "none used for the search"
    if check is not None:
        seeds += f"; checked on {check.seeds[0]} to {check.seeds[-1]}"
    return Provenance(
        command=facts.get("command", ""),
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seeds=seeds,
        sampling=_sorted({"steps": str(sampling.n_steps), **table.settings, **_drawn(opened)}),
        versions=_sorted(versions()),
        machine=f"{platform.system()} {platform.machine()}, {_processor()}",
        seconds={"the whole job": float(facts.get("seconds", 0))},
        notes=(*opened.space.notes, *opened.rules),
    )


def _drawn(opened: Opened) -> dict[str, str]:
    """What the samples were told to show, and how strongly: a default may not be what the model was made for."""
    if not opened.is_pipeline or opened.why_not_sampled() is not None:
        return {}
    plan = opened.order.sampling.searching(opened.pipe)
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
