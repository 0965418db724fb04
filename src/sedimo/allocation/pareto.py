"""Which options can be part of a best choice, whatever the budget."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray


def pareto(cost: NDArray[np.float64], size: NDArray[np.int64], ties: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the options that no other dominates, by size, then cost.

    An option is dominated if another costs at most as much and takes at most as much of each resource. That
    is exact: some best choice never needs it. (The convex hull would be smaller, and loses best choices.)
    Of equal options the first by `ties` stays. An infinite cost forbids an option.

    Shapes: `cost` `[V]`, `size` `[R, V]` with one or two resources, `ties` `[T, V]`, the first row first.
    """
    order = np.lexsort((*ties[::-1], cost, *size[::-1]))
    stays = _falls(cost[order]) if len(size) == 1 else _under_the_stairs(cost[order], size[1, order])
    return np.asarray(order[stays], dtype=np.int64)


def _falls(cost: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a cost is finite and less than all before it."""
    before = np.concatenate([[np.inf], np.minimum.accumulate(cost)[:-1]])[: len(cost)]
    return cost < before


def _under_the_stairs(cost: NDArray[np.float64], size: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where a cost is finite and no earlier option has both at most the cost and at most the size.

    The least cost at each size so far is a falling staircase. It is kept in a list, option by option, because
    comparing all pairs takes minutes where all of 300,000 options stay.
    """
    stays = np.zeros(len(cost), dtype=bool)
    steps, heights = [-1], [float("inf")]  # sizes are never negative
    for i, (own, room) in enumerate(zip(cost.tolist(), size.tolist(), strict=True)):
        at = bisect_right(steps, room)
        if heights[at - 1] <= own:
            continue
        stays[i] = True
        end = at
        while end < len(heights) and heights[end] >= own:
            end += 1
        steps[at:end], heights[at:end] = [room], [own]
    return stays
