"""How good a quantized pipeline is, beside the one it came from, on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sedimo.measurement.images import DistributionEvaluation, Samples
from sedimo.metrics.estimate import Estimate, mean_estimate
from sedimo.metrics.signal import NoisePowers, SignalSummary, psnr_db, relative_noise, sqnr_estimates, summarize


@dataclass(frozen=True)
class SignalEvaluation:
    """A quantized pipeline against the full-precision one, sample by sample: SQNR of latents, PSNR of images."""

    powers: NoisePowers
    sqnr: SignalSummary
    psnr: Estimate


def compare_signals(reference: Samples, quantized: Samples) -> SignalEvaluation:
    """SQNR of the latents and PSNR of the images, each with its error."""
    powers = relative_noise(reference.latents, quantized.latents)
    ratios = psnr_db(reference.images, quantized.images)
    finite = ratios[np.isfinite(ratios)]
    exact = Estimate(float("inf"), 0.0, float("inf"), float("inf"), len(ratios))
    return SignalEvaluation(powers, summarize(powers), mean_estimate(finite) if finite.size else exact)


def measures(signals: SignalEvaluation, distributions: DistributionEvaluation | None) -> Mapping[str, Estimate]:
    """Every measure by name, each with value, standard error, interval and n."""
    found = {**sqnr_estimates(signals.sqnr), "psnr_db": signals.psnr}
    if distributions is not None:
        names = ("fid", "reference_fid", "fid_difference", "kid", "reference_kid", "kid_difference")
        found |= {name: getattr(distributions, name) for name in names}
    return found
