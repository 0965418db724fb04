"""Pictures inside the page: small enough, side by side, with their difference."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sedimo.errors import InputError
from sedimo.reporting.page import Picture

AMPLIFICATION = 2
SMALL_PIXELS = 96  # up to this edge, pixels are kept as they are and shown enlarged
LARGEST_PIXELS = 384
_GREY = 128
_QUALITY = 88

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ShownPicture:
    """A picture as data URIs."""

    label: str
    reference: str
    quantized: str
    difference: str
    is_small: bool

    @property
    def n_bytes(self) -> int:
        """Characters that it takes in the page."""
        return len(self.reference) + len(self.quantized) + len(self.difference)


def show_pictures(pictures: Sequence[Picture], *, budget_bytes: int) -> tuple[ShownPicture, ...]:
    """The first pictures that fit in `budget_bytes` of the page.

    Raises:
        InputError: an array that is not uint8 `[height, width, 3]`, or a pair of different sizes.
    """
    found: list[ShownPicture] = []
    for picture in pictures:
        shown = _show(picture)
        budget_bytes -= shown.n_bytes
        if budget_bytes < 0:
            break
        found.append(shown)
    return tuple(found)


def _show(picture: Picture) -> ShownPicture:
    reference, quantized = picture.reference, picture.quantized
    for array in (reference, quantized):
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.shape != reference.shape:
            raise InputError(
                f"picture {picture.label!r} must be two uint8 arrays [height, width, 3] of one size, "
                f"got {array.dtype} {array.shape} beside {reference.shape}."
            )
    change = quantized.astype(np.int16) - reference.astype(np.int16)
    difference = np.clip(_GREY + AMPLIFICATION * change, 0, 255).astype(np.uint8)
    is_small = max(reference.shape[:2]) <= SMALL_PIXELS
    uris = [_data_uri(array, is_small=is_small) for array in (reference, quantized, difference)]
    return ShownPicture(picture.label, uris[0], uris[1], uris[2], is_small)


def _data_uri(array: Pixels, *, is_small: bool) -> str:
    image, buffer = Image.fromarray(np.ascontiguousarray(array)), io.BytesIO()
    if is_small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.thumbnail((LARGEST_PIXELS, LARGEST_PIXELS), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=_QUALITY)
    kind = "png" if is_small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
