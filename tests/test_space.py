"""Decisions of a graph, recipes, and their bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedimo.errors import InputError, StateError
from sedimo.graph.model import DenoiserGraph, Group, Node
from sedimo.lab.study import Study
from sedimo.quant.formats import FP16, Format
from sedimo.quant.parts import PartFormat
from sedimo.space import Recipe, search_space

KMC4, UAQ3 = Format("kmc", 4), Format("uaq", 3)


def graph_of(*shapes, ties=()):
    nodes = tuple(
        Node(f"blocks.{i}.proj", "layer", "blocks.proj", f"blocks.{i}", 100, "Linear", shape)
        for i, shape in enumerate(shapes)
    )
    edges = tuple((i, i + 1) for i in range(len(nodes) - 1))
    groups = (Group("g", "other", (nodes[0].name,), nodes[0].name, 0),)
    return DenoiserGraph("Toy", nodes, edges, groups, ties)


def test_layers_with_equal_weights_are_one_decision_stored_once():
    graph = graph_of((64, 64), (64, 64), (32, 64), ties=(("blocks.0.proj", "blocks.1.proj"),))
    space = search_space(graph, "paper")
    assert [d.layers for d in space.decisions] == [("blocks.0.proj", "blocks.1.proj"), ("blocks.2.proj",)]
    assert space.params == graph.params == 64 * 64 + 32 * 64
    assert space.decisions[0].macs == 200
    recipe = space.uniform(KMC4)
    assert set(recipe.layers) == {"blocks.0.proj", "blocks.1.proj", "blocks.2.proj"}
    assert space.paper_bytes(recipe) == (4096 // 2 + 64 * 32) + (2048 // 2 + 32 * 32)


def test_a_format_that_saves_nothing_is_dropped_with_a_note():
    space = search_space(graph_of((64, 64), (16, 4)), "kmc4,uaq4")
    assert space.decisions[0].formats == (KMC4, Format("uaq", 4))
    assert KMC4 not in space.decisions[1].formats
    assert any("blocks.1.proj" in note and "kmc4" in note for note in space.notes)


def test_where_nothing_remains_fp16_does():
    space = search_space(graph_of((64, 64), (2, 1)), "kmc4")
    assert space.decisions[1].formats == (FP16,)


def test_paper_bits_counts_what_is_left_at_16_bits():
    space = search_space(graph_of((64, 64), (64, 64)), "paper")
    half = space.recipe({"blocks.0.proj": UAQ3})
    quantized = 4096 * 3 / 8 + 4 * 64
    assert space.paper_bits(half) == pytest.approx(8 * (quantized + 8192) / 8192)
    assert space.paper_bits(Recipe({})) == 16


@given(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([KMC4, UAQ3, FP16])))
def test_a_recipe_survives_its_file_and_fp16_does_not_count_in_its_key(layers):
    recipe = Recipe(layers)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.key == Recipe({n: f for n, f in reversed(layers.items()) if f != FP16}).key


def test_parts_survive_their_file_and_are_counted():
    space = search_space(graph_of((64, 64)), "paper")
    parts = (PartFormat(0, 16, KMC4), PartFormat(16, 64, UAQ3))
    recipe = Recipe({"blocks.0.proj": parts})
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert space.paper_bytes(recipe) == (64 * 16 // 2 + 2048) + (64 * 48 * 3 // 8 + 256)
    with pytest.raises(InputError, match="split in parts"):
        space.choice(recipe)


@pytest.mark.parametrize(
    ("text", "kind", "complaint"),
    [
        ('{"a": "kmc1"}', InputError, "layer 'a' cannot take format 'kmc1': bits must lie in 2..8"),
        ('{"a": 4}', InputError, "takes a format text"),
        ('{"a": []}', InputError, "takes a format text"),
        ('{"a": [{"start": 4, "stop": 4, "format": "kmc4"}]}', InputError, "range of input channels"),
        ('{"sedimo_recipe": 99, "layers": {}}', StateError, "version 99"),
        ("[]", StateError, "must be an object"),
        ("{", StateError, "not valid JSON"),
    ],
)
def test_a_wrong_recipe_file_is_refused(text, kind, complaint):
    with pytest.raises(kind, match=complaint):
        Recipe.from_json(text)


def test_a_recipe_for_another_network_is_refused():
    space = search_space(graph_of((64, 64), (64, 64), ties=(("blocks.0.proj", "blocks.1.proj"),)), "paper")
    with pytest.raises(InputError, match="does not have"):
        space.choice(Recipe({"elsewhere": KMC4}))
    with pytest.raises(InputError, match="must have one format"):
        space.choice(Recipe({"blocks.0.proj": KMC4}))
    with pytest.raises(InputError, match="no such decision"):
        space.recipe({"blocks.1.proj": KMC4})


def test_choice_and_recipe_are_inverse():
    space = search_space(graph_of((64, 64), (64, 64), (64, 32)), "wide")
    choice = {d.name: d.formats[i] for i, d in enumerate(space.decisions)}
    assert space.choice(space.recipe(choice)) == choice


@pytest.mark.parametrize(
    ("edges", "groups", "ties", "complaint"),
    [
        (((1, 0),), (), (), "edges must go forward"),
        (((0, 7),), (), (), "edges must go forward"),
        ((), (Group("g", "other", ("nowhere",), "nowhere", 0),), (), "unknown layers"),
        ((), (), (("nowhere", "blocks.0.proj"),), "unknown layers"),
    ],
)
def test_a_graph_that_contradicts_itself_is_refused(edges, groups, ties, complaint):
    nodes = graph_of((4, 4), (4, 4)).nodes
    with pytest.raises(StateError, match=complaint):
        DenoiserGraph("Toy", nodes, edges, groups, ties)
    with pytest.raises(StateError, match="unique"):
        DenoiserGraph("Toy", (nodes[0], nodes[0]), (), ())


def test_a_study_keeps_one_space(tmp_path):
    graph = graph_of((64, 64), (64, 64))
    product = Node("attention_0", "attention", "attention", "", 1000, None)
    space = search_space(DenoiserGraph("Toy", (*graph.nodes, product), graph.edges, graph.groups), "paper")
    assert (space.attention_macs, space.full_bops) == (1000, 256 * 1200)
    with Study(tmp_path) as study:
        study.claim("space", space)
        study.claim("space", replace(space))
        with pytest.raises(StateError, match="begun with another space"):
            study.claim("space", replace(space, graph_digest="other"))
