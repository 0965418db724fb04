"""A finished job kept in its study: its table and report can be had again without measuring anything."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from sedimo.allocation.problem import Allocation
from sedimo.allocation.solve import allocate
from sedimo.api.order import BudgetOrder
from sedimo.errors import StateError
from sedimo.measurement.study import Study
from sedimo.reporting.html import write_report
from sedimo.reporting.summary import Picture, Summary
from sedimo.sensitivity.table import SensitivityTable

TABLE, REPORT = "table", "report"


@dataclass(frozen=True)
class SavedPicture:
    """A pair of images as PNG in base64."""

    label: str
    reference: str
    quantized: str


@dataclass(frozen=True)
class SavedReport:
    """All numbers of a report, its pictures apart."""

    summary: Summary
    pictures: tuple[SavedPicture, ...]


def keep_report(study: Study, table: SensitivityTable, summary: Summary) -> None:
    """Saves what the report is made of."""
    pictures = tuple(SavedPicture(p.label, _png(p.reference), _png(p.quantized)) for p in summary.evidence.pictures)
    bare = replace(summary, evidence=replace(summary.evidence, pictures=()))
    study.put_record(TABLE, table)
    study.put_record(REPORT, SavedReport(bare, pictures))


def report_again(run: Path, out: Path | None = None) -> Path:
    """Writes the report of a finished job and returns its path.

    Raises:
        InputError: the folder holds no study, or its job was not finished.
        StateError: damaged records.
    """
    with Study(run, create=False) as study:
        saved = study.record(SavedReport, REPORT)
    pictures = tuple(Picture(p.label, _pixels(p.reference), _pixels(p.quantized)) for p in saved.pictures)
    summary = replace(saved.summary, evidence=replace(saved.summary.evidence, pictures=pictures))
    return write_report(summary, out or run / "report.html")


def evidence_of(run: Path) -> Mapping[str, object]:
    """What the report of a finished job explains and draws, as plain values by name; what it lacks is left out.

    Raises:
        InputError: the folder holds no study, or its job was not finished.
    """
    with Study(run, create=False) as study:
        evidence = study.record(SavedReport, REPORT).summary.evidence
    found: dict[str, object] = {}
    if evidence.explanation is not None:
        found["explanation"] = evidence.explanation.as_json()
    if not evidence.maps.is_empty:
        found["maps"] = evidence.maps.as_json()
    return found


def allocate_again(run: Path, budget: BudgetOrder, rule: str = "milp") -> Allocation:
    """The best recipe for another budget, or by another rule, from the table that a job has kept.

    Raises:
        InputError: no study, no table in it, or a budget that cannot be kept.
        StateError: a budget of bit operations, and a table that does not know those of attention.
    """
    with Study(run, create=False) as study:
        table = study.record(SensitivityTable, TABLE)
    if budget.bops is not None and not table.full_bops:
        raise StateError(
            f"the table in {run} was kept by an older version, which did not count the bit operations of attention; "
            "run the job again to allocate by them"
        )
    return allocate(table, **budget.named(table.full_bops), rule=rule)


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _pixels(text: str) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))).convert("RGB"))
    except (OSError, ValueError) as error:
        raise StateError(f"a picture of the study is damaged: {error}") from error
