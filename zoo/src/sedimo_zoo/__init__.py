"""Embedded models of Sedimo: where their files are, and the feature extractor behind FID and KID."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
MODELS = ("cifar-dit", "cifar-ldm")


def model_path(name: str) -> Path:
    """Folder of an embedded pipeline, in the form that diffusers reads.

    Raises:
        ValueError: no such model.
    """
    if name not in MODELS:
        raise ValueError(f"the zoo has no model {name!r}; it has: {', '.join(MODELS)}")
    return DATA / name


def classifier_path() -> Path:
    """Folder with `model.safetensors` of the classifier and `statistics.safetensors` of the test images.

    The statistics hold the float64 `mean` `[256]` and `covariance` `[256, 256]` of the features of the
    10,000 CIFAR-10 test images (FID), and the float16 `features` `[2000, 256]` of their first 2,000 (KID).
    """
    return DATA / "cifar-classifier"
