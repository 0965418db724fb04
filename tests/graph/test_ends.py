"""First and last layers, against what a person would name in each architecture."""

from __future__ import annotations

import pytest
from denoisers import traced

from sedimo.graph.model import DenoiserGraph, Node, first_layers, last_layers
from sedimo.quant.formats import FP16, Format
from sedimo.space import search_space

ENDS = {
    "DiT-XL/2": ("pos_embed.proj", "proj_out_2"),
    "PixArt-XL": ("pos_embed.proj", "proj_out"),
    "SD 1.5": ("conv_in", "conv_out"),
    "Hunyuan": ("pos_embed.proj", "proj_out"),
    "FLUX": ("x_embedder", "proj_out"),
    "SD3": ("pos_embed.proj", "proj_out"),
    "Sana": ("patch_embed.proj", "proj_out"),
    "Wan": ("patch_embedding", "proj_out"),
    "UNet2D": ("conv_in", "conv_out"),
    "UNet2D with classes": ("conv_in", "conv_out"),
    "UNet with text": ("conv_in", "conv_out"),
    "UNet with added conditions": ("conv_in", "conv_out"),
}


@pytest.mark.parametrize("name", ENDS)
def test_one_layer_reads_the_latents_and_one_makes_the_output(name):
    graph = traced(name)
    assert (first_layers(graph), last_layers(graph)) == ((ENDS[name][0],), (ENDS[name][1],))


def test_where_no_layer_has_as_many_positions_the_one_with_most_is_first():
    """Latents of 64 positions that are merged to 16 in between; a class that is read once; a layer nobody calls."""
    layers = [("class", 1), ("image", 64), ("merge", 16), ("idle", 0)]
    nodes = tuple(Node(n, "layer", n, "", 4 * positions, "Linear", (2, 2)) for n, positions in layers)
    graph = DenoiserGraph("Toy", nodes, ((0, 2), (1, 2)), ())
    assert (first_layers(graph), last_layers(graph)) == (("image",), ("merge",))


def test_the_ends_have_their_format_and_no_choice_and_uniform_recipes_leave_them_so():
    eight, four = Format.parse("uaq8a8"), Format.parse("uaq4a8")
    space = search_space(traced("UNet2D"), "uaq3a8,uaq4a8", ends=eight)
    formats = {d.name: d.formats for d in space.decisions}
    assert formats.pop("conv_in") == formats.pop("conv_out") == (eight,)
    assert set(formats.values()) == {(Format.parse("uaq3a8"), four)}
    assert four in space.common_formats
    uniform = space.choice(space.uniform(four))
    assert {n for n, f in uniform.items() if f == eight} == {"conv_in", "conv_out"}
    assert {f for n, f in uniform.items() if n not in ("conv_in", "conv_out")} == {four}
    left = search_space(traced("UNet2D"), "uaq4", ends="fp16").decision_index
    assert left["conv_in"].formats == left["conv_out"].formats == (FP16,)
