"""A quantized checkpoint against its source: sizes, SQNR, PSNR, FID, KID on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sedimo.api.evaluation import compare_distributions, compare_signals, draw, measures
from sedimo.api.order import DEFAULT_COMPUTE, Compute, SamplingOrder
from sedimo.bank import SILENT, Progress
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline, locate
from sedimo.pipelines.weights import denoiser_folder
from sedimo.quant.memory import memory_bytes


@dataclass(frozen=True)
class Evaluation:
    """Measures by name, and sizes by name [bytes]."""

    measures: Mapping[str, Estimate]
    size: Mapping[str, int]
    extractor: str | None

    def as_json(self) -> dict[str, object]:
        """Plain values by name: each measure has value, standard_error, low, high, n."""
        return {**to_plain(self.measures), "size": dict(self.size), "extractor": self.extractor}


def evaluate_sources(
    quantized: str,
    against: str,
    order: SamplingOrder,
    *,
    n_images: int = 0,
    compute: Compute = DEFAULT_COMPUTE,
    progress: Progress = SILENT,
) -> Evaluation:
    """Samples both pipelines from the same seeds and compares them.

    SQNR and PSNR use the order's seeds; FID and KID use `n_images` seeds from the first on (0: not measured).

    Raises:
        InputError: one of them cannot be sampled, or they are different pipelines.
    """
    full = _pipeline(against, compute)
    small = _pipeline(quantized, compute)
    if full.pipeline.__class__ is not small.pipeline.__class__:
        raise InputError(
            f"{quantized} is a {type(small.pipeline).__name__} and {against} a {type(full.pipeline).__name__}; "
            "only a checkpoint and its own source can be compared"
        )
    n = max(order.n_seeds, n_images)
    plan = order.plan(full, range(order.first_seed, order.first_seed + n))
    reference, ours = (draw(p, plan, label=p.name, progress=progress) for p in (full, small))
    few = slice(0, order.n_seeds)
    signals = compare_signals(
        type(reference)(reference.latents[few], reference.images[few]), type(ours)(ours.latents[few], ours.images[few])
    )
    distributions = compare_distributions(reference.images, ours.images) if n_images else None
    size = {
        "file_bytes": _file_bytes(quantized),
        "source_file_bytes": _file_bytes(against),
        "memory_bytes": memory_bytes(small.denoiser),
        "source_memory_bytes": memory_bytes(full.denoiser),
    }
    return Evaluation(measures(signals, distributions), size, distributions.extractor if distributions else None)


def _pipeline(source: str, compute: Compute) -> DiffusersPipeline:
    loaded = load_pipeline(source, device=compute.device, dtype=compute.dtype)
    if not isinstance(loaded, DiffusersPipeline):
        raise InputError(f"{source} is a denoiser without its pipeline and cannot be sampled")
    return loaded


def _file_bytes(source: str) -> int:
    folder = denoiser_folder(locate(source, None)[1])
    return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
