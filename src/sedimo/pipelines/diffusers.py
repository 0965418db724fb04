"""The door to diffusers: a pipeline object behind Sedimo's seam, and a denoiser without its pipeline.

Loading from folders and hub ids is in `loading.py`; this module wraps objects that exist already, decodes their latents
the way pipelines do it behind their own calls, and saves them: the denoiser anew, everything else as it came.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.pipelines.adapter import Observer, PipelineObject, Sampling
from sedimo.pipelines.conditions import default_conditions, default_guidance
from sedimo.pipelines.differentiable import DifferentiableRun, run_differentiably
from sedimo.pipelines.folder import new_folder, place_file
from sedimo.pipelines.sampling import sample_batch
from sedimo.pipelines.weights import DENOISER_NAMES, component_files

DECODE_BATCH = 32
_MAX_BATCH = 64
_LATENT_PIXELS_PER_BATCH = 65536  # 64 samples of 32 x 32, 4 of 128 x 128 (SDXL at 1024 pixels)
_N_VALUES = 64
_N_DIGITS = 16
_DEFAULTED = "_use_default_values"  # settings that were not given; diffusers lists a set, so in another order each time

Finish = Callable[[Path, str], None]  # the folder, and how files of other components came there (empty: none did)


class _Loaded:
    """A pipeline or a denoiser alone, its name for people, and the folder and variant it was loaded from, if any.

    `finish_saving` may add files to a folder that is being saved.
    """

    def __init__(self, name: str, folder: Path | None, variant: str | None) -> None:
        self.name, self.folder, self.variant = name, folder, variant
        self.finish_saving: Finish | None = None

    @property
    def denoiser(self) -> nn.Module:
        """The network that is called at each step."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        dtype = getattr(self.denoiser, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else next(self.denoiser.parameters()).dtype

    @property
    def is_quantized(self) -> bool:
        """Whether the denoiser came from a quantized checkpoint."""
        config = getattr(self.denoiser, "config", {})
        return bool(getattr(self.denoiser, "is_quantized", False) or config.get("quantization_config"))

    def save_pretrained(self, out: Path | str) -> Path:
        """Writes a diffusers folder, from which the class that was loaded can be loaded again.

        Components of a pipeline that are still the objects that were loaded are copied file by file from the source
        folder, so that their bytes (and their dtype) stay; of several variants of their weights the loaded one is
        copied, under its plain name. Components that the user exchanged are written by their own `save_pretrained`.

        Raises:
            InputError: `out` exists and is not an empty folder, or the network has no `save_pretrained`.
        """
        with new_folder(Path(out)) as folder:
            others = self._save(folder)
            if self.finish_saving is not None:
                self.finish_saving(folder, others)
        return Path(out)

    def _save(self, folder: Path) -> str:
        """Writes everything, and tells how files of other components came there."""
        raise NotImplementedError


