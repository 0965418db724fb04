"""How good a quantized pipeline is, beside the one it came from, on the same seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sedimo.bank import SILENT, Progress
from sedimo.lab.images import Samples, compare_distributions, draw, draw_latents_and_features
from sedimo.metrics.estimate import Estimate, mean_estimate
from sedimo.metrics.signal import NoisePowers, psnr_db, relative_noise, sqnr_estimates
from sedimo.pipelines.adapter import PipelineAdapter, Sampling


def draw_all(
    pipe: PipelineAdapter, plan: Sampling, images: Sampling | None, *, label: str = "", progress: Progress = SILENT
) -> Samples:
    """Samples of a plan, with features of the images of another, if there is one."""
    samples = draw(pipe, plan, label=label, progress=progress)
    if images is None:
        return samples
    _, features = draw_latents_and_features(pipe, images, label=label, progress=progress)
    return replace(samples, features=features)


def measures(reference: Samples, quantized: Samples) -> dict[str, Estimate]:
    """What both pipelines drew, sample by sample, and as sets where there are features: every measure by name."""
    _, found = compare_signals(reference, quantized)
    if reference.features is None or quantized.features is None:
        return found
    return found | compare_distributions(reference.features, quantized.features)


def compare_signals(reference: Samples, quantized: Samples) -> tuple[NoisePowers, dict[str, Estimate]]:
    """The noise of the latents, their SQNR, and the PSNR of the images, each with its error."""
    powers = relative_noise(reference.latents, quantized.latents)
    ratios = psnr_db(reference.images, quantized.images)
    finite = ratios[np.isfinite(ratios)]
    psnr = mean_estimate(finite) if finite.size else Estimate(np.inf, 0.0, np.inf, np.inf, len(ratios))
    return powers, {**sqnr_estimates(powers), "psnr_db": psnr}
