"""The door to diffusers: a pipeline object behind Sedimo's seam, and a denoiser without its pipeline.

Loading from folders and hub ids is in `loading.py`; this module wraps objects that exist already.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.pipelines.adapter import Observer, PipelineObject, Sampling
from sedimo.pipelines.conditions import default_conditions, default_guidance
from sedimo.pipelines.differentiable import DifferentiableRun, run_differentiably
from sedimo.pipelines.folder import Finish, LoadedFrom, save_denoiser_only, save_pipeline
from sedimo.pipelines.sampling import sample_batch

DECODE_BATCH = 32


@torch.no_grad()
def decode_latents(pipeline: PipelineObject, latents: torch.Tensor) -> torch.Tensor:
    """Images `[n, 3, H, W]` float32 in [0, 1] on the CPU; pixel-space pipelines only rescale.

    Raises:
        InputError: the latents do not belong to this pipeline, or its decoder is not known.
    """
    decoder = _decoder(pipeline)
    if decoder is None:
        return _to_unit(latents)
    latents = _unpacked(pipeline, latents)
    n_channels = _config(decoder).get("latent_channels")
    if latents.ndim != 4 or (n_channels is not None and latents.shape[1] != n_channels):
        raise InputError(f"latents must have shape [n, {n_channels}, H, W], got {list(latents.shape)}")
    with _upcast_if_forced(decoder):
        chunks = [_decode_chunk(decoder, chunk) for chunk in torch.split(latents, DECODE_BATCH)]
    return torch.cat(chunks)


def _decoder(pipeline: PipelineObject) -> nn.Module | None:
    for name in ("vae", "vqvae"):
        if getattr(pipeline, name, None) is not None:
            return getattr(pipeline, name)  # type: ignore[no-any-return]  # diffusers has no types
    if getattr(pipeline, "movq", None) is not None:
        raise InputError(
            f"{type(pipeline).__name__} decodes by a MOVQ, which is not supported; compare latents instead"
        )
    return None


def _unpacked(pipeline: PipelineObject, latents: torch.Tensor) -> torch.Tensor:
    """FLUX-like pipelines hand out tokens `[n, T, 4 C]` of 2 x 2 latent pixels; images are square here."""
    unpack = getattr(pipeline, "_unpack_latents", None)
    if latents.ndim != 3 or unpack is None:
        return latents
    factor: int = getattr(pipeline, "vae_scale_factor", 8)
    if list(inspect.signature(unpack).parameters) != ["latents", "height", "width", "vae_scale_factor"]:
        raise InputError(f"{type(pipeline).__name__} packs its latents in an unknown way; compare latents instead")
    pixels = 2 * factor * math.isqrt(latents.shape[1])
    return unpack(latents, pixels, pixels, factor)  # type: ignore[no-any-return]


def _decode_chunk(decoder: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    weight = next(decoder.parameters())
    scaled = _unscaled(_config(decoder), latents.float()).to(weight.device, weight.dtype)
    return _to_unit(decoder.decode(scaled).sample)  # type: ignore[operator]


def _unscaled(config: Mapping[str, Any], latents: torch.Tensor) -> torch.Tensor:
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    latents = latents / (config.get("scaling_factor") or 1.0)
    if mean is not None and deviation is not None:
        latents = latents * _per_channel(deviation) + _per_channel(mean)
    return latents + (config.get("shift_factor") or 0.0)


def _config(decoder: nn.Module) -> Mapping[str, Any]:
    return decoder.config  # type: ignore[return-value]  # a frozen dictionary of diffusers


def _per_channel(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _to_unit(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 2 + 0.5).clamp(0, 1).cpu()


@contextmanager
def _upcast_if_forced(decoder: nn.Module) -> Iterator[None]:
    """SDXL's autoencoder overflows in float16 and says so (`force_upcast`); float16 -> float32 -> float16 is exact."""
    is_forced = next(decoder.parameters()).dtype is torch.float16 and decoder.config.get("force_upcast", False)  # type: ignore[union-attr, operator]
    if not is_forced:
        yield
        return
    decoder.to(torch.float32)
    try:
        yield
    finally:
        decoder.to(torch.float16)


