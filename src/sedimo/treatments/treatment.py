"""What a treatment is: everything about one way to make weights, inputs or codes better, before or after the decision.

A treatment lives in one file, which makes one constant of the class `Treatment`; `treatments.TREATMENTS` lists them
all. Help, dry run, checks and report read that tuple, and nothing else names a treatment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sedimo.allocation.solve import Allocation
from sedimo.bank import Bank
from sedimo.lab.bench import InForce
from sedimo.lab.lab import Lab
from sedimo.methods.method import Price, Words
from sedimo.quant.formats import Format
from sedimo.quant.tensor import QuantizedTensor

Knobs = TypeVar("Knobs")


class Finished(Protocol):
    """What a treatment after the decision has made of a recipe's weights. Its text says for people what was done."""

    @property
    def weights(self) -> Mapping[str, QuantizedTensor]:
        """The packed weights by layer."""

    def as_json(self) -> Mapping[str, object]:
        """What scripts are told, by key."""


@dataclass(frozen=True)
class Treatment(Generic[Knobs]):
    """One way to make something better, before the decision (`apply`) or after it (`finish`).

    `apply` measures what it needs and gives what is then in force (`lab.treated`). `finish` gives the weights of a
    recipe that was decided on. `refuse` looks at its knobs beside the formats, before anything is measured. People ask
    for a treatment by setting any of its `knobs`, unless those say that it is not wanted. `excludes` are the treatments
    that it cannot be together with.
    """

    name: str
    words: Words
    knobs: type[Knobs]
    apply: Callable[[Lab, Knobs], InForce | None] | None = None
    finish: Callable[[Lab, Knobs, Bank, Allocation], Finished] | None = None
    price: Callable[[Lab, Knobs], Price] = lambda _lab, _knobs: Price()
    refuse: Callable[[Knobs, Sequence[Format]], None] = lambda _knobs, _formats: None
    is_wanted: Callable[[Knobs], bool] = lambda _knobs: True
    excludes: tuple[str, ...] = ()
