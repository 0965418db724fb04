"""Small denoisers that differ in what models differ in: the ground on which decisions are tried and then proven.

Half of them are for development; the others are looked at for final figures alone. None is embedded in the zoo: they
are trained by whoever wants them, into a folder for each.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import nn

from training.assemble import write_pipeline, write_text_parts_for_all
from training.captions import build_tokenizer
from training.data import draw_shapes, read_digits, read_images, to_unit_range
from training.denoiser import N_CLASSES, NULL_CLASS, share_embedders, untie
from training.loop import Budget, atomic_save, train
from training.unet import TEXT_WIDTH, build_text_encoder, draw_captions, token_table

logger = logging.getLogger(__name__)

BATCH = 64
N_IMAGES = 20_000
DROPOUT = 0.1

Kind = Literal["dit", "unet", "pixels"]
Prediction = Literal["epsilon", "v_prediction", "flow_prediction"]
Images = Literal["cifar", "digits", "shapes"]
_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}


@dataclass(frozen=True, slots=True)
class Design:
    """One denoiser: a transformer told a class, a U-Net told a caption, or a U-Net of pixels that is told nothing.

    `widths` is one width for a transformer, one per resolution for a U-Net. `minutes` is its share of the time that
    is ordered. `compressed` takes the other autoencoder, of 8 channels at 8 x 8.
    """

    name: str
    is_held_back: bool
    kind: Kind
    widths: tuple[int, ...]
    depth: int
    prediction: Prediction
    scheduler: str
    images: Images = "cifar"
    is_guided: bool = False
    compressed: bool = False
    minutes: float = 1.0


DESIGNS = (
    Design("dit-v-deep", False, "dit", (128,), 8, "v_prediction", "ddim"),
    Design("dit-eps-guided", False, "dit", (192,), 4, "epsilon", "ddim", is_guided=True),
    Design("dit-flow", False, "dit", (128,), 6, "flow_prediction", "dpm-solver++"),
    Design("unet-text-v", False, "unet", (48, 64, 96), 1, "v_prediction", "ddim", is_guided=True),
    Design("pixels-eps", False, "pixels", (32, 48, 64), 1, "epsilon", "ddim"),
    Design("dit-v-long", True, "dit", (160,), 6, "v_prediction", "ddim", is_guided=True, minutes=2.0),
    Design("dit-eps-short", True, "dit", (128,), 5, "epsilon", "dpm-solver++", compressed=True, minutes=0.4),
    Design("dit-flow-wide", True, "dit", (256,), 3, "flow_prediction", "unipc", "shapes", is_guided=True),
    Design("unet-text-eps", True, "unet", (64, 96), 2, "epsilon", "euler", is_guided=True),
    Design("pixels-v-digits", True, "pixels", (32, 64), 2, "v_prediction", "ddim", "digits"),
)


def run(arguments: argparse.Namespace) -> None:
    """Trains the designs that are named, all by default, each into `work/suite/NAME`."""
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    known = {design.name: design for design in DESIGNS}
    for name in arguments.models or known:
        out = arguments.work / "suite" / name
        if (out / "model_index.json").exists():
            logger.info("%s is there already", name)
            continue
        logger.info("training %s", name)
        _train(known[name], arguments, out)


def _train(design: Design, arguments: argparse.Namespace, out: Path) -> None:
    work = arguments.work / "suite-parts" / design.name
    clean, labels = _data(design, arguments)
    model = _build(design)
    scheduler = build_scheduler(design)
    loss_function = _loss_function(design, model, scheduler, clean, labels)
    budget = Budget(design.minutes * arguments.minutes, learning_rate=1e-3, ema_decay=0.998, warmup_steps=100)
    average = train(model, loss_function, budget, work / "state.safetensors", seed=arguments.seed)
    _write(design, average, scheduler, arguments, out)


def build_scheduler(design: Design) -> Any:
    """The scheduler of a design, for sampling."""
    made = _SCHEDULERS[design.scheduler]
    if design.prediction == "flow_prediction":
        return made(prediction_type=design.prediction, use_flow_sigmas=True, flow_shift=1.0)
    settings = {"clip_sample": False} if made is DDIMScheduler else {}
    if design.kind == "unet":
        settings["steps_offset"] = 1
    return made(prediction_type=design.prediction, timestep_spacing="trailing", **settings)


def _build(design: Design) -> nn.Module:
    if design.kind == "dit":
        model = _build_dit(design)
        share_embedders(model)
        return model.train()
    if design.kind == "pixels":
        return _build_pixels(design).train()
    tokenizer = build_tokenizer()
    unet = _build_unet(design)
    unet.set_attn_processor(AttnProcessor())  # the fused attention's backward pass is slow on a CPU
    return nn.ModuleDict({"unet": unet, "text_encoder": build_text_encoder(tokenizer)}).train()


def _build_dit(design: Design) -> DiTTransformer2DModel:
    channels, size = (8, 8) if design.compressed else (4, 16)
    return DiTTransformer2DModel(
        num_attention_heads=design.widths[0] // 32,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        num_layers=design.depth,
        sample_size=size,
        patch_size=1 if design.compressed else 2,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
    )


def _build_unet(design: Design) -> UNet2DConditionModel:
    n = len(design.widths) - 1
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=design.widths,
        layers_per_block=design.depth,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * n),
        up_block_types=(*["CrossAttnUpBlock2D"] * n, "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def _build_pixels(design: Design) -> UNet2DModel:
    n = len(design.widths) - 1
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=design.widths,
        layers_per_block=design.depth,
        down_block_types=(*["DownBlock2D"] * n, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * n),
        attention_head_dim=16,
        norm_num_groups=16,
    )


def _loss_function(
    design: Design, model: nn.Module, scheduler: Any, clean: torch.Tensor, labels: torch.Tensor
) -> Callable[[int, torch.Generator], torch.Tensor]:
    reference = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    tokens = token_table(build_tokenizer()) if design.kind == "unet" else None

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(0, len(clean), (BATCH,), generator=generator)
        images = clean[index].float()
        noise = torch.randn(images.shape, generator=generator)
        timestep = torch.randint(0, 1000, (BATCH,), generator=generator)
        if design.prediction == "flow_prediction":
            sigma = ((timestep + 1) / 1000).view(-1, 1, 1, 1)
            noisy, wanted = (1 - sigma) * images + sigma * noise, noise - images
        else:
            noisy = reference.add_noise(images, noise, timestep)
            is_noise = design.prediction == "epsilon"
            wanted = noise if is_noise else reference.get_velocity(images, noise, timestep)
        predicted = _predict(design, model, noisy, timestep, labels[index], tokens, generator)
        return nn.functional.mse_loss(predicted, wanted)

    return loss_function


def _predict(
    design: Design,
    model: nn.Module,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    labels: torch.Tensor,
    tokens: torch.Tensor | None,
    generator: torch.Generator,
) -> torch.Tensor:
    if design.kind == "pixels":
        return model(noisy, timestep).sample
    if tokens is not None:
        captions = draw_captions(labels, generator)
        told = model["text_encoder"](tokens)[0][captions]
        return model["unet"](noisy, timestep, told).sample
    dropped = torch.rand(labels.shape, generator=generator) < (DROPOUT if design.is_guided else 0.0)
    return model(noisy, timestep=timestep, class_labels=labels.masked_fill(dropped, NULL_CLASS)).sample


def _data(design: Design, arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Images or scaled latents `[N, C, H, W]`, and classes `[N]`."""
    if design.images == "cifar":
        images, labels = read_images(arguments.data / "cifar10_train.parquet")
        images, labels = images[:N_IMAGES], labels[:N_IMAGES]
    else:
        images, labels = read_digits() if design.images == "digits" else draw_shapes(N_IMAGES)
    if design.kind == "pixels":
        return to_unit_range(images), labels
    path = arguments.work / f"latents-{design.images}{'-compressed' * design.compressed}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_save({"latents": _encode(images, _autoencoder(design, arguments))}, path)
    return load_file(path)["latents"], labels


