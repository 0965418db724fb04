"""Decisions about streams: names, shapes, exact sums, recipes there and back, and where layers stay whole."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph, Group, Node, Stream
from sedimo.methods.predictor.features import node_names, split_streams
from sedimo.quant.formats import FP16, Format, count_bops, paper_bytes, stored_bytes
from sedimo.quant.parts import PartFormat
from sedimo.space import Recipe, search_space

KMC4, UAQ3 = Format("kmc", 4), Format("uaq", 3)
FORMATS = "uaq3,kmc4,kma5,uaq4g64,fp16"


def graph_of(*, ties=()):
    """An input layer, and three that read streams of 96 and 64 channels; `up.0` and `up.1` may be tied."""
    up = [Node(f"up.{i}.conv", "layer", "up.conv", f"up.{i}", 128 * 160 * 9 * 64, "Conv2d", (128, 160, 3, 3), (96, 64))
          for i in range(2)]  # fmt: skip
    nodes = (
        Node("first", "layer", "first", "", 96 * 16, "Linear", (96, 16)),
        *up,
        Node("last", "layer", "last", "", 8 * 160 * 64, "Conv2d", (8, 160, 1, 1), (96, 64)),
    )
    groups = (Group("up.0.conv", "residual", ("up.0.conv", "up.1.conv"), "up.1.conv", 1),)
    return DenoiserGraph("Toy", nodes, ((0, 1), (1, 2), (2, 3)), groups, ties)


def test_each_stream_is_a_decision_with_its_share():
    graph = graph_of()
    space = search_space(graph, FORMATS)
    names = [f"{layer}[{part}]" for layer in ("up.0.conv", "up.1.conv", "last") for part in ("0:96", "96:160")]
    assert [d.name for d in space.decisions] == ["first", *names]
    found = space.decision_index["up.1.conv[96:160]"]
    assert (found.layers, found.shape, found.stream) == (("up.1.conv",), (128, 64, 3, 3), Stream(96, 160, 160))
    assert found.operation == "up.conv[1]"
    assert found.block == "up.1"
    assert found.share == 0.4
    assert sum(d.macs for d in space.decisions) == sum(node.macs for node in graph.layers)
    assert found.macs * 160 == graph.layer_index["up.1.conv"].macs * 64
    whole = search_space(graph, FORMATS, streams=False)
    assert (space.params, space.full_bops) == (whole.params, whole.full_bops)
    assert [replace(w, formats=()) for w in space.weights] == [replace(d, formats=()) for d in whole.decisions]
    only = search_space(graph, FORMATS, streams=["last"])
    assert [d.name for d in only.decisions if d.stream] == names[4:]


def test_sums_over_decisions_are_those_of_the_recipe_in_integers():
    space, shapes = search_space(graph_of(), FORMATS), {node.name: node.shape for node in graph_of().layers}
    generator = random.Random(0)
    for _ in range(50):
        choice = {d.name: generator.choice(d.formats) for d in space.decisions}
        recipe = space.recipe(choice)
        assert space.choice(recipe) == choice
        assert Recipe.from_json(recipe.to_json()) == recipe
        for size, total in ((paper_bytes, space.paper_bytes(recipe)), (stored_bytes, space.stored_bytes(recipe))):
            by_hand = 0
            for layer, shape in shapes.items():
                entry = recipe.layers[layer]
                parts = [(0, shape[1], entry)] if isinstance(entry, Format) else [
                    (p.start, p.stop, p.format) for p in entry]  # fmt: skip
                by_hand += sum(size(f, (shape[0], stop - start, *shape[2:])) for start, stop, f in parts)
            assert by_hand == total
        assert sum(d.paper_bytes(choice[d.name]) for d in space.decisions) == space.paper_bytes(recipe)
        assert sum(count_bops(d.macs, choice[d.name]) for d in space.decisions) == space.bops(recipe)


def test_a_layer_whose_streams_are_all_left_alone_is_left_alone():
    space = search_space(graph_of(), FORMATS)
    assert space.recipe({"last[0:96]": FP16, "first": KMC4}).layers == {"last": FP16, "first": KMC4}
    alone = space.recipe({"last[96:160]": UAQ3})
    assert alone.layers == {"last": (PartFormat(0, 96, FP16), PartFormat(96, 160, UAQ3))}
    assert space.choice(alone)["last[0:96]"] == FP16


def test_a_layer_as_a_whole_is_another_weight_than_its_streams():
    space = search_space(graph_of(), FORMATS)
    with pytest.raises(InputError, match=r"it is kmc4, and 'last\[0:96\]' must have a format of its own"):
        space.choice(Recipe({"last": KMC4}))
    with pytest.raises(InputError, match=r"0\.\.100 kmc4 \| 100\.\.160 kmc4"):
        space.choice(Recipe({"last": (PartFormat(0, 100, KMC4), PartFormat(100, 160, KMC4))}))
    whole = space.paper_bytes(Recipe({"last": KMC4}))
    assert whole == space.paper_bytes(Recipe({})) - paper_bytes(FP16, (8, 160, 1, 1)) + paper_bytes(
        KMC4, (8, 160, 1, 1)
    )


def test_tied_layers_are_decided_on_together_if_their_streams_are_the_same():
    tie = (("up.0.conv", "up.1.conv"),)
    space = search_space(graph_of(ties=tie), FORMATS)
    found = space.decision_index["up.0.conv[0:96]"]
    assert found.layers == ("up.0.conv", "up.1.conv")
    assert "up.1.conv[0:96]" not in space.decision_index
    recipe = space.recipe({found.name: KMC4, "up.0.conv[96:160]": UAQ3})
    assert recipe.layers["up.0.conv"] == recipe.layers["up.1.conv"]
    assert split_streams(graph_of(ties=tie), space).ties == (
        ("up.0.conv[0:96]", "up.1.conv[0:96]"), ("up.0.conv[96:160]", "up.1.conv[96:160]"))  # fmt: skip
    graph = graph_of(ties=tie)
    nodes = tuple(replace(n, streams=(64, 96)) if n.name == "up.1.conv" else n for n in graph.nodes)
    other = search_space(replace(graph, nodes=nodes), FORMATS)
    assert other.decision_index["up.0.conv"].stream is None


def test_layers_stay_whole_where_activations_are_rounded_or_nothing_is_chosen():
    rounded = search_space(graph_of(), "uaq4a8,uaq3a8")
    assert not rounded.streams
    assert "3 layers read several streams and have one decision each" in rounded.notes[-1]
    assert not search_space(graph_of(), "kmc4").streams
    ends = search_space(graph_of(), FORMATS, ends="uaq8")
    assert [str(f) for f in ends.decision_index["last"].formats] == ["uaq8"]


def test_a_stream_drops_formats_that_cost_it_too_much():
    space = search_space(graph_of(), "kmc4,kmc8,fp16")
    assert space.decision_index["last[0:96]"].formats == (KMC4, FP16)  # 96 weights per codebook of 256
    assert space.decision_index["up.0.conv[0:96]"].formats == (KMC4, Format("kmc", 8), FP16)


def test_a_graph_for_predictors_has_a_node_for_each_decision():
    space = search_space(graph_of(), FORMATS)
    split = split_streams(graph_of(), space)
    assert [n.name for n in split.nodes] == [name for d in space.decisions for name in node_names(d)]
    assert split.edges == (
        (0, 1), (0, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 5), (4, 5), (3, 6), (4, 6))  # fmt: skip
    (group,) = split.groups
    assert group.layers == tuple(d.name for d in space.decisions[1:5])
    assert group.root == "up.1.conv[96:160]"
    assert (split.params, split.macs) == (graph_of().params, graph_of().macs)
    assert split_streams(graph_of(), search_space(graph_of(), streams=False)) == graph_of()


@pytest.mark.parametrize("ends", [(0, 160), (-1, 4), (4, 4), (100, 161)])
def test_a_stream_is_a_proper_part(ends):
    with pytest.raises(InputError, match="a part of the 160 inputs"):
        Stream(*ends, 160)
