"""Random recipes: recipe i of a study is a function of (study seed, i) and of nothing else.

Two samplers. `paper` draws the share of low bits, so that recipes differ mostly in how many bits they have.
`stratified` spreads recipes evenly over bands of bits and lets the *placement* of the bits differ as much as it can:
whole operations and whole blocks are favoured or starved together, so that few trials tell them apart.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypeVar, get_args

from sedimo.errors import InputError
from sedimo.quant.formats import Format
from sedimo.settings import one_of
from sedimo.space import Decision, Recipe, SearchSpace

Item = TypeVar("Item")
SamplerName = Literal["paper", "stratified"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
TOLERANCE_BITS = 0.02
MOST_BITS = 5.0  # beyond it nearly nothing is lost, and nothing is learned
_MAX_MOVES = 20
_BISECTIONS = 30
_STEP = 0.7  # between two widths, in standard deviations of one preference
_METHOD_STRENGTH = 1.5
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, mod 1, fill an interval evenly at every length
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Exploration:
    """What the random recipes of a study are a function of, besides their number.

    `low_bits` to `high_bits` is the range of `stratified`, in paper bits; None: all that the formats allow, up to 5.
    """

    seed: int
    space: SearchSpace
    sampler: SamplerName = "paper"
    low_bits: float | None = None
    high_bits: float | None = None

    def __post_init__(self) -> None:
        """Checks them."""
        one_of(SAMPLERS)(self.sampler, "sampler")
        if self.sampler == "paper" and (self.low_bits is not None or self.high_bits is not None):
            raise InputError("the sampler 'paper' spreads bits by itself: leave the range of bits out")
        if self.sampler == "stratified" and not self.range_bits[0] <= self.range_bits[1]:
            low, high = self.range_bits
            raise InputError(f"a range of bits must rise, within what the formats allow; got {low:.3f} to {high:.3f}")

    @property
    def range_bits(self) -> tuple[float, float]:
        """Least and most average bits that are drawn."""
        least, most = possible_bits(self.space)
        low = least if self.low_bits is None else max(least, self.low_bits)
        usual = MOST_BITS if low < MOST_BITS else most
        return low, min(most, usual if self.high_bits is None else self.high_bits)

    def recipe(self, index: int) -> Recipe:
        """Recipe `index`."""
        if self.sampler == "paper":
            return random_recipe(self.space, self.seed, index)
        return stratified_recipe(self.space, self.range_bits, self.seed, index)


def possible_bits(space: SearchSpace) -> tuple[float, float]:
    """The least and the most paper bits of any recipe of a space."""
    sizes = [[decision.paper_bytes(f) for f in decision.formats] for decision in space.decisions]
    return 8 * sum(map(min, sizes)) / space.params, 8 * sum(map(max, sizes)) / space.params


def random_recipe(space: SearchSpace, seed: int, index: int) -> Recipe:
    """Recipe `index` of a study: bits spread widely over the recipes, methods uniform.

    One p ~ U(0, 1) is drawn per recipe. A decision with k different bit widths takes width number
    Binomial(k - 1, 1 - p), counted from the lowest: with two widths, the low one with probability p, as in the
    paper. Among the formats of that width one is drawn uniformly.

    Source:
        Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), sampling of the training set, for {3, 4} bits.
    """
    return space.recipe(_draw(space, _uniform(seed, index)))


def random_recipe_near(
    space: SearchSpace, bits: float, seed: int, index: int, *, tolerance: float = TOLERANCE_BITS
) -> Recipe:
    """A random recipe whose paper bits are within `tolerance` of `bits`: decisions of a `random_recipe` drawn again."""
    uniform = _uniform(seed, index)
    choice = _draw(space, uniform)
    if not _approach(space, choice, bits, tolerance, uniform):
        raise InputError(f"found no random recipe of {bits} +- {tolerance} bits; the last has {_size(space, choice):g}")
    return space.recipe(choice)


def stratified_recipe(space: SearchSpace, range_bits: tuple[float, float], seed: int, index: int) -> Recipe:
    """Recipe `index` of a study that spreads average bits evenly over a range and varies their placement.

    Each operation type, each block and each decision draws a preference from N(0, 1); a decision's place is their
    sum, and widths are given out by place so that the average meets the recipe's goal. Each operation type prefers a
    method, more or less strongly. Goals of successive recipes fill the range evenly, whatever their number.
    """
    uniform, drawn = _uniform(seed, index), dict[str, float]()
    goal = range_bits[0] + (range_bits[1] - range_bits[0]) * ((0.5 + _GOLDEN * index) % 1.0)

    def normal(name: str) -> float:
        if name not in drawn:
            drawn[name] = _NORMAL.inv_cdf(_open_unit(uniform))
        return drawn[name]

    def place(decision: Decision) -> float:
        own = normal(f"decision {decision.name}")
        return normal(f"operation {decision.operation}") + normal(f"block {decision.block}") + own

    def liking(decision: Decision, number_format: Format) -> float:
        method = f"{number_format.family} {number_format.group_size}"
        shared = normal(f"method {method} of {decision.operation}")
        gumbel = -math.log(-math.log(min(_open_unit(uniform), 1 - 2**-53)))
        return _METHOD_STRENGTH * shared + gumbel

    def placed(threshold: float) -> dict[str, Format]:
        """Widths by place: the higher a decision stands above the threshold, the more bits it has."""
        found = {}
        for name, formats in ranked.items():
            step = math.floor((places[name] - threshold) / _STEP + (len(formats) - 1) / 2 + 0.5)
            found[name] = formats[min(max(step, 0), len(formats) - 1)]
        return found

    places = {d.name: place(d) for d in space.decisions}
    ranked = {  # one format per width, by rising width
        d.name: [max(formats, key=functools.partial(liking, d)) for formats in _by_width(d)] for d in space.decisions
    }
    reach = _STEP * max(len(formats) for formats in ranked.values())
    low, high = min(places.values()) - reach, max(places.values()) + reach
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_large = _size(space, placed(middle)) > goal
        low, high = (middle, high) if is_large else (low, middle)
    choice = placed(high)
    _approach(space, choice, goal, TOLERANCE_BITS, uniform)  # where formats are coarse, as near as they allow
    return space.recipe(choice)


def _approach(
    space: SearchSpace, choice: dict[str, Format], bits: float, tolerance: float, uniform: random.Random
) -> bool:
    """Draws decisions of `choice` again while that brings the average nearer; whether it came near enough."""
    total = sum(d.paper_bytes(choice[d.name]) for d in space.decisions)
    goal, allowed = bits * space.params / 8, tolerance * space.params / 8
    for _ in range(_MAX_MOVES * max(50, len(space.decisions))):
        if abs(total - goal) <= allowed:
            return True
        decision = _pick(uniform, space.decisions)
        other = _pick(uniform, decision.formats)
        moved = total + decision.paper_bytes(other) - decision.paper_bytes(choice[decision.name])
        if abs(moved - goal) < abs(total - goal):
            choice[decision.name], total = other, moved
    return False


def _size(space: SearchSpace, choice: Mapping[str, Format]) -> float:
    return 8 * sum(d.paper_bytes(choice[d.name]) for d in space.decisions) / space.params


def _open_unit(uniform: random.Random) -> float:
    return max(uniform.random(), 2**-60)


def _uniform(seed: int, index: int) -> random.Random:
    """Only `.random()` of it is used: Python promises that sequence for a text seed on every version."""
    return random.Random(f"sedimo recipe {seed} {index}")


def _draw(space: SearchSpace, uniform: random.Random) -> dict[str, Format]:
    """One p, and formats by it (see `random_recipe`)."""
    p, found = uniform.random(), {}
    for decision in space.decisions:
        widths = _by_width(decision)
        found[decision.name] = _pick(uniform, widths[sum(uniform.random() >= p for _ in widths[1:])])
    return found


def _by_width(decision: Decision) -> list[list[Format]]:
    """Formats of each width of weights, by rising width."""
    return [[f for f in decision.formats if f.bits == bits] for bits in sorted({f.bits for f in decision.formats})]


def _pick(uniform: random.Random, items: Sequence[Item]) -> Item:
    return items[int(uniform.random() * len(items))]
