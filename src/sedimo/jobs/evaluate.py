"""Compare the checkpoint OUT with its source on the same seeds: size, SQNR, PSNR, FID, KID."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sedimo.checkpoint.contents import packed_layers
from sedimo.checkpoint.inputs import rounded_inputs
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.jobs.describe import refuse_other_source
from sedimo.jobs.job import Job
from sedimo.jobs.settings import SAMPLING
from sedimo.lab.bench import Compute, trace
from sedimo.lab.images import Samples, compare_distributions, draw, draw_latents_and_features
from sedimo.lab.seeds import SamplingSettings, Seeds
from sedimo.metrics.distribution import N_PARTS
from sedimo.metrics.estimate import Estimate, mean_estimate
from sedimo.metrics.signal import NoisePowers, paired_difference, psnr_db, relative_noise, sqnr_estimates
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.pipelines.correction import corrected
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.weights import denoiser_folder
from sedimo.progress import SILENT, Progress
from sedimo.quant.formats import FP16
from sedimo.quant.parts import Entry, PartFormat
from sedimo.quant.tensor import QuantizedTensor, memory_bytes
from sedimo.reporting.page import Block, Facts, Page, Table, Text, columns, page_of, rows
from sedimo.reporting.words import byte_size, count
from sedimo.settings import REQUIRED, Checked, block, option
from sedimo.space import Recipe, search_space
from sedimo.treatments.noise_correction import (
    CorrectionExtent,
    StepFit,
    check_extent,
    correction_of,
    correction_plan,
    estimate_correction,
)

MIN_IMAGES = 2 * N_PARTS  # two in each part that the jackknife leaves out


@dataclass(frozen=True, slots=True)
class EvaluateSettings(Checked):
    """Which checkpoint beside which source, sampled how, with how many images for FID and KID."""

    out: str = option(REQUIRED, metavar="OUT", help="A packed checkpoint.")
    against: str = option(REQUIRED, "--against", metavar="SRC", help="The pipeline that OUT was made from.")
    variant: str | None = option(None, "--variant", help="Variant of SRC's weights, such as fp16.")
    n_images: int = option(0, "--images", least=0, help="Number of images for FID and KID; 0: not measured.")
    correct: CorrectionExtent | None = option(
        None, "--correct", bare="all", help="Also with noise corrected in the sampler; =output: in predictions alone."
    )
    sampling: SamplingSettings = block(SAMPLING, "Sampling")
    compute: Compute = block(Compute(), "Sampling")


@dataclass(frozen=True)
class CorrectedEvaluation:
    """Measures with the noise corrected in the sampler, and the paired gain (corrected minus not) of SQNR and FID.

    The correction was estimated from `seeds` on a `path`; `fits` has slope and biases by timestep, `done` what it did.
    """

    measures: Mapping[str, Estimate]
    gain: Mapping[str, Estimate]
    done: str
    seeds: tuple[int, ...]
    path: str
    fits: tuple[StepFit, ...]


@dataclass(frozen=True)
class Evaluation:
    """Measures by name; sizes by name [bytes]; bit operations of one sample and denoiser call by name [BOPs].

    Of the samples of the SQNR, `n_exact` have no noise at all and `n_decorrelated` have more than half of the signal's
    power. `extractor` names the network behind FID and KID. `corrected` is what noise correction made, if asked for.
    """

    measures: Mapping[str, Estimate]
    n_exact: int
    n_decorrelated: int
    size: Mapping[str, int]
    bops: Mapping[str, int]
    extractor: str | None
    corrected: CorrectedEvaluation | None = None

    def as_json(self) -> dict[str, object]:
        """Plain values by name: each measure has value, standard_error, low, high, n."""
        plain: dict[str, Any] = to_plain(self)
        if self.corrected is None:
            del plain["corrected"]
        return {**plain.pop("measures"), **plain}


def evaluate(
    quantized: DiffusersPipeline,
    against: DiffusersPipeline,
    *,
    sampling: SamplingSettings = SAMPLING,
    n_images: int = 0,
    correct: CorrectionExtent | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Samples both pipelines from the same seeds and compares them.

    SQNR and PSNR use the order's seeds; FID and KID use `n_images` seeds from the first on (0: not measured).
    With `correct`, the quantization noise that 16 further seeds show is corrected in the sampler, and all is measured
    again: `all` corrects predictions and the noise that the scheduler adds, `output` predictions alone.

    Raises:
        InputError: they are pipelines of different classes or weights, or fewer than twenty images.
        UnsupportedError: a scheduler that cannot be corrected to that extent.
    """
    if against.pipeline.__class__ is not quantized.pipeline.__class__:
        raise InputError(
            f"{quantized.name} is a {type(quantized.pipeline).__name__} and {against.name} a "
            f"{type(against.pipeline).__name__}; only a checkpoint and its own source can be compared"
        )
    if 0 < n_images < MIN_IMAGES:
        raise InputError(f"FID and KID need at least {MIN_IMAGES} images, got {n_images}; 0 leaves them out")
    if correct is not None:
        check_extent(correct, "correct")
    _refuse_strangers(quantized, against)
    images = range(sampling.first_seed, sampling.first_seed + n_images)
    seeds = Seeds(sampling, against.default_sampling)
    plans = seeds.search, seeds.plan(images) if n_images else None
    reference, drawn = (_draw(p, *plans, progress) for p in (against, quantized))
    powers, found = _measures(reference, drawn)
    correction = None
    if correct:
        estimating = correction_plan(seeds, n_images)
        fits = estimate_correction(against, quantized, estimating, progress=progress)
        with corrected(quantized, correction_of(fits), with_variance=correct == "all") as log:
            again = _draw(quantized, *plans, progress, label=f"{quantized.name}, corrected")
        less_noise, better = _measures(reference, again)
        gain = {"sqnr_db": paired_difference(less_noise, powers).estimate}
        if drawn.features is not None and again.features is not None:
            gain["fid"] = compare_distributions(drawn.features, again.features)["fid_difference"]
        correction = CorrectedEvaluation(better, gain, str(log), estimating.seeds, "full", fits)
    return Evaluation(
        measures=found,
        n_exact=powers.n_exact,
        n_decorrelated=powers.n_decorrelated,
        size=_sizes(quantized, against),
        bops=_bops(quantized, against),
        extractor=drawn.features.extractor if drawn.features else None,
        corrected=correction,
    )


