"""What a method is: everything about one way to find out which weights may lose bits.

A method lives in one file, which makes one constant of the class `Method`; `methods.METHODS` lists them all. Help, dry
run, `compare`, checks and report read that tuple, and nothing else names a method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from sedimo.allocation.budget import NO_BUDGET, BudgetSettings, allocated
from sedimo.allocation.solve import Allocation
from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Bank
from sedimo.errors import InputError, StateError
from sedimo.lab.exchange import MEMORY_BYTES, passes
from sedimo.lab.lab import Lab
from sedimo.lab.measuring import CallTiming
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import Format
from sedimo.space import Recipe, SearchSpace

Knobs = TypeVar("Knobs")
Evidence = TypeVar("Evidence")
N_RANDOM = 30  # recipes that show whether costs add up
_TRIAL_BYTES = 2_000  # of a row, besides the recipe and the powers
_ENTRY_BYTES = 60  # of a layer's entry in a recipe


@dataclass(frozen=True, slots=True)
class Words:
    """What people read: one line of what it does, its source, what it can see, and what it cannot.

    `cost` ends the sentence "the cost of a layer is ..."; empty for what has no costs. `given` is what a report says of
    a recipe that costs did not decide, with {} for the format that it was made of.
    """

    summary: str
    source: str = ""
    cost: str = ""
    sees: str = ""
    misses: str = ""
    given: str = ""


@dataclass(frozen=True, slots=True)
class Price:
    """What work takes on this machine: seconds, denoiser calls, memory besides the pipeline and disk [bytes]."""

    seconds: float = 0.0
    n_calls: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0

    def __add__(self, other: Price) -> Price:
        """One after the other: memory is needed by one at a time."""
        return Price(
            self.seconds + other.seconds,
            self.n_calls + other.n_calls,
            max(self.memory_bytes, other.memory_bytes),
            self.disk_bytes + other.disk_bytes,
        )


def price_of_passes(space: SearchSpace, timing: CallTiming, call_factor: float) -> Price:
    """A plan's calls, and all of them again, each `call_factor` plain ones long, as often as memory demands."""
    n_calls = timing.n_calls * (1 + len(passes(space)))
    seconds = timing.seconds_per_call * (timing.n_calls + call_factor * (n_calls - timing.n_calls))
    return Price(seconds, n_calls, MEMORY_BYTES)


def price_of_trials(recipes: Collection[Recipe], n_samples: int, timing: CallTiming, weights_bytes: int) -> Price:
    """Of measuring different recipes, and full precision once; one that is probed is as large as the loaded weights."""
    if not recipes:
        return Price()
    n_calls = (len(recipes) + 1) * timing.n_calls
    n_layers = max(len(recipe.layers) for recipe in recipes)
    disk_bytes = len(recipes) * (_TRIAL_BYTES + n_layers * _ENTRY_BYTES + 50 * n_samples)
    return Price(n_calls * timing.seconds_per_call, n_calls, 2 * weights_bytes, disk_bytes)


@dataclass(frozen=True, slots=True)
class NoKnobs:
    """A method that has nothing to set."""


NO_KNOBS = NoKnobs()


@dataclass(frozen=True, slots=True)
class Task(Generic[Knobs]):
    """What a method is asked for: a recipe under a budget.

    `is_checked` tells whether what it claims is measured, `n_samples` how many it looks at (0: its own number), or
    `on` what plan of samples, whatever the lab's are. `number_format` is that of `uniform:kmc4`.
    """

    knobs: Knobs
    budget: BudgetSettings = NO_BUDGET
    is_checked: bool = True
    n_samples: int = 0
    on: Sampling | None = None
    number_format: Format | None = None


