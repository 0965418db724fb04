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
from typing import Literal

import torch
from torch import nn

from sedimo.bank import Bank
from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.lab.bench import InForce
from sedimo.lab.exchange import hooked
from sedimo.lab.lab import Lab
from sedimo.methods.method import Price, Words
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import sample_until
from sedimo.quant.activations import ActivationQuantizer, Activations, InputRange
from sedimo.quant.formats import FULL_BITS, Format
from sedimo.settings import Checked, option, within
from sedimo.treatments.treatment import Treatment

CALIBRATION_VERSION = 2  # raised when ranges of the same settings change
N_SAMPLES = 64  # that static ranges are calibrated on, at least
PERCENTILE = 99.99  # so many percent of the values lie below the upper end of a range, and above the lower one
_N_VALUES = 1 << 16  # of bfloat16
_SHRINK_FACTORS = tuple(0.95**power for power in range(90))  # from all of the range to a hundredth of it
Values = tuple[float, float, torch.Tensor]  # least, greatest, and how often each bfloat16 occurred, by its bits


@dataclass(frozen=True, slots=True)
class ActivationSettings(Checked):
    """How the inputs of layers are rounded whose format asks for it.

    By the range of each token or image (dynamic), symmetric or not; or by static ranges, that `n_samples` of the
    model's own trajectories are calibrated on. `n_steps` of those are looked at, evenly spaced from the first on: 0
    means all, 1 is the call of greatest noise alone, as published; that loses much where later steps have wider ranges
    (docs/results/sqnr-strategy.md).
    """

    ranges: Literal["dynamic", "min-max", "percentile", "mse"] = option(
        "dynamic", "--act-ranges", metavar="HOW", help="Ranges: dynamic (per token or image), min-max, percentile, mse."
    )
    symmetric: bool = option(False, "--act-symmetric", help="Round activations without a zero point.")
    n_steps: int = option(0, "--act-steps", least=0, help="Steps to calibrate at; 0: all; 1: the first, of most noise.")
    by_timestep: bool = option(False, "--act-by-timestep", help="Static ranges for each calibrated timestep.")
    n_samples: int = N_SAMPLES

    def check_together(self) -> None:
        """Refuses what belongs to static ranges, without them, and no samples."""
        within(least=1)(self.n_samples, "n_samples")
        if self.ranges == "dynamic" and (self.n_steps or self.by_timestep):
            raise InputError("--act-steps and --act-by-timestep are for static ranges: give --act-ranges min-max, too")

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        if self.ranges == "dynamic":
            return f"{kind}, by each token's or image's own range"
        steps = f"{self.n_steps or 'all'} steps" + (", for each of them" if self.by_timestep else "")
        return f"{kind}, static ranges by {self.ranges} at {steps}"


DYNAMIC_ACTIVATIONS = ActivationSettings()


def calibrate(lab: Lab, widths: Mapping[str, Collection[int]], on: Sampling, how: ActivationSettings) -> Activations:
    """Static ranges of the full-precision inputs of layers, for the bits that each may take; kept in a study."""
    parts = lab.parts()
    options = {name: getattr(how, name) for name in ("n_steps", "symmetric", "by_timestep")}
    named = {
        "calibration": CALIBRATION_VERSION,
        "setting": lab.setting(on, "step", weights_digest=lab.weights.digest),
        "options": {"method": how.ranges, "percentile": PERCENTILE, **options},
        "widths": {layer: sorted(bits) for layer, bits in widths.items()},
    }

    def measure() -> Activations:
        seen: list[int] = []  # the calls of the first sample, where it matters how many there are
        if how.n_steps != 1:
            lab.pipe.sample(on.first(1), observer=lambda call: seen.append(call.step))
        look = _Look(calls_of(how.n_steps, on.n_steps, len(seen) or 1), how)
        hooks = {layer: functools.partial(look.add, layer) for layer in widths}
        stage = parts.stage("calibrating activations", on.n_batches * len(look.calls))
        with stage as stop, hooked(lab.pipe.denoiser, hooks):

            def see(call: DenoiserCall) -> None:
                if look.see(call):
                    lab.progress.advance(1)
                parts.check(stop)

            sample_until(lab.pipe, on, look.calls[-1], see)
        static = {layer: look.ranges(layer, bits) for layer, bits in widths.items()}
        return Activations(how.symmetric, static, tuple(look.timesteps) if how.by_timestep else ())

    return parts.part(Activations, content_key(named), measure)