def _draw(
    pipe: PipelineAdapter, plan: Sampling, images: Sampling | None, progress: Progress, *, label: str = ""
) -> Samples:
    """The samples of a plan, with features of the images of another, if there is one."""
    samples = draw(pipe, plan, label=label, progress=progress)
    if images is None:
        return samples
    return replace(samples, features=draw_latents_and_features(pipe, images, label=label, progress=progress)[1])


def _measures(reference: Samples, quantized: Samples) -> tuple[NoisePowers, dict[str, Estimate]]:
    """The noise sample by sample, and every measure by name: of sets of images, too, where there are features."""
    powers, found = compare_signals(reference, quantized)
    if reference.features is None or quantized.features is None:
        return powers, found
    return powers, found | compare_distributions(reference.features, quantized.features)


def compare_signals(reference: Samples, quantized: Samples) -> tuple[NoisePowers, dict[str, Estimate]]:
    """The noise of the latents, their SQNR, and the PSNR of the images, each with its error."""
    powers = relative_noise(reference.latents, quantized.latents)
    ratios = psnr_db(reference.images, quantized.images)
    finite = ratios[np.isfinite(ratios)]
    psnr = mean_estimate(finite) if finite.size else Estimate(np.inf, 0.0, np.inf, np.inf, len(ratios))
    return powers, {**sqnr_estimates(powers), "psnr_db": psnr}


