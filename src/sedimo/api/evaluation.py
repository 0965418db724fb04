"""How good a quantized pipeline is, beside the one it came from, on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from sedimo.bank import SILENT, Progress
from sedimo.metrics.distribution import FeatureStatistics, fid_difference, fid_jackknife, kid, kid_difference
from sedimo.metrics.estimate import Estimate, mean_estimate
from sedimo.metrics.signal import NoisePowers, SignalSummary, psnr_db, relative_noise, summarize
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.pipelines.zoo import feature_extractor, reference_statistics


@dataclass(frozen=True)
class Samples:
    """Final latents `[n, C, H, W]` and images `[n, 3, H, W]` in [0, 1] of one pipeline under one plan."""

    latents: torch.Tensor
    images: torch.Tensor

    def first(self, n: int) -> Samples:
        """The first `n` samples."""
        return Samples(self.latents[:n], self.images[:n])


@dataclass(frozen=True)
class SignalEvaluation:
    """A quantized pipeline against the full-precision one, sample by sample: SQNR of latents, PSNR of images."""

    powers: NoisePowers
    sqnr: SignalSummary
    psnr: Estimate


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
    """Latents and images of a plan, batch by batch."""
    n, size = len(sampling.seeds), sampling.batch_size
    progress.start(n, f"sampling {label or adapter.name}")
    latents, images = [], []
    for first in range(0, n, size):
        latents.append(adapter.sample(_part(sampling, first, min(first + size, n))))
        images.append(adapter.decode(latents[-1]))
        progress.advance(len(latents[-1]))
    progress.done()
    return Samples(torch.cat(latents), torch.cat(images))


def compare_signals(reference: Samples, quantized: Samples) -> SignalEvaluation:
    """SQNR of the latents and PSNR of the images, each with its error."""
    powers = relative_noise(reference.latents, quantized.latents)
    ratios = psnr_db(reference.images, quantized.images)
    finite = ratios[np.isfinite(ratios)]
    exact = Estimate(float("inf"), 0.0, float("inf"), float("inf"), len(ratios))
    return SignalEvaluation(powers, summarize(powers), mean_estimate(finite) if finite.size else exact)


def compare_distributions(reference: torch.Tensor, quantized: torch.Tensor) -> DistributionEvaluation:
    """FID and KID of two sets of images `[n, 3, H, W]` in [0, 1] from the same seeds.

    Raises:
        MissingExtraError: the embedded extractor is not installed.
        InputError: fewer than twenty images.
    """
    name, extract = feature_extractor()
    real = reference_statistics()
    target = FeatureStatistics(real.mean, real.covariance, real.n_images)
    ours, theirs = extract(quantized).numpy(), extract(reference).numpy()
    return DistributionEvaluation(
        extractor=name,
        n_images=len(ours),
        fid=fid_jackknife(ours, target),
        reference_fid=fid_jackknife(theirs, target),
        fid_difference=fid_difference(ours, theirs, target),
        kid=kid(ours, real.features),
        reference_kid=kid(theirs, real.features),
        kid_difference=kid_difference(ours, theirs, real.features),
    )


def sqnr_estimate(summary: SignalSummary) -> Estimate:
    """The SQNR of a summary as value, error and interval [dB]."""
    return Estimate(summary.sqnr_db, summary.standard_error, summary.interval_low, summary.interval_high, summary.n)


def measures(signals: SignalEvaluation, distributions: DistributionEvaluation | None) -> Mapping[str, Estimate]:
    """Every measure by name, each with value, standard error, interval and n."""
    found = {"sqnr_db": sqnr_estimate(signals.sqnr), "psnr_db": signals.psnr}
    if distributions is not None:
        names = ("fid", "reference_fid", "fid_difference", "kid", "reference_kid", "kid_difference")
        found |= {name: getattr(distributions, name) for name in names}
    return found


def _part(sampling: Sampling, first: int, stop: int) -> Sampling:
    """Samples `first` to `stop` of a plan, with the conditions that they have there."""
    conditions = tuple(sampling.condition(i) or "" for i in range(first, stop)) if sampling.conditions else ()
    return Sampling(
        sampling.seeds[first:stop],
        sampling.n_steps,
        conditions,
        guidance=sampling.guidance,
        resolution=sampling.resolution,
        batch_size=sampling.batch_size,
    )