def calls_of(wanted: int, n_steps: int, n_calls: int) -> tuple[int, ...]:
    """Which of the denoiser's `n_calls` in `n_steps` of a trajectory are looked at for `wanted` steps (0: all), from 0.

    Step i of N has the calls from ceil(i C / N) to below ceil((i + 1) C / N): with C = 2 N - 1 (Heun, KDPM2) two
    each and the last one, with C = N + 1 (PNDM) two in the first and one in the others.
    """
    n = min(wanted or n_steps, n_steps)
    if n == 1:
        return (0,)
    first = [-(-i * n_calls // n_steps) for i in range(n_steps + 1)]
    steps = sorted({round(i * n_steps / n) for i in range(n)})
    return tuple(call for step in steps for call in range(first[step], first[step + 1]))


class _Look:
    """Looks at the inputs of layers during some calls of the denoiser."""

    def __init__(self, calls: tuple[int, ...], how: ActivationSettings) -> None:
        self.calls, self.timesteps = calls, dict[float, None]()  # a dictionary keeps their order
        self._found: dict[tuple[str, float], Values] = {}  # by layer and timestep, 0 for all unless they are told apart
        self._how, self._call = how, 0
        self._now: list[tuple[str, Values]] = []

    def add(self, layer: str, _module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        if self._call not in self.calls:
            return
        inputs = args[0].detach()
        low, high = map(float, inputs.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise InputError(f"layer {layer!r}: its inputs hold NaN or infinity; calibrate in float32")
        counts = torch.zeros((), dtype=torch.int64)
        if self._how.ranges != "min-max":
            bits = inputs.to(torch.bfloat16).contiguous().view(torch.int16).flatten().int() & (_N_VALUES - 1)
            counts = torch.bincount(bits, minlength=_N_VALUES).cpu()
        self._now.append((layer, (low, high, counts)))

    def see(self, call: DenoiserCall) -> bool:
        """Ends a call; the next one is the next, or the first of the next batch. Tells if it was looked at."""
        self._call = 0 if call.step >= self.calls[-1] else call.step + 1
        if call.step not in self.calls:
            return False
        self.timesteps[call.timestep] = None
        for layer, (low, high, counts) in self._now:
            key = layer, call.timestep if self._how.by_timestep else 0.0
            known = self._found.get(key, (low, high, torch.zeros_like(counts)))
            self._found[key] = min(low, known[0]), max(high, known[1]), counts + known[2]
        self._now.clear()
        return True

    def ranges(self, layer: str, widths: Collection[int]) -> dict[str, InputRange]:
        """The static ranges of a layer by width."""
        groups = [values for (name, _), values in self._found.items() if name == layer]  # in the order of sampling
        if not groups:
            raise InputError(f"layer {layer!r} was never called: its inputs have no range; leave them alone")
        ends = {bits: zip(*(_range(values, bits, self._how) for values in groups), strict=True) for bits in widths}
        return {f"a{bits}": InputRange(*ends[bits]) for bits in sorted(widths)}


def _range(seen: Values, bits: int, how: ActivationSettings) -> tuple[float, float]:
    """Least and greatest value; those that a share of all lies between; or the shrunk range of least squared error."""
    low, high, counts = seen
    if how.ranges == "min-max":
        return low, high
    occurred = counts.nonzero().flatten()
    values = occurred.to(torch.int16).view(torch.bfloat16).float()
    order = values.argsort()
    values, weights = values[order], counts[occurred][order].double()
    if how.ranges == "percentile":
        below, above = weights.cumsum(0), weights.flip(0).cumsum(0)
        least = PERCENTILE / 100 * float(weights.sum())
        lower, upper = values.flip(0)[above >= least][0], values[below >= least][0]
        return max(low, float(lower)), min(high, float(upper))

    def error(pair: tuple[float, float]) -> float:
        quantizer = ActivationQuantizer(bits, how.symmetric, InputRange((pair[0],), (pair[1],)))
        return float(((quantizer(values) - values).double().square() * weights).sum())

    return min(((low * f, high * f) for f in _SHRINK_FACTORS), key=error)


@dataclass(frozen=True)
class RoundedActivations(InForce):
    """Rules for activations that are in force."""

    settings: ActivationSettings
    rules: Activations

    def on(self, bank: Bank) -> Bank:
        """The bank with these rules."""
        return bank.rounding(self.rules)

    def __str__(self) -> str:
        return f"activations: {self.settings}"


def round_activations(lab: Lab, settings: ActivationSettings) -> RoundedActivations | None:
    """The rules, calibrated where they are static; None where nothing is rounded otherwise than by default."""
    widths = {layer: bits for d in lab.space.decisions if (bits := d.activation_bits) for layer in d.layers}
    if settings == DYNAMIC_ACTIVATIONS or not widths:
        return None
    if settings.ranges == "dynamic":
        return RoundedActivations(settings, Activations(settings.symmetric))
    return RoundedActivations(settings, calibrate(lab, widths, lab.seeds.more(settings.n_samples), settings))


def refuse_idle(settings: ActivationSettings, formats: Sequence[Format]) -> None:
    """Refuses rules for activations where no format rounds any."""
    if settings != DYNAMIC_ACTIVATIONS and all(f.activation_bits == FULL_BITS for f in formats):
        raise InputError(
            f"activations are to be {settings}, but no format has activation bits. Add --act a8, or write formats such "
            "as uaq4a8; or leave out --act-ranges and --act-symmetric"
        )


def _price(lab: Lab, settings: ActivationSettings) -> Price:
    """Every batch up to the last call that is looked at; one run more tells which that is, unless it is the first."""
    if settings.ranges == "dynamic":
        return Price()
    on = lab.seeds.more(settings.n_samples)
    timing = lab.time_calls(on)
    calls_of_a_run = timing.n_calls // on.n_batches
    n_calls = on.n_batches * (calls_of(settings.n_steps, on.n_steps, calls_of_a_run)[-1] + 1)
    n_calls += 0 if settings.n_steps == 1 else calls_of_a_run
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