def _refuse_strangers(quantized: DiffusersPipeline, against: DiffusersPipeline) -> None:
    """Refuses a checkpoint whose packed weights cannot have been made from the other's."""
    weights = dict(against.denoiser.named_parameters(remove_duplicate=False))
    for name, packed in packed_layers(quantized.denoiser).items():
        weight = weights.get(f"{name}.weight")
        if weight is None:
            raise InputError(f"{against.name} has no layer {name!r}; give the source that the checkpoint was made from")
        if not isinstance(weight, QuantizedTensor):
            refuse_other_source(name, weight.detach().cpu(), packed.dequantize().cpu())


def _sizes(quantized: DiffusersPipeline, against: DiffusersPipeline) -> dict[str, int]:
    size = {"memory_bytes": memory_bytes(quantized.denoiser), "source_memory_bytes": memory_bytes(against.denoiser)}
    for name, pipe in (("file_bytes", quantized), ("source_file_bytes", against)):
        if pipe.folder is not None:
            size[name] = sum(f.stat().st_size for f in denoiser_folder(pipe.folder).glob("*.safetensors"))
    return size


def _bops(quantized: DiffusersPipeline, against: DiffusersPipeline) -> dict[str, int]:
    """Bit operations, those of attention included; a source that is packed itself cannot be traced and has none."""
    if packed_layers(against.denoiser):
        return {}
    space = search_space(trace(against), "fp16")
    bits = {name: quantizer.bits for name, quantizer in rounded_inputs(quantized.denoiser).layers.items()}
    layers: dict[str, Entry] = dict.fromkeys(bits, FP16)
    for name, weight in packed_layers(quantized.denoiser).items():
        layers[name] = tuple(PartFormat(start, stop, f) for start, stop, f, _ in weight.packing.parts)
    counts = {"bops": space.bops(Recipe(layers).with_activations(bits)), "source_bops": space.full_bops}
    return {**counts, "attention_bops": space.attention_bops}


def _pipeline(source: str, compute: Compute, variant: str | None = None) -> DiffusersPipeline:
    loaded = load_pipeline(source, device=compute.device, dtype=compute.dtype, variant=variant)
    if not isinstance(loaded, DiffusersPipeline):
        raise InputError(f"{source} is a denoiser without its pipeline and cannot be sampled")
    return loaded


def run(settings: EvaluateSettings, progress: Progress) -> Evaluation:
    """Loads both and compares them."""
    against = _pipeline(settings.against, settings.compute, settings.variant)
    return evaluate(
        _pipeline(settings.out, settings.compute),
        against,
        sampling=settings.sampling,
        n_images=settings.n_images,
        correct=settings.correct,
        progress=progress,
    )


def page(found: Evaluation) -> Page:
    """Measures with their intervals, and sizes."""
    sizes = [(name, byte_size(value)) for name, value in found.size.items()]
    sizes += [(name, f"{count(value)} bit operations a call and sample") for name, value in found.bops.items()]
    noisy = f"{found.n_exact} samples are exact, {found.n_decorrelated} have more noise than half the signal"
    features = f"features by {found.extractor}; FID falls with n, so compare only figures of equal n"
    blocks: list[Block | None] = [
        _table("measure", found.measures),
        Facts(tuple(sizes)),
        Text(noisy) if found.n_exact or found.n_decorrelated else None,
        Text(features) if found.extractor else None,
    ]
    if found.corrected:
        gains = {f"gain of {name}": value for name, value in found.corrected.gain.items()}
        blocks += [
            _table("corrected", {**found.corrected.measures, **gains}),
            Text(f"{found.corrected.done}; estimated from {len(found.corrected.seeds)} other seeds"),
        ]
    return page_of("", "", *blocks)


def _table(title: str, measures: Mapping[str, Estimate]) -> Table:
    return Table(columns(title, "value, with its 95 % interval", "n"), rows((n, v, v.n) for n, v in measures.items()))


JOB = Job(__doc__, EvaluateSettings, run, page)
