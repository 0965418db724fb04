"""The second denoiser: a latent U-Net told by captions, in the form of diffusers' `UNet2DConditionModel`.

The text encoder is learnt together with it, as in latent diffusion before Stable Diffusion: a pretrained one would
be many times as large as the U-Net, and ten classes need no knowledge of the world.
"""

from __future__ import annotations

import argparse
import logging

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.captions import CLASS_NAMES, MAX_TOKENS, TEMPLATES, build_tokenizer, captions_of
from training.data import read_images
from training.denoiser import build_scheduler, draw, encode_all
from training.loop import Budget, train

logger = logging.getLogger(__name__)

BATCH = 64
CAPTION_DROPOUT = 0.1
TEXT_WIDTH = 128


def build_unet() -> UNet2DConditionModel:
    """An untrained U-Net of three resolutions (16, 8 and 4), attention at the lower two: 5.6 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # the number of heads, whatever diffusers calls it
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of two layers for the tokens of `tokenizer`: 0.35 M parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def run(arguments: argparse.Namespace) -> None:
    """Trains both networks and saves their averaged weights, and the tokenizer."""
    images, labels = read_images(arguments.data / "cifar10_train.parquet")
    device = torch.device(arguments.device)
    latents = encode_all(images, (arguments.start or arguments.work) / "vae", device)
    logger.info("encoded; latents' standard deviation %.3f", latents.float().std())
    scheduler, tokenizer = build_scheduler(), build_tokenizer()
    model = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}).to(device).train()
    model["unet"].set_attn_processor(AttnProcessor())  # the fused attention's backward pass is slow on a CPU
    table = token_table(tokenizer).to(device)

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        batch = draw(latents, BATCH, generator, device)
        captions = draw_captions(labels[batch.index], generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            noisy = scheduler.add_noise(batch.clean, batch.noise, batch.timestep)
            told = model["text_encoder"](table)[0][captions]  # B 16 128
            predicted = model["unet"](noisy, batch.timestep, told).sample
        target = scheduler.get_velocity(batch.clean, batch.noise, batch.timestep)
        return nn.functional.mse_loss(predicted.float(), target)

    budget = Budget(arguments.minutes, learning_rate=8e-4, ema_decay=0.9985, warmup_steps=200)
    average = train(model, loss_function, budget, arguments.work / "unet.safetensors", seed=arguments.seed)
    for name, network in average.items():
        network.save_pretrained(arguments.work / name)
    tokenizer.save_pretrained(arguments.work / "tokenizer")


def token_table(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Tokens `[1 + 10 * 5, 16]` of the empty caption, then of each class in each template."""
    texts = ["", *(text for name in CLASS_NAMES for text in captions_of(name))]
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def draw_captions(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows `[B]` of the table of tokens: a random template of each label's class, or the empty caption."""
    template = torch.randint(0, len(TEMPLATES), labels.shape, generator=generator)
    is_dropped = torch.rand(labels.shape, generator=generator) < CAPTION_DROPOUT
    return (1 + labels * len(TEMPLATES) + template).masked_fill(is_dropped, 0)
