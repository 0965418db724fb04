"""Sampling images, and how far a set of them is from real ones: FID and KID with their errors.

Their features are those of the extractor of the optional package `sedimo-zoo`. It is a measuring instrument: its name
belongs into every record of a number it had a part in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file as load_tensors

from sedimo.codec import parse_json
from sedimo.errors import InputError, StateError
from sedimo.metrics.distribution import FeatureStatistics, Matrix, fid_replicates, kid_replicates
from sedimo.metrics.estimate import Estimate, jackknife_estimate
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.pipelines.loading import existing, zoo_module
from sedimo.progress import SILENT, Progress

_EXTRACT_BATCH = 250


@dataclass(frozen=True, eq=False)
class Features:
    """Features `[n, D]` float32 of images, by the network named `extractor`."""

    extractor: str
    values: npt.NDArray[np.float32]

    @functools.cached_property
    def distances(self) -> tuple[Matrix, Matrix]:
        """FID and KID to real images; computed once, because full precision is compared with every recipe."""
        real, statistics = _real()
        return fid_replicates(self.values, statistics), kid_replicates(self.values, real.values)


@dataclass(frozen=True)
class Samples:
    """Final latents `[n, C, H, W]` and images `[n, 3, H, W]` in [0, 1] of one pipeline under one plan.

    `features` are those of the images of another plan, if there is one.
    """

    latents: torch.Tensor
    images: torch.Tensor
    features: Features | None = None


def draw(adapter: PipelineAdapter, sampling: Sampling, *, label: str = "", progress: Progress = SILENT) -> Samples:
    """Latents and images of a plan, all in memory."""
    latents, images = zip(*_drawn(adapter, sampling, f"sampling {label or adapter.name}", progress), strict=True)
    return Samples(torch.cat(latents), torch.cat(images))


def draw_latents_and_features(
    adapter: PipelineAdapter, sampling: Sampling, *, label: str = "", progress: Progress = SILENT
) -> tuple[torch.Tensor, Features]:
    """Final latents `[n, C, H, W]` of a plan, and features of their images, of which a batch is in memory."""
    extractor, extract = feature_extractor()
    batches = _drawn(adapter, sampling, f"images of {label or adapter.name}", progress)
    latents, values = zip(*((latents, extract(images).numpy()) for latents, images in batches), strict=True)
    return torch.cat(latents), Features(extractor, np.concatenate(values))


def _drawn(
    adapter: PipelineAdapter, sampling: Sampling, label: str, progress: Progress
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Latents and images of a plan, batch by batch."""
    progress.start(len(sampling.seeds), label)
    for plan in sampling.batches():
        latents = adapter.sample(plan)
        yield latents, adapter.decode(latents)
        progress.advance(len(latents))
    progress.done()


def compare_distributions(reference: Features, quantized: Features) -> dict[str, Estimate]:
    """`fid` and `kid` of the second set of images to real ones, `reference_fid` and `reference_kid` of the first.

    Both are of the same seeds; `fid_difference` and `kid_difference` are paired, the second minus the first.
    """
    names = {reference.extractor, quantized.extractor, _real()[0].extractor}
    if len(names) > 1:
        raise InputError(f"features of different extractors do not compare: {', '.join(sorted(names))}")
    if reference.values.shape != quantized.values.shape:
        raise InputError(
            "sets must be of one size, to be compared image by image, got features of shape "
            f"{reference.values.shape} and {quantized.values.shape}. Draw both with the same seeds."
        )
    found: dict[str, Estimate] = {}
    for name, ours, theirs in zip(("fid", "kid"), quantized.distances, reference.distances, strict=True):
        for label, values in ((name, ours), (f"reference_{name}", theirs), (f"{name}_difference", ours - theirs)):
            value, *replicates = values.tolist()
            found[label] = jackknife_estimate(value, replicates, len(reference.values))
    return found


def feature_extractor() -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name and function of the embedded extractor: images `[B, 3, H, W]` in [0, 1] to features `[B, 256]` on the CPU.

    Images of another size than 32 x 32 are resized first, as FID's own extractor resizes to 299 x 299.
    """
    module = zoo_module("sedimo_zoo.classifier", "the embedded feature extractor")
    classifier = module.Classifier()
    path = existing(zoo_module("sedimo_zoo", "the embedded feature extractor").classifier_path()) / "model.safetensors"
    try:
        tensors = load_tensors(path)
        classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StateError(f"{path} does not hold the embedded classifier: {error}") from error
    classifier.eval().requires_grad_(False)

    @torch.no_grad()
    def extract(images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images must have shape [B, 3, H, W], got {list(images.shape)}")
        found = []
        for chunk in torch.split(images, _EXTRACT_BATCH):
            fitting = chunk.cpu().float()
            if fitting.shape[2:] != (32, 32):
                fitting = torch.nn.functional.interpolate(fitting, (32, 32), mode="bilinear", antialias=True)
            found.append(classifier.features(fitting * 2 - 1).float())
        return torch.cat(found)

    return module.EXTRACTOR_NAME, extract


def reference_statistics() -> tuple[Features, FeatureStatistics]:
    """Of the real images that the embedded models imitate: features of some (KID), and statistics of all (FID)."""
    folder = existing(zoo_module("sedimo_zoo", "the reference of FID and KID").classifier_path())
    record = parse_json(existing(folder / "training.json").read_bytes(), place=str(folder / "training.json"))
    try:
        arrays = load_arrays(existing(folder / "statistics.safetensors"))
        mean, covariance = (arrays[name].astype(np.float64) for name in ("mean", "covariance"))
        statistics = FeatureStatistics(mean, covariance, int(record["n_reference_images"]))
        return Features(str(record["extractor"]), arrays["features"]), statistics
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{folder} does not hold complete reference statistics: {error!r}") from error


_real = functools.cache(reference_statistics)  # read once
