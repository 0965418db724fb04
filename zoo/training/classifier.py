"""The classifier whose features serve FID and KID."""

from __future__ import annotations

import argparse
import json
import logging

import torch
from safetensors.torch import save_file
from sedimo_zoo.classifier import Classifier
from torch.nn import functional

from training.data import random_crop, random_flip, read_images, to_unit_range
from training.loop import Budget, train

logger = logging.getLogger(__name__)

BATCH = 128


def run(arguments: argparse.Namespace) -> None:
    """Trains on the 50,000 images, states the accuracy on the 10,000 others, saves."""
    images, labels = read_images(arguments.data / "cifar10_train.parquet")
    device = torch.device(arguments.device)
    model = Classifier().to(device, memory_format=torch.channels_last).train()

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(0, len(images), (BATCH,), generator=generator)
        batch = random_crop(random_flip(to_unit_range(images[index]), generator), generator)
        batch = batch.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(batch)
        return functional.cross_entropy(logits.float(), labels[index].to(device), label_smoothing=0.1)

    budget = Budget(arguments.minutes, learning_rate=4e-3, weight_decay=0.05, ema_decay=0.998)
    path = arguments.work / "classifier.safetensors"
    average = train(model, loss_function, budget, path, seed=arguments.seed)
    accuracy = _accuracy(average, arguments, device)
    logger.info("test accuracy %.4f", accuracy)
    folder = arguments.work / "classifier"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in average.state_dict().items()}, folder / "model.safetensors")
    record = {"test_accuracy": accuracy, "minutes": arguments.minutes, "seed": arguments.seed}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def _accuracy(model: Classifier, arguments: argparse.Namespace, device: torch.device) -> float:
    images, labels = read_images(arguments.data / "cifar10_test.parquet")
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    hits = sum(int((model(to_unit_range(x).to(device)).argmax(1).cpu() == y).sum()) for x, y in batches)
    return hits / len(images)