@dataclass(frozen=True)
class Finding:
    """What a method has found: the bank that it is about, a table of costs, a recipe, and what else it can tell.

    `evidence` is for the report, by kind of record; `notes` are for people. There may be no recipe, with a note why.
    """

    bank: Bank
    table: SensitivityTable
    allocation: Allocation | None = None
    evidence: Mapping[type, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def decided(self) -> Allocation:
        """The recipe; a StateError where there is none."""
        if self.allocation is None:
            raise StateError(f"the method {self.table.method} ended without a recipe: {'; '.join(self.notes)}")
        return self.allocation

    def of(self, kind: type[Evidence]) -> Evidence | None:
        """The evidence of a kind, None where there is none."""
        found = self.evidence.get(kind)
        return found if isinstance(found, kind) else None

    def need(self, kind: type[Evidence]) -> Evidence:
        """The evidence of a kind that its method always gives; a StateError where there is none."""
        found = self.of(kind)
        if found is None:
            raise StateError(f"the method {self.table.method} ended without {kind.__name__}; this is a fault of Sedimo")
        return found

    def with_evidence(self, *records: object) -> Finding:
        """The same with more to tell."""
        return replace(self, evidence={**self.evidence, **{type(one): one for one in records}})


def plan_of(lab: Lab, task: Task[Any], least: int = 0) -> Sampling:
    """The samples that a task says, else at least so many, the searched ones among them."""
    return task.on or lab.seeds.more(task.n_samples or least)


def refuse_blind(name: str, formats: Iterable[Format]) -> None:
    """Refuses several widths of activations for a method that sees weights alone, by an InputError."""
    widths = sorted({f.activation_bits for f in formats})
    if len(widths) > 1:
        raise InputError(
            f"method {name!r} sees weights alone and cannot choose among activations of {widths} bits: use "
            "another method (orthogonality: with --importance-of bits), or one width with --act"
        )


@dataclass(frozen=True)
class Method(Generic[Knobs]):
    """One way to find out which weights may lose bits, and what others must know to use it.

    What it does: `measure` gives the table of costs and the bank that it is about, `decide` the recipe under the task's
    budget (by default that of least total cost, with proof). `knobs` is the record of what people may set for it,
    `compared` how it is set where methods are compared. `price` tells beforehand what both take (nothing worth telling
    by default), `price_of_prior` what measuring on a plan takes where formats are fitted already. `refuse` looks at a
    task beside the formats before anything is loaded; `prepare` refuses what shows only beside the bank and the study.
    A method that stands for others says by `resolve` for which.

    What it needs: whether it `runs_pipeline`. One that `is_blind` sees weights alone and cannot choose among widths of
    activations.

    What it gives: whether its costs predict the noise of final latents (`is_noise`), and how many random recipes show
    whether they add up (`n_random`, 0: they are not meant to). Its table only describes what was decided otherwise, by
    weight error, where `is_described`.

    Where it is offered: `compare` gives it formats of one `family` alone if its source knows no other. `is_peer`: it is
    another tool's, with formats of its own. `takes_format`: it may be written with a format, `uniform:kmc4`;
    `needs_format`: it must, and is not compared. `contains` are methods whose tables it is made of, `treatments` those
    that come with it unless people say no. Plans tell it by the name `told_as`, if there is one.
    """

    name: str
    words: Words
    measure: Callable[[Lab, Task[Knobs]], Finding]
    decide: Callable[[Lab, Task[Knobs], Finding], Finding] = lambda _lab, task, finding: replace(
        finding, allocation=allocated(finding.table, task.budget)
    )
    knobs: type[Knobs] = NoKnobs  # type: ignore[assignment]  # the one default of a generic field
    compared: Knobs | None = None
    price: Callable[[Lab, Task[Knobs]], Price] = lambda _lab, _task: Price()
    price_of_prior: Callable[[SearchSpace, CallTiming], Price] = lambda _space, _timing: Price()
    refuse: Callable[[Task[Knobs], Sequence[Format]], None] = lambda _task, _formats: None
    prepare: Callable[[Lab, Task[Knobs]], None] = lambda _lab, _task: None
    resolve: Callable[[Lab, Task[Knobs]], Resolved] | None = None
    runs_pipeline: bool = True
    is_blind: bool = False
    is_noise: bool = False
    n_random: int = 0
    is_described: bool = False
    family: str = ""
    is_peer: bool = False
    takes_format: bool = False
    needs_format: bool = False
    contains: tuple[str, ...] = ()
    treatments: tuple[str, ...] = ()
    told_as: str = ""

    def __str__(self) -> str:
        """As people write it."""
        if not self.takes_format:
            return self.name
        return f"{self.name}:FORMAT" if self.needs_format else f"{self.name}[:FORMAT]"

    def check(self, task: Task[Knobs], formats: Sequence[Format]) -> None:
        """Refuses a task that this method cannot do with these formats, before anything is loaded, by an InputError."""
        if self.is_blind:
            refuse_blind(self.name, formats)
        self.refuse(task, formats)

    def find(self, lab: Lab, task: Task[Knobs]) -> Finding:
        """The recipe under the task's budget, with the costs behind it."""
        return self.decide(lab, task, self.measure(lab, task))


@dataclass(frozen=True)
class Resolved:
    """The method that another one stands for here, with its task, why, and what it takes."""

    method: Method[Any]
    task: Task[Any]
    reason: str
    price: Price


def listed(things: Iterable[object]) -> str:
    """The texts of several things for people."""
    names = list(map(str, things))
    return " or ".join([", ".join(names[:-1]), names[-1]])
