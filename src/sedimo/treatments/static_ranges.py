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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from sedimo.bank import Bank
from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.lab.exchange import Hook, activation_bits, hooked
from sedimo.lab.lab import Lab
from sedimo.lab.parts import Parts
from sedimo.methods.method import Price, Words
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import sample_until
from sedimo.quant.activations import ActivationQuantizer, Activations, StaticRange
from sedimo.quant.formats import FULL_BITS, Format
from sedimo.settings import option
from sedimo.treatments.treatment import Treatment, Untouched

CALIBRATION_VERSION = 2  # raised when ranges of the same settings change
RangeMethod = Literal["min-max", "percentile", "mse"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
_N_VALUES = 1 << 16  # of bfloat16
_SHRINK_FACTORS = tuple(0.95**power for power in range(90))  # from all of the range to a hundredth of it


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How ranges are found.

    `n_steps` of the trajectory are looked at, evenly spaced from the first on: 0 means all, 1 is the call of greatest
    noise alone, as published; that loses much where later steps have wider ranges (docs/results/sqnr-strategy.md). Of a
    scheduler that calls the denoiser several times in a step, all calls of a step are looked at. `percentile` is for
    that method: so many percent of the values lie below the upper end, and above the lower one. `by_timestep` gives
    each timestep that is looked at ranges of its own.

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
    lab: Lab, widths: Mapping[str, Collection[int]], on: Sampling, *, options: CalibrationOptions | None = None
) -> Activations:
    """Static ranges of the inputs of layers, for the bits that each may take; those of full precision.

    With a study, ranges that were found before are taken from there.

    Raises:
        InputError: inputs that are not finite, or a layer of that name is never called.
        Interrupted: the user stopped it.
    """
    options, parts = options or CalibrationOptions(), lab.parts()
    key = content_key(
        {
            "calibration": CALIBRATION_VERSION,
            "setting": lab.setting(on, "step", weights_digest=lab.weights.digest),
            "options": options,
            "widths": {layer: sorted(bits) for layer, bits in widths.items()},
        }
    )

    def measure() -> Activations:
        look = _count(lab, tuple(widths), on, options, parts)
        static = {layer: _ranges(layer, look.found, bits, options) for layer, bits in widths.items()}
        return Activations(options.symmetric, static, tuple(look.timesteps) if options.by_timestep else ())

    return parts.part(Activations, key, measure)


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


def _count(lab: Lab, layers: Sequence[str], on: Sampling, options: CalibrationOptions, parts: Parts) -> _Look:
    """The inputs of layers by layer and timestep, and the timesteps in the order of sampling."""
    pipe = lab.pipe
    look = _Look(options.calls(on.n_steps, _n_calls(pipe, on, options)), options)
    hooks = {layer: look.hook(layer) for layer in layers}
    with parts.stage("calibrating activations", on.n_batches * len(look.calls)) as stop, hooked(pipe.denoiser, hooks):

        def see(call: DenoiserCall) -> None:
            if look.see(call):
                lab.progress.advance(1)
            parts.check(stop)

        sample_until(pipe, on, look.calls[-1], see)
    return look


def _n_calls(adapter: PipelineAdapter, on: Sampling, options: CalibrationOptions) -> int:
    """How often the denoiser is called in a trajectory: the first sample tells, where more than one call is wanted."""
    if options.n_steps == 1:
        return 1
    seen: list[int] = []
    adapter.sample(on.first(1), observer=lambda call: seen.append(call.step))
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


RangesName = Literal["dynamic", "min-max", "percentile", "mse"]
N_SAMPLES = 64  # that static ranges are calibrated on, at least


