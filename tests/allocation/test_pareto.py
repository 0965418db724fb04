"""Pruning against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from sedimo.allocation.program import pareto


def by_definition(cost, size, ties):
    """All pairs: an option goes when another is as good everywhere, and better somewhere or earlier by name."""
    keys = [(*size[:, i].tolist(), float(cost[i]), *ties[:, i].tolist()) for i in range(len(cost))]
    kept = []
    for i in range(len(cost)):
        others = (j for j in range(len(cost)) if j != i and cost[j] <= cost[i] and (size[:, j] <= size[:, i]).all())
        beaten = any((cost[j], *size[:, j]) != (cost[i], *size[:, i]) or keys[j] < keys[i] for j in others)
        if np.isfinite(cost[i]) and not beaten:
            kept.append(i)
    return sorted(kept, key=lambda i: keys[i])


@st.composite
def options(draw):
    n, n_resources = draw(st.integers(0, 40)), draw(st.integers(1, 2))
    rng, top = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.sampled_from([3, 12, 1000]))
    cost = rng.integers(-top, top, n) * draw(st.sampled_from([1e-30, 1.0, 1e30]))
    cost[rng.random(n) < 0.1] = np.inf
    return cost, rng.integers(0, top, (n_resources, n)), np.array([rng.permutation(n) // 2, np.arange(n)])


@examples(400)
@given(options())
def test_what_stays_is_what_no_other_option_beats(drawn):
    assert pareto(*drawn).tolist() == by_definition(*drawn)


@pytest.mark.timeout(30)
def test_many_options_that_all_stay_take_no_square_of_time():
    n = 200_000
    bytes_, bops = np.arange(n), np.random.default_rng(0).permutation(n)
    kept = pareto(-(bytes_ + bops).astype(np.float64), np.array([bytes_, bops]), np.arange(n)[None])
    assert kept.tolist() == list(range(n))
