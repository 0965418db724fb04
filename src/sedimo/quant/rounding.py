"""Learned rounding of uniform codes: each weight goes up or down, whichever serves the output of its block.

A weight between two codes may take either: code = clamp(floor(weight / scale) + zero_point + h, 0, 2^b - 1), h 0 or 1.
While learning, h is a number in between, h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1), which starts where the weight is
exact; a regulariser, sum of 1 - |2 h - 1|^beta, then drives every h to 0 or 1. Scale, zero point, format and bytes
stay.

Source:
    Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv 2004.10568), eq. 21 to 24:
    the rectified sigmoid (zeta 1.1, gamma -0.1), the regulariser and its annealed exponent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sedimo.errors import InputError
from sedimo.quant.packing import pack
from sedimo.quant.parts import WeightPart
from sedimo.quant.tensor import QuantizedTensor

ZETA, GAMMA = 1.1, -0.1  # where the sigmoid is stretched to, so that 0 and 1 are reached


@dataclass(frozen=True, slots=True)
class RoundingSchedule:
    """How long and how hard to learn.

    `n_steps` steps of Adam at `learning_rate`. The loss is the squared error as a multiple of nearest rounding's, times
    the number of weights, plus `strength` (lambda) times the regulariser, so that lambda means the same everywhere. The
    regulariser is off during the first `warm_up` share of the steps; then its exponent falls from `first_beta` to
    `last_beta`, linearly.
    """

    n_steps: int = 500
    learning_rate: float = 1e-2
    strength: float = 1.0
    warm_up: float = 0.2
    first_beta: float = 20.0
    last_beta: float = 2.0

    def __post_init__(self) -> None:
        """Refuses what would not learn."""
        if self.n_steps < 1 or self.learning_rate <= 0 or self.strength <= 0:
            raise InputError(f"steps, learning rate and strength must be positive, got {self}")
        if not 0 <= self.warm_up < 1 or self.first_beta < self.last_beta or self.last_beta <= 0:
            raise InputError(f"the warm-up must lie in [0, 1) and beta must fall and stay positive, got {self}")

    def beta(self, step: int) -> float | None:
        """The exponent at a step, counted from 0; None while warming up."""
        begin = self.warm_up * self.n_steps
        if step < begin:
            return None
        progress = (step - begin) / max(1.0, self.n_steps - 1 - begin)
        return self.first_beta + (self.last_beta - self.first_beta) * min(1.0, progress)


DEFAULT_SCHEDULE = RoundingSchedule()


class SoftWeight:
    """A packed weight whose codes on uniform grids are being learned; parts in other formats stay as they are.

    Raises:
        InputError: another shape than the full-precision weight's.
    """

    def __init__(self, weight: Tensor, packed: QuantizedTensor) -> None:
        """Starts where `soft()` is the full-precision `weight` `[out, in, ...]`, as far as the grid's ends allow."""
        if weight.shape != packed.shape:
            raise InputError(f"a packed weight of shape {tuple(packed.shape)} is not of one of {tuple(weight.shape)}")
        self._packed = packed
        self._pieces = [_piece(weight[:, p.start : p.stop], p, packed.packing.shape) for p in packed.parts]

    @property
    def logits(self) -> list[Tensor]:
        """V of every learned part: what an optimiser changes."""
        return [piece.logits for piece in self._pieces if isinstance(piece, _SoftPart)]

    def soft(self) -> Tensor:
        """The weight with codes in between, float32 `[out, in, ...]`; gradients reach the logits."""
        pieces = [piece.soft() if isinstance(piece, _SoftPart) else piece for piece in self._pieces]
        return torch.cat(pieces, dim=1)

    def penalty(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^beta over the learned weights: 0 when every h is 0 or 1."""
        return torch.stack([(1 - (2 * _h(v) - 1).abs().pow(beta)).sum() for v in self.logits]).sum()

    def hard(self) -> QuantizedTensor:
        """The packed weight with every h at the nearer of 0 and 1."""
        parts = [
            part.with_codes(pack(piece.codes(), part.format.bits)) if isinstance(piece, _SoftPart) else part
            for part, piece in zip(self._packed.parts, self._pieces, strict=True)
        ]
        return self._packed.rewrapped(parts)


def learn_rounding(
    weights: Sequence[SoftWeight],
    error: Callable[[], Tensor],
    schedule: RoundingSchedule,
    *,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimises error plus regulariser over the logits of `weights`, in place.

    Args:
        weights: soft weights that `error` computes with.
        error: the squared error of the present soft weights (of another minibatch at each call), as a multiple of
            what nearest rounding leaves.
        schedule: how long and how hard.
        after_step: called after each step.
    """
    logits = [v for weight in weights for v in weight.logits]
    n_weights = sum(v.numel() for v in logits)
    optimizer = torch.optim.Adam(logits, lr=schedule.learning_rate)
    for step in range(schedule.n_steps):
        beta = schedule.beta(step)
        with torch.enable_grad():
            loss = n_weights * error()
            if beta is not None:
                loss = loss + schedule.strength * torch.stack([w.penalty(beta) for w in weights if w.logits]).sum()
            optimizer.zero_grad()
            loss.backward(inputs=logits)  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
        after_step()


class _SoftPart:
    """A part on a uniform grid: codes below every weight, and V."""

    def __init__(self, weight: Tensor, part: WeightPart) -> None:
        self._shape, self._qmax = weight.shape, part.format.qmax
        rows = weight.detach().float().reshape(weight.shape[0], -1)
        self._scale, self._zero_point = part.format.numerics.grid(part.format, part.tensors, rows.shape[1])
        steps = rows / self._scale
        below = steps.floor()
        self._below = below + self._zero_point
        self.logits = torch.logit((steps - below - GAMMA) / (ZETA - GAMMA)).requires_grad_(True)

    def soft(self) -> Tensor:
        codes = (self._below + _h(self.logits)).clamp(0, self._qmax)
        return ((codes - self._zero_point) * self._scale).reshape(self._shape)

    def codes(self) -> Tensor:
        return (self._below + (self.logits.detach() >= 0)).clamp(0, self._qmax).to(torch.uint8)


def _piece(weight: Tensor, part: WeightPart, shape: Sequence[int]) -> _SoftPart | Tensor:
    return _SoftPart(weight, part) if part.format.numerics.is_uniform else part.dequantize(shape)


def _h(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