@torch.no_grad()
def _encode(images: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    parts = [vae.encode(to_unit_range(chunk)).latent_dist.mean for chunk in images.split(250)]
    return (torch.cat(parts) * vae.config.scaling_factor).contiguous()  # B C H W


def _autoencoder(design: Design, arguments: argparse.Namespace) -> AutoencoderKL:
    """The embedded models' own, or a second one of 8 channels at 8 x 8 that is trained when first wanted."""
    if not design.compressed:
        return AutoencoderKL.from_pretrained(arguments.start / "vae").eval()
    path = arguments.work / "vae-compressed"
    if path.exists():
        return AutoencoderKL.from_pretrained(path).eval()
    images, _ = read_images(arguments.data / "cifar10_train.parquet")
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
    )

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        batch = to_unit_range(images[torch.randint(0, len(images), (BATCH,), generator=generator)])
        posterior = model.encode(batch).latent_dist
        decoded = model.decode(posterior.sample(generator)).sample
        error = decoded - batch
        return error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()

    budget = Budget(arguments.minutes, learning_rate=2e-3, ema_decay=0.995)
    average = train(model, loss_function, budget, arguments.work / "vae-compressed.safetensors", seed=arguments.seed)
    with torch.no_grad():
        latents = average.encode(to_unit_range(images[:1024])).latent_dist.mean
    average.register_to_config(scaling_factor=float(1 / latents.std()))
    average.save_pretrained(path)
    return average.eval()


def _write(design: Design, average: nn.Module, scheduler: Any, arguments: argparse.Namespace, out: Path) -> None:
    if design.kind == "pixels":
        write_pipeline(DDIMPipeline(average, scheduler), out)
    elif design.kind == "dit":
        plain = untie(average, _build_dit(design).eval())
        names = dict(enumerate(f"class {number}" for number in range(N_CLASSES)))
        write_pipeline(DiTPipeline(plain, _autoencoder(design, arguments), scheduler, id2label=names), out, names)
    else:
        unet = _build_unet(design)
        unet.load_state_dict(average["unet"].state_dict())
        tokenizer = build_tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(design, arguments),
            text_encoder=average["text_encoder"],
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        write_pipeline(pipeline, out)
        write_text_parts_for_all(tokenizer, out)
