"""Operation types, blocks and costs from paths and shapes."""

from __future__ import annotations

import doctest

import pytest
from denoisers import published
from torch import nn

from sedimo.graph import layers
from sedimo.graph.layers import block_of, find_blocks, operation_type, weight_layers
from sedimo.graph.trace import per_sample


def test_examples() -> None:
    assert doctest.testmod(layers).failed == 0
    assert doctest.testmod(layers).attempted > 0


@pytest.mark.parametrize(
    ("denoiser", "path", "block", "operation"),
    [
        ("DiT-XL/2", "transformer_blocks.3.ff.net.0.proj", "transformer_blocks.3", "transformer_blocks.ff.net.proj"),
        ("DiT-XL/2", "proj_out_1", "", "proj_out_1"),
        ("SD 1.5", "down_blocks.0.resnets.1.conv1", "down_blocks.0.resnets.1", "down_blocks.resnets.conv1"),
        ("SD 1.5", "down_blocks.0.downsamplers.0.conv", "down_blocks.0", "down_blocks.downsamplers.conv"),
        (
            "SD 1.5",
            "down_blocks.0.attentions.1.proj_in",
            "down_blocks.0.attentions.1",
            "down_blocks.attentions.proj_in",
        ),
        (
            "SDXL",
            "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0",
            "mid_block.attentions.0.transformer_blocks.9",
            "mid_block.attentions.transformer_blocks.attn2.to_out",
        ),
    ],
)
def test_blocks_and_operations(denoiser: str, path: str, block: str, operation: str) -> None:
    module = published(denoiser)
    blocks = find_blocks(module, weight_layers(module))
    assert block_of(path, blocks) == block
    assert operation_type(path) == operation


def test_a_numbered_module_outside_a_container_is_no_block() -> None:
    module = nn.Module()
    module.add_module("3", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert find_blocks(module, weight_layers(module)) == frozenset()


def test_an_output_that_does_not_grow_with_the_batch_is_counted_whole() -> None:
    assert per_sample(120, (6, 5), 3) == 40
    assert per_sample(120, (1, 5), 3) == 120
    assert per_sample(120, (), 3) == 120
