"""Show the trials of the study RUN, or write them to a file that depends on nothing but what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sedimo.bank import Progress
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.jobs.job import Job
from sedimo.lab.study import SPACE, ObjectiveName, Study, Trial, export_trials, measures_of
from sedimo.metrics.estimate import Estimate
from sedimo.pipelines.folder import write_file
from sedimo.reporting.page import Page, Table, Text, columns, page_of, rows
from sedimo.settings import REQUIRED, option
from sedimo.space import SearchSpace


@dataclass(frozen=True, slots=True)
class TrialsSettings:
    """Which study, and where to write its trials, if anywhere."""

    run: Path = option(REQUIRED, metavar="RUN", place="folder", help="The folder of a study.")
    out: Path | None = option(None, "-o", "--out", help="Write all of them to this file, as JSON.")


@dataclass(frozen=True, slots=True)
class Exported:
    """The file that the trials of a study were written to, and how many there are."""

    out: Path
    trials: int


@dataclass(frozen=True, slots=True)
class TrialRow:
    """A trial in a table. `paper_bits` is None where the study does not tell its space."""

    key: str
    objective: ObjectiveName
    paper_bits: float | None
    sqnr_db: Estimate
    fid: Estimate | None


def list_trials(run: Path) -> tuple[TrialRow, ...]:
    """All trials of the study `run`, by objective and bits.

    Raises:
        InputError: the folder holds no study.
        StateError: damaged records.
    """
    with Study(run, create=False) as study:
        space = study.record(SearchSpace, SPACE) if SPACE in study.record_names() else None
        rows = [_row(trial, space) for trial in study.trials()]
    return tuple(sorted(rows, key=lambda row: (row.objective, row.paper_bits or 0.0, row.key)))


def export_run(run: Path, out: Path) -> int:
    """Writes the canonical export of the study `run` to the file `out`, whole or not at all; the number of trials.

    Raises:
        InputError: the folder holds no study, it has no trials, or `out` cannot be a file.
    """
    with Study(run, create=False) as study:
        n_trials = len(study.trial_keys())
        if n_trials == 0:
            raise InputError(f"the study {study.path} has no trials; sedimo explore measures some")
        write_file(out, export_trials(study).encode())
    return n_trials


def _row(trial: Trial, space: SearchSpace | None) -> TrialRow:
    measures = measures_of(trial)
    bits = None if space is None else space.paper_bits(trial.recipe)
    return TrialRow(trial.key, trial.setting.objective, bits, measures["sqnr_db"], measures.get("fid"))


def run(settings: TrialsSettings, _progress: Progress) -> tuple[TrialRow, ...] | Exported:
    """The trials, or the file that they were written to."""
    if settings.out is None:
        return list_trials(settings.run)
    return Exported(settings.out, export_run(settings.run, settings.out))


def _as_json(found: tuple[TrialRow, ...] | Exported) -> object:
    if isinstance(found, Exported):
        return {"out": str(found.out), "trials": found.trials}
    return {"trials": to_plain(found)}


def page(found: tuple[TrialRow, ...] | Exported) -> Page:
    """One line per trial, or where they were written to."""
    if isinstance(found, Exported):
        return page_of("", "", Text(f"{found.trials} trials are in {found.out}"))
    has_fid = any(row.fid is not None for row in found)
    titles = columns(
        "trial",
        "objective",
        ("paper bits", "fine bits"),
        ("SQNR [dB]", "plus-minus"),
    )
    lines = ((r.key[:12], r.objective, r.paper_bits, r.sqnr_db, *([r.fid] if has_fid else [])) for r in found)
    titles = (*titles, *columns(("FID", "plus-minus"))) if has_fid else titles
    return page_of("", "", Table(titles, rows(lines)), Text(f"{len(found)} trials"))


JOB = Job(
    name="trials",
    words="Show the trials of the study RUN, or write them to a file that depends on nothing but what was measured.",
    settings=TrialsSettings,
    page=page,
    run=run,
    as_json=_as_json,
)
