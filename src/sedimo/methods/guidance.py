"""How a sampler combines the rows of a denoiser call into one prediction, found from what it did.

With classifier-free guidance the denoiser computes every sample twice (or more often), and the scheduler sees a
weighted sum, y = a_0 y_0 + a_1 y_1. Errors that both rows have in common pass with weight 1, all others are
amplified. The weights are read from a recorded trajectory: where the next latents are a linear function of the
latents and the outputs, least squares give them, whatever the order of the rows and the guidance scale.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sedimo.pipelines.adapter import DenoiserCall
from sedimo.pipelines.trajectory import Trajectory, batches_of

logger = logging.getLogger(__name__)

_MAX_RESIDUAL = 1e-2  # relative, of the next latents' change: half precision leaves about 1e-3
_MAX_SPREAD = 2e-2  # of the weights between steps
_TINY = 1e-30
Matrix = npt.NDArray[np.float64]


def find_row_weights(trajectory: Trajectory) -> tuple[float, ...] | None:
    """The weights of a sample's rows in its prediction, summing to 1; `(1.0,)` when it has one row.

    None when the steps do not show them: a scheduler that adds noise, clips, changes the guidance, or whose step
    depends on more than the last two outputs.
    """
    calls = list(batches_of(trajectory.sampling, trajectory.calls))
    n_rows = {call.output.shape[0] // len(samples) for call, samples in calls}
    if n_rows == {1}:
        return (1.0,)
    if len(n_rows) != 1:
        return None
    steps = [_weights_of_step(calls[max(0, i - 1) : i + 2]) for i in range(len(calls) - 1)]
    found = [weights for weights in steps if weights is not None]
    if not found or 2 * len(found) < len(steps):
        return None
    weights = np.median(found, axis=0)
    spread = float(np.abs(np.asarray(found) - weights).max() / np.abs(weights).max())
    if spread > _MAX_SPREAD:
        logger.info("the weights of guided rows differ between steps by %.3f; rows count as samples", spread)
        return None
    return tuple(float(w) for w in weights / weights.sum())


def _weights_of_step(calls: Sequence[tuple[DenoiserCall, range]]) -> Matrix | None:
    """Weights of the last call but one, from how it led to the last; None where that does not show.

    The call before it is needed only when the step is no function of the present outputs alone.
    """
    (now, samples), (after, _) = calls[-2:]
    n, latents, next_latents = len(samples), _latents(now), _latents(after)
    if after.step != now.step + 1 or latents is None or next_latents is None:
        return None  # another batch begins
    channels = latents.shape[1]
    start, end = _rows(latents, n)[0], _rows(next_latents, n)[0]
    basis = [*_rows(now.output[:, :channels], n), start]
    n_rows = len(basis) - 1
    weights = _fit(basis, end, n_rows)
    before = calls[0][0]
    if weights is None and len(calls) == 3 and before.step == now.step - 1:
        weights = _fit([*basis, *_rows(before.output[:, :channels], n)], end, n_rows)
    return weights


def _fit(basis: Sequence[Matrix], end: Matrix, n_rows: int) -> Matrix | None:
    """Coefficients of the first `n_rows` vectors, divided by their sum; None when the fit or the sum is poor."""
    matrix = np.stack(basis, axis=1)
    if not (np.isfinite(matrix).all() and np.isfinite(end).all()):
        return None  # a sample diverged
    coefficients, *_ = np.linalg.lstsq(matrix, end, rcond=None)
    change = max(float(np.linalg.norm(end - basis[n_rows])), _TINY)
    weights = np.asarray(coefficients[:n_rows], dtype=np.float64)
    total = float(weights.sum())
    if (
        np.linalg.norm(matrix @ coefficients - end) > _MAX_RESIDUAL * change
        or abs(total) < 1e-3 * np.abs(weights).max()
    ):
        return None
    return weights / total


def _latents(call: DenoiserCall) -> torch.Tensor | None:
    """The channels that inputs and outputs have in common, of the input that has the output's batch and size."""
    output = call.output
    for value in call.inputs.values():
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value[:, :1].shape == output[:, :1].shape:
            return value[:, : output.shape[1]]
    return None


def _rows(tensor: torch.Tensor, n_samples: int) -> list[Matrix]:
    """Row j of every sample, flat, for each j."""
    flat = tensor.detach().double().cpu().reshape(-1, n_samples * tensor[0].numel())
    return list(flat.numpy())
