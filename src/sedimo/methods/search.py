"""The search of a recipe by measured recipes: explore, predict, build, refine by measuring what is proposed, decide.

A high rank correlation on random recipes does not certify an optimum: an optimiser goes where the predictor errs. So
costs carry a margin for what the trials do not know, and rounds of refinement measure recipes that are optimal
under costs drawn from the posterior (Thompson sampling), which is where the next trial says most about the optimum.

Whatever was best on the seeds of the search is best there partly by luck, and a predictor may be wrong where it is
confident. So the recipe that it builds has to hold its own on seeds that nothing was searched on: against the one of
the prior alone, one half way between both, and the best recipes that were measured on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from sedimo.allocation.budget import BudgetSettings, allocated
from sedimo.allocation.combine import geometric_mean
from sedimo.allocation.solve import Allocation, allocate_given, allocate_within
from sedimo.allocation.table import SensitivityTable
from sedimo.errors import InputError
from sedimo.lab.exploration import Exploration, possible_bits
from sedimo.lab.lab import Lab, seconds_of_fits
from sedimo.lab.seeds import FINAL_FACTOR
from sedimo.lab.study import Trial
from sedimo.methods.method import Finding, Method, Price, Task, Words, listed
from sedimo.methods.predictor.features import Values
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.noise_model import NoiseModel, fit_noise_model
from sedimo.methods.predictor.scoring import NAME, noise_of_variants, noise_table, options_table, refuse_confidence
from sedimo.methods.predictor.study import (
    PRIORS,
    Background,
    measure_background,
    prior_named,
    refuse_other_space,
    training_set,
)
from sedimo.methods.predictor.training import FAST, MIN_RECIPES, Predictor, TrainingOptions, train_predictor
from sedimo.metrics.estimate import Estimate, mean_estimate
from sedimo.quant.formats import Format
from sedimo.settings import Checked, option, within
from sedimo.space import Recipe, SearchSpace

Level = Literal["decisions", "groups"]
GOALS = ("sqnr_db", "sqnr_pooled_db")
RANGE_BITS = 0.75  # on both sides of the budget
N_TABLE_ROUNDS = 3  # costs depend on the recipe that they are taken around
MAX_DRAWS = 6  # per proposal that is wanted
BUILT = "built by the predictor"
MEASURED = ("best of the trials", "second of the trials")
N_FINALISTS = 3 + len(MEASURED)  # at most
N_EXPLAINED = 12  # recipes of the measured curve, and about as many changes on the seeds of the check
TRIAL_BYTES = 6_000  # of a trial's row
TRAINING_FACTOR = 3e-3  # seconds per trial and node, of training a predictor in five folds


def _refuse_target(text: str, _name: str) -> None:
    if str(Goal.parse(text).split_bits()[0]) not in GOALS:
        raise InputError(
            f"a search measures final latents and can predict {' or '.join(GOALS)}, with a term of avg_bits or "
            f"without; got {text!r}. Other targets: sedimo explore, sedimo attribute"
        )


@dataclass(frozen=True, slots=True)
class SearchSettings(Checked):
    """How many recipes are measured, and how: half of `n_trials` are those of the `n_rounds` of refinement, if any."""

    n_trials: int = option(300, "--trials", help="Number of measured recipes.")
    n_rounds: int = option(3, "--refine", help="Rounds of measuring what is proposed.")
    prior: str = option(
        PRIORS[0].name, "--prior", check=prior_named, help=f"What the predictor starts from: {listed(PRIORS)}."
    )
    target: str = option(
        "sqnr_db", "--goal", "--target", check=_refuse_target, help="What to predict, such as sqnr_db."
    )
    level: Level = option(
        "decisions", "--level", help="Decide on single layers, or on all variants of attention and feed-forward groups."
    )
    confidence: float = option(
        1.0,
        "--confidence",
        check=refuse_confidence,
        help="Margin of costs, in standard deviations of what the trials leave unknown.",
    )
    seed: int = option(0, "--study-seed", check=within(least=0), help="Which random recipes.")
    training: TrainingOptions = FAST

    def check_together(self) -> None:
        """Refuses too few trials."""
        if self.n_trials < MIN_RECIPES or self.n_rounds < 0:
            raise InputError(
                f"a search needs at least {MIN_RECIPES} trials and no negative number of rounds, got {self.n_trials} "
                f"and {self.n_rounds}"
            )
        if self.n_rounds and (self.per_round < 1 or self.n_random < MIN_RECIPES):
            raise InputError(f"{self.n_trials} trials are too few for {self.n_rounds} rounds: half of them are random")

    @property
    def per_round(self) -> int:
        """Trials of one round of refinement."""
        return self.n_trials // (2 * self.n_rounds) if self.n_rounds else 0

    @property
    def n_random(self) -> int:
        """Random recipes to begin with."""
        return self.n_trials - self.n_rounds * self.per_round


@dataclass(frozen=True, slots=True)
class Round:
    """A round of refinement: how many recipes it measured, the best so far (in the budget, if any), its prediction."""

    round: int
    n_trials: int
    best_db: Estimate
    predicted_db: float


@dataclass(frozen=True)
class Search:
    """What was found: the predictor's table, the choice, the predictor, and all trials in their order.

    `finalists` are the trials of the final by name, if one was held. When another than the predictor's own recipe won
    it, the allocation's gap is that of the predictor's costs and certifies nothing.
    """

    table: SensitivityTable
    allocation: Allocation
    predictor: Predictor
    trials: tuple[Trial, ...]
    rounds: tuple[Round, ...]
    n_random: int
    finalists: Mapping[str, Trial] = field(default_factory=dict)


def search(lab: Lab, background: Background, settings: SearchSettings, budget: BudgetSettings) -> Search:
    """Explores, refines, trains the predictor on all trials, and allocates by its costs; no final yet."""
    on, goal = lab.seeds.search, Goal.parse(settings.target)
    trials = list(lab.measure(draw_around(background.space, settings, budget), on))
    rounds = []
    for index in range(settings.n_rounds):
        data = training_set(background, trials, goal)
        model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
        proposed = propose(background, model, budget, settings.per_round, known=trials, seed=(settings.seed, index))
        trials += lab.measure(proposed, on)
        best = max([t for t in trials if keeps(background, t.recipe, budget)] or trials, key=lambda t: t.score)
        predicted = float(model.predict(data.choices.codes([best.recipe]))[0])
        rounds.append(Round(index + 1, len(proposed), mean_estimate(best.powers.sqnr_db), predicted))
    data = training_set(background, trials, goal)
    predictor = train_predictor(data, settings.training, progress=lab.progress)
    table, allocation = build(background, predictor, budget, confidence=settings.confidence)
    if settings.level == "groups":
        allocation = build_by_groups(background, predictor, table, allocation, budget, confidence=settings.confidence)
    n_random = min(settings.n_random, len(trials))
    return Search(table, allocation, predictor, tuple(trials), tuple(rounds), n_random)


def draw_around(space: SearchSpace, settings: SearchSettings, budget: BudgetSettings) -> list[Recipe]:
    """The random recipes of a search: stratified, around the budget."""
    least, most = possible_bits(space)
    bits = min(max(budget.in_bits(space.params), least), most)
    low, high = max(least, bits - RANGE_BITS), min(most, bits + RANGE_BITS)
    exploration = Exploration(settings.seed, space, "stratified", low, high)
    drawn = (exploration.recipe(index) for index in range(MAX_DRAWS * settings.n_random))
    distinct = {recipe.key: recipe for recipe in drawn}
    if len(distinct) < MIN_RECIPES:
        raise InputError(
            f"these formats make only {len(distinct)} different recipes within {low:.2f} to {high:.2f} bits, too few "
            "to learn from; add formats, or use --method jacobian"
        )
    return list(distinct.values())[: settings.n_random]


def propose(
    background: Background,
    model: NoiseModel,
    budget: BudgetSettings,
    n: int,
    *,
    known: Sequence[Trial],
    seed: tuple[int, ...],
) -> list[Recipe]:
    """Recipes that are best under costs drawn from the posterior, none of them measured already."""
    generator = np.random.default_rng([*seed, n])
    seen = {trial.recipe.key for trial in known}
    found: dict[str, Recipe] = {}
    for _ in range(MAX_DRAWS * n):
        if len(found) == n:
            break
        recipe = allocated(model_table(background, model.draw(generator)), budget, rule="greedy").recipe
        if recipe.key not in seen:
            found.setdefault(recipe.key, recipe)
    return [*found.values()]


def build(
    background: Background, predictor: Predictor, budget: BudgetSettings, *, confidence: float
) -> tuple[SensitivityTable, Allocation]:
    """Costs around the recipe that they lead to: allocated, taken again around the result, allocated again."""
    data = predictor.data
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    log_costs = model.log_costs + confidence * np.where(np.isfinite(model.deviation), model.deviation, 0.0)
    start = allocated(model_table(background, log_costs), budget).recipe
    reference = data.choices.codes([start])[0]
    for _ in range(N_TABLE_ROUNDS):
        table = noise_table(predictor, background.candidates, reference, confidence=confidence)
        allocation = allocated(table, budget)
        found = data.choices.codes([allocation.recipe])[0]
        if (found == reference).all():
            break
        reference = found
    return table, allocation


def build_by_groups(
    background: Background,
    predictor: Predictor,
    table: SensitivityTable,
    around: Allocation,
    budget: BudgetSettings,
    *,
    confidence: float,
) -> Allocation:
    """The best variants of all groups, each with the others as in the recipe of `around`."""
    reference = predictor.data.choices.codes([around.recipe])[0]
    variants = noise_of_variants(predictor, background.groups, reference, table, confidence=confidence)
    return allocate_within(table, budget.resolved(table.total_params, table.full_bops), groups=variants)


def model_table(background: Background, log_costs: Values) -> SensitivityTable:
    """A table of the noise model's costs."""
    costs = np.exp(np.where(np.isfinite(log_costs), log_costs, -700.0))
    choices, exact = background.choices, np.zeros_like(costs)
    return options_table(choices, background.candidates, costs, errors=exact, settings={}, method="noise model")


