"""Show the trials of the study RUN, or write them to a file that depends on nothing but what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from sedimo.errors import InputError
from sedimo.jobs.job import simple_job
from sedimo.lab.study import SPACE, Study, export_trials, measures_of
from sedimo.pipelines.folder import write_file
from sedimo.reporting.page import Page, Table, Text, columns, page_of, rows
from sedimo.settings import Option
from sedimo.space import SearchSpace


def run(
    folder: Annotated[Path, Option((), "The folder of a study.", metavar="RUN", place="folder")],
    out: Annotated[Path | None, Option(("-o", "--out"), "Write all of them to this file, as JSON.")] = None,
) -> dict[str, Any]:
    """All trials, by objective and bits, as plain values; or the file that they were written to, and how many.

    A study that does not tell its space has no `paper_bits`. The file is written whole or not at all.
    """
    with Study(folder, create=False) as study:
        if out is None:
            space = study.record(SearchSpace, SPACE) if SPACE in study.record_names() else None
            rows = [
                {
                    "key": trial.key,
                    "objective": trial.setting.objective,
                    "paper_bits": None if space is None else space.paper_bits(trial.recipe),
                    "sqnr_db": measures["sqnr_db"],
                    "fid": measures.get("fid"),
                }
                for trial in study.trials()
                for measures in [measures_of(trial)]
            ]
            return {"trials": sorted(rows, key=lambda row: (row["objective"], row["paper_bits"] or 0.0, row["key"]))}
        if not study.trial_keys():
            raise InputError(f"the study {study.path} has no trials; sedimo explore measures some")
        write_file(out, export_trials(study).encode())
        return {"out": str(out), "trials": len(study.trial_keys())}


def page(found: Mapping[str, Any]) -> Page:
    """One line per trial, or where they were written to."""
    if "out" in found:
        return page_of("", "", Text(f"{found['trials']} trials are in {found['out']}"))
    trials = found["trials"]
    titles = columns("trial", "objective", ("paper bits", "fine bits"), ("SQNR [dB]", "plus-minus"))
    lines = [[row["key"][:12], row["objective"], row["paper_bits"], row["sqnr_db"]] for row in trials]
    if any(row["fid"] is not None for row in trials):
        titles = (*titles, *columns(("FID", "plus-minus")))
        lines = [[*line, row["fid"]] for line, row in zip(lines, trials, strict=True)]
    return page_of("", "", Table(titles, rows(lines)), Text(f"{len(trials)} trials"))


JOB = simple_job(__doc__, run, page)
