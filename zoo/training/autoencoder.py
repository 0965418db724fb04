"""The autoencoder: 32 x 32 images to latents `[4, 16, 16]` and back, a diffusers `AutoencoderKL`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.data import random_flip, read_images, to_unit_range
from training.loop import Budget, train

logger = logging.getLogger(__name__)

BATCH = 64
KL_WEIGHT = 1e-6


def build() -> AutoencoderKL:
    """An untrained autoencoder of about 0.66 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
    )


def run(arguments: argparse.Namespace) -> None:
    """Trains, sets the scaling factor to one over the latents' standard deviation, and saves."""
    images, _ = read_images(arguments.data / "cifar10_train.parquet")
    device = torch.device(arguments.device)
    model = build().to(device, memory_format=torch.channels_last)

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(0, len(images), (BATCH,), generator=generator)
        batch = random_flip(to_unit_range(images[index]), generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = model.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - batch
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().float().mean()

    budget = Budget(arguments.minutes, learning_rate=2e-3, ema_decay=0.995)
    average = train(model, loss_function, budget, arguments.work / "autoencoder.safetensors", seed=arguments.seed)
    _finish(average, images, arguments.data, arguments.work / "vae", device)


@torch.no_grad()
def _finish(model: AutoencoderKL, images: torch.Tensor, data: Path, out: Path, device: torch.device) -> None:
    latents = model.encode(to_unit_range(images[:2048]).to(device)).latent_dist.mean
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    test, _ = read_images(data / "cifar10_test.parquet")
    batch = to_unit_range(test[:2048]).to(device)
    error = model.decode(model.encode(batch).latent_dist.mean).sample - batch
    logger.info("test mse %.5f, scaling factor %.4f", error.square().mean(), model.config.scaling_factor)
    model.save_pretrained(out)
