"""Fixtures: tiny class-conditional, text-to-image and unconditional pipelines, made in memory in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
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


@pytest.fixture
def consistency() -> DiffusersPipeline:
    """Draws noise at every step; knows no latents."""
    return DiffusersPipeline(ConsistencyModelPipeline(build_tiny_unet(), CMStochasticIterativeScheduler()))


@pytest.fixture
def latent_diffusion() -> DiffusersPipeline:
    torch.manual_seed(1)
    decoder = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
        sample_size=16,
    ).eval()
    return DiffusersPipeline(LDMPipeline(decoder, build_tiny_unet(), DDIMScheduler()))


class FluxWithoutTextEncoders(FluxPipeline):
    """Packed latents and a distilled guidance; its two text encoders are replaced by fixed numbers."""

    def encode_prompt(self, prompt, **_: object):
        generator = torch.Generator().manual_seed(0)
        states, pooled = torch.randn(1, 5, 32, generator=generator), torch.randn(1, 8, generator=generator)
        return states.expand(len(prompt), 5, 32), pooled.expand(len(prompt), 8), torch.zeros(5, 3)


@pytest.fixture
def flux() -> DiffusersPipeline:
    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    vae = build_tiny_vae()
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = FluxWithoutTextEncoders(scheduler=scheduler, vae=vae, transformer=denoiser, **nothing)
    pipeline.default_sample_size = 8
    return DiffusersPipeline(pipeline)
