"""Write the report of a finished job again from its study folder RUN."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedimo.bank import SILENT, Progress
from sedimo.errors import StateError
from sedimo.jobs.job import Job
from sedimo.lab.study import Study
from sedimo.reporting.html import write_page
from sedimo.reporting.page import page_of
from sedimo.reporting.report_page import report_page
from sedimo.reporting.summary import Summary
from sedimo.settings import REQUIRED, option

TABLE, REPORT = "table", "report"


@dataclass(frozen=True, slots=True)
class ReportSettings:
    """Which study, and where to write its report."""

    run: Path = option(REQUIRED, metavar="RUN", place="folder", help="The folder of a study.")
    out: Path | None = option(None, "-o", "--out", help="Where to write; default: report.html in RUN.")


def run(settings: ReportSettings, _progress: Progress = SILENT) -> dict[str, Any]:
    """Writes the report of a finished job and tells where, with what it explains and draws.

    Raises:
        InputError: the folder holds no study, or its job was not finished.
        StateError: damaged records.
    """
    with Study(settings.run, create=False) as study:
        try:
            summary = study.record(Summary, REPORT)
        except StateError as error:
            remedy = "If an earlier version wrote it, give the job's command again: what was measured is kept"
            raise StateError(f"{error}. {remedy}") from error
    path = write_page(report_page(summary), settings.out or settings.run / "report.html")
    return {"report": str(path), **summary.evidence.as_json()}


JOB = Job(__doc__, ReportSettings, run, lambda found: page_of("", found["report"]))
