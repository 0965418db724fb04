"""How good a quantized pipeline is, beside the one it came from, on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sedimo.bank import SILENT, Progress
from sedimo.lab.images import Features, Samples, compare_distributions, draw, draw_features
from sedimo.metrics.estimate import Estimate, mean_estimate
from sedimo.metrics.signal import NoisePowers, SignalSummary, psnr_db, relative_noise, sqnr_estimates, summarize
from sedimo.pipelines.adapter import PipelineAdapter, Sampling


@dataclass(frozen=True)
class SignalEvaluation:
    """A quantized pipeline against the full-precision one, sample by sample: SQNR of latents, PSNR of images."""

    powers: NoisePowers
    sqnr: SignalSummary
    psnr: Estimate


@dataclass(frozen=True)
class Plans:
    """What is drawn: the samples of a plan, and features of the images of another, if there is one."""

    samples: Sampling
    images: Sampling | None = None


@dataclass(frozen=True)
class Drawn:
    """What a pipeline gave under plans."""

    plans: Plans
    samples: Samples
    features: Features | None


def draw_all(pipe: PipelineAdapter, plans: Plans, *, label: str = "", progress: Progress = SILENT) -> Drawn:
    """Samples all plans."""
    label = label or pipe.name
    samples = draw(pipe, plans.samples, label=label, progress=progress)
    features = draw_features(pipe, plans.images, label=label, progress=progress) if plans.images else None
    return Drawn(plans, samples, features)


def compare_drawn(reference: Drawn, quantized: Drawn) -> tuple[SignalEvaluation, Mapping[str, Estimate]]:
    """What both pipelines drew, sample by sample, and as sets where there are features."""
    signals = compare_signals(reference.samples, quantized.samples)
    if reference.features is None or quantized.features is None:
        return signals, {}
    return signals, compare_distributions(reference.features, quantized.features)


def compare_signals(reference: Samples, quantized: Samples) -> SignalEvaluation:
    """SQNR of the latents and PSNR of the images, each with its error."""
    powers = relative_noise(reference.latents, quantized.latents)
    ratios = psnr_db(reference.images, quantized.images)
    finite = ratios[np.isfinite(ratios)]
    exact = Estimate(float("inf"), 0.0, float("inf"), float("inf"), len(ratios))
    return SignalEvaluation(powers, summarize(powers), mean_estimate(finite) if finite.size else exact)


def measures(signals: SignalEvaluation, distributions: Mapping[str, Estimate]) -> Mapping[str, Estimate]:
    """Every measure by name, each with value, standard error, interval and n."""
    return {**sqnr_estimates(signals.sqnr), "psnr_db": signals.psnr, **distributions}
