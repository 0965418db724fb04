"""Ranges of layers' inputs: the least and the greatest value of each channel, per denoiser step.

The denoiser runs at full precision on a recorded trajectory, some samples at a time; only minima and maxima are
kept. Channels are the last axis of a Linear's input and the second of a convolution's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.lab.exchange import hooked
from sedimo.lab.lab import Lab
from sedimo.lab.study import Execution, Setting
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import calls_by_step, inputs_by_samples

RANGES_VERSION = 1
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ChannelRange:
    """The least and the greatest value of each input channel of a layer, over samples and positions."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses ranges that are none."""
        if len(self.low) != len(self.high) or any(low > high for low, high in zip(self.low, self.high, strict=True)):
            raise InputError(f"a range needs low <= high for each channel, got {self.low[:3]} and {self.high[:3]}")


@dataclass(frozen=True, slots=True)
class RangesPart:
    """Of one denoiser step: ranges by layer; calls of a layer within the step are merged. Uncalled ones are absent."""

    timestep: float
    ranges: Mapping[str, ChannelRange]


@dataclass(frozen=True, slots=True)
class RangesProbe:
    """Ranges of the inputs of layers at each step, in the order of sampling."""

    setting: Setting
    parts: tuple[RangesPart, ...]
    execution: Execution

    @property
    def n_samples(self) -> int:
        """Samples behind each range."""
        return len(self.setting.seeds)

    def over_time(self, layer: str) -> ChannelRange | None:
        """The range over all steps; None for a layer that was not called."""
        found = [part.ranges[layer] for part in self.parts if layer in part.ranges]
        if not found:
            return None
        low, high = np.array([one.low for one in found]), np.array([one.high for one in found])
        return ChannelRange(tuple(low.min(axis=0).tolist()), tuple(high.max(axis=0).tolist()))

    def largest(self, layer: str) -> Values | None:
        """max|X_j| `[C]` over all steps; None for a layer that was not called."""
        found = self.over_time(layer)
        return None if found is None else np.maximum(np.abs(found.low), np.abs(found.high))


def probe_ranges(lab: Lab, layers: Sequence[str], on: Sampling) -> RangesProbe:
    """Measures the ranges of the inputs of `layers` on one recorded trajectory.

    With a study, each step's part is saved when it is finished and not measured again.

    Raises:
        Interrupted: the user stopped it (with a study, calling again goes on).
    """
    parts, pipe = lab.parts(), lab.pipe
    setting = lab.setting(on, "step", weights_digest=lab.weights.digest)
    calls = calls_by_step(on, parts.trajectory(on, setting).calls)
    named = {"ranges": RANGES_VERSION, "setting": setting, "layers": list(layers)}
    works = (
        (content_key({**named, "call": index}), functools.partial(_measure_part, pipe.denoiser, layers, batches))
        for index, batches in enumerate(calls)
    )
    found = tuple(parts.each(RangesPart, "ranges of inputs", len(calls), works))
    return RangesProbe(setting, found, parts.execution)


def _measure_part(
    denoiser: nn.Module, layers: Sequence[str], batches: Sequence[tuple[DenoiserCall, range]]
) -> RangesPart:
    """The part of one step. Rows of a sample, several with guidance, run together."""
    found = _Extremes()
    with torch.no_grad(), hooked(denoiser, {name: functools.partial(found.add, name) for name in layers}):
        for call, samples in batches:
            for _, inputs in inputs_by_samples(call, len(samples)):
                denoiser(**inputs)
    return RangesPart(batches[0][0].timestep, found.ranges())


class _Extremes:
    """Running minima and maxima `[C]` of each layer."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
        """The hook of a layer."""
        axis = -1 if isinstance(module, nn.Linear) else 1
        rows = args[0].detach().movedim(axis, 0).flatten(1).float()
        low, high = rows.amin(1), rows.amax(1)
        if name in self._found:
            low, high = torch.minimum(low, self._found[name][0]), torch.maximum(high, self._found[name][1])
        self._found[name] = low, high

    def ranges(self) -> dict[str, ChannelRange]:
        return {name: ChannelRange(_numbers(low), _numbers(high)) for name, (low, high) in self._found.items()}


def _numbers(values: torch.Tensor) -> tuple[float, ...]:
    """Short texts that are exactly the float32 values."""
    return tuple(float(str(value)) for value in values.cpu().numpy())
