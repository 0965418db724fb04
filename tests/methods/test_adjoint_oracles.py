"""Effects on the final latents of real architectures against plain autograd through their whole pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from product_oracles import whole_products

import sedimo
from sedimo.lab.lab import Lab
from sedimo.methods.adjoint import probe_adjoint
from sedimo.pipelines.adapter import Sampling

SINGLE_TOLERANCE = 1e-4  # of the product of the norms: all is float32, whose last bit moves rounded inputs by a step
N_DIRECTIONS = 2


def assert_products_are_those_of_plain_autograd(pipe, bank, sampling):
    probe = probe_adjoint(Lab(pipe, bank), sampling, n_directions=N_DIRECTIONS)
    wanted = whole_products(pipe, bank, sampling, N_DIRECTIONS)
    assert {(d, name) for d, changes in probe.numbers.items() for name in changes} == wanted.keys()
    for (decision, name), products in wanted.items():
        got = probe.numbers[decision][name]
        assert len(got) == len(products) == N_DIRECTIONS * len(sampling.seeds)
        for value, product in zip(got, products, strict=True):
            assert value == pytest.approx(product.value, abs=SINGLE_TOLERANCE * product.greatest), (decision, name)
    return probe


def test_a_guided_transformer_with_a_tied_timestep_embedder(tiny_pipeline_folder):
    pipe = sedimo.load(tiny_pipeline_folder)
    bank = sedimo.fit(pipe, sedimo.search_space(sedimo.trace(pipe), "uaq3,kmc4,uaq4a8,fp16"))
    tied = [d for d in bank.space.decisions if len(d.layers) > 1]
    assert {len(d.layers) for d in tied} == {2}
    sampling = Sampling((3, 4), 3, ("1", "2"), guidance=3.0)
    probe = assert_products_are_those_of_plain_autograd(pipe, bank, sampling)
    assert probe.unused == ()
    assert all(any(probe.numbers[d.name]["uaq3"]) for d in tied)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A U-Net whose last blocks read concatenations, and which draws no noise."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    place = tmp_path_factory.mktemp("unet") / "pipeline"
    DDIMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(place)
    return place


def test_streams_of_concatenated_inputs(folder):
    pipe = sedimo.load(folder)
    bank = sedimo.fit(pipe, sedimo.search_space(sedimo.trace(pipe), "uaq3,kma4,fp16"))
    streams = [d for d in bank.space.decisions if d.stream is not None]
    assert {d.stream.start for d in streams} > {0, 8}
    probe = assert_products_are_those_of_plain_autograd(pipe, bank, Sampling((3, 4), 2))
    assert all(any(probe.numbers[d.name]["kma4"]) for d in streams)
