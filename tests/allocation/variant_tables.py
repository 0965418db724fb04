"""Groups of decisions for the tests of allocation: made from tables of decisions, and as large as SDXL's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from allocation_tables import table_of, tiny_tables
from hypothesis import strategies as st

from sedimo.allocation.program import GAP
from sedimo.allocation.solve import Allocation, allocate_within, read_budget
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.allocation.variants import Variants
from sedimo.quant.formats import PAPER_FORMATS, paper_bytes, stored_bytes

# groups of SDXL by number of decisions, as Qua2SeDiMo counts them: 243 groups, 343,458 variants of six formats
SDXL_GROUPS = {4: 59 + 70 + 1, 5: 11 + 11, 2: 70, 3: 6, 1: 15}
SHAPES = ((1280, 1280), (1280, 2048), (640, 640, 3, 3), (5120, 640), (1280, 320))


@dataclass(frozen=True)
class Grouped:
    """A table of decisions, and groups of them."""

    table: SensitivityTable
    groups: tuple[Variants, ...]

    @property
    def total_params(self) -> int:
        return self.table.total_params

    def allocate(self, *, rule: str = "milp", gap: float = GAP, **budget: float) -> Allocation:
        within = read_budget(self.total_params, **budget)
        return allocate_within(self.table, within, rule=rule, gap=gap, groups=self.groups)


def columns_of(counts: Sequence[int]) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, counts))), dtype=np.int8)


def grouped(
    table: SensitivityTable, widths: Sequence[int], change: Callable[[np.ndarray], np.ndarray] = lambda cost: cost
) -> Grouped:
    """Consecutive decisions in groups of the widths given; costs are sums over decisions, then changed."""
    names, groups = iter(table.by_decision), []
    for width in widths:
        entries = {d: table.by_decision[d] for d in itertools.islice(names, width)}
        choice = columns_of([len(row) for row in entries.values()])

        def total(field, entries=entries, choice=choice):
            rows = [np.array([getattr(e, field) for e in row]) for row in entries.values()]
            return sum(row[column] for row, column in zip(rows, choice.T, strict=True))

        formats = {d: tuple(e.format for e in row) for d, row in entries.items()}
        costs = change(total("cost")), total("standard_error")
        groups.append(table.group("+".join(entries), formats, choice, *costs))
    return Grouped(table, tuple(groups))


@st.composite
def tiny_variant_tables(draw: st.DrawFn) -> Grouped:
    """Up to five decisions in groups of one to three; costs are no sums, many are equal, some forbid a variant."""
    table = replace(draw(tiny_tables(5)), attention_bops=0)
    n_left, widths = len(table.by_decision), []
    while n_left:
        widths.append(draw(st.integers(1, min(3, n_left))))
        n_left -= widths[-1]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    step, forbidden = draw(st.sampled_from([1.0, 0.01])), draw(st.sampled_from([0.0, 0.3]))

    def change(cost):
        new = np.round(rng.uniform(-2, 5, len(cost)) / step) * step
        new[rng.random(len(cost)) < forbidden] = np.inf
        new[rng.integers(len(cost))] = 1.0
        return new

    return grouped(table, widths, change)


def brute_force(table: Grouped, size_bytes: int, bops: int | None = None) -> float | None:
    """The least total cost over all choices of at most so many paper bytes; None when none fits."""
    totals = np.zeros((3, 1))
    for group in table.groups:
        rows = np.array([group.cost, group.paper_bytes, group.bops])[:, np.isfinite(group.cost)]
        totals = np.unique((totals[:, :, None] + rows[:, None, :]).reshape(3, -1), axis=1)
    fits = (totals[1] <= size_bytes) & (totals[2] <= (math.inf if bops is None else bops))
    return float(totals[0, fits].min()) if fits.any() else None


def sdxl_variants(seed: int = 0) -> Grouped:
    """Costs that fall by about 6 dB per bit, times noise of each variant, in [1e-9, 1]."""
    rng = np.random.default_rng(seed)
    entries, params, costs = [], {}, {}
    for width, n_groups in SDXL_GROUPS.items():
        choice = columns_of([len(PAPER_FORMATS)] * width)
        for i in range(n_groups):
            names = [f"w{width}.{i}.{j}" for j in range(width)]
            for name, j in zip(names, rng.integers(len(SHAPES), size=width), strict=True):
                params[name] = math.prod(SHAPES[j])
                sizes = {f: (paper_bytes(f, SHAPES[j]), stored_bytes(f, SHAPES[j])) for f in PAPER_FORMATS}
                entries += [Cost(name, f, 0.0, 0.0, 0, *sizes[f], params[name] * f.bits * 16) for f in PAPER_FORMATS]
            alone = [
                10 ** rng.normal(-4, 1) * np.array([4.0**-f.bits for f in PAPER_FORMATS]) * rng.lognormal(0, 0.3, 6)
                for _ in names
            ]
            cost = sum(row[column] for row, column in zip(alone, choice.T, strict=True))
            cost = np.clip(cost * rng.lognormal(0, 0.3, len(choice)), 1e-9, 1.0)
            costs[f"w{width}.{i}"] = dict.fromkeys(names, PAPER_FORMATS), choice, cost, 0.1 * cost
    table = table_of(entries, params)
    return Grouped(table, tuple(table.group(name, *about) for name, about in costs.items()))
