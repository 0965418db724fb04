"""Puts the trained parts together as the data of `sedimo-zoo`: diffusers folders, a classifier, statistics."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from sedimo_zoo.classifier import EXTRACTOR_NAME, Classifier
from transformers import CLIPTextModel, CLIPTokenizer

from training.captions import CLASS_NAMES, TASK, captions_of
from training.data import read_images, to_unit_range
from training.denoiser import build_scheduler

logger = logging.getLogger(__name__)

N_KID_FEATURES = 2000
GUIDANCE = 3.0  # of 1, 1.5, 2, 3 and 4 the one of least FID (docs/results/embedded-models.md)


def run(arguments: argparse.Namespace) -> None:
    """Writes into `arguments.out` what was trained: `cifar-dit/`, `cifar-ldm/` and `cifar-classifier/`."""
    autoencoder = AutoencoderKL.from_pretrained((arguments.start or arguments.work) / "vae")
    if (arguments.work / "transformer").exists():
        _write_dit(arguments.work, autoencoder, arguments.out / "cifar-dit")
    if (arguments.work / "unet").exists():
        _write_ldm(arguments.work, autoencoder, arguments.out / "cifar-ldm")
    if (arguments.work / "classifier").exists():
        _write_classifier(arguments.work, arguments.data, arguments.out / "cifar-classifier")
    total = sum(f.stat().st_size for f in arguments.out.rglob("*") if f.is_file())
    logger.info("%.1f MB in %s", total / 1e6, arguments.out)


def _write_dit(work: Path, autoencoder: AutoencoderKL, out: Path) -> None:
    pipeline = DiTPipeline(
        DiTTransformer2DModel.from_pretrained(work / "transformer"),
        autoencoder,
        build_scheduler(),
        id2label=dict(enumerate(CLASS_NAMES)),
    )
    write_pipeline(pipeline, out, dict(enumerate(CLASS_NAMES)))


def _write_ldm(work: Path, autoencoder: AutoencoderKL, out: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=build_scheduler(steps_offset=1),  # the pipeline insists; trailing timesteps have no use for it
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    write_pipeline(pipeline, out)
    write_text_parts_for_all(tokenizer, out)


def write_text_parts_for_all(tokenizer: CLIPTokenizer, out: Path) -> None:
    """Brings tokenizer and text encoder of a written pipeline into a form that transformers 4 reads, too."""
    tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))  # the two files that transformers 4 reads
    _write_text_encoder_for_all(out / "text_encoder")


def _write_text_encoder_for_all(folder: Path) -> None:
    """Names the weights as transformers 4 does, which 5 reads too, and adds what the encoder was made to be told.

    The dtype that is asked for by default becomes float32, as it is for the networks of diffusers: transformers 5
    would take the stored float16, and the pipeline would stumble over the mixture.
    """
    weights = load_file(folder / "model.safetensors")
    renamed = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    prompts = [captions_of(name)[0] for name in CLASS_NAMES]
    suited = {TASK: {"prompts": prompts, "guidance_scale": GUIDANCE}}
    _add_to_json(folder / "config.json", task_specific_params=suited, dtype="float32")


def write_pipeline(pipeline: DiffusionPipeline, out: Path, labels: Mapping[int, str] | None = None) -> None:
    """The pipeline in float16 as a folder, with the names of its classes, which diffusers forgets."""
    shutil.rmtree(out, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(out)
    for config in out.glob("*/config.json"):
        _add_to_json(config)
    if labels is not None:
        _add_to_json(out / "model_index.json", id2label={str(number): name for number, name in labels.items()})


def _add_to_json(path: Path, **entries: object) -> None:
    """Adds entries to a config, and removes from it the folder of the one who trained it."""
    plain = json.loads(path.read_text()) | entries
    plain.pop("_name_or_path", None)
    path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def _write_classifier(work: Path, data: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    weights = load_file(work / "classifier" / "model.safetensors")
    halved = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(halved, out / "model.safetensors")
    classifier = Classifier().eval()
    classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in halved.items()})
    images, labels = read_images(data / "cifar10_test.parquet")
    features = torch.cat([classifier.features(to_unit_range(chunk)) for chunk in images.split(500)])
    accuracy = float((classifier.head(features).argmax(1) == labels).double().mean())
    wide = features.double()
    statistics = {
        "mean": wide.mean(0),
        "covariance": torch.cov(wide.t()),
        "features": features[:N_KID_FEATURES].half(),
    }
    save_file({k: v.contiguous() for k, v in statistics.items()}, out / "statistics.safetensors")
    record = json.loads((work / "classifier" / "training.json").read_text())
    record |= {"extractor": EXTRACTOR_NAME, "test_accuracy": accuracy, "n_reference_images": len(images)}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    logger.info("classifier in float16: test accuracy %.4f", accuracy)
