"""Random recipes: recipe i of a study is a function of (study seed, i) and of nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from sedimo.errors import InputError
from sedimo.quant.formats import Format
from sedimo.space import Decision, Recipe, SearchSpace

Item = TypeVar("Item")
_MAX_MOVES = 20


def random_recipe(space: SearchSpace, seed: int, index: int) -> Recipe:
    """Recipe `index` of a study: bits spread widely over the recipes, methods uniform.

    One p ~ U(0, 1) is drawn per recipe. A decision with k different bit widths takes width number
    Binomial(k - 1, 1 - p), counted from the lowest: with two widths, the low one with probability p, as in the
    paper. Among the formats of that width one is drawn uniformly.

    Source:
        Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), sampling of the training set, for {3, 4} bits.
    """
    uniform = _uniform(seed, index)
    return space.recipe(_draw(space, uniform, uniform.random()))


def random_recipe_near(space: SearchSpace, bits: float, seed: int, index: int, *, tolerance: float = 0.02) -> Recipe:
    """A random recipe whose paper bits are within `tolerance` of `bits`.

    It is drawn like `random_recipe`, then random decisions are drawn again as long as that brings the average
    nearer to the goal.

    Raises:
        InputError: no recipe that near was found.
    """
    uniform = _uniform(seed, index)
    choice = _draw(space, uniform, uniform.random())
    total = sum(d.paper_bytes(choice[d.name]) for d in space.decisions)
    goal, allowed = bits * space.params / 8, tolerance * space.params / 8
    for _ in range(_MAX_MOVES * max(50, len(space.decisions))):
        if abs(total - goal) <= allowed:
            return space.recipe(choice)
        decision = _pick(uniform, space.decisions)
        other = _pick(uniform, decision.formats)
        moved = total + decision.paper_bytes(other) - decision.paper_bytes(choice[decision.name])
        if abs(moved - goal) < abs(total - goal):
            choice[decision.name], total = other, moved
    raise InputError(
        f"found no random recipe of {bits} +- {tolerance} bits; the last one has {_bits(space, total):.3f}"
    )


def _uniform(seed: int, index: int) -> random.Random:
    """Only `.random()` of it is used: Python promises that sequence for a text seed on every version."""
    return random.Random(f"sedimo recipe {seed} {index}")


def _draw(space: SearchSpace, uniform: random.Random, p: float) -> dict[str, Format]:
    return {decision.name: _draw_format(decision, uniform, p) for decision in space.decisions}


def _draw_format(decision: Decision, uniform: random.Random, p: float) -> Format:
    widths = sorted({f.bits for f in decision.formats})
    width = widths[sum(uniform.random() >= p for _ in widths[1:])]
    return _pick(uniform, [f for f in decision.formats if f.bits == width])


def _pick(uniform: random.Random, items: Sequence[Item]) -> Item:
    return items[int(uniform.random() * len(items))]


def _bits(space: SearchSpace, total_bytes: int) -> float:
    return 8 * total_bytes / space.params
