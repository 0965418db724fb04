"""The search of a recipe by measured recipes: explore, predict, build, and refine by measuring what is proposed.

A high rank correlation on random recipes does not certify an optimum: an optimiser goes where the predictor errs. So
costs carry a margin for what the trials do not know, and rounds of refinement measure recipes that are optimal
under costs drawn from the posterior (Thompson sampling), which is where the next trial says most about the optimum.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sedimo.allocation.problem import Allocation
from sedimo.allocation.solve import allocate
from sedimo.allocation.variants import allocate_variants
from sedimo.api.order import BudgetOrder
from sedimo.api.predicting import Known, training_set
from sedimo.api.search_order import SearchOrder
from sedimo.bank import SILENT, Bank, Progress
from sedimo.errors import InputError
from sedimo.graph.groups import split_groups
from sedimo.measurement.campaign import run_trials
from sedimo.measurement.executors import Executor, MakeWorker
from sedimo.measurement.exploration import Exploration, possible_bits
from sedimo.measurement.study import Study
from sedimo.measurement.target import Target
from sedimo.measurement.trial import ObjectiveName, Setting, Trial
from sedimo.measurement.worker import References, TrialWorker, setting_of
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.sensitivity.choices import Choices, Codes, Values
from sedimo.sensitivity.gnn.costs import noise_table, noise_variant_table, options_table
from sedimo.sensitivity.gnn.scoring import disjoint_groups, group_contributions
from sedimo.sensitivity.gnn.training import MIN_RECIPES, Predictor, TrainingSet, train_predictor
from sedimo.sensitivity.noise_model import NoiseModel, fit_noise_model
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import Recipe, SearchSpace

logger = logging.getLogger(__name__)

RANGE_BITS = 0.75  # on both sides of the budget
N_TABLE_ROUNDS = 3  # costs depend on the recipe that they are taken around
MAX_VARIANTS = 8_000  # of a group; larger ones are split
MAX_DRAWS = 6  # per proposal that is wanted


@dataclass(frozen=True)
class Measuring:
    """Where trials are measured and kept."""

    study: Study
    setting: Setting
    make_worker: MakeWorker
    executor: Executor | None = None
    progress: Progress = SILENT

    @classmethod
    def on(
        cls,
        pipe: DiffusersPipeline,
        bank: Bank,
        study: Study,
        plan: Sampling,
        *,
        objective: ObjectiveName = "final_latents",
        references: References | None = None,
        progress: Progress = SILENT,
    ) -> Measuring:
        """Measuring recipes of a bank on a pipeline under a plan; one worker, which samples full precision once.

        It samples it not at all where `references` of the same function have it.
        """
        setting = setting_of(pipe, plan, weights_digest=bank.digest, objective=objective)
        make = functools.cache(lambda: TrialWorker(pipe, bank, plan, objective=objective, references=references))
        return cls(study, setting, make, progress=progress)

    def trials(self, recipes: Sequence[Recipe]) -> tuple[Trial, ...]:
        """The trials of recipes, measured where the study lacks them."""
        return run_trials(
            self.study,
            recipes,
            setting=self.setting,
            make_worker=self.make_worker,
            executor=self.executor,
            progress=self.progress,
        )


@dataclass(frozen=True)
class Round:
    """A round of refinement: how many recipes it measured, the best measured so far, what was predicted of it.

    The best is one within the budget if there is any.
    """

    index: int
    n_trials: int
    best: Trial
    predicted: float


@dataclass(frozen=True)
class Finalist:
    """A recipe that could be the result, and its trial on seeds that nothing was searched on."""

    name: str
    trial: Trial


@dataclass(frozen=True)
class Search:
    """What was found: the predictor's table, the choice, the predictor, and all trials in their order.

    `finalists` are those that the choice was made among; empty where no final was held. When another than the
    predictor's own recipe won it, the allocation's gap is that of the predictor's costs and certifies nothing.
    """

    table: SensitivityTable
    allocation: Allocation
    predictor: Predictor
    data: TrainingSet
    trials: tuple[Trial, ...]
    rounds: tuple[Round, ...]
    n_random: int
    finalists: tuple[Finalist, ...] = ()


def search(known: Known, measuring: Measuring, order: SearchOrder, budget: BudgetOrder) -> Search:
    """Explores, refines, trains the predictor on all trials, and allocates by its costs.

    Raises:
        InputError: a budget that cannot be kept, or a target that the trials do not know.
        Interrupted: Ctrl-C; what was measured is kept, the same call goes on.
    """
    target = Target.parse(order.target)
    trials = list(explore_around(known, measuring, order, budget))
    rounds = []
    for index in range(order.n_rounds):
        data = training_set(known, trials, target)
        model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
        proposed = propose(known, model, budget, order.per_round, known_recipes=trials, seed=(order.seed, index))
        trials += measuring.trials(proposed)
        rounds.append(_round(known, budget, trials, model, (index, len(proposed))))
    data = training_set(known, trials, target)
    predictor = train_predictor(data, order.training, progress=measuring.progress)
    table, allocation = build(known, predictor, data, budget, confidence=order.confidence)
    if order.level == "groups":
        allocation = build_by_groups(known, predictor, allocation, budget, confidence=order.confidence)
    n_random = min(order.n_random, len(trials))
    return Search(table, allocation, predictor, data, tuple(trials), tuple(rounds), n_random)


def explore_around(known: Known, measuring: Measuring, order: SearchOrder, budget: BudgetOrder) -> tuple[Trial, ...]:
    """The trials of the random recipes of a search."""
    return measuring.trials(draw_around(known.space, order, budget))


def draw_around(space: SearchSpace, order: SearchOrder, budget: BudgetOrder) -> list[Recipe]:
    """The random recipes of a search: stratified, around the budget.

    Raises:
        InputError: there are too few different ones.
    """
    least, most = possible_bits(space)
    bits = min(max(budget.in_bits(space.params), least), most)
    low, high = max(least, bits - RANGE_BITS), min(most, bits + RANGE_BITS)
    exploration = Exploration(order.seed, space, "stratified", low, high)
    drawn = (exploration.recipe(index) for index in range(MAX_DRAWS * order.n_random))
    distinct = {recipe.key: recipe for recipe in drawn}
    if len(distinct) < MIN_RECIPES:
        raise InputError(
            f"these formats make only {len(distinct)} different recipes within {low:.2f} to {high:.2f} bits, too few "
            "to learn from; add formats, or use --method jacobian"
        )
    return list(distinct.values())[: order.n_random]


def propose(
    known: Known,
    model: NoiseModel,
    budget: BudgetOrder,
    n: int,
    *,
    known_recipes: Sequence[Trial],
    seed: tuple[int, ...],
) -> list[Recipe]:
    """Recipes that are best under costs drawn from the posterior, none of them measured already."""
    generator = np.random.default_rng([*seed, n])
    seen = {trial.recipe.key for trial in known_recipes}
    found: list[Recipe] = []
    for _ in range(MAX_DRAWS * n):
        if len(found) == n:
            break
        recipe = allocated(model_table(known, model.draw(generator)), budget, rule="greedy").recipe
        if recipe.key not in seen:
            seen.add(recipe.key)
            found.append(recipe)
    return found


def build(
    known: Known, predictor: Predictor, data: TrainingSet, budget: BudgetOrder, *, confidence: float
) -> tuple[SensitivityTable, Allocation]:
    """Costs around the recipe that they lead to: allocated, taken again around the result, allocated again."""
    reference = _start(known, data, budget, confidence)
    for _ in range(N_TABLE_ROUNDS):
        table = noise_table(predictor, known.candidates, reference, confidence=confidence)
        allocation = allocated(table, budget)
        found = data.choices.codes([allocation.recipe])[0]
        if (found == reference).all():
            break
        reference = found
    return table, allocation


def build_by_groups(
    known: Known, predictor: Predictor, around: Allocation, budget: BudgetOrder, *, confidence: float
) -> Allocation:
    """The best variants of all groups, each with the others as in the recipe of `around`."""
    reference = predictor.choices.codes([around.recipe])[0]
    groups = split_groups(known.graph, n_options=predictor.choices.n_options, max_variants=MAX_VARIANTS)
    noise = [
        group_contributions(predictor, known.graph, group, reference)
        for group in disjoint_groups(predictor, known.graph, groups)
    ]
    table = noise_variant_table(predictor, noise, known.candidates, confidence=confidence)
    return allocate_variants(table, **budget.named(known.space.full_bops))


def model_table(known: Known, log_costs: Values) -> SensitivityTable:
    """A table of the noise model's costs."""
    costs = np.exp(np.where(np.isfinite(log_costs), log_costs, -700.0))
    exact = np.zeros_like(costs)
    return options_table(known.choices, known.candidates, costs, errors=exact, settings={}, method="noise model")


