"""Sedimo: one table per method from the search seeds, and the recipe of each budget in stored bits.

The budget is bytes of what replaces the weights, so a recipe never takes more than the peer it is compared with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import sedimo
from _peers.weights import Layers, Quantized, QuantizedLayer
from sedimo.allocation.budget import BudgetSettings
from sedimo.allocation.solve import Allocation
from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Bank
from sedimo.checkpoint.weights import replace_weights
from sedimo.cli.console import ConsoleProgress
from sedimo.lab.bench import Compute
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.methods import method_named
from sedimo.methods.method import Task
from sedimo.methods.predictor.study import measure_background
from sedimo.methods.search import SearchSettings, hold_final, search
from sedimo.quant.tensor import QuantizedTensor

PACKAGE = "sedimo"
SINGLE_TABLE_METHODS = ("error", "jacobian")  # do not depend on the budget
SEARCH, SEARCH_DTYPE = "gnn", "bf16"
N_TRIALS, N_ROUNDS = 300, 3
_MEASURING_SOURCES = ("quant", "pipelines", "lab", "methods", "bank.py", "space.py")


@dataclass(frozen=True, slots=True)
class Goal:
    """A budget: so many bytes of stored weights, and what to call it."""

    name: str
    n_bytes: int


def goals(bits: Sequence[float], layers: Layers) -> tuple[Goal, ...]:
    """Budgets of so many stored bits per distinct weight."""
    return tuple(Goal(f"{b:g}", int(b * layers.n_distinct_weights / 8)) for b in bits)


class Searches:
    """Tables and banks of one denoiser; what was measured is kept in `folder` and not measured again."""

    def __init__(self, source: str, folder: Path, sampling: SamplingSettings, layers: Layers) -> None:
        self.source, self.sampling, self.layers = source, sampling, layers
        self._folder = folder / f"sedimo-{_source_digest()[:16]}"
        self._tables: dict[tuple[str, int], tuple[Bank, SensitivityTable]] = {}

    def allocation(self, method: str, goal: Goal) -> tuple[Bank, Allocation]:
        """The recipe of least cost in at most the goal's bytes, or what the search by measured recipes finds there."""
        if method == SEARCH:
            return self._searched(goal)
        bank, table = self._table(method, goal)
        return bank, sedimo.allocate(table, budget_bytes=goal.n_bytes)

    def _searched(self, goal: Goal) -> tuple[Bank, Allocation]:
        known, budget = measure_background(self._lab), BudgetSettings(n_bytes=goal.n_bytes)
        found = search(self._sampled, known, SearchSettings(N_TRIALS, N_ROUNDS), budget)
        return self._lab.bank, hold_final(self._sampled, known, found, budget).allocation

    def _table(self, method: str, goal: Goal) -> tuple[Bank, SensitivityTable]:
        key = (method, 0 if method in SINGLE_TABLE_METHODS else goal.n_bytes)
        if key not in self._tables:
            one, _ = method_named(method)
            finding = one.measure(self._lab, Task(one.knobs(), BudgetSettings(n_bytes=goal.n_bytes), is_checked=False))
            self._tables[key] = (finding.bank, finding.table)
        return self._tables[key]

    @cached_property
    def _lab(self) -> sedimo.Lab:
        found = sedimo.Lab(
            self.source,
            store=self._folder,
            sampling=self.sampling,
            compute=Compute("fp32", "cpu"),
            progress=ConsoleProgress(),
        )
        if found.space.params != self.layers.n_distinct_weights:
            raise ValueError(f"{found.space.params} weights in the space, {self.layers.n_distinct_weights} counted")
        return found

    @cached_property
    def _sampled(self) -> Lab:
        """The same in the dtype that recipes are measured in."""
        exact, pipe = self._lab, sedimo.load(self.source, dtype=SEARCH_DTYPE)
        more = {"graph": exact.graph, "study": exact.study, "sampling": self.sampling, "progress": exact.progress}
        return Lab(pipe, exact.bank, **more)


def quantize(denoiser: nn.Module, bank: Bank, allocation: Allocation) -> Quantized:
    """The recipe's packed weights, and `denoiser`, which is consumed, holding them."""
    packed = bank.quantize(allocation.recipe)
    replace_weights(denoiser, {n: w.to(torch.float32) for n, w in packed.items()})
    facts = {} if allocation.status == "optimal" else {"status": str(allocation.status)}
    return Quantized({n: _read(w) for n, w in packed.items()}, denoiser, shares_ties=True, facts=facts)


def _read(weight: QuantizedTensor) -> QuantizedLayer:
    formats = "+".join(str(f) for f in weight.formats)
    plain = weight.to(torch.float32).dequantize()
    return QuantizedLayer(plain.detach(), weight.stored_bytes, formats)


def _source_digest() -> str:
    """Changes when the code that measures does: what an older one measured is then not reused."""
    total = hashlib.sha256()
    for path in _sources(Path(sedimo.__file__).parent):
        total.update(path.read_bytes())
    return total.hexdigest()


def _sources(root: Path) -> Iterator[Path]:
    for name in _MEASURING_SOURCES:
        place = root / name
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]
