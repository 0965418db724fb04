"""Fixtures: tiny class-conditional, text-to-image and unconditional pipelines, made in memory in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sedimo.pipelines.diffusers import DiffusersPipeline


@pytest.fixture
def dit(tiny_pipeline_folder: Path) -> DiffusersPipeline:
    pipeline = DiTPipeline.from_pretrained(tiny_pipeline_folder, id2label={i: f"class{i}" for i in range(10)})
    pipeline.transformer.requires_grad_(False)
    return DiffusersPipeline(pipeline)


def build_tiny_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    ).eval()


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


@pytest.fixture(scope="session")
def text_components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    return {
        "vae": build_tiny_vae(),
        "text_encoder": CLIPTextModel(config).eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
    }


@pytest.fixture
def text_to_image(text_components: dict[str, object]) -> DiffusersPipeline:
    pipeline = StableDiffusionPipeline(
        **text_components,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return DiffusersPipeline(pipeline)


def build_tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


@pytest.fixture
def ddim() -> DiffusersPipeline:
    return DiffusersPipeline(DDIMPipeline(build_tiny_unet(), DDIMScheduler()))


@pytest.fixture
def ddpm() -> DiffusersPipeline:
    """Draws noise at every step."""
    return DiffusersPipeline(DDPMPipeline(build_tiny_unet(), DDPMScheduler()))
