"""Error feedback: codes that make up for one another in what a layer gives, at unchanged format and bytes.

Rounding a row w of a weight to w' changes the layer's output by the squared error (w - w') H (w - w')^T in the mean,
H the second moments of the layer's inputs. Nearest codes ignore H. Here columns are rounded one after another, and
after each the columns that are still to come move to where they make up best for what was missed. Inputs of large
power come first. Where inputs are strongly correlated (embedded timesteps, modulation), most of the error vanishes.

Source:
    Frantar et al. 2022, GPTQ (arXiv 2210.17323): the order of columns, the Cholesky form of the updates, and
    damping by 1 % of the mean power. Scales, zero points and codebooks are those of the format's own fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sedimo.errors import InputError
from sedimo.quant.fitting import named, rows_fitted_by, with_codes
from sedimo.quant.parts import Fitted

FEEDBACK_VERSION = 1  # raise it when codes change: trials are then measured anew
DAMPING = 0.01  # added to every power of an input, as a share of their mean
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 1.0


class Moments(Protocol):
    """Second moments of the inputs of weights."""

    @property
    def key(self) -> str:
        """What they were measured on."""

    def blocks(self, weight: str) -> Sequence[Tensor]:
        """Blocks `[n, n]` on the diagonal of the moments of a weight's columns, in order; none if it has no moments."""


@dataclass(frozen=True)
class Feedback:
    """How the errors of some columns are passed on to later ones.

    `order` int64 `[N]` is that in which columns are rounded; `asked` float32 `[N, N]`, lower triangular in that order:
    in row j what a unit of error in each earlier column asks of column j.
    """

    order: Tensor
    asked: Tensor

    @property
    def n_bytes(self) -> int:
        """Memory that it takes [bytes]."""
        return self.order.nbytes + self.asked.nbytes


def feedback(moments: Tensor, *, damping: float = DAMPING) -> Feedback:
    """The feedback that second moments of inputs `[N, N]` ask for.

    Inputs that are never used, and moments that are too nearly singular, are damped more until a factor exists.

    Raises:
        InputError: moments that are not square, not finite, or those of no inputs.
    """
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1]:
        raise InputError(f"second moments are a square matrix, got {tuple(moments.shape)}")
    wide = moments.detach().cpu().double()
    if not torch.isfinite(wide).all():
        raise InputError(
            "second moments hold NaN or infinity: measure them in another dtype, or leave codes as they are"
        )
    power = wide.diagonal()
    order = torch.argsort(power, descending=True, stable=True)
    mean, damped = float(power.mean()), wide[order][:, order]
    if mean == 0:  # no inputs were seen: nothing is passed on
        return Feedback(order, torch.eye(len(power), dtype=torch.float32))
    added = 0.0
    while damping <= _MOST_DAMPING:
        damped.diagonal().add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return Feedback(order, (upper / upper.diagonal().unsqueeze(1)).T.float().contiguous())
        damping = max(10 * damping, _LEAST_DAMPING)
    raise InputError(
        "second moments that are far from positive semidefinite are those of no inputs: measure them again"
    )


def feedback_of(blocks: Sequence[Tensor], start: int, stop: int) -> list[Feedback]:
    """The feedback of columns `start` to `stop` (exclusive), one for each block that they lie in."""
    found, first = [], 0
    for block in blocks:
        inner = slice(max(start - first, 0), min(stop - first, len(block)))
        if inner.start < inner.stop:
            found.append(feedback(block[inner, inner]))
        first += len(block)
    return found


def compensated(weight: Tensor, fitted: Fitted, parts: Sequence[Feedback], *, layer_name: str = "") -> Fitted:
    """A fit with codes by error feedback instead of the nearest ones, if its family has such.

    Args:
        weight: `[out, in, ...]`, as it was fitted.
        fitted: its parameters stay.
        parts: feedback of consecutive ranges of the N = in * kernel size columns; errors stay within a range.
        layer_name: named in errors.

    Raises:
        InputError: another shape than that of the fit, or parts that do not cover the columns.
    """
    rows = rows_fitted_by(fitted, weight, layer_name)
    n = sum(len(part.order) for part in parts)
    if n != rows.shape[1]:
        raise InputError(f"{named(layer_name)} has {rows.shape[1]} columns, its moments are of {n}")
    codes, start, family = torch.empty(rows.shape, dtype=torch.uint8), 0, fitted.format.numerics
    for part in parts:
        columns = part.order + start
        found = family.feedback_codes(rows[:, columns], columns, part.asked, fitted.format, fitted.parameters)
        if found is None:
            return with_codes(weight, fitted, layer_name=layer_name)
        codes[:, columns] = found
        start += len(part.order)
    return replace(fitted, codes=codes)
