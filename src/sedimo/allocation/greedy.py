"""Choices by single exchanges: make a choice fit, and spend what is left.

These promise nothing about the distance from the optimum; they start the exact search, mend its answers,
and stand in for it by name.
"""

from __future__ import annotations

import numpy as np

from sedimo.allocation.problem import FloatArray, IntArray, Problem

_FREE = 1e-15  # an exchange that takes no room counts as taking this share of a limit


def repair(problem: Problem[object], choice: IntArray) -> IntArray | None:
    """Exchanges options until the choice keeps the limits, cheapest relief first.

    Returns None where no single exchange helps any more; with one limit that means that nothing fits.
    """
    choice = choice.copy()
    rows = np.arange(len(choice))
    while not problem.fits(choice):
        used = problem.used(choice)
        change = problem.size - problem.size[:, rows, choice][..., None]
        relief = _violation(problem, used) - _violation(problem, used[:, None, None] + change)
        rise = problem.cost - problem.cost[rows, choice][:, None]
        helps = (relief > 0) & np.isfinite(problem.cost)
        if not helps.any():
            return None
        price = np.where(helps, rise, np.inf) / np.where(helps, relief, 1.0)
        row, column = np.unravel_index(int(price.argmin()), price.shape)
        choice[row] = column
    return choice


def fill(problem: Problem[object], choice: IntArray) -> IntArray:
    """Exchanges options for cheaper ones that still fit, most saved per room first, until none is left."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    room_unit = np.maximum(problem.limit, 1)[:, None, None]
    while True:
        change = problem.size - problem.size[:, rows, choice][..., None]
        left = (problem.limit - problem.used(choice))[:, None, None]
        saved = problem.cost[rows, choice][:, None] - problem.cost
        takes = (saved > 0) & (change <= left).all(axis=0)
        if not takes.any():
            return choice
        weight = (np.maximum(change, 0) / room_unit).sum(axis=0)
        gain = np.where(takes, saved, 0.0) / np.maximum(weight, _FREE)
        row, column = np.unravel_index(int(gain.argmax()), gain.shape)
        choice[row] = column


def _violation(problem: Problem[object], used: IntArray) -> FloatArray:
    """By how much limits are exceeded, relative to them and summed; `used` is `[R, ...]`."""
    over = np.maximum(used - problem.limit.reshape(-1, *[1] * (used.ndim - 1)), 0)
    unit = np.maximum(problem.limit, 1).reshape(-1, *[1] * (used.ndim - 1))
    return np.asarray((over / unit).sum(axis=0), dtype=np.float64)