def keeps(background: Background, recipe: Recipe, budget: BudgetSettings) -> bool:
    """Whether a recipe is within a budget, which limits the size."""
    space = background.space
    if budget.bops is not None and space.bops(recipe) > budget.bops.resolved(space.full_bops):
        return False
    used = 8 * (space.paper_bytes(recipe) if budget.bits is not None else background.stored_bytes(recipe))
    return used <= budget.in_bits(space.params) * space.params * (1 + 1e-9)


def hold_final(lab: Lab, background: Background, found: Search, budget: BudgetSettings) -> Search:
    """The search with its best finalist as its allocation, measured on seeds that the search has not seen."""
    recipes, space = finalists(background, found, budget), background.space
    held = dict(zip(recipes, lab.measure(list(recipes.values()), lab.seeds.final), strict=True))
    best = max(held, key=lambda name: held[name].score)
    if best == BUILT:
        return replace(found, finalists=held)
    own = budget.resolved(space.params, space.full_bops)
    return replace(found, allocation=allocate_given(found.table, space.choice(recipes[best]), own), finalists=held)


def finalists(background: Background, found: Search, budget: BudgetSettings) -> Mapping[str, Recipe]:
    """The recipes among which the final decides, by name, each once; the predictor's own first."""
    prior = background.table
    entries = {
        BUILT: found.allocation.recipe,
        f"by {prior.method} alone": allocated(prior, budget).recipe,
        f"half way to {prior.method}": allocated(geometric_mean(found.table, prior), budget).recipe,
    }
    measured = sorted((t for t in found.trials if keeps(background, t.recipe, budget)), key=lambda t: -t.score)
    entries |= {name: trial.recipe for name, trial in zip(MEASURED, measured, strict=False)}
    first = {recipe.key: name for name, recipe in reversed(entries.items())}
    return {name: recipe for name, recipe in entries.items() if first[recipe.key] == name}


