"""Sedimo: one table per method from the search seeds, and the recipe of each budget in stored bits.

The budget is bytes of what replaces the weights, so a recipe never takes more than the peer it is compared with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import sedimo
from _peers.weights import Layers, Quantized, QuantizedLayer
from sedimo.allocation.problem import Allocation
from sedimo.allocation.solve import allocate
from sedimo.api.finals import hold_finals
from sedimo.api.measuring import measure_table
from sedimo.api.opening import Opened, open_source
from sedimo.api.order import BudgetOrder, Compute, Order, SamplingOrder
from sedimo.api.planning import MeasuredMethod
from sedimo.api.predicting import know
from sedimo.api.search_order import SearchOrder
from sedimo.api.searching import Measuring, search
from sedimo.bank import Bank
from sedimo.cli.console import ConsoleProgress
from sedimo.measurement.study import Study
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.quant.tensor import QuantizedTensor
from sedimo.runtime.weights import replace_weights
from sedimo.sensitivity.table import SensitivityTable

PACKAGE = "sedimo"
SINGLE_TABLE_METHODS = ("error", "jacobian")  # do not depend on the budget
SEARCH, SEARCH_DTYPE = "gnn", "bf16"
N_TRIALS, N_ROUNDS = 300, 3
_MEASURING_SOURCES = ("quant", "pipelines", "measurement", "sensitivity", "bank.py", "space.py")


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

    def __init__(self, source: str, folder: Path, sampling: SamplingOrder, layers: Layers) -> None:
        self.source, self.sampling, self.layers = source, sampling, layers
        self._folder = folder / f"sedimo-{_source_digest()[:16]}"
        self._tables: dict[tuple[str, int], tuple[Bank, SensitivityTable]] = {}

    def allocation(self, method: MeasuredMethod | str, goal: Goal) -> tuple[Bank, Allocation]:
        """The recipe of least cost in at most the goal's bytes, or what the search by measured recipes finds there."""
        if method == SEARCH:
            return self._searched(goal)
        bank, table = self._table(method, goal)
        return bank, allocate(table, budget_bytes=goal.n_bytes)

    def _searched(self, goal: Goal) -> tuple[Bank, Allocation]:
        with Study(self._folder) as study:
            bank, _ = self._table("jacobian", goal)
            known = know(
                self._first.pipe, self._first.graph, bank, study, sampling=self._plan, progress=ConsoleProgress()
            )
            measuring = Measuring.on(self._sampled, bank, study, self._plan, progress=ConsoleProgress())
            finals = Measuring.on(
                self._sampled, bank, study, SamplingOrder().deciding(self._sampled), progress=ConsoleProgress()
            )
            order = SearchOrder(N_TRIALS, N_ROUNDS)
            budget = BudgetOrder(n_bytes=goal.n_bytes)
            return bank, hold_finals(known, search(known, measuring, order, budget), budget, finals).allocation

    @cached_property
    def _sampled(self) -> DiffusersPipeline:
        return sedimo.load(self.source, dtype=SEARCH_DTYPE)

    @cached_property
    def _plan(self) -> Sampling:
        return self._sampled.default_sampling(range(self.sampling.n_seeds), self.sampling.n_steps)

    def _table(self, method: MeasuredMethod, goal: Goal) -> tuple[Bank, SensitivityTable]:
        key = (method, 0 if method in SINGLE_TABLE_METHODS else goal.n_bytes)
        if key not in self._tables:
            with Study(self._folder) as study:
                found = measure_table(self._opened(goal), method, study, ConsoleProgress())
            self._tables[key] = (found.bank, found.table)
        return self._tables[key]

    def _opened(self, goal: Goal) -> Opened:
        budget = BudgetOrder(stored_bits=8 * goal.n_bytes / self.layers.n_distinct_weights)
        return replace(self._first, order=replace(self._first.order, budget=budget))

    @cached_property
    def _first(self) -> Opened:
        order = Order(
            self.source,
            None,
            BudgetOrder(stored_bits=4.0),
            method="jacobian",
            formats="wide",
            sampling=self.sampling,
            compute=Compute("fp32", "cpu"),
        )
        opened = open_source(order)
        if opened.space.params != self.layers.n_distinct_weights:
            raise ValueError(f"{opened.space.params} weights in the space, {self.layers.n_distinct_weights} counted")
        return opened


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