DENOISER_NAMES = ("transformer", "unet")
_MAX_BATCH = 64
_LATENT_PIXELS_PER_BATCH = 65536  # 64 samples of 32 x 32, 4 of 128 x 128 (SDXL at 1024 pixels)
_N_VALUES = 64
_N_DIGITS = 16
_DEFAULTED = "_use_default_values"  # settings that were not given; diffusers lists a set, so in another order each time


class DiffusersPipeline:
    """A diffusers pipeline that can be sampled from seeds, watched, decoded and saved.

    `name` is what people call it (the class name by default); `folder` is where its files are, if anywhere, and
    `variant` which of the weights there were loaded. `finish_saving` may add files to a folder that is being saved.
    """

    def __init__(
        self,
        pipeline: PipelineObject,
        *,
        name: str | None = None,
        folder: Path | None = None,
        variant: str | None = None,
    ) -> None:
        """Wraps `pipeline`, which is used as it is: neither moved nor cast.

        Raises:
            InputError: it has no component `transformer` or `unet`, or no scheduler.
        """
        self.pipeline = pipeline
        self.finish_saving: Finish | None = None
        self.folder = folder
        self.variant = variant
        self.denoiser_name = _denoiser_name(pipeline)
        self._name = name or type(pipeline).__name__
        self._source = None if folder is None else LoadedFrom(folder, variant, dict(pipeline.components))

    @property
    def name(self) -> str:
        """Name of the pipeline for people."""
        return self._name

    @property
    def identity(self) -> str:
        """Class of the pipeline, and digests of its scheduler's settings and of its other networks."""
        return pipeline_identity(self.pipeline, self.denoiser_name)

    @property
    def denoiser(self) -> nn.Module:
        """The network that is called at each step."""
        return getattr(self.pipeline, self.denoiser_name)  # type: ignore[no-any-return]  # diffusers has no types

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return _device(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return _dtype(self.denoiser)

    @property
    def is_quantized(self) -> bool:
        """Whether the denoiser came from a quantized checkpoint."""
        return is_quantized(self.denoiser)

    def sample(self, sampling: Sampling, *, observer: Observer | None = None) -> torch.Tensor:
        """Final latents `[n, C, H, W]` float32 on the CPU, one per seed; `observer` sees each denoiser call.

        Packed latents of FLUX-like pipelines are `[n, T, C]`. Pixel-space pipelines give images in [-1, 1],
        not clipped. With guidance the denoiser sees its batch twice: row r belongs to sample r mod B.

        Raises:
            InputError: conditions, guidance or resolution do not suit this pipeline.
        """
        n = len(sampling.seeds)
        batches = [range(i, min(i + sampling.batch_size, n)) for i in range(0, n, sampling.batch_size)]
        return torch.cat([sample_batch(self.pipeline, self.denoiser, sampling, b, observer) for b in batches])

    def differentiable(self, sampling: Sampling) -> DifferentiableRun:
        """The samples of a plan as one batch, with what it takes to differentiate their final latents.

        Raises:
            InputError: as `sample`.
            UnsupportedError: the way from the denoiser to the final latents has no derivative.
        """
        return run_differentiably(self.pipeline, self.denoiser, sampling, range(len(sampling.seeds)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `[n, 3, H, W]` float32 in [0, 1] of final latents.

        Raises:
            InputError: the latents do not belong to this pipeline, or its decoder is not known.
        """
        return decode_latents(self.pipeline, latents)

    def default_sampling(self, seeds: Sequence[int], n_steps: int) -> Sampling:
        """A plan with the pipeline's own resolution, and conditions and a guidance that suit it."""
        own_side = getattr(self.pipeline, "default_sample_size", 32)  # FLUX-like denoisers know no size
        side = self.denoiser.config.get("sample_size", own_side)  # type: ignore[union-attr, operator]
        pixels = side * side if isinstance(side, int) else 1024
        batch_size = max(1, min(_MAX_BATCH, _LATENT_PIXELS_PER_BATCH // pixels))
        conditions = default_conditions(self.pipeline, len(seeds))
        guidance = default_guidance(self.pipeline)
        return Sampling(tuple(seeds), n_steps, conditions, guidance, batch_size=batch_size)

    def save_pretrained(self, out: Path | str) -> Path:
        """Writes a diffusers folder; see `saving.save_pipeline` for what is copied and what is written anew.

        Raises:
            InputError: `out` exists and is not an empty folder.
        """
        return save_pipeline(
            self.pipeline, self.denoiser_name, Path(out), source=self._source, finish=self.finish_saving
        )


class BareDenoiser:
    """A denoiser without a pipeline: it can be traced, quantized and saved, but not sampled."""

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        name: str | None = None,
        folder: Path | None = None,
        variant: str | None = None,
    ) -> None:
        """Wraps `denoiser` as it is; `folder` and `variant` tell which files it came from, if any."""
        self._denoiser = denoiser
        self.finish_saving: Finish | None = None
        self._name = name or type(denoiser).__name__
        self.folder = folder
        self.variant = variant

    @property
    def name(self) -> str:
        """Name for records and people."""
        return self._name

    @property
    def denoiser(self) -> nn.Module:
        """The network."""
        return self._denoiser

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return _device(self._denoiser)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return _dtype(self._denoiser)

    @property
    def is_quantized(self) -> bool:
        """Whether it came from a quantized checkpoint."""
        return is_quantized(self._denoiser)

    def sample(self, sampling: Sampling, *, observer: Observer | None = None) -> torch.Tensor:
        """Cannot be done.

        Raises:
            InputError: always.
        """
        raise self._refusal("sampled")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Cannot be done.

        Raises:
            InputError: always.
        """
        raise self._refusal("decoded")

    def save_pretrained(self, out: Path | str) -> Path:
        """Writes a folder that the denoiser's own class loads.

        Raises:
            InputError: `out` exists and is not an empty folder, or the network has no `save_pretrained`.
        """
        return save_denoiser_only(self._denoiser, Path(out), finish=self.finish_saving)

    def _refusal(self, action: str) -> InputError:
        return InputError(
            f"{self._name} is a denoiser without its pipeline and cannot be {action}. Give the whole pipeline's "
            "folder (with model_index.json), or use a method that needs no sampling: method='error'"
        )


def is_quantized(denoiser: nn.Module) -> bool:
    """Whether a diffusers model came from a quantized checkpoint."""
    config = getattr(denoiser, "config", {})
    return bool(getattr(denoiser, "is_quantized", False) or config.get("quantization_config"))


def _denoiser_name(pipeline: PipelineObject) -> str:
    components = pipeline.components
    found = [n for n in DENOISER_NAMES if isinstance(components.get(n), nn.Module)]
    if not found:
        raise InputError(
            f"{type(pipeline).__name__} has no component {' or '.join(DENOISER_NAMES)}: {', '.join(components)}"
        )
    if components.get("scheduler") is None:
        raise InputError(f"{type(pipeline).__name__} has no scheduler and cannot be sampled")
    return found[0]


def _device(denoiser: nn.Module) -> torch.device:
    return next(denoiser.parameters()).device


def _dtype(denoiser: nn.Module) -> torch.dtype:
    dtype = getattr(denoiser, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else next(denoiser.parameters()).dtype


def pipeline_identity(pipeline: PipelineObject, denoiser_name: str) -> str:
    """Such as `DiTPipeline DDIMScheduler:5a3f... vae:09bc...`: the same for equal pipelines, wherever they lie.

    It is part of the name of everything that is measured. Networks are told apart by their settings and by the first
    values of each of their tensors. That is no proof of equality, but whoever trains, merges or replaces a text encoder
    changes those, and reading ten gigabytes to name a measurement would be too much.
    """
    scheduler = pipeline.scheduler
    config = dict(getattr(scheduler, "config", {}))
    if _DEFAULTED in config:
        config[_DEFAULTED] = sorted(config[_DEFAULTED])
    settings = {str(name): repr(value) for name, value in config.items()}
    parts = [type(pipeline).__name__, f"{type(scheduler).__name__}:{content_key(settings)[:_N_DIGITS]}"]
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module) and name != denoiser_name:
            parts.append(f"{name}:{_network_digest(component)}")
    return " ".join(parts)


def _network_digest(network: nn.Module) -> str:
    total = hashlib.sha256(type(network).__name__.encode())
    for name, tensor in sorted(network.state_dict().items()):
        first = tensor.flatten()[:_N_VALUES].cpu().contiguous()
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(first.view(torch.uint8).numpy().data if first.numel() else b"")
    return total.hexdigest()[:_N_DIGITS]
