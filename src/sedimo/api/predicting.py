"""From a study to a predictor: which trials count, what the target is, and how good the predictor is beside rivals."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from sedimo.api.explore_order import GRAPH, SPACE
from sedimo.api.probing import ProbeMethod, attribute_measured, probe
from sedimo.api.search_order import PRIORS
from sedimo.bank import SILENT, Bank, Candidate, Progress
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.measurement.study import Study
from sedimo.measurement.target import Target
from sedimo.measurement.trial import ObjectiveName, Trial
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import NoisePowers
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.quant.formats import Format
from sedimo.sensitivity.adjoint import Effects, effects_of
from sedimo.sensitivity.baselines import Held, run_baselines
from sedimo.sensitivity.choices import Choices, Codes, Values
from sedimo.sensitivity.gnn.features import graph_features
from sedimo.sensitivity.gnn.streams import split_streams
from sedimo.sensitivity.gnn.training import Predictor, TrainingSet
from sedimo.sensitivity.quality import PredictionQuality, prediction_quality, quality_difference
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import Recipe, SearchSpace

logger = logging.getLogger(__name__)

DEFAULT_TARGETS: Mapping[ObjectiveName, str] = {
    "final_latents": "sqnr_db",
    "path": "sqnr_db",
    "step": "sqnr_db",
    "fid": "-fid",
}
CANDIDATES, PRIOR = "candidates", "prior"
WORST_NOISE, LEAST_NOISE = 1e6, 1e-12  # of a sample that diverged, of one without noise
BAND_HALF_WIDTH = 0.25  # bits
MIN_IN_BAND = 8  # recipes that a rank correlation in a band needs


@dataclass(frozen=True)
class Known:
    """What is known of a model before recipes are measured.

    `graph` has a node for each decision; `candidates` are those of a bank by (decision, format); `table` has the
    sensitivities by the prior. `digest` is that of the bank, empty where an older version kept none. `effects` are
    those that a prior by method adjoint comes from, where they were measured just now.
    """

    graph: DenoiserGraph
    space: SearchSpace
    candidates: Mapping[tuple[str, Format], Candidate]
    table: SensitivityTable
    digest: str = ""
    effects: Effects | None = None

    @property
    def choices(self) -> Choices:
        """The options of the space."""
        return Choices(self.space)

    def prior(self) -> Values:
        """Costs that the noise model starts from, `[D, K]`."""
        return self.choices.costs(self.table)

    def stored_bytes(self, recipe: Recipe) -> int:
        """Bytes of the tensors of all weights under a recipe [bytes]."""
        choice = self.space.choice(recipe)
        return sum(self.candidates[key].stored_bytes for key in choice.items())


@dataclass(frozen=True)
class KeptCandidates:
    """The candidates of a bank as a record of a study."""

    candidates: tuple[Candidate, ...]
    digest: str = ""


@dataclass(frozen=True)
class PredictorReport:
    """A predictor beside its rivals, on recipes that none of them was trained on.

    `rows` are (name, subset, quality); `differences` the SRCC of the predictor minus that of a rival, paired, per
    (rival, subset).
    """

    rows: tuple[tuple[str, str, PredictionQuality], ...]
    differences: Mapping[tuple[str, str], Estimate]


def know(
    pipe: DiffusersPipeline,
    graph: DenoiserGraph,
    bank: Bank,
    study: Study,
    *,
    prior: str = "jacobian",
    sampling: Sampling | None = None,
    progress: Progress = SILENT,
) -> Known:
    """Measures the prior and keeps what is known in the study for `recall`.

    Raises:
        InputError: an unknown prior, or a study of another space.
    """
    refuse_other_space(study, bank.space)
    if prior not in PRIORS:
        raise InputError(f"the prior must be one of {', '.join(PRIORS)}, got {prior!r}")
    effects = None
    if prior == "error":
        table = attribute_measured(bank)
    else:
        measured = probe(pipe, bank, cast("ProbeMethod", prior), store=study, sampling=sampling, progress=progress)
        table = attribute_measured(measured)
        effects = None if measured.adjoint is None else effects_of(bank.candidates, measured.adjoint)
    study.put_record(GRAPH, graph)
    study.put_record(SPACE, bank.space)
    study.put_record(CANDIDATES, KeptCandidates(bank.candidates, bank.digest))
    study.put_record(PRIOR, table)
    return Known(split_streams(graph, bank.space), bank.space, bank.index, table, bank.digest, effects)


def refuse_other_space(study: Study, space: SearchSpace) -> None:
    """Refuses a study whose recipes are about other decisions or formats, before anything is measured.

    Raises:
        InputError: saying what to do.
    """
    if SPACE in study.record_names() and study.record(SearchSpace, SPACE) != space:
        raise InputError(
            f"the study {study.path} holds recipes of another denoiser or of other formats, from which this one cannot "
            "learn; give the same formats (and --whole-layers if it has no decisions on streams), or another folder "
            "with --store"
        )


def recall(study: Study) -> Known:
    """What an exploration or a search has kept in its study; nothing is measured.

    Raises:
        InputError: the study has no such records: it was not made by `sedimo explore` or `sedimo run`.
    """
    graph, space = study.record(DenoiserGraph, GRAPH), study.record(SearchSpace, SPACE)
    kept = study.record(KeptCandidates, CANDIDATES)
    candidates = {(c.decision, c.format): c for c in kept.candidates}
    table = study.record(SensitivityTable, PRIOR)
    return Known(split_streams(graph, space), space, candidates, table, kept.digest)


def measures_of(trial: Trial, space: SearchSpace) -> dict[str, float]:
    """All that a target may speak of, by name."""
    ratio = np.clip(trial.powers.ratio, LEAST_NOISE, WORST_NOISE)
    found = {
        "sqnr_db": float(-10 * np.log10(ratio).mean()),
        "sqnr_pooled_db": float(-10 * np.log10(_pooled(trial.powers))),
        "noise": float(ratio.mean()),
        "avg_bits": space.paper_bits(trial.recipe),
        "paper_bits": space.paper_bits(trial.recipe),
        "stored_bits": 8 * space.stored_bytes(trial.recipe) / space.params,
    }
    return found | {name: estimate.value for name, estimate in trial.measures.items()}


def training_set(known: Known, trials: Sequence[Trial], target: Target) -> TrainingSet:
    """The trials as numbers.

    Raises:
        InputError: a target that speaks of a measure which these trials do not have.
    """
    choices, space = known.choices, known.space
    without_bits, _ = target.split_bits()
    named = [(trial, measures_of(trial, space)) for trial in trials]
    usable = [(trial, m) for trial, m in named if all(np.isfinite(m.get(name, 0.0)) for name in target.names)]
    if len(usable) < len(named):
        logger.info("%d trials have no finite %s and are left out", len(named) - len(usable), target)
    trials, measures = [trial for trial, _ in usable], [m for _, m in usable]
    return TrainingSet(
        features=graph_features(known.graph, choices, known.candidates),
        choices=choices,
        prior=known.prior(),
        codes=choices.codes(trial.recipe for trial in trials),
        quality=np.array([without_bits.value(m) for m in measures]),
        target=np.array([target.value(m) for m in measures]),
    )


def fits_space(trial: Trial, space: SearchSpace) -> bool:
    """Whether a trial is a whole recipe of a space: every decision at a format that the space offers."""
    named = all(d.layers[0] in trial.recipe.layers for d in space.decisions)
    return named and all(trial.recipe.format_of(d.layers[0], d.stream) in d.formats for d in space.decisions)


def judge(
    predictor: Predictor,
    data: TrainingSet,
    known: Known,
    *,
    extra: tuple[Codes, Values] | None = None,
    band: tuple[float, float] | None = None,
) -> PredictorReport:
    """The predictor and all rivals on the same held-out recipes: all, those in a band of bits, and extra ones.

    What is predicted is the quality, or the whole target if the predictor's preset does; of `extra` recipes, too.
    """
    truth = data.target if predictor.has_sizes else data.quality
    codes, measured = (data.codes[:0], data.quality[:0]) if extra is None else extra
    mine = Held(
        "this predictor", predictor.cross_validated(data.n), predictor.predict(codes) if len(codes) else measured
    )
    costs = {} if known.table.method == "error" else {known.table.method: known.prior()}
    errors = data.choices.errors(known.candidates)
    tests = [fold.test for fold in predictor.folds]
    rivals = run_baselines(
        replace(data, quality=truth), codes, tests=tests, costs=costs, errors=errors, effects=known.effects
    )
    bits = data.choices.paper_bits(data.codes)
    subsets: dict[str, tuple[Values, Mapping[str, Values]]] = {
        "all": (truth, {h.name: h.folds for h in (mine, *rivals)})
    }
    if band is not None:
        inside = (bits >= band[0]) & (bits <= band[1])
        if inside.sum() >= MIN_IN_BAND:
            subsets[band_name(band)] = (truth[inside], {h.name: h.folds[inside] for h in (mine, *rivals)})
    if len(codes):
        subsets["extra recipes in the band"] = (measured, {h.name: h.extra for h in (mine, *rivals)})
    rows, differences = [], {}
    for subset, (y, predictions) in subsets.items():
        rows += [(name, subset, prediction_quality(p, y)) for name, p in predictions.items()]
        for rival in rivals:
            differences[rival.name, subset] = quality_difference(predictions[mine.name], predictions[rival.name], y)
    return PredictorReport(tuple(rows), differences)


def band_name(band: tuple[float, float]) -> str:
    """A band of average bits, for people."""
    return f"{band[0]:.2f} to {band[1]:.2f} bits"


def _pooled(powers: NoisePowers) -> float:
    noise = float(np.minimum(powers.noise, WORST_NOISE * powers.signal).sum())
    return max(noise / float(powers.signal.sum()), LEAST_NOISE)
