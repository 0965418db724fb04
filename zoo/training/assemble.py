"""Puts the trained parts together as the data of `sedimo-zoo`: a diffusers folder, a classifier, statistics."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from sedimo_zoo.classifier import EXTRACTOR_NAME, Classifier

from training.data import read_images, to_unit_range
from training.denoiser import build_scheduler

logger = logging.getLogger(__name__)

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
N_KID_FEATURES = 2000


def run(arguments: argparse.Namespace) -> None:
    """Writes `cifar-dit/` and `cifar-classifier/` into `arguments.out`."""
    autoencoder = AutoencoderKL.from_pretrained((arguments.start or arguments.work) / "vae")
    _write_pipeline(arguments.work, autoencoder, arguments.out / "cifar-dit")
    if not arguments.start:
        _write_classifier(arguments.work, arguments.data, arguments.out / "cifar-classifier")
    total = sum(f.stat().st_size for f in arguments.out.rglob("*") if f.is_file())
    logger.info("wrote %.1f MB to %s", total / 1e6, arguments.out)


def _write_pipeline(work: Path, autoencoder: AutoencoderKL, out: Path) -> None:
    pipeline = DiTPipeline(
        DiTTransformer2DModel.from_pretrained(work / "transformer"),
        autoencoder,
        build_scheduler(),
        id2label=dict(enumerate(CLASS_NAMES)),
    )
    shutil.rmtree(out, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(out)
    for config in out.glob("*/config.json"):
        plain = json.loads(config.read_text())
        plain.pop("_name_or_path", None)  # the folder of the one who trained it
        config.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
    index = json.loads((out / "model_index.json").read_text())
    index["id2label"] = {str(number): name for number, name in enumerate(CLASS_NAMES)}  # diffusers forgets it
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


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
