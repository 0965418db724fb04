"""Fixtures of all tests: a tiny denoiser and a tiny pipeline folder, made in memory from a seed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from hypothesis import HealthCheck, settings

# A slow or loaded machine is no failure, and where nobody looks the examples are the same each time.
settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("any machine")


def build_tiny_dit(seed: int = 0) -> DiTTransformer2DModel:
    """About 60 k parameters, two blocks, one tied timestep embedder, latents `[4, 8, 8]`, 10 classes."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        norm_num_groups=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    )
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # random weights that matter: the default ones barely change the output
    return model.eval().requires_grad_(False)


def build_tiny_pipeline(seed: int = 0) -> DiTPipeline:
    """A complete class-conditional latent pipeline around the tiny denoiser."""
    denoiser = build_tiny_dit(seed)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    return DiTPipeline(denoiser, vae, scheduler, id2label={i: f"class{i}" for i in range(10)})


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_dit() -> DiTTransformer2DModel:
    """Shared by the whole session: deepcopy it before changing it."""
    return build_tiny_dit()


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline in float32; copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build_tiny_pipeline().save_pretrained(folder)
    return folder
