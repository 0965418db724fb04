"""Write the report of a finished job again from its study folder RUN."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Progress
from sedimo.codec import to_plain
from sedimo.errors import StateError
from sedimo.jobs.job import Job
from sedimo.lab.study import Study
from sedimo.reporting.html import write_page
from sedimo.reporting.maps import NO_MAPS
from sedimo.reporting.page import Picture, page_of
from sedimo.reporting.report_page import report_page
from sedimo.reporting.summary import Summary
from sedimo.settings import REQUIRED, option

TABLE, REPORT = "table", "report"


@dataclass(frozen=True, slots=True)
class ReportSettings:
    """Which study, and where to write its report."""

    run: Path = option(REQUIRED, metavar="RUN", place="folder", help="The folder of a study.")
    out: Path | None = option(None, "-o", "--out", help="Where to write; default: report.html in RUN.")


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
    return write_page(report_page(summary), out or run / "report.html")


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
    if evidence.maps != NO_MAPS:
        found["maps"] = to_plain(evidence.maps)
    return found


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _pixels(text: str) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))).convert("RGB"))
    except (OSError, ValueError) as error:
        raise StateError(f"a picture of the study is damaged: {error}") from error


@dataclass(frozen=True, slots=True)
class Reported:
    """The report that was written, and the study that it is of."""

    path: Path
    run: Path

    def as_json(self) -> Mapping[str, object]:
        """The path, and what the report explains and draws; scripts may rely on the names."""
        return {"report": str(self.path), **evidence_of(self.run)}


def run(settings: ReportSettings, _progress: Progress) -> Reported:
    """Writes the report."""
    return Reported(report_again(settings.run, settings.out), settings.run)


JOB = Job(__doc__, ReportSettings, run, lambda found: page_of("", str(found.path)))
