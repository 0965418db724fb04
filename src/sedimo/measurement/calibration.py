"""Static ranges of activations, calibrated on the model's own trajectory.

The full-precision denoiser is sampled; at the chosen steps the inputs of every layer are looked at. A range is their
least and greatest value, the values that a share of them stays between, or the one that rounds them with the least
squared error. Values are counted as bfloat16 (65,536 of them), so that nothing has to be kept or sampled from, and a
count does not depend on batches; least and greatest values are exact.

Source:
    Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431): calibration at the single step of
    greatest noise, which is the first that sampling takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from sedimo.bank import SILENT, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.measurement.hooks import Hook, hooked
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.parts import Parts
from sedimo.measurement.study import Study
from sedimo.measurement.worker import setting_of
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import sample_until
from sedimo.quant.activations import ActivationQuantizer, Activations, StaticRange

CALIBRATION_VERSION = 2  # raised when ranges of the same settings change
RangeMethod = Literal["min-max", "percentile", "mse"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
_N_VALUES = 1 << 16  # of bfloat16
_SHRINK_FACTORS = tuple(0.95**power for power in range(90))  # from all of the range to a hundredth of it


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How ranges are found.

    `n_steps` of the trajectory are looked at, evenly spaced from the first on: 0 means all, 1 is the call of greatest
    noise alone, as published; that loses much where later steps have wider ranges (docs/results.md). Of a scheduler
    that calls the denoiser several times in a step, all calls of a step are looked at. `percentile` is for that method:
    so many percent of the values lie below the upper end, and above the lower one. `by_timestep` gives each timestep
    that is looked at ranges of its own.

    Raises:
        InputError: an unknown method, or numbers outside their ranges.
    """

    method: RangeMethod = "min-max"
    n_steps: int = 0
    percentile: float = 99.99
    symmetric: bool = False
    by_timestep: bool = False

    def __post_init__(self) -> None:
        """Refuses what cannot be calibrated."""
        if self.method not in RANGE_METHODS:
            raise InputError(f"ranges are found by one of {', '.join(RANGE_METHODS)}, got {self.method!r}")
        if self.n_steps < 0:
            raise InputError(f"the steps to calibrate at must be 1 or more, or 0 for all, got {self.n_steps}")
        if not 50 < self.percentile <= 100:
            raise InputError(f"the percentile must lie above 50 and at most at 100, got {self.percentile}")

    def calls(self, n_steps: int, n_calls: int) -> tuple[int, ...]:
        """Which of the denoiser's `n_calls` in `n_steps` of a trajectory are looked at, from 0.

        Step i of N has the calls from ceil(i C / N) to below ceil((i + 1) C / N): with C = 2 N - 1 (Heun, KDPM2) two
        each and the last one, with C = N + 1 (PNDM) two in the first and one in the others.
        """
        wanted = min(self.n_steps or n_steps, n_steps)
        if wanted == 1:
            return (0,)
        steps = {round(i * n_steps / wanted) for i in range(wanted)}
        first = [-(-i * n_calls // n_steps) for i in range(n_steps + 1)]
        return tuple(call for step in sorted(steps) for call in range(first[step], first[step + 1]))


def calibrate(
    adapter: PipelineAdapter,
    widths: Mapping[str, Collection[int]],
    sampling: Sampling,
    *,
    weights_digest: str,
    options: CalibrationOptions | None = None,
    study: Study | None = None,
    progress: Progress = SILENT,
) -> Activations:
    """Static ranges of the inputs of layers, for the bits that each may take.

    With a study, ranges that were found before are taken from there.

    Raises:
        InputError: inputs that are not finite, or a layer of that name is never called.
        Interrupted: the user stopped it.
    """
    options, kept = options or CalibrationOptions(), Parts(adapter, study)
    key = content_key(
        {
            "calibration": CALIBRATION_VERSION,
            "setting": setting_of(adapter, sampling, weights_digest=weights_digest, objective="step"),
            "options": options,
            "widths": {layer: sorted(bits) for layer, bits in widths.items()},
        }
    )

    def measure() -> Activations:
        counts, timesteps = _count(adapter, tuple(widths), (sampling, options), kept, progress)
        static = {layer: _ranges(layer, counts, bits, options) for layer, bits in widths.items()}
        return Activations(options.symmetric, static, timesteps if options.by_timestep else ())

    return kept.part(Activations, key, measure)


@dataclass
class _Values:
    """What a layer's inputs were: the exact extremes, and how often each bfloat16 occurred, by its bits."""

    low: float = math.inf
    high: float = -math.inf
    counts: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor, *, is_counted: bool) -> None:
        low, high = map(float, inputs.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise InputError("its inputs hold NaN or infinity, so they have no range; calibrate in float32")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if is_counted:
            bits = inputs.to(torch.bfloat16).contiguous().view(torch.int16).flatten().int() & (_N_VALUES - 1)
            found = torch.bincount(bits, minlength=_N_VALUES).cpu()
            self.counts = found if self.counts is None else self.counts + found

    def merge(self, other: _Values) -> None:
        """Adds what was seen elsewhere."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if other.counts is not None:
            self.counts = other.counts if self.counts is None else self.counts + other.counts

    def sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The values that occurred, float32, ascending, and how often each did."""
        counts = torch.zeros(_N_VALUES) if self.counts is None else self.counts
        found = counts.nonzero().flatten()
        values = found.to(torch.int16).view(torch.bfloat16).float()
        order = values.argsort()
        return values[order], counts[found][order].double()


Counts = Mapping[tuple[str, float], _Values]  # by layer and timestep, 0 for all unless they are told apart


def _count(
    adapter: PipelineAdapter,
    layers: tuple[str, ...],
    how: tuple[Sampling, CalibrationOptions],
    kept: Parts,
    progress: Progress,
) -> tuple[Counts, tuple[float, ...]]:
    """The inputs of layers by layer and timestep, and the timesteps in the order of sampling."""
    sampling, options = how
    look = _Look(options.calls(sampling.n_steps, _n_calls(adapter, how)), options)
    progress.start(sampling.n_batches * len(look.calls), "calibrating activations")
    with graceful_interrupt() as stop, hooked(adapter.denoiser, {layer: look.hook(layer) for layer in layers}):

        def see(call: DenoiserCall) -> None:
            if look.see(call):
                progress.advance(1)
            kept.check(stop)

        sample_until(adapter, sampling, look.calls[-1], see)
    progress.done()
    return look.found, tuple(look.timesteps)


def _n_calls(adapter: PipelineAdapter, how: tuple[Sampling, CalibrationOptions]) -> int:
    """How often the denoiser is called in a trajectory: the first sample tells, where more than one call is wanted."""
    sampling, options = how
    if options.n_steps == 1:
        return 1
    seen: list[int] = []
    adapter.sample(sampling.first(1), observer=lambda call: seen.append(call.step))
    return len(seen)


class _Look:
    """Looks at the inputs of layers during some calls of the denoiser."""

    def __init__(self, calls: tuple[int, ...], options: CalibrationOptions) -> None:
        self.calls, self.timesteps = calls, dict[float, None]()  # a dictionary keeps their order
        self.found: dict[tuple[str, float], _Values] = {}
        self._options, self._call = options, 0
        self._now: dict[str, _Values] = {}

    def hook(self, layer: str) -> Hook:
        """The hook on a layer."""
        return functools.partial(self._add, layer)

    def see(self, call: DenoiserCall) -> bool:
        """Ends a call; the next one is the next, or the first of the next batch. Tells if it was looked at."""
        self._call = 0 if call.step >= self.calls[-1] else call.step + 1
        if call.step not in self.calls:
            return False
        self.timesteps[call.timestep] = None
        timestep = call.timestep if self._options.by_timestep else 0.0
        for layer, values in self._now.items():
            self.found.setdefault((layer, timestep), _Values()).merge(values)
        self._now.clear()
        return True

    def _add(self, layer: str, _module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        if self._call not in self.calls:
            return
        try:
            values = self._now.setdefault(layer, _Values())
            values.add(args[0].detach(), is_counted=self._options.method != "min-max")
        except InputError as error:
            raise InputError(f"layer {layer!r}: {error}") from error


def _ranges(layer: str, counts: Counts, widths: Collection[int], options: CalibrationOptions) -> dict[str, StaticRange]:
    groups = [values for (name, _), values in counts.items() if name == layer]  # in the order of sampling
    if not groups:
        raise InputError(f"layer {layer!r} was never called, so its inputs have no range; leave its activations alone")
    found = {}
    for bits in sorted(widths):
        pairs = [_range(values, bits, options) for values in groups]
        found[f"a{bits}"] = StaticRange(tuple(low for low, _ in pairs), tuple(high for _, high in pairs))
    return found


def _range(values: _Values, bits: int, options: CalibrationOptions) -> tuple[float, float]:
    if options.method == "percentile":
        return _percentiles(values, options.percentile / 100)
    if options.method == "mse":
        return _least_error(values, bits, symmetric=options.symmetric)
    return values.low, values.high


def _percentiles(values: _Values, share: float) -> tuple[float, float]:
    """The values that a share of all lies above, and below."""
    found, counts = values.sorted()
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0)
    least = share * float(counts.sum())
    low, high = (
        float(found.flip(0)[int((above >= least).nonzero()[0])]),
        float(found[int((below >= least).nonzero()[0])]),
    )
    return max(values.low, low), min(values.high, high)


def _least_error(values: _Values, bits: int, *, symmetric: bool) -> tuple[float, float]:
    """Of the shrunk ranges, the one that rounds the values with the least squared error."""
    found, counts = values.sorted()

    def error(pair: tuple[float, float]) -> float:
        quantizer = ActivationQuantizer(bits, symmetric, StaticRange((pair[0],), (pair[1],)))
        return float(((quantizer(found) - found).double().square() * counts).sum())

    return min(((values.low * f, values.high * f) for f in _SHRINK_FACTORS), key=error)