@dataclass(frozen=True, slots=True)
class ActivationSettings:
    """How the inputs of layers are rounded whose format asks for it.

    By the range of each token or image (dynamic), symmetric or not; or by static ranges, that `n_samples` of the
    model's own trajectories are calibrated on.

    Raises:
        InputError: no samples, or what belongs to static ranges, without them.
    """

    ranges: RangesName = option(
        "dynamic", "--act-ranges", help="Range of each token or image, or static ranges calibrated this way."
    )
    symmetric: bool = option(False, "--act-symmetric", help="Round activations without a zero point.")
    n_steps: int = option(
        0,
        "--act-steps",
        least=0,
        help="Steps to calibrate static ranges at; 1: the first, of most noise, alone; 0: all.",
    )
    by_timestep: bool = option(
        False, "--act-by-timestep", help="Static ranges of their own for each calibrated timestep."
    )
    n_samples: int = N_SAMPLES

    def __post_init__(self) -> None:
        """Checks them together."""
        if self.n_samples < 1:
            raise InputError(f"ranges are calibrated on at least one sample, got {self.n_samples}")
        if self.ranges == "dynamic" and (self.n_steps or self.by_timestep):
            raise InputError("--act-steps and --act-by-timestep are for static ranges: give --act-ranges min-max, too")
        _ = self.calibration

    @property
    def calibration(self) -> CalibrationOptions | None:
        """How static ranges are found; None for dynamic ones."""
        if self.ranges == "dynamic":
            return None
        return CalibrationOptions(self.ranges, self.n_steps, symmetric=self.symmetric, by_timestep=self.by_timestep)

    def __str__(self) -> str:
        """For people."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        how = self.calibration
        if how is None:
            return f"{kind}, by each token's or image's own range"
        steps = f"{how.n_steps or 'all'} steps" + (", for each of them" if how.by_timestep else "")
        return f"{kind}, static ranges by {how.method} at {steps}"


DYNAMIC_ACTIVATIONS = ActivationSettings()


@dataclass(frozen=True)
class RoundedActivations(Untouched):
    """Rules for activations that are in force."""

    settings: ActivationSettings
    rules: Activations

    def on(self, bank: Bank) -> Bank:
        """The bank with these rules."""
        return bank.rounding(self.rules)

    def __str__(self) -> str:
        """For people."""
        return f"activations: {self.settings}"


def round_activations(lab: Lab, settings: ActivationSettings) -> RoundedActivations | None:
    """The rules, calibrated where they are static; None where nothing is rounded otherwise than by default.

    Raises:
        Interrupted: the user stopped it.
    """
    widths = {layer: bits for d in lab.space.decisions if (bits := activation_bits(d)) for layer in d.layers}
    if settings == DYNAMIC_ACTIVATIONS or not widths:
        return None
    if settings.calibration is None:
        return RoundedActivations(settings, Activations(settings.symmetric))
    found = calibrate(lab, widths, lab.seeds.more(settings.n_samples), options=settings.calibration)
    return RoundedActivations(settings, found)


def refuse_idle(settings: ActivationSettings, formats: Sequence[Format]) -> None:
    """Refuses rules for activations where no format rounds any.

    Raises:
        InputError: saying what to add.
    """
    if settings != DYNAMIC_ACTIVATIONS and all(f.activation_bits == FULL_BITS for f in formats):
        raise InputError(
            f"activations are to be {settings}, but no format has activation bits. Add --act a8, or write formats such "
            "as uaq4a8; or leave out --act-ranges and --act-symmetric"
        )


def _price(lab: Lab, settings: ActivationSettings) -> Price:
    """Every batch up to the last call that is looked at; one run more tells which that is, unless it is the first."""
    options, on = settings.calibration, lab.seeds.more(settings.n_samples)
    if options is None:
        return Price()
    timing = lab.time_calls(on)
    calls_of_a_run = timing.n_calls // on.n_batches
    n_calls = on.n_batches * (options.calls(on.n_steps, calls_of_a_run)[-1] + 1)
    n_calls += 0 if options.n_steps == 1 else calls_of_a_run
    return Price(n_calls * timing.seconds_per_call, n_calls)


ACTIVATIONS = Treatment(
    name="activations",
    words=Words(
        "rounds the inputs of layers by dynamic or calibrated static ranges",
        source="Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431)",
    ),
    knobs=ActivationSettings,
    apply=round_activations,
    price=_price,
    refuse=refuse_idle,
)
