"""Block curves as recipes, and which blocks stay at 16 bits by each rule."""

from __future__ import annotations

import math

import pytest

from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph, Node
from sedimo.methods.hybrid import (
    BlockRow,
    KeepSettings,
    all_but_one,
    blocks_of,
    extra_bytes_of,
    first_blocks,
    hybrid_recipe,
    sensitive_blocks,
)
from sedimo.metrics.estimate import Estimate
from sedimo.quant.formats import FP16, Format
from sedimo.space import search_space

UAQ4 = Format.parse("uaq4")
LAYERS = {"embed": "", "a.q": "a", "a.k": "a", "b.q": "b", "out": ""}
SPACE = search_space(
    DenoiserGraph("Toy", tuple(Node(n, "layer", "op", b, 10, "Linear", (64, 64)) for n, b in LAYERS.items()), (), ()),
    "uaq4,fp16",
)


def row(block, gain, extra_bytes=100, half=0.1):
    estimate = Estimate(gain, half / 2, gain - half, gain + half, 8)
    return BlockRow(block, (block,), 10, extra_bytes, estimate, estimate)


ROWS = (row("embed", 0.05), row("a", 2.0, 1000), row("b", 0.5, 100), row("out", 1.5, 10))


def quantized(recipe):
    return {name for name, entry in recipe.layers.items() if entry != FP16}


def test_layers_outside_blocks_are_blocks_of_their_own():
    assert {name: [d.name for d in members] for name, members in blocks_of(SPACE).items()} == {
        "embed": ["embed"],
        "a": ["a.q", "a.k"],
        "b": ["b.q"],
        "out": ["out"],
    }


def test_the_progressive_curve_grows_block_by_block():
    found = [quantized(recipe) for recipe in first_blocks(SPACE, UAQ4)]
    assert found == [{"embed"}, {"embed", "a.q", "a.k"}, {"embed", "a.q", "a.k", "b.q"}, set(LAYERS)]


def test_the_other_curve_leaves_out_one_block_at_a_time():
    left_out = [set(LAYERS) - quantized(recipe) for recipe in all_but_one(SPACE, UAQ4)]
    assert left_out == [{"embed"}, {"a.q", "a.k"}, {"b.q"}, {"out"}]


def test_a_hybrid_recipe_keeps_blocks_at_16_bits():
    assert quantized(hybrid_recipe(SPACE, UAQ4, ["a", "out"])) == {"embed", "b.q"}
    with pytest.raises(InputError, match="no such block: 'c'"):
        hybrid_recipe(SPACE, UAQ4, ["c"])


def test_a_format_that_no_layer_takes_is_refused():
    with pytest.raises(InputError, match="can take kmc3"):
        first_blocks(SPACE, Format.parse("kmc3"))


def test_extra_bytes_are_what_16_bits_take_more():
    members = blocks_of(SPACE)["a"]
    saved = SPACE.paper_bytes(hybrid_recipe(SPACE, UAQ4, ["a"])) - SPACE.paper_bytes(hybrid_recipe(SPACE, UAQ4, []))
    assert extra_bytes_of(members, UAQ4) == saved > 0


@pytest.mark.parametrize(
    ("keeping", "free_bytes", "expected"),
    [
        (KeepSettings(keep_db=0.4), 0, ("a", "b", "out")),
        (KeepSettings(keep_db=0.0), 0, ("a", "b", "out")),  # the gain of embed is within its interval
        (KeepSettings(keep_db=5.0), 0, ()),
        (KeepSettings(keep=2), 0, ("a", "out")),
        (KeepSettings(keep=0), 0, ()),
        (KeepSettings(keep=9), 0, ("embed", "a", "b", "out")),
        (KeepSettings(bits=5.0), 115, ("b", "out")),  # most per byte first, what does not fit is left out
        (KeepSettings(bits=5.0), 0, ()),
        (KeepSettings(bits=5.0), 5000, ("embed", "a", "b", "out")),
        (KeepSettings(), 0, ()),
    ],
)
def test_blocks_stay_by_gain_by_number_or_by_budget(keeping, free_bytes, expected):
    assert sensitive_blocks(ROWS, keeping, free_bytes) == expected


def test_a_block_that_is_better_quantized_is_never_kept_for_a_budget():
    assert sensitive_blocks([row("a", -0.3)], KeepSettings(bits=5.0), 1000) == ()


@pytest.mark.parametrize("rule", [{"keep_db": 0.0}, {"keep": 2}, {"bits": 5.0}])
def test_blocks_that_cannot_take_the_format_and_gains_without_a_number_are_not_ranked(rule):
    rows = [row("narrow", 9.0, extra_bytes=0), row("diverged", math.nan), row("a", 2.0), row("b", 1.0)]
    assert sensitive_blocks(rows, KeepSettings(**rule), 5000) == ("a", "b")


def test_one_rule_is_enough():
    with pytest.raises(InputError, match="give one rule"):
        KeepSettings(keep_db=1.0, keep=1)