def _measure(lab: Lab, task: Task[SearchSettings]) -> Finding:
    background = measure_background(lab, task.knobs.prior)
    found = search(lab, background, task.knobs, task.budget)
    return Finding(lab.bank, found.table, found.allocation).with_evidence(background, found, task.knobs)


def _decide(lab: Lab, task: Task[SearchSettings], finding: Finding) -> Finding:
    final = hold_final(lab, finding.need(Background), finding.need(Search), task.budget)
    return replace(finding, allocation=final.allocation).with_evidence(final)


def _price(lab: Lab, task: Task[SearchSettings]) -> Price:
    """Fits and prior, the recipes, the final, what explains the result, and the training of the predictor."""
    timing, seeds, n_trials = lab.time_calls(lab.seeds.search), lab.seeds.settings, task.knobs.n_trials
    explained = N_EXPLAINED * (1 + seeds.n_check_seeds / seeds.n_seeds) if task.is_checked else 0.0
    n_calls = round((n_trials + 1 + FINAL_FACTOR * (1 + N_FINALISTS) + explained) * timing.n_calls)
    training = TRAINING_FACTOR * n_trials * len(lab.graph.nodes)
    trials = Price(n_calls * timing.seconds_per_call + training, n_calls, 8 * lab.space.params, n_trials * TRIAL_BYTES)
    return Price(seconds_of_fits(lab)) + prior_named(task.knobs.prior).price_of_prior(lab.space, timing) + trials


def _refuse(task: Task[SearchSettings], _formats: Sequence[Format]) -> None:
    if not task.budget.has_size:
        raise InputError("a search draws recipes around a size: give --bits (or --stored-bits, --bytes) with --bops")


def _prepare(lab: Lab, task: Task[SearchSettings]) -> None:
    if lab.study is not None:
        refuse_other_space(lab.study, lab.bank.space)
    draw_around(lab.bank.space, task.knobs, task.budget)


SEARCH = Method(
    name=NAME,
    words=Words(
        summary="search by measured recipes: a graph network learns what they cost, the best are measured again",
        source="Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628); noise model and refinement are ours",
        cost="the noise that a network taught by measured recipes expects of it",
        sees="quality of whole recipes, what choices do to one another",
        misses="what its trials do not show: it takes hundreds of them",
    ),
    measure=_measure,
    knobs=SearchSettings,
    price=_price,
    decide=_decide,
    refuse=_refuse,
    prepare=_prepare,
    compared=SearchSettings(n_trials=120),
)
