"""Weight changes of many formats in memory: which, and of how many decisions at a time."""

from __future__ import annotations

import torch
from torch import nn

from sedimo.bank import Bank
from sedimo.quant.activations import InputQuantizers
from sedimo.quant.formats import FULL_BITS, Format
from sedimo.space import Decision, SearchSpace

MEMORY_BYTES = 2 << 30


def weight_formats(space: SearchSpace, decision: str) -> tuple[Format, ...]:
    """The different weight formats of a decision, full precision left out."""
    formats = space.decision_index[decision].formats
    return tuple(dict.fromkeys(f.weight_format for f in formats if f.is_quantized))


def activation_bits(decision: Decision) -> tuple[int, ...]:
    """The bits below 16 that a decision's inputs may take, ascending."""
    return tuple(sorted({f.activation_bits for f in decision.formats} - {FULL_BITS}))


def change_names(space: SearchSpace, decision: str) -> list[str]:
    """What can change at a decision, each by itself: its weight formats (`uaq4`), then its activations (`a8`)."""
    widths = activation_bits(space.decision_index[decision])
    return [*map(str, weight_formats(space, decision)), *(f"a{bits}" for bits in widths)]


def input_roundings(bank: Bank, decision: Decision) -> dict[str, tuple[InputQuantizers, ...]]:
    """How the inputs of a decision's layers are rounded, at each width that it may take, ascending."""
    widths = activation_bits(decision)
    return {name: tuple(bank.activations.quantizers({name: n}) for n in widths) for name in decision.layers}


def passes(space: SearchSpace, memory_bytes: int = MEMORY_BYTES) -> list[list[str]]:
    """Decisions in groups whose weight changes fit in memory; at least one decision each."""
    found: list[list[str]] = []
    free = 0
    for decision in space.decisions:
        if not change_names(space, decision.name):
            continue
        size = 4 * decision.params * len(weight_formats(space, decision.name))
        if not found or size > free:
            found.append([])
            free = memory_bytes
        found[-1].append(decision.name)
        free -= size
    return found


def count_passes(space: SearchSpace, memory_bytes: int = MEMORY_BYTES) -> int:
    """How often a trajectory is gone through because weight changes do not fit in memory at once."""
    return len(passes(space, memory_bytes))


def weight_changes(bank: Bank, denoiser: nn.Module, decision: str) -> torch.Tensor:
    """What each weight format changes, `[F, out, in, ...]` float32 on the denoiser's device."""
    shape = bank.space.decision_index[decision].shape
    device = next(denoiser.parameters()).device
    deltas = torch.empty(len(weight_formats(bank.space, decision)), *shape, device=device)
    for target, (_, change) in zip(deltas, bank.changes(decision), strict=True):
        target.copy_(change)
    return deltas
