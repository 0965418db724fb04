"""SmoothQuant's factors: how much of a channel's range moves from the inputs of a layer into its weights.

Dividing channel j of the input by s_j and multiplying column j of the weight by s_j leaves the layer's function as it
is. Here s_j is a power of two, which floating-point numbers in their normal range take without rounding: the
smoothed denoiser is the same function bit for bit where no constant is involved, and can be undone (in float16, weights
far below the largest of their column may become subnormal and lose bits). Its distance from the
published factor is at most the square root of two, less than what one step of alpha changes.

Source:
    Xiao et al. 2023, SmoothQuant (arXiv 2211.10438), equation 4; alpha = 0.7 as in Efficient Quantization Strategies
    for Latent Diffusion Models (arXiv 2312.05431).
"""

from __future__ import annotations

import math

import torch

from sedimo.errors import InputError

DEFAULT_ALPHA = 0.7
MAX_EXPONENT = 8
_LARGEST = 15  # float16 ends at 2^16: weights stay below half of that
_SMALLEST = -14  # the smallest normal float16 is 2^-14: the largest weight of a column stays above it


def check_alpha(alpha: float) -> None:
    """Refuses an alpha outside 0..1.

    Raises:
        InputError: naming it.
    """
    if not (math.isfinite(alpha) and 0 <= alpha <= 1):
        raise InputError(f"alpha must lie in 0..1 (0: all of the range stays in the input), got {alpha}; 0.7 is usual")


def smoothing_factors(input_max: torch.Tensor, weight_max: torch.Tensor, alpha: float = DEFAULT_ALPHA) -> torch.Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) `[C]` float64; 1 where either is zero, for nothing is to be moved.

    `input_max` and `weight_max` `[C]` are the largest magnitudes of each channel of the input and column of the weight.

    Raises:
        InputError: alpha outside 0..1, tensors of different shapes, or maxima that are negative or no numbers.

    Example:
        >>> smoothing_factors(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0]), 0.5)
        tensor([2., 1.], dtype=torch.float64)
    """
    check_alpha(alpha)
    if input_max.shape != weight_max.shape or input_max.ndim != 1:
        raise InputError(f"maxima must be [C] both, got {list(input_max.shape)} and {list(weight_max.shape)}")
    inputs, weights = input_max.double(), weight_max.double()
    for name, values in (("inputs", inputs), ("weights", weights)):
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise InputError(f"the largest magnitudes of {name} must be finite and not negative, got {values.tolist()}")
    is_live = (inputs > 0) & (weights > 0)
    found = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where(is_live, found, torch.ones_like(found))


def factor_exponents(factors: torch.Tensor, input_max: torch.Tensor, weight_max: torch.Tensor) -> torch.Tensor:
    """The exponents `[C]` int64 of the powers of two that are used for `factors` `[C]` of channels that go together.

    The geometric mean of the live channels is taken out, because a factor common to all channels changes no rounding
    of a layer; dead channels get 0. Exponents lie in -8..8, and are limited so that no weight that fits float16 leaves
    its range: the largest weight of a column stays in 2^-14..2^15 if it was there.
    """
    weights = weight_max.double()
    is_live = (input_max > 0) & (weights > 0)
    logs = factors.double().log2()
    middle = logs[is_live].mean() if bool(is_live.any()) else logs.new_zeros(())
    size = torch.where(is_live, weights, torch.ones_like(weights)).log2()
    upper = (_LARGEST - size).floor().clamp(0, MAX_EXPONENT)
    lower = (_SMALLEST - size).ceil().clamp(-MAX_EXPONENT, 0)
    rounded = (logs - middle).round().clamp(lower, upper)
    return torch.where(is_live, rounded, torch.zeros_like(rounded)).long()
