"""The embedded models of the optional package `sedimo-zoo`: pipelines, the feature extractor, its reference.

The extractor is a measuring instrument: its name belongs into every record of a number it had a part in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file as load_tensors

from sedimo.codec import parse_json
from sedimo.errors import InputError, MissingExtraError, StateError

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


def zoo_path(name: str) -> Path:
    """Folder of the embedded pipeline `name`.

    Raises:
        MissingExtraError: the package sedimo-zoo is not installed.
        InputError: it has no such model.
        StateError: its data is not there.
    """
    zoo = _zoo("sedimo_zoo", f"the embedded model 'zoo:{name}'")
    try:
        return _existing(zoo.model_path(name))
    except ValueError as error:
        raise InputError(str(error)) from error


def feature_extractor(device: str | torch.device = "cpu") -> tuple[str, FeatureExtractor]:
    """Name and function of the embedded extractor: images `[B, 3, H, W]` in [0, 1] to features `[B, 256]`.

    Features are float32 on the CPU. Images of another size than 32 x 32 are resized first (bilinear,
    antialiased), as FID's own extractor resizes to 299 x 299.

    Raises:
        MissingExtraError: the package sedimo-zoo is not installed.
        StateError: its data is missing or damaged.
    """
    module = _zoo("sedimo_zoo.classifier", "the embedded feature extractor")
    classifier = module.Classifier()
    path = _existing(_zoo("sedimo_zoo", "the embedded feature extractor").classifier_path()) / "model.safetensors"
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
    folder = _existing(_zoo("sedimo_zoo", "the reference of FID and KID").classifier_path())
    path = folder / "statistics.safetensors"
    record = parse_json(_existing(folder / "training.json").read_bytes(), place=str(folder / "training.json"))
    try:
        arrays = load_arrays(_existing(path))
        return ReferenceStatistics(
            str(record["extractor"]),
            arrays["mean"].astype(np.float64),
            arrays["covariance"].astype(np.float64),
            arrays["features"],
            int(record["n_reference_images"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{folder} does not hold complete reference statistics: {error!r}") from error


def _zoo(module: str, purpose: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError("sedimo-zoo", "zoo", purpose) from error


def _existing(path: Path) -> Path:
    if not path.exists():
        raise StateError(f"sedimo-zoo is installed without its data: {path} is missing; install it again")
    return path


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _fitted(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as the classifier wants them: 32 x 32, in [-1, 1]."""
    images = images.float()
    if images.shape[2:] != (32, 32):
        images = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    return images * 2 - 1
