"""Stratified recipes: even over a range of bits, placed by operation and block."""

from __future__ import annotations

import numpy as np
import pytest

from sedimo.errors import InputError
from sedimo.lab.exploration import MOST_BITS, TOLERANCE_BITS, Exploration, possible_bits
from toy_pipeline import ToyAdapter, toy_space


def bits_of(exploration, n):
    return np.array([exploration.space.paper_bits(exploration.recipe(i)) for i in range(n)])


def test_bits_fill_the_range_evenly_at_every_length():
    space = toy_space(ToyAdapter().denoiser, "uaq3,uaq4,uaq5,uaq6,uaq8")
    least, most = possible_bits(space)
    low, high = least + 0.5, least + 2.5
    exploration = Exploration(0, space, "stratified", low, high)
    for n in (8, 20):
        found = np.sort(bits_of(exploration, n))
        assert found[0] < low + 0.4
        assert found[-1] > high - 0.4
        assert np.diff(found).max() < 3 * (high - low) / n
    assert most > high


def test_recipes_are_a_function_of_seed_and_index():
    space = toy_space(ToyAdapter().denoiser, "uaq3,uaq4,uaq6")
    one, same, other = (Exploration(seed, space, "stratified") for seed in (1, 1, 2))
    assert [one.recipe(i).key for i in range(6)] == [same.recipe(i).key for i in range(6)]
    assert [one.recipe(i).key for i in range(6)] != [other.recipe(i).key for i in range(6)]
    assert len({one.recipe(i).key for i in range(30)}) > 20


def test_formats_that_all_need_more_than_five_bits_have_a_range():
    space = toy_space(ToyAdapter().denoiser, "uaq6,uaq8")
    low, high = Exploration(0, space, "stratified").range_bits
    assert low > MOST_BITS
    assert high == possible_bits(space)[1]
    assert len({Exploration(0, space, "stratified").recipe(i).key for i in range(20)}) > 10


def test_ends_of_the_range_are_reached_by_placement():
    """With many widths everything low or everything high needs no luck."""
    space = toy_space(ToyAdapter().denoiser, "uaq2,uaq3,uaq4,uaq5,uaq6,uaq7,uaq8")
    least, most = possible_bits(space)
    for goal in (least, most):
        exploration = Exploration(0, space, "stratified", goal, goal)
        assert np.allclose(bits_of(exploration, 5), goal, atol=TOLERANCE_BITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "best"}, "sampler must be one of paper, stratified"),
        ({"sampler": "paper", "low_bits": 3.0}, "spreads bits by itself"),
        ({"sampler": "stratified", "low_bits": 5.0, "high_bits": 4.0}, "must rise"),
    ],
)
def test_what_is_no_range_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        Exploration(0, toy_space(ToyAdapter().denoiser, "uaq3,uaq8"), **change)
