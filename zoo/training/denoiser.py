"""The denoiser: a class-conditional latent DiT in the form of diffusers' `DiTTransformer2DModel`."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from training.data import read_images, to_unit_range
from training.loop import Budget, train

logger = logging.getLogger(__name__)

BATCH = 128
N_CLASSES = 10
NULL_CLASS = 1000  # `DiTPipeline` hard-codes it
LABEL_DROPOUT = 0.1


def build() -> DiTTransformer2DModel:
    """An untrained DiT of 6 blocks and width 256 (9.6 M parameters, 64 tokens)."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
    )


def share_embedders(model: DiTTransformer2DModel) -> None:
    """Makes all blocks use the first block's timestep and class embedder, as the original DiT does."""
    shared = model.transformer_blocks[0].norm1.emb
    shared.class_embedder.dropout_prob = 0.0  # labels are dropped once per image, not once per block
    for block in model.transformer_blocks:
        block.norm1.emb = shared


def build_scheduler(**settings: object) -> DDIMScheduler:
    """DDIM on the linear schedule of 1,000 steps, predicting v."""
    return DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing", **settings)


@torch.no_grad()
def encode_all(images: torch.Tensor, folder: Path, device: torch.device) -> torch.Tensor:
    """Scaled latents of the images and of their mirror images: `[2, N, 4, 16, 16]` bf16."""
    vae = AutoencoderKL.from_pretrained(folder).to(device).eval()
    halves = []
    for flipped in (images, images.flip(3)):
        parts = []
        for chunk in flipped.split(500):
            with torch.autocast(device.type, torch.bfloat16):
                mean = vae.encode(to_unit_range(chunk).to(device)).latent_dist.mean
            parts.append((mean.float() * vae.config.scaling_factor).bfloat16().cpu())
        halves.append(torch.cat(parts))
    return torch.stack(halves)


@dataclass(frozen=True)
class Draw:
    """A minibatch: which images `[B]`, their latents and noise `[B, 4, 16, 16]`, and timesteps `[B]`."""

    index: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor
    timestep: torch.Tensor


def draw(latents: torch.Tensor, n: int, generator: torch.Generator, device: torch.device) -> Draw:
    """`n` random images of `latents` `[2, N, 4, 16, 16]`, mirrored or not, with noise and a timestep each."""
    index = torch.randint(0, latents.shape[1], (n,), generator=generator)
    side = torch.randint(0, 2, (n,), generator=generator)
    clean = latents[side, index].float().to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    return Draw(index, clean, noise, torch.randint(0, 1000, (n,), generator=generator).to(device))


def run(arguments: argparse.Namespace) -> None:
    """Trains and saves the averaged weights."""
    images, labels = read_images(arguments.data / "cifar10_train.parquet")
    device = torch.device(arguments.device)
    latents = encode_all(images, (arguments.start or arguments.work) / "vae", device)
    logger.info("encoded; latents' standard deviation %.3f", latents.float().std())
    scheduler, model = build_scheduler(), build()
    if arguments.start:
        model.load_state_dict(DiTTransformer2DModel.from_pretrained(arguments.start / "transformer").state_dict())
    share_embedders(model)
    model.to(device).train()

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        batch = draw(latents, BATCH, generator, device)
        dropped = torch.rand(BATCH, generator=generator) < LABEL_DROPOUT
        classes = labels[batch.index].masked_fill(dropped, NULL_CLASS).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            noisy = scheduler.add_noise(batch.clean, batch.noise, batch.timestep)
            predicted = model(noisy, timestep=batch.timestep, class_labels=classes).sample
        target = scheduler.get_velocity(batch.clean, batch.noise, batch.timestep)
        return torch.nn.functional.mse_loss(predicted.float(), target)

    budget = Budget(arguments.minutes, learning_rate=8e-4, ema_decay=0.9985, warmup_steps=200)
    path = arguments.work / "denoiser.safetensors"
    average = train(model, loss_function, budget, path, seed=arguments.seed)
    untie(average, build().eval()).save_pretrained(arguments.work / "transformer")


@torch.no_grad()
def untie(model: DiTTransformer2DModel, plain: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """`plain`, of the same build, with the weights and one copy of the embedders per block; unused classes are zero."""
    plain.load_state_dict(model.state_dict())
    for block in plain.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table.weight[N_CLASSES:NULL_CLASS] = 0.0
    return plain