class DiffusersPipeline(_Loaded):
    """A diffusers pipeline, used as it is, that can be sampled from seeds, watched, decoded and saved."""

    def __init__(
        self,
        pipeline: PipelineObject,
        *,
        name: str | None = None,
        folder: Path | None = None,
        variant: str | None = None,
    ) -> None:
        super().__init__(name or type(pipeline).__name__, folder, variant)
        self.pipeline = pipeline
        self.denoiser_name = _denoiser_name(pipeline)
        self._came_with = {} if folder is None else dict(pipeline.components)

    @property
    def identity(self) -> str:
        """Such as `DiTPipeline DDIMScheduler:5a3f... vae:09bc...`: the same for equal pipelines, wherever they lie.

        It is part of the name of everything that is measured. Networks are told apart by their settings and by the
        first values of each of their tensors. That is no proof of equality, but whoever trains, merges or replaces a
        text encoder changes those, and reading ten gigabytes to name a measurement would be too much.
        """
        scheduler = self.pipeline.scheduler
        config = dict(getattr(scheduler, "config", {}))
        if _DEFAULTED in config:
            config[_DEFAULTED] = sorted(config[_DEFAULTED])
        settings = {str(name): repr(value) for name, value in config.items()}
        parts = [type(self.pipeline).__name__, f"{type(scheduler).__name__}:{content_key(settings)[:_N_DIGITS]}"]
        for name, component in sorted(self.pipeline.components.items()):
            if isinstance(component, nn.Module) and name != self.denoiser_name:
                parts.append(f"{name}:{_network_digest(component)}")
        return " ".join(parts)

    @property
    def denoiser(self) -> nn.Module:
        """The network that is called at each step."""
        return getattr(self.pipeline, self.denoiser_name)  # type: ignore[no-any-return]  # diffusers has no types

    def sample(self, sampling: Sampling, *, observer: Observer | None = None) -> torch.Tensor:
        """Final latents `[n, C, H, W]` float32 on the CPU, one per seed; `observer` sees each denoiser call.

        Packed latents of FLUX-like pipelines are `[n, T, C]`. Pixel-space pipelines give images in [-1, 1],
        not clipped. With guidance the denoiser sees its batch twice: row r belongs to sample r mod B.
        """
        return torch.cat([sample_batch(self.pipeline, self.denoiser, batch, observer) for batch in sampling.batches()])

    def differentiable(self, sampling: Sampling) -> DifferentiableRun:
        """The samples of a plan as one batch, with what it takes to differentiate their final latents."""
        return run_differentiably(self.pipeline, self.denoiser, sampling)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `[n, 3, H, W]` float32 in [0, 1] of final latents."""
        return decode_latents(self.pipeline, latents)

    def default_sampling(self, seeds: Sequence[int], n_steps: int) -> Sampling:
        """A plan with the pipeline's own resolution, and conditions and a guidance that suit it."""
        own_side = getattr(self.pipeline, "default_sample_size", 32)  # FLUX-like denoisers know no size
        side = self.denoiser.config.get("sample_size", own_side)  # type: ignore[union-attr, operator]
        pixels = side * side if isinstance(side, int) else 1024
        batch_size = max(1, min(_MAX_BATCH, _LATENT_PIXELS_PER_BATCH // pixels))
        conditions, guidance = default_conditions(self.pipeline, len(seeds)), default_guidance(self.pipeline)
        return Sampling(tuple(seeds), n_steps, conditions, guidance, batch_size=batch_size)

    def _save(self, folder: Path) -> str:
        n_copied, anew, told = 0, [], []
        for name, component in self.pipeline.components.items():
            if component is None:
                continue
            if name != self.denoiser_name and self._came_with.get(name) is component:
                files = component_files(Path(self.folder or "") / name, self.variant)
                for path, file in files.items():
                    place_file(file, folder / name / path, link=False)
                n_copied += len(files)
            else:
                component.save_pretrained(folder / name)  # type: ignore[attr-defined]  # components all have it
                anew.append(name)
        _write_index(self.pipeline, folder)
        if n_copied:
            told.append(f"{n_copied} copied from the source folder")
        if others := [name for name in anew if name != self.denoiser_name]:
            told.append(f"those of {', '.join(others)} written anew")
        return ", ".join(told)


class BareDenoiser(_Loaded):
    """A denoiser without a pipeline: it can be traced, quantized and saved, but not sampled."""

    def __init__(
        self, denoiser: nn.Module, *, name: str | None = None, folder: Path | None = None, variant: str | None = None
    ) -> None:
        super().__init__(name or type(denoiser).__name__, folder, variant)
        self._denoiser = denoiser

    @property
    def denoiser(self) -> nn.Module:
        """The network."""
        return self._denoiser

    def sample(self, sampling: Sampling, *, observer: Observer | None = None) -> torch.Tensor:
        """Cannot be done."""
        raise self._refusal("sampled")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Cannot be done."""
        raise self._refusal("decoded")

    def _save(self, folder: Path) -> str:
        if not hasattr(self._denoiser, "save_pretrained"):
            kind = type(self._denoiser).__name__
            raise InputError(f"a {kind} has no save_pretrained; only diffusers models can be saved")
        self._denoiser.save_pretrained(folder)  # type: ignore[operator]  # diffusers has no types
        return ""

    def _refusal(self, action: str) -> InputError:
        return InputError(
            f"{self.name} is a denoiser without its pipeline and cannot be {action}. Give the whole pipeline's "
            "folder (with model_index.json), or use a method that needs no sampling: method='error'"
        )


def _denoiser_name(pipeline: PipelineObject) -> str:
    components = pipeline.components
    found = next((n for n in DENOISER_NAMES if isinstance(components.get(n), nn.Module)), None)
    if found is None:
        raise InputError(
            f"{type(pipeline).__name__} has no component {' or '.join(DENOISER_NAMES)}: {', '.join(components)}"
        )
    if components.get("scheduler") is None:
        raise InputError(f"{type(pipeline).__name__} has no scheduler and cannot be sampled")
    return found


def _network_digest(network: nn.Module) -> str:
    total = hashlib.sha256(type(network).__name__.encode())
    for name, tensor in sorted(network.state_dict().items()):
        first = tensor.flatten()[:_N_VALUES].cpu().contiguous()
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(first.view(torch.uint8).numpy().data if first.numel() else b"")
    return total.hexdigest()[:_N_DIGITS]


def _write_index(pipeline: PipelineObject, folder: Path) -> None:
    """`model_index.json` as diffusers writes it, with the class names that it forgets."""
    pipeline.save_config(folder)
    names: dict[int, list[str]] = {}
    for label, number in (getattr(pipeline, "labels", None) or {}).items():
        names.setdefault(number, []).append(label)
    if names:
        path = folder / "model_index.json"
        index = json.loads(path.read_text())
        index["id2label"] = {str(number): ", ".join(names[number]) for number in sorted(names)}
        path.write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def decode_latents(pipeline: PipelineObject, latents: torch.Tensor) -> torch.Tensor:
    """Images `[n, 3, H, W]` float32 in [0, 1] on the CPU; pixel-space pipelines only rescale."""
    decoder: Any = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if decoder is None:
        if getattr(pipeline, "movq", None) is not None:
            name = type(pipeline).__name__
            raise InputError(f"{name} decodes by a MOVQ, which is not supported; compare latents instead")
        return _to_unit(latents)
    latents, config = _unpacked(pipeline, latents), decoder.config
    n_channels = config.get("latent_channels")
    if latents.ndim != 4 or (n_channels is not None and latents.shape[1] != n_channels):
        raise InputError(f"latents must have shape [n, {n_channels}, H, W], got {list(latents.shape)}")
    with ExitStack() as stack:
        if next(decoder.parameters()).dtype is torch.float16 and config.get("force_upcast", False):
            decoder.to(torch.float32)  # SDXL's overflows in float16 and says so; float16 -> float32 -> float16 is exact
            stack.callback(decoder.to, torch.float16)
        weight, images = next(decoder.parameters()), []
        for chunk in torch.split(latents, DECODE_BATCH):
            scaled = _unscaled(config, chunk.float()).to(weight.device, weight.dtype)
            images.append(_to_unit(decoder.decode(scaled).sample))
    return torch.cat(images)


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


def _unscaled(config: Mapping[str, Any], latents: torch.Tensor) -> torch.Tensor:
    latents = latents / (config.get("scaling_factor") or 1.0)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, deviation = (torch.tensor(config[f"latents_{n}"]).float().view(1, -1, 1, 1) for n in ("mean", "std"))
        latents = latents * deviation + mean
    return latents + (config.get("shift_factor") or 0.0)


def _to_unit(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 2 + 0.5).clamp(0, 1).cpu()
