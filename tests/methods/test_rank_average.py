"""Ranks averaged over tables of any unit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tables_of_noise import CANDIDATES, SPACE

from sedimo.allocation.combine import rank_average
from sedimo.allocation.solve import allocate
from sedimo.errors import InputError
from sedimo.methods.error import error_table

ERROR = error_table(SPACE, CANDIDATES)
KEYS = tuple(ERROR.index)


def table_of(costs, method="other"):
    changed = {key: replace(ERROR.index[key], cost=float(cost)) for key, cost in zip(KEYS, costs, strict=True)}
    return replace(ERROR, method=method, unit="points", costs=tuple(changed.values()))


def costs_of(table):
    return np.array([table.index[key].cost for key in KEYS])


lists_of_costs = st.lists(st.integers(0, 30).map(float), min_size=len(KEYS), max_size=len(KEYS))


@settings(max_examples=60)
@given(lists_of_costs)
def test_tables_of_one_order_give_the_first_back_and_rising_transformations_change_nothing(costs):
    first, other = table_of(costs), ERROR
    assert costs_of(rank_average([first, table_of(np.exp(costs), "exp")])) == pytest.approx(costs)
    plain, bent = rank_average([first, other]), rank_average([first, table_of(np.sqrt(costs_of(other)), "bent")])
    assert costs_of(bent) == pytest.approx(costs_of(plain))


def test_ranks_by_hand():
    """Four choices matter, the others cost more in both tables, by the same order."""
    rest = list(range(100, 100 + len(KEYS) - 4))
    found = rank_average([table_of([1.0, 2.0, 4.0, 8.0, *rest]), table_of([7, 5, 3, 1, *rest], "reversed")])
    assert costs_of(found)[:4] == pytest.approx([3.0] * 4)  # rank 1.5 of all: between 2 and 4
    assert costs_of(found)[4:] == pytest.approx(rest)
    errors = [found.index[key].standard_error for key in KEYS]
    assert errors[0] == pytest.approx((8 - 1) / 2)  # ranks 0 and 3: 1.5 +- 1.5
    assert errors[1] == pytest.approx((4 - 2) / 2)
    assert errors[4:] == [0.0] * len(rest)
    assert (found.unit, found.method) == ("points", "rank average of other, reversed")


def test_equal_costs_share_their_rank_and_what_one_forbids_stays_forbidden():
    costs = costs_of(ERROR)
    forbidden = costs.copy()
    forbidden[0] = math.inf
    found = rank_average([ERROR, table_of(forbidden)])
    assert found.index[KEYS[0]].cost == math.inf
    zero = [key for key, cost in ERROR.index.items() if cost.cost == 0]
    assert len(zero) == 4  # fp16 of every decision
    assert all(found.index[key].cost == 0 for key in zero)
    chosen = allocate(found, bits=5.0)
    assert chosen.choice[KEYS[0][0]] != KEYS[0][1]


def test_one_table_or_other_choices_are_refused():
    with pytest.raises(InputError, match="at least two tables, got 1"):
        rank_average([ERROR])
    with pytest.raises(InputError, match="different choices"):
        rank_average([ERROR, replace(ERROR, costs=ERROR.costs[:-1])])
