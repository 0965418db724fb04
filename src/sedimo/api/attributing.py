"""From a study of measured recipes to a table and the quality of the predictor behind it; nothing is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from sedimo.api.explaining import predictor_rows
from sedimo.api.predicting import (
    BAND_HALF_WIDTH,
    DEFAULT_TARGETS,
    Known,
    PredictorReport,
    fits_space,
    judge,
    recall,
    training_set,
)
from sedimo.api.probing import Probe, attribute_measured
from sedimo.api.rereport import TABLE
from sedimo.api.search_order import check_confidence
from sedimo.api.searching import MAX_VARIANTS
from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.graph.groups import split_groups
from sedimo.measurement.study import Study
from sedimo.measurement.target import Target
from sedimo.measurement.trial import ObjectiveName, Trial
from sedimo.sensitivity.choices import Values, picked
from sedimo.sensitivity.gnn.costs import Calibration, calibrate, noise_table, score_table
from sedimo.sensitivity.gnn.scoring import (
    HopQuality,
    disjoint_groups,
    group_scores,
    hop_qualities,
    option_scores,
)
from sedimo.sensitivity.gnn.training import (
    FAST,
    MIN_RECIPES,
    PAPER,
    PRESETS,
    Predictor,
    TrainingOptions,
    TrainingSet,
    train_predictor,
)
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import Recipe

OPTIONS: Mapping[str, TrainingOptions] = {"fast": FAST, "paper": PAPER}


@dataclass(frozen=True, slots=True)
class AttributeOrder:
    """Which predictor is trained on which trials.

    `objective` and `target` are found from the study when empty: the objective with most trials, its usual target.
    `band` is the range of bits within which quality is told besides; None: the middle of the trials.
    """

    preset: str = "fast"
    objective: str = ""
    target: str = ""
    confidence: float = 1.0
    band: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuses an unknown preset or objective, and a target that cannot be read."""
        if self.preset not in PRESETS:
            raise InputError(f"the preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.objective and self.objective not in get_args(ObjectiveName):
            known = ", ".join(get_args(ObjectiveName))
            raise InputError(f"the objective must be one of {known}, got {self.objective!r}")
        check_confidence(self.confidence)
        if self.target:
            Target.parse(self.target)


@dataclass(frozen=True)
class Attribution:
    """A table with the predictor behind it, its quality beside its rivals, and how its scores were calibrated.

    `argmax` are the published recipes without a budget: the best-scored option of each layer (`operations`), the
    best-scored variant of each group in isolation (`groups`).
    """

    table: SensitivityTable
    predictor: Predictor
    report: PredictorReport
    calibration: Calibration
    target: str
    n_trials: int
    argmax: Mapping[str, Recipe]

    def as_json(self) -> Mapping[str, object]:
        """Plain values; scripts may rely on the names (see docs/cli.md)."""
        plain: dict[str, object] = to_plain(
            {
                "method": self.table.method,
                "target": self.target,
                "trials": self.n_trials,
                "predictors": predictor_rows(self.report),
                "calibration": self.calibration,
                "costs": self.table.costs,
                "argmax": {name: recipe.layers for name, recipe in self.argmax.items()},
            }
        )
        return plain


def attribute_run(run: Path, order: AttributeOrder, progress: Progress = SILENT) -> Attribution:
    """Trains a predictor on the trials of a study folder and keeps its table there, for `allocate`.

    Raises:
        InputError: no study, too few trials, or a target that the trials do not know.
    """
    with Study(run, create=False) as study:
        found = attribute_study(study, order, progress)
        study.put_record(TABLE, found.table)
        return found


def attribute_study(study: Study, order: AttributeOrder | None = None, progress: Progress = SILENT) -> Attribution:
    """Trains a predictor on the trials of a study and makes its table.

    Raises:
        InputError: see `attribute_run`.
    """
    order = order or AttributeOrder()
    known = recall(study)
    trials = trials_of(study, known, order.objective)
    text = order.target or DEFAULT_TARGETS[trials[0].setting.objective]
    data = training_set(known, trials, Target.parse(text))
    predictor = train_predictor(data, OPTIONS[order.preset], progress=progress)
    qualities = hop_qualities(predictor, known.graph, data.codes)
    scores = option_scores(predictor, qualities)
    table, calibration = predictor_table(known, predictor, data, scores, (order.confidence, text == "sqnr_db"))
    bits = data.choices.paper_bits(data.codes)
    middle = float(np.median(bits))
    band = order.band or (middle - BAND_HALF_WIDTH, middle + BAND_HALF_WIDTH)
    report = judge(predictor, data, known, band=band)
    argmax = argmax_recipes(known, predictor, scores[0], qualities)
    return Attribution(table, predictor, report, calibration, text, len(trials), argmax)


def attribute(source: Bank | Probe | Study, method: str = "") -> SensitivityTable:
    """The cost of every choice: `error` from a bank, `jacobian` or `ablation` from a probe, `gnn` from a study.

    `method` may be left out; when given it must be one that the source can answer.

    Raises:
        InputError: the source cannot give that method, or a study with too few recipes for a predictor.

    Example:
        >>> table = sedimo.attribute(sedimo.probe(pipe, bank, "jacobian", store="runs/alpha"))
    """
    if not isinstance(source, Study):
        return attribute_measured(source, method)
    if method not in ("", "gnn"):
        raise InputError(f"method {method!r} cannot be had from a study of whole recipes; 'gnn' can")
    return attribute_study(source).table


def trials_of(study: Study, known: Known, objective: str = "") -> tuple[Trial, ...]:
    """The trials of whole recipes under the setting that has most of them, sorted by key.

    Those of other weights, or measured smoothed or rounded otherwise than what is known, are left out.

    Raises:
        InputError: too few for a predictor.
    """
    by_setting: dict[str, list[Trial]] = {}
    for trial in study.trials():
        is_of_these = known.digest in ("", trial.setting.weights_digest) and fits_space(trial, known.space)
        if is_of_these and objective in ("", trial.setting.objective):
            by_setting.setdefault(trial.setting.key, []).append(trial)
    largest: Sequence[Trial] = max(by_setting.values(), key=len, default=())
    if len(largest) < MIN_RECIPES:
        what = f" by {objective}" if objective else ""
        raise InputError(
            f"the study {study.path} has {len(largest)} measured recipes{what} of one setting; a predictor needs "
            f"{MIN_RECIPES}: run sedimo explore with more trials"
        )
    return tuple(largest)


def argmax_recipes(
    known: Known, predictor: Predictor, scores: Values, qualities: Sequence[Sequence[HopQuality]]
) -> dict[str, Recipe]:
    """The recipes of best scores `[D, K]` of single options, and of the variants of groups in isolation.

    Source: Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628): argmax per operation and per block, without a budget.
    """
    choices = predictor.choices
    operations = np.where(choices.exists, scores, -np.inf).argmax(axis=1)
    grouped = operations.copy()
    groups = split_groups(known.graph, n_options=choices.n_options, max_variants=MAX_VARIANTS)
    for group in disjoint_groups(predictor, known.graph, groups):
        found = group_scores(predictor, known.graph, group, qualities)
        grouped[list(found.decisions)] = found.choice[found.scores.mean.argmax()]
    return {"operations": choices.recipe(operations), "groups": choices.recipe(grouped)}


def predictor_table(
    known: Known,
    predictor: Predictor,
    data: TrainingSet,
    scores: tuple[Values, Values],
    how: tuple[float, bool],
) -> tuple[SensitivityTable, Calibration]:
    """The table of a predictor, around the best training recipe, and the calibration of its scores by option.

    Costs depend on the recipe around which they are taken; a search takes them again around its own result.

    `scores` are those of the options and their errors, `[D, K]` each; `how` is the confidence, and whether the target
    is in decibels.

    Raises:
        InputError: costs that are not finite.
    """
    confidence, is_decibel = how
    sums = picked(np.nan_to_num(scores[0]), data.codes).sum(axis=1)
    calibration = calibrate(sums, data.choices.paper_bits(data.codes), data.quality)
    if predictor.options.preset == "paper":
        return score_table(data.choices, known.candidates, scores, calibration), calibration
    best = data.codes[int(data.quality.argmax())]
    table = noise_table(predictor, known.candidates, best, confidence=confidence, is_decibel=is_decibel)
    if not all(math.isfinite(cost.cost) for cost in table.costs):
        raise InputError("the predictor's costs are not finite; the trials hold diverged recipes only")
    return table, calibration
