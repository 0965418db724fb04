from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline

from sedimo.errors import InputError
from sedimo.pipelines.diffusers import DECODE_BATCH, decode_latents
from tolerances import FLOAT32_FORMULA

pytest_plugins = ["tiny_pipelines"]


def pipeline_with(**components):
    return SimpleNamespace(**components)


def decoded_by_hand(vae: AutoencoderKL, latents):
    with torch.no_grad():
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_scale_and_shift_are_undone(dit, latents):
    vae = dit.pipeline.vae
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    torch.testing.assert_close(dit.decode(latents), decoded_by_hand(vae, latents / 0.5 + 0.25))


def test_per_channel_statistics_are_undone(dit, latents):
    vae = dit.pipeline.vae
    mean, deviation = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae.register_to_config(latents_mean=mean, latents_std=deviation, scaling_factor=2.0)
    expected = latents * torch.tensor(deviation).view(1, 4, 1, 1) / 2.0 + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(dit.decode(latents), decoded_by_hand(vae, expected))


def test_many_latents_are_decoded_in_parts(dit):
    many = torch.randn(DECODE_BATCH + 1, 4, 8, 8)
    images = dit.decode(many)
    assert len(images) == DECODE_BATCH + 1
    torch.testing.assert_close(images[-1:], dit.decode(many[-1:]), rtol=0, atol=FLOAT32_FORMULA)


def test_pixel_pipelines_only_rescale():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 5)
    assert decode_latents(pipeline_with(unet=None), pixels).flatten().tolist() == [0, 0, 0.5, 1, 1]


def test_packed_latents_are_unpacked(dit, latents):
    packed = FluxPipeline._pack_latents(latents, 2, 4, 8, 8)
    assert packed.shape == (2, 16, 16)
    flux = pipeline_with(vae=dit.pipeline.vae, vae_scale_factor=2, _unpack_latents=FluxPipeline._unpack_latents)
    assert torch.equal(decode_latents(flux, packed), dit.decode(latents))


def test_forced_upcast_is_obeyed_and_undone(dit, latents):
    vae = dit.pipeline.vae.half()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    vae.register_to_config(force_upcast=True)
    seen = []
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    dit.decode(latents)
    assert seen == [torch.float32]
    assert all(torch.equal(before[k], v) for k, v in vae.state_dict().items())
    assert vae.dtype is torch.float16


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 8), (2, 4, 1, 8, 8)])
def test_foreign_latents_are_refused(dit, shape):
    with pytest.raises(InputError, match=r"latents must have shape \[n, 4, H, W\]"):
        dit.decode(torch.zeros(shape))


def test_unknown_decoders_and_packings_are_refused(dit):
    with pytest.raises(InputError, match="MOVQ"):
        decode_latents(pipeline_with(movq=dit.pipeline.vae), torch.zeros(1, 4, 8, 8))
    strange = pipeline_with(vae=dit.pipeline.vae, vae_scale_factor=2, _unpack_latents=lambda latents, frames: latents)
    with pytest.raises(InputError, match="unknown way"):
        decode_latents(strange, torch.zeros(1, 16, 16))
