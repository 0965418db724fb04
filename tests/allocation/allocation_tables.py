"""Small tables for the tests of allocation: by hand, random, and by hypothesis."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.quant.formats import FP16, Format, paper_bytes, stored_bytes

FORMATS = tuple(Format.parse(t) for t in ("uaq2", "kmc2", "uaq3", "kmc3", "uaq4", "kmc4", "uaq6", "fp16"))


def table_of(entries: list[Cost], params: dict[str, int]) -> SensitivityTable:
    names = {name: (name,) for name in params}
    words = dict.fromkeys(params, "op")
    return SensitivityTable("error", "relative noise power", "toy", tuple(entries), names, words, words, params, {})


def random_table(n_decisions: int, seed: int, formats: tuple[Format, ...] = FORMATS) -> SensitivityTable:
    """Costs that fall by about 6 dB per bit, with noise, over several decades."""
    rng = np.random.default_rng(seed)
    entries, params = [], {}
    for i in range(n_decisions):
        name, shape = f"layer{i}", tuple(int(v) for v in rng.integers(8, 200, 2))
        params[name] = shape[0] * shape[1]
        level = 10 ** rng.normal(-5, 1)
        for f in formats:
            cost = level * 4.0**-f.bits * np.exp(rng.normal(0, 0.4)) if f != FP16 else 0.0
            sizes = paper_bytes(f, shape), stored_bytes(f, shape)
            entries.append(Cost(name, f, float(cost), float(cost) * 0.1, 8, *sizes, params[name] * f.bits * 16))
    return table_of(entries, params)


def scaled(table: SensitivityTable, factor: float) -> SensitivityTable:
    return replace(table, costs=tuple(replace(c, cost=c.cost * factor) for c in table.costs))


@st.composite
def tiny_tables(draw: st.DrawFn, n_max: int = 5) -> SensitivityTable:
    """Up to five decisions with up to five formats, sizes and costs without any order, ties included."""
    entries, params = [], {}
    for i in range(draw(st.integers(1, n_max))):
        name = f"d{i}"
        params[name] = draw(st.integers(1, 40))
        for f in draw(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=5, unique=True)):
            cost = draw(st.floats(-2, 5, width=32) | st.integers(0, 3).map(float))
            size, bops = draw(st.integers(1, 30)), draw(st.integers(0, 30))
            entries.append(Cost(name, f, cost, 0.0, 0, size, size + draw(st.integers(0, 5)), bops))
    return replace(table_of(entries, params), attention_bops=draw(st.sampled_from([0, 7])))


def brute_force(table: SensitivityTable, size_bytes: int | None, bops: int | None = None) -> float | None:
    """The least total cost over all choices of at most so many paper bytes and operations; None when none fits."""
    best = None
    for choice in itertools.product(*table.by_decision.values()):
        fits = size_bytes is None or sum(c.paper_bytes for c in choice) <= size_bytes
        if fits and (bops is None or table.attention_bops + sum(c.bops for c in choice) <= bops):
            total = sum(c.cost for c in choice)
            best = total if best is None else min(best, total)
    return best
