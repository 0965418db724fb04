"""Train a predictor on the study RUN, say how good it is, and keep its table for `sedimo allocate`.

Example: sedimo attribute runs/alpha && sedimo allocate runs/alpha --bits 3.7
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sedimo.allocation.table import SensitivityTable
from sedimo.codec import to_plain
from sedimo.jobs.job import Job
from sedimo.jobs.report import TABLE
from sedimo.lab.study import OBJECTIVES, Study
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.quality import PredictorRow, rate
from sedimo.methods.predictor.scoring import (
    Calibration,
    argmax_recipes,
    calibrated_table,
    hop_moments,
    option_scores,
    refuse_confidence,
)
from sedimo.methods.predictor.study import DEFAULT_GOALS, read_background, training_set, trials_of
from sedimo.methods.predictor.training import FAST, PAPER, Predictor, TrainingOptions, train_predictor
from sedimo.methods.search import SEARCH
from sedimo.progress import SILENT, Progress
from sedimo.reporting.explanation import predictors_table
from sedimo.reporting.page import Page, Text, page_of
from sedimo.settings import REQUIRED, Checked, one_of, option, read_by
from sedimo.space import Recipe

OPTIONS: Mapping[str, TrainingOptions] = {"fast": FAST, "paper": PAPER}


@dataclass(frozen=True, slots=True)
class AttributeSettings(Checked):
    """Which predictor is trained on which trials; `objective` and `target` are found from the study when empty."""

    run: Path = option(REQUIRED, metavar="RUN", place="folder", help="The folder of a study.")
    method: str = option(SEARCH.name, "--method", choices=(SEARCH.name,), help="What to train.")
    preset: str = option(
        "fast", "--preset", check=one_of(OPTIONS), help="fast: on a noise model, additive; paper: as published (hours)."
    )
    objective: str = option(
        "", "--objective", check=one_of(OBJECTIVES), help="Whose trials; default: the objective that has most."
    )
    target: str = option(
        "",
        "--goal",
        "--target",
        check=read_by(Goal.parse),
        help="Such as '-fid - 150*avg_bits'; default: by the objective.",
    )
    confidence: float = option(1.0, "--confidence", check=refuse_confidence, help="Margin of costs, in deviations.")


@dataclass(frozen=True)
class Attribution:
    """A table with the predictor behind it, its quality beside its rivals, and how its scores were calibrated.

    `argmax` are the published recipes without a budget: the best-scored option of each layer (`operations`), the
    best-scored variant of each group in isolation (`groups`).
    """

    table: SensitivityTable
    predictor: Predictor
    ratings: tuple[PredictorRow, ...]
    calibration: Calibration
    target: str
    n_trials: int
    argmax: Mapping[str, Recipe]

    def as_json(self) -> object:
        """Plain values by name."""
        return to_plain(
            {
                "method": self.table.method,
                "target": self.target,
                "trials": self.n_trials,
                "predictors": self.ratings,
                "calibration": self.calibration,
                "costs": self.table.costs,
                "argmax": {name: recipe.layers for name, recipe in self.argmax.items()},
            }
        )


def attribute_study(study: Study, settings: AttributeSettings, progress: Progress = SILENT) -> Attribution:
    """Trains a predictor on the trials of a study and makes its table."""
    background = read_background(study)
    trials = trials_of(study, background, settings.objective)
    text = settings.target or DEFAULT_GOALS[trials[0].setting.objective]
    goal = Goal.parse(text)
    data = training_set(background, trials, goal)
    predictor = train_predictor(data, OPTIONS[settings.preset], progress=progress)
    moments = hop_moments(predictor)
    scores = option_scores(predictor, moments)
    table, calibration = calibrated_table(
        predictor, background.candidates, scores, confidence=settings.confidence, goal=goal
    )
    ratings = rate(predictor, background, around=float(np.median(data.choices.paper_bits(data.codes))))
    argmax = argmax_recipes(predictor, background, scores, moments)
    return Attribution(table, predictor, ratings, calibration, text, len(trials), argmax)


def run(settings: AttributeSettings, progress: Progress) -> Attribution:
    """Trains a predictor on the trials of a study folder and keeps its table there, for `allocate`."""
    with Study(settings.run, create=False) as study:
        found = attribute_study(study, settings, progress)
        study.put_record(TABLE, found.table)
        return found


def page(found: Attribution) -> Page:
    """How good the predictor is, beside its rivals."""
    text = "The table is kept in the study: `sedimo allocate RUN --bits 3.7` chooses a recipe by it."
    table = predictors_table(found.ratings, "")
    return page_of(f"{found.target} of held-out recipes, {found.n_trials} trials", "", table, Text(text))


JOB = Job(__doc__, AttributeSettings, run, page)
