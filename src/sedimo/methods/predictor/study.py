"""From a study to what a predictor is trained on: what is known beforehand, which trials count, and their numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sedimo.allocation.effects import Effects
from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.graph.groups import split_groups
from sedimo.graph.model import DenoiserGraph, Group
from sedimo.lab.lab import Lab
from sedimo.lab.study import GRAPH, SPACE, ObjectiveName, Study, Trial
from sedimo.methods.ablation import ABLATION
from sedimo.methods.adjoint import ADJOINT
from sedimo.methods.error import ERROR
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Method, Task
from sedimo.methods.predictor.features import (
    Candidates,
    Choices,
    Values,
    disjoint_groups,
    graph_features,
    split_streams,
)
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.training import MIN_RECIPES, TrainingSet
from sedimo.pipelines.adapter import Sampling
from sedimo.settings import one_of
from sedimo.space import Recipe, SearchSpace

logger = logging.getLogger(__name__)

PRIORS: tuple[Method[Any], ...] = (JACOBIAN, ADJOINT, ABLATION, ERROR)  # that a search may start from
DEFAULT_GOALS: Mapping[ObjectiveName, str] = {
    "final_latents": "sqnr_db",
    "path": "sqnr_db",
    "step": "sqnr_db",
    "fid": "-fid",
}
CANDIDATES, PRIOR = "candidates", "prior"
WORST_NOISE, LEAST_NOISE = 1e6, 1e-12  # of a sample that diverged, of one without noise
MAX_VARIANTS = 8_000  # of a group; larger ones are split


@dataclass(frozen=True)
class Background:
    """What is known of a model before recipes are measured."""

    graph: DenoiserGraph  # with a node for each decision
    space: SearchSpace
    candidates: Candidates  # those of a bank, by (decision, format)
    table: SensitivityTable  # by the prior
    digest: str  # of the bank
    effects: Effects | None = None  # that a prior by method adjoint comes from, if it was measured just now

    @cached_property
    def choices(self) -> Choices:
        """The options of the space."""
        return Choices(self.space)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups, cut where there are too many variants to try them all, with no decision in two of them."""
        cut = split_groups(self.graph, n_options=self.choices.n_options, max_variants=MAX_VARIANTS)
        return disjoint_groups(self.space, cut)

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
    digest: str


def measure_background(lab: Lab, prior: str = JACOBIAN.name, on: Sampling | None = None) -> Background:
    """Measures the prior on a plan, that of the search if none is given, and keeps all in the study."""
    bank, study = lab.bank, lab.study
    if study is not None:
        refuse_other_space(study, bank.space)
    method = prior_named(prior)  # its table is of every format, fitted
    finding = method.measure(lab.fitted, Task(method.knobs(), is_checked=False, on=on or lab.seeds.search))
    if study is not None:
        study.put_record(GRAPH, lab.graph)
        study.put_record(SPACE, bank.space)
        study.put_record(CANDIDATES, KeptCandidates(bank.candidates, bank.digest))
        study.put_record(PRIOR, finding.table)
    graph = split_streams(lab.graph, bank.space)
    return Background(graph, bank.space, bank.index, finding.table, bank.digest, finding.of(Effects))


def read_background(study: Study) -> Background:
    """What an exploration or a search has kept in its study; nothing is measured."""
    graph, space = study.record(DenoiserGraph, GRAPH), study.record(SearchSpace, SPACE)
    kept = study.record(KeptCandidates, CANDIDATES)
    candidates = {(c.decision, c.format): c for c in kept.candidates}
    return Background(
        split_streams(graph, space), space, candidates, study.record(SensitivityTable, PRIOR), kept.digest
    )


def prior_named(name: str, said: str = "the prior") -> Method[Any]:
    """The method that a search starts from; an error tells what it is by the name `said`."""
    one_of([one.name for one in PRIORS])(name, said)
    return next(one for one in PRIORS if one.name == name)


def refuse_other_space(study: Study, space: SearchSpace) -> None:
    """Refuses a study whose recipes are about other decisions or formats, before anything is measured."""
    if SPACE in study.record_names() and study.record(SearchSpace, SPACE) != space:
        raise InputError(
            f"the study {study.path} holds recipes of another denoiser or of other formats, from which this one cannot "
            "learn; give the same formats (and --whole-layers if it has no decisions on streams), or another folder "
            "with --store"
        )


def trials_of(study: Study, background: Background, objective: str = "") -> tuple[Trial, ...]:
    """The trials of whole recipes under the setting that has most of them, sorted by key.

    Those of other weights, or measured smoothed or rounded otherwise than what is known, are left out.
    """
    by_setting: dict[str, list[Trial]] = {}
    for trial in study.trials():
        is_of_these = trial.setting.weights_digest == background.digest and fits_space(trial, background.space)
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


def fits_space(trial: Trial, space: SearchSpace) -> bool:
    """Whether a trial is a whole recipe of a space: every decision at a format that the space offers."""
    named = all(d.layers[0] in trial.recipe.layers for d in space.decisions)
    return named and all(trial.recipe.format_of(d.layers[0], d.stream) in d.formats for d in space.decisions)


def measures_of(trial: Trial, space: SearchSpace) -> dict[str, float]:
    """All that a goal may speak of, by name."""
    powers, bits = trial.powers, space.paper_bits(trial.recipe)
    ratio = np.clip(powers.ratio, LEAST_NOISE, WORST_NOISE)
    pooled = float(np.minimum(powers.noise, WORST_NOISE * powers.signal).sum()) / float(powers.signal.sum())
    found = {
        "sqnr_db": float(-10 * np.log10(ratio).mean()),
        "sqnr_pooled_db": float(-10 * np.log10(max(pooled, LEAST_NOISE))),
        "noise": float(ratio.mean()),
        "avg_bits": bits,
        "paper_bits": bits,
        "stored_bits": 8 * space.stored_bytes(trial.recipe) / space.params,
    }
    return found | {name: estimate.value for name, estimate in trial.measures.items()}


def training_set(background: Background, trials: Sequence[Trial], goal: Goal) -> TrainingSet:
    """The trials as numbers."""
    choices, space = background.choices, background.space
    without_bits, _ = goal.split_bits()
    named = [(trial, measures_of(trial, space)) for trial in trials]
    usable = [(trial, m) for trial, m in named if all(np.isfinite(m.get(name, 0.0)) for name in goal.names)]
    if len(usable) < len(named):
        logger.info("%d trials have no finite %s and are left out", len(named) - len(usable), goal)
    return TrainingSet(
        features=graph_features(background.graph, choices, background.candidates),
        choices=choices,
        prior=background.prior(),
        codes=choices.codes(trial.recipe for trial, _ in usable),
        quality=np.array([without_bits.value(m) for _, m in usable]),
        target=np.array([goal.value(m) for _, m in usable]),
    )
