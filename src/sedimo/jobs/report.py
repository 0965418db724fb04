"""Write the report of a finished job again from its study folder RUN."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from sedimo.errors import StateError
from sedimo.jobs.job import simple_job
from sedimo.lab.study import Study
from sedimo.reporting.html import write_page
from sedimo.reporting.page import page_of
from sedimo.reporting.report_page import report_page
from sedimo.reporting.summary import Summary
from sedimo.settings import Option

TABLE, REPORT = "table", "report"


def run(
    folder: Annotated[Path, Option((), "The folder of a study.", metavar="RUN", place="folder")],
    out: Annotated[Path | None, Option(("-o", "--out"), "Where to write; default: report.html in RUN.")] = None,
) -> dict[str, Any]:
    """Writes the report of a finished job and tells where, with what it explains and draws."""
    with Study(folder, create=False) as study:
        try:
            summary = study.record(Summary, REPORT)
        except StateError as error:
            remedy = "If an earlier version wrote it, give the job's command again: what was measured is kept"
            raise StateError(f"{error}. {remedy}") from error
    path = write_page(report_page(summary), out or folder / "report.html")
    return {"report": str(path), **summary.evidence.as_json()}


JOB = simple_job(__doc__, run, lambda found: page_of("", found["report"]))
