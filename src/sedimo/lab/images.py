"""Sampling images, and how far a set of them is from real ones: FID and KID with their errors."""

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

from sedimo.bank import SILENT, Progress
from sedimo.codec import parse_json
from sedimo.errors import InputError, StateError
from sedimo.metrics.distribution import FeatureStatistics, Replicated, fid_replicates, kid_replicates
from sedimo.metrics.estimate import Estimate
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.pipelines.loading import existing, zoo_module


@dataclass(frozen=True)
class Samples:
    """Final latents `[n, C, H, W]` and images `[n, 3, H, W]` in [0, 1] of one pipeline under one plan."""

    latents: torch.Tensor
    images: torch.Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Features `[n, D]` float32 of images, by the network named `extractor`."""

    extractor: str
    values: npt.NDArray[np.float32]

    @functools.cached_property
    def distances(self) -> tuple[Replicated, Replicated]:
        """FID and KID to real images; computed once, because full precision is compared with every recipe."""
        real = _real()
        target = FeatureStatistics(real.mean, real.covariance, real.n_images)
        return fid_replicates(self.values, target), kid_replicates(self.values, real.features)


@dataclass(frozen=True)
class DistributionEvaluation:
    """FID and KID of both pipelines to real images, and their paired differences (quantized minus reference).

    `extractor` names the network behind the features; `n_images` were made by each pipeline from the same seeds.
    """

    extractor: str
    n_images: int
    fid: Estimate
    reference_fid: Estimate
    fid_difference: Estimate
    kid: Estimate
    reference_kid: Estimate
    kid_difference: Estimate


def draw(adapter: PipelineAdapter, sampling: Sampling, *, label: str = "", progress: Progress = SILENT) -> Samples:
    """Latents and images of a plan, all in memory."""
    batches = list(_drawn(adapter, sampling, f"sampling {label or adapter.name}", progress))
    return Samples(torch.cat([latents for latents, _ in batches]), torch.cat([images for _, images in batches]))


def draw_features(
    adapter: PipelineAdapter, sampling: Sampling, *, label: str = "", progress: Progress = SILENT
) -> Features:
    """Features of the images of a plan; no more than a batch of images is in memory.

    Raises:
        MissingExtraError: the embedded extractor is not installed.
    """
    return draw_latents_and_features(adapter, sampling, label=label, progress=progress)[1]


def draw_latents_and_features(
    adapter: PipelineAdapter, sampling: Sampling, *, label: str = "", progress: Progress = SILENT
) -> tuple[torch.Tensor, Features]:
    """Final latents `[n, C, H, W]` of a plan, and features of their images; a batch of images is in memory.

    Raises:
        MissingExtraError: the embedded extractor is not installed.
    """
    extractor, extract = feature_extractor()
    batches = _drawn(adapter, sampling, f"images of {label or adapter.name}", progress)
    pairs = [(latents, extract(images).numpy()) for latents, images in batches]
    values = np.concatenate([features for _, features in pairs])
    return torch.cat([latents for latents, _ in pairs]), Features(extractor, values)


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


def compare_distributions(reference: Features, quantized: Features) -> DistributionEvaluation:
    """FID and KID of two sets of features of images from the same seeds.

    Raises:
        InputError: fewer than twenty images, or features of different extractors.
    """
    real = _real()
    names = {reference.extractor, quantized.extractor, real.extractor}
    if len(names) > 1:
        raise InputError(f"features of different extractors do not compare: {', '.join(sorted(names))}")
    if reference.values.shape != quantized.values.shape:
        raise InputError(f"sets must be of one size, got {reference.values.shape} and {quantized.values.shape}")
    (fid, kid), (reference_fid, reference_kid) = quantized.distances, reference.distances
    return DistributionEvaluation(
        extractor=real.extractor,
        n_images=len(quantized.values),
        fid=fid.estimate(),
        reference_fid=reference_fid.estimate(),
        fid_difference=fid.minus(reference_fid),
        kid=kid.estimate(),
        reference_kid=reference_kid.estimate(),
        kid_difference=kid.minus(reference_kid),
    )


@functools.cache
def _real() -> ReferenceStatistics:
    """Real images, read once."""
    return reference_statistics()


FeatureExtractor = Callable[[torch.Tensor], torch.Tensor]


_EXTRACT_BATCH = 250


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Features of real images by the extractor named `extractor`.

    `mean` `[D]` and `covariance` `[D, D]` float64 of all `n_images` (FID), and `features` `[m, D]` float16 of
    the first m of them (KID).
    """

    extractor: str
    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    features: npt.NDArray[np.float16]
    n_images: int


def feature_extractor(device: str | torch.device = "cpu") -> tuple[str, FeatureExtractor]:
    """Name and function of the embedded extractor: images `[B, 3, H, W]` in [0, 1] to features `[B, 256]`.

    Features are float32 on the CPU. Images of another size than 32 x 32 are resized first (bilinear,
    antialiased), as FID's own extractor resizes to 299 x 299.

    Raises:
        MissingExtraError: the package sedimo-zoo is not installed.
        StateError: its data is missing or damaged.
    """
    module = zoo_module("sedimo_zoo.classifier", "the embedded feature extractor")
    classifier = module.Classifier()
    path = existing(zoo_module("sedimo_zoo", "the embedded feature extractor").classifier_path()) / "model.safetensors"
    try:
        classifier.load_state_dict({k: _widened(v) for k, v in load_tensors(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StateError(f"{path} does not hold the embedded classifier: {error}") from error
    classifier.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def extract(images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images must have shape [B, 3, H, W], got {list(images.shape)}")
        chunks = [classifier.features(_fitted(c.to(device))).float().cpu() for c in torch.split(images, _EXTRACT_BATCH)]
        return torch.cat(chunks)

    return module.EXTRACTOR_NAME, extract


def reference_statistics() -> ReferenceStatistics:
    """Feature statistics of the real images that the embedded models imitate.

    Raises:
        MissingExtraError: the package sedimo-zoo is not installed.
        StateError: its data is missing or damaged.
    """
    folder = existing(zoo_module("sedimo_zoo", "the reference of FID and KID").classifier_path())
    path = folder / "statistics.safetensors"
    record = parse_json(existing(folder / "training.json").read_bytes(), place=str(folder / "training.json"))
    try:
        arrays = load_arrays(existing(path))
        return ReferenceStatistics(
            str(record["extractor"]),
            arrays["mean"].astype(np.float64),
            arrays["covariance"].astype(np.float64),
            arrays["features"],
            int(record["n_reference_images"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{folder} does not hold complete reference statistics: {error!r}") from error


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _fitted(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as the classifier wants them: 32 x 32, in [-1, 1]."""
    images = images.float()
    if images.shape[2:] != (32, 32):
        images = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    return images * 2 - 1
