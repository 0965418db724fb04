"""MACs and bit operations against numbers worked out by hand and against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from denoisers import PUBLISHED, TINY, build, published, traced
from torch.utils.flop_counter import FlopCounterMode

from sedimo.graph.example_inputs import batch_size, find_inputs
from sedimo.quant.formats import Format, count_bops
from sedimo.space import search_space

UAQ4, KMC4 = Format.parse("uaq4"), Format.parse("kmc4")


@pytest.mark.parametrize("name", [*TINY, "DiT-XL/2", "SD 1.5"])
def test_macs_are_half_of_the_operations_that_pytorch_counts(name):
    """Attention included: on the meta device it is counted as the two products that it is."""
    denoiser = published(name) if name in PUBLISHED else build(*TINY[name])
    inputs = find_inputs(denoiser, {})
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(**inputs)
    assert 2 * traced(name).macs * batch_size(inputs) == counter.get_total_flops()


def test_operations_of_a_transformer_by_hand():
    """DiT-XL/2 at 256 pixels: 16 x 16 tokens of width 1152 in 28 blocks."""
    tokens, width = 256, 1152
    timestep = 256 * width + width * width  # embedded in each block, and again by the first one for the output
    modulation, projections = width * 6 * width, 4 * tokens * width * width
    feed_forward = 2 * tokens * width * 4 * width
    patches, output = tokens * (4 * 2 * 2) * width, width * 2 * width + tokens * width * (8 * 2 * 2)
    layers = 28 * (modulation + projections + feed_forward) + 29 * timestep + patches + output
    attention = 28 * 2 * tokens * tokens * width  # both products
    space = search_space(traced("DiT-XL/2"), "uaq4,kmc4,fp16")
    assert space.attention_macs == attention
    assert space.full_bops == 256 * (layers + attention)
    assert space.bops(space.uniform(UAQ4)) == 4 * 16 * layers + 256 * attention
    assert space.bops(space.uniform(KMC4)) == space.full_bops  # looked-up weights are multiplied in 16 bits
    assert space.bops(space.uniform(Format.parse("uaq4a8"))) == 4 * 8 * layers + 256 * attention


def test_operations_of_a_small_unet_by_hand():
    """`UNet2DModel` of 16 and 32 channels on 16 x 16 pixels, attention at 8 x 8."""

    def residual(pixels: int, width_in: int, width: int) -> int:
        convolutions = 9 * pixels * width * (width_in + width)
        shortcut = pixels * width_in * width if width_in != width else 0
        return convolutions + 64 * width + shortcut  # the timestep embedding has 4 * 16 channels

    attention_layers, attention = 4 * 64 * 32 * 32, 2 * 64 * 64 * 32
    down = residual(256, 16, 16) + 9 * 64 * 16 * 16 + residual(64, 16, 32) + attention_layers
    middle = 2 * residual(64, 32, 32) + attention_layers
    up = residual(64, 64, 32) + residual(64, 48, 32) + 2 * attention_layers + 9 * 256 * 32 * 32
    last = residual(256, 48, 16) + residual(256, 32, 16)
    ends = 9 * 256 * 16 * 3 + (16 * 64 + 64 * 64) + 9 * 256 * 3 * 16
    space = search_space(traced("UNet2D"), "uaq4,fp16")
    layers = down + middle + up + last + ends
    assert space.attention_macs == 4 * attention
    assert space.full_bops == 256 * (layers + 4 * attention)
    assert space.bops(space.recipe({"conv_in": UAQ4})) == space.full_bops - (256 - 64) * 9 * 256 * 16 * 3


def test_a_count_is_macs_times_both_widths():
    assert count_bops(500, Format.parse("uaq3a8")) == 500 * 3 * 8
    assert count_bops(500, Format.parse("uaq3g64")) == 500 * 3 * 16
    assert count_bops(500, Format.parse("kma2a4")) == 500 * 16 * 4
    assert count_bops(500, Format.parse("fp16a8")) == 500 * 16 * 8
