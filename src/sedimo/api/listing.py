"""The trials of a study for people and for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sedimo.api.explore_order import SPACE
from sedimo.errors import InputError
from sedimo.measurement.export import export_trials, measures_of
from sedimo.measurement.study import Study
from sedimo.measurement.trial import ObjectiveName, Trial
from sedimo.metrics.estimate import Estimate
from sedimo.pipelines.folder import write_file
from sedimo.space import SearchSpace


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
