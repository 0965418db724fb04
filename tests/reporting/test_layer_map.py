"""Names and places of decisions on the map, for several families of denoisers."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
from report_examples import dit_summary, unet_summary

from sedimo.reporting import placement
from sedimo.reporting.layer_map import layer_maps
from sedimo.reporting.placement import OUTSIDE, inside, kind_of, label_of, stage, stage_labels


def test_the_examples_in_the_documentation_hold():
    assert doctest.testmod(placement).failed == 0


@pytest.mark.parametrize(
    ("operation", "block", "kind", "label", "local"),
    [
        ("transformer_blocks.ff.net.proj", "transformer_blocks.11", "transformer_blocks", "11", "ff.net.proj"),
        (
            "single_transformer_blocks.proj_mlp",
            "single_transformer_blocks.0",
            "single_transformer_blocks",
            "0",
            "proj_mlp",
        ),
        ("down_blocks.attentions.proj_in", "down_blocks.2.attentions.1", "attentions", "down 2.1", "proj_in"),
        ("mid_block.resnets.conv1", "mid_block.resnets.1", "resnets", "mid 1", "conv1"),
        ("conv_in", "", OUTSIDE, "", "conv_in"),
    ],
)
def test_places(operation, block, kind, label, local):
    assert (kind_of(block), label_of(block), inside(operation, block)) == (kind, label, local)


def test_a_dit_has_one_panel_of_blocks_and_one_of_the_rest():
    blocks, rest = layer_maps(dit_summary())
    assert (blocks.title, blocks.columns) == (
        "6 \N{MULTIPLICATION SIGN} transformer_blocks",
        ("0", "1", "2", "3", "4", "5"),
    )
    assert rest.title == "Layers outside all blocks"
    assert rest.rows == ("pos_embed.proj", "proj_out_1", "proj_out_2")
    assert len(blocks.cells) == 9 * 6  # shared embedders stand in every block
    assert sum(cell.is_copy for cell in blocks.cells.values()) == 2 * 5


def test_a_unet_shows_every_layer_once_in_reading_order():
    summary = unet_summary()
    found = {one.title.split()[-1]: one for one in layer_maps(summary)}
    cells = [(kind, *at) for kind, one in found.items() for at in one.cells]
    assert len(cells) == len(set(cells)) == summary.n_layers == 282
    assert set(found) == {"transformer_blocks", "resnets", "attentions", "down_blocks", "up_blocks", "blocks"}
    resnets = found["resnets"].columns
    ways = [label.split()[0] for label in resnets]
    assert ways == ["down"] * 8 + ["mid"] * 2 + ["up"] * 12


def test_two_layers_at_one_place_get_a_row_each():
    summary = dit_summary()
    names = summary.table.operations
    twice = {n: o.replace("to_k", "to_q") if n.startswith("transformer_blocks.0.") else o for n, o in names.items()}
    assert "attn1.to_q (2)" in layer_maps(replace(summary, table=replace(summary.table, operations=twice)))[0].rows


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ("up_blocks.3.resnets.2", "up_blocks.3"),
        ("mid_block.attentions.0.transformer_blocks.0", "mid_block"),
        ("model.layers.7", "model.layers.7"),
        ("blocks.0", "blocks.0"),
    ],
)
def test_stages(block, found):
    assert stage(block) == found


def test_labels_of_stages_of_several_kinds():
    labels, common = stage_labels(["transformer_blocks.0", "single_transformer_blocks.3", OUTSIDE])
    assert (labels, common) == (["transformer 0", "single_transformer 3", "outside"], "")