def allocated(table: SensitivityTable, budget: BudgetOrder, *, rule: str = "milp") -> Allocation:
    """The recipe of a table under a budget in any accounting."""
    return allocate(table, **budget.named(table.full_bops), rule=rule)


def keeps(known: Known, recipe: Recipe, budget: BudgetOrder) -> bool:
    """Whether a recipe is within a budget, which limits the size."""
    space = known.space
    if budget.bops is not None and space.bops(recipe) > budget.bops.resolved(space.full_bops):
        return False
    used = 8 * (space.paper_bytes(recipe) if budget.bits is not None else known.stored_bytes(recipe))
    return used <= budget.in_bits(space.params) * space.params * (1 + 1e-9)


def _start(known: Known, data: TrainingSet, budget: BudgetOrder, confidence: float) -> Codes:
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    log_costs = model.log_costs + confidence * np.where(np.isfinite(model.deviation), model.deviation, 0.0)
    first: Codes = data.choices.codes([allocated(model_table(known, log_costs), budget).recipe])[0]
    return first


def _round(
    known: Known, budget: BudgetOrder, trials: Sequence[Trial], model: NoiseModel, done: tuple[int, int]
) -> Round:
    within = [t for t in trials if keeps(known, t.recipe, budget)] or list(trials)
    best = max(within, key=lambda t: t.score)
    predicted = float(model.predict(Choices(known.space).codes([best.recipe]))[0])
    return Round(*done, best, predicted)
