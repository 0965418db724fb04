"""What correcting quantization noise in the sampler is worth, for a checkpoint beside its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sedimo.bank import SILENT, Progress
from sedimo.codec import to_plain
from sedimo.jobs.measures import Drawn, compare_drawn, draw_all, measures
from sedimo.lab.images import compare_distributions
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import paired_difference, relative_noise
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.correction import corrected
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.treatments.noise_correction import CorrectionExtent, CorrectionProbe, estimate_correction


@dataclass(frozen=True)
class CorrectedEvaluation:
    """Measures with the correction, and the paired gain (corrected minus not) of `sqnr_db` and, with images, `fid`.

    `probe` is what the correction was estimated from; `done` tells what it did.
    """

    measures: Mapping[str, Estimate]
    gain: Mapping[str, Estimate]
    probe: CorrectionProbe
    done: str

    def as_json(self) -> dict[str, object]:
        """Plain values by name; `fits` has the slope and biases of each timestep."""
        found = {"measures": to_plain(self.measures), "gain": to_plain(self.gain), "done": self.done}
        return {**found, "seeds": list(self.probe.seeds), "path": self.probe.path, "fits": to_plain(self.probe.fits)}


def evaluate_corrected(
    pair: tuple[DiffusersPipeline, DiffusersPipeline],
    drawn: tuple[Drawn, Drawn],
    estimating: Sampling,
    extent: CorrectionExtent,
    progress: Progress = SILENT,
) -> CorrectedEvaluation:
    """Estimates the correction of the second pipeline from the first, and draws the second's plans again with it.

    Raises:
        InputError: predictions that cannot be corrected.
        UnsupportedError: a scheduler that cannot be corrected to that extent.
    """
    reference, plain = drawn
    probe = estimate_correction(*pair, estimating, progress=progress)
    with corrected(pair[1], probe.correction, with_variance=extent == "all") as log:
        again = draw_all(pair[1], plain.plans, label=f"{pair[1].name}, corrected", progress=progress)
    powers = [relative_noise(reference.samples.latents, d.samples.latents) for d in (again, plain)]
    gain = {"sqnr_db": paired_difference(*powers).estimate}
    if plain.features is not None and again.features is not None:
        gain["fid"] = compare_distributions(plain.features, again.features)["fid_difference"]
    return CorrectedEvaluation(measures(*compare_drawn(reference, again)), gain, probe, str(log))
