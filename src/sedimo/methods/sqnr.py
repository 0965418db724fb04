"""Local noise: what each format of each layer puts on that layer's own output, per timestep.

The denoiser runs at full precision on a recorded trajectory. At each layer, the output's change under a weight change
is computed beside the output itself (layers are linear in their weight, so this is exact, not to first order), and
its power is divided by the output's: 10 to the power of minus a tenth of the local SQNR. Inputs are those of full
precision: noise from earlier layers is not in it, which is what makes it local.

Source:
    Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431), local SQNR; the mean over
    samples is taken before the logarithm, and the quantized layer gets full-precision inputs (the paper leaves both
    open).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from sedimo.allocation.costs import CostEstimate, build_table
from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Candidate
from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.graph.model import Stream
from sedimo.lab.exchange import (
    MEMORY_BYTES,
    Hook,
    change_names,
    count_passes,
    hooked,
    input_roundings,
    linear_part,
    passes,
    rounding_change,
    stream_of,
    weight_changes,
)
from sedimo.lab.lab import Lab, seconds_of_fits
from sedimo.lab.study import Execution, Setting
from sedimo.methods.method import Finding, Method, NoKnobs, Price, Task, Traits, Words, plan_of
from sedimo.metrics.estimate import to_digits
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import StepBatches, calls_by_step, inputs_by_samples
from sedimo.quant.activations import InputQuantizers
from sedimo.quant.formats import Format
from sedimo.space import SearchSpace

NAME = "sqnr"
LEAST_SAMPLES = 64
SQNR_VERSION = 1
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class LocalNoise:
    """Relative noise power at a layer's output: mean over samples, and its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class SqnrPart:
    """Of one recorded call: local noise by decision and format text. Decisions that were not called are absent."""

    timestep: float
    noise: Mapping[str, Mapping[str, LocalNoise]]

    def of(self, decision: str, number_format: Format) -> LocalNoise:
        """The noise of a format at a decision that was called: that of the weight and that of the activations added."""
        parts = [self.noise[decision][name] for name in number_format.changes]
        return LocalNoise(sum(one.mean for one in parts), math.hypot(*(one.standard_error for one in parts)))


@dataclass(frozen=True, slots=True)
class SqnrProbe:
    """Local noise of all decisions and formats per timestep, in the order of sampling."""

    setting: Setting
    parts: tuple[SqnrPart, ...]
    execution: Execution

    @property
    def n_samples(self) -> int:
        """Samples behind each number."""
        return len(self.setting.seeds)

    def over_time(self, decision: str, number_format: Format) -> LocalNoise:
        """Mean over timesteps, of weight and activations together.

        Steps are of the same samples, so their errors are averaged as if they went together.
        """
        found = [part.of(decision, number_format) for part in self.parts if decision in part.noise]
        if not found:
            return LocalNoise(0.0, 0.0)
        return LocalNoise(
            sum(one.mean for one in found) / len(found), sum(one.standard_error for one in found) / len(found)
        )


def probe_sqnr(lab: Lab, on: Sampling) -> SqnrProbe:
    """Measures the local noise of all decisions and formats of the lab's bank on one recorded trajectory.

    With a study, the part of each timestep is saved when it is finished and not measured again.

    Raises:
        Interrupted: the user stopped it (with a study, calling again goes on).
    """
    parts, setting = lab.parts(), lab.setting(on, "step")
    calls = calls_by_step(on, parts.trajectory(on, setting).calls)
    groups = passes(lab.bank.space)

    def works() -> Iterator[tuple[str, Callable[[], SqnrPart]]]:
        for decisions in groups:
            one = _Pass(lab, decisions)
            for index, batches in enumerate(calls):
                key = content_key({"sqnr": SQNR_VERSION, "setting": setting, "call": index, "formats": one.named})
                yield key, functools.partial(one.measure, batches)

    noise: list[dict[str, Mapping[str, LocalNoise]]] = [{} for _ in calls]
    label = "noise at the layers' own outputs"
    for index, part in enumerate(parts.each(SqnrPart, label, len(groups) * len(calls), works())):
        noise[index % len(calls)] |= part.noise
    found = tuple(SqnrPart(batches[0][0].timestep, one) for batches, one in zip(calls, noise, strict=True))
    return SqnrProbe(setting, found, parts.execution)


def sqnr_table(space: SearchSpace, candidates: Iterable[Candidate], probe: SqnrProbe) -> SensitivityTable:
    """Cost = relative noise power at the decision's own outputs, averaged over samples and timesteps.

    A sum of such costs treats noise at all layers alike, wherever it goes from there.

    Raises:
        InputError: the probe was made for other decisions or formats.

    Source:
        Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431), time-averaged local SQNR.
    """
    known = {(d, text) for part in probe.parts for d, formats in part.noise.items() for text in formats}
    called = {d for d, _ in known}

    def estimate(candidate: Candidate) -> CostEstimate:
        missing = [name for name in candidate.format.changes if (candidate.decision, name) not in known]
        if candidate.decision in called and missing:
            raise InputError(f"the probe has no {candidate.decision} at {missing[0]}; measure it again for this space")
        found = probe.over_time(candidate.decision, candidate.format)
        return CostEstimate(found.mean, found.standard_error, probe.n_samples)

    unused = sorted({d.name for d in space.decisions} - called)
    settings = {
        "n_samples": str(probe.n_samples),
        "n_steps": str(len(probe.parts)),
        "unused_decisions": ", ".join(unused) or "none",
    }
    return build_table(NAME, space, candidates, estimate, settings, sees_activations=True)


def noisiest_decisions(space: SearchSpace, probe: SqnrProbe, number_format: Format, share: float) -> tuple[str, ...]:
    """The share of the decisions, at least one, whose own outputs `number_format` disturbs most, averaged over time.

    Raises:
        InputError: a share outside 0..1 (0 excluded).

    Source:
        Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431): a tenth is corrected.
    """
    if not 0 < share <= 1:
        raise InputError(f"the share of layers must lie in 0..1 and not be 0, got {share}; 0.1 is usual")
    noise = {d.name: probe.over_time(d.name, number_format).mean for d in space.decisions}
    n = max(1, math.floor(share * len(noise) + 0.5))
    return tuple(sorted(noise, key=lambda name: -noise[name])[:n])


class _Pass:
    """The decisions whose weight changes are in memory together; they are loaded when first needed."""

    def __init__(self, lab: Lab, decisions: Sequence[str]) -> None:
        self._denoiser, self._bank = lab.pipe.denoiser, lab.bank
        self._changes: dict[str, torch.Tensor] | None = None
        self._roundings = {d: input_roundings(lab.bank, lab.bank.space.decision_index[d]) for d in decisions}
        self.named = {d: change_names(lab.bank.space, d) for d in decisions}

    def measure(self, batches: StepBatches) -> SqnrPart:
        """The part of one step."""
        if self._changes is None:
            self._changes = {d: weight_changes(self._bank, self._denoiser, d) for d in self.named}
        ratios: dict[str, list[torch.Tensor]] = {}
        for call, samples in batches:
            for name, powers in self._powers(call, len(samples)).items():
                ratios.setdefault(name, []).append(powers)
        noise = {
            name: {text: _mean(column) for text, column in zip(self.named[name], torch.cat(parts, dim=1), strict=True)}
            for name, parts in ratios.items()
        }
        return SqnrPart(batches[0][0].timestep, noise)

    def _powers(self, call: DenoiserCall, n_samples: int) -> dict[str, torch.Tensor]:
        """Relative noise `[F, n]` by decision, of one call."""
        n_sets = call.output.shape[0] // n_samples
        sums: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for n, inputs in inputs_by_samples(call, n_samples):
                powers = _Powers((n_sets, n), call.timestep)
                with hooked(self._denoiser, self._hooks(powers)):
                    self._denoiser(**inputs)
                for name, (noise, signal) in powers.found.items():
                    sums.setdefault(name, []).append(noise / signal.clamp_min(torch.finfo(torch.float64).tiny))
        return {name: torch.cat(parts, dim=1) for name, parts in sums.items()}

    def _hooks(self, powers: _Powers) -> dict[str, Hook]:
        of_layer: dict[str, list[_Change]] = {}
        for name, deltas in (self._changes or {}).items():
            stream = self._bank.space.decision_index[name].stream
            for layer, roundings in self._roundings[name].items():
                of_layer.setdefault(layer, []).append(_Change(name, deltas, roundings, stream))
        return {layer: functools.partial(powers.add, layer, changes) for layer, changes in of_layer.items()}


class _Change(NamedTuple):
    """What changes a layer for one decision.

    `deltas` `[F, out, in, ...]` of its weight, or of the part that reads a `stream`; then how its inputs are rounded.
    """

    decision: str
    deltas: torch.Tensor
    roundings: tuple[InputQuantizers, ...]
    stream: Stream | None


class _Powers:
    """Noise `[F, n]` and signal `[n]` powers of the samples of one run, added up over the layers of each decision."""

    def __init__(self, shape: tuple[int, int], timestep: float) -> None:
        self.found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._shape, self._timestep = shape, timestep  # sets of rows, samples

    def add(
        self,
        layer: str,
        changes: Sequence[_Change],
        module: nn.Module,
        args: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> None:
        """The hook of a layer, with what changes it for each of its decisions."""
        for name, deltas, roundings, stream in changes:
            read = stream_of(module, args[0], stream)
            by_weight = (linear_part(module, read, delta) for delta in deltas)
            by_inputs = (rounding_change(module, layer, args[0], how, self._timestep) for how in roundings)
            noise = torch.stack([self._per_sample(change) for change in itertools.chain(by_weight, by_inputs)])
            signal = self._per_sample(output.detach())
            if name in self.found:
                noise, signal = noise + self.found[name][0], signal + self.found[name][1]
            self.found[name] = noise, signal

    def _per_sample(self, output: torch.Tensor) -> torch.Tensor:
        """Sums of squares `[n]` float64; what is the same for all samples is counted for each."""
        n_sets, n = self._shape
        if output.shape[0] != n_sets * n:
            return output.double().square().sum().expand(n).cpu()
        return output.flatten(1).double().square().sum(1).reshape(n_sets, n).sum(0).cpu()


def _mean(values: torch.Tensor) -> LocalNoise:
    n = values.numel()
    error = float(values.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    return LocalNoise(to_digits(float(values.mean()), _DIGITS), to_digits(error, _DIGITS))


def _price(lab: Lab, _task: Task[NoKnobs]) -> Price:
    """A trajectory of more samples, all its calls again with all formats, which are fitted in full."""
    timing = lab.time_calls(lab.seeds.search)
    n_calls = max(1.0, LEAST_SAMPLES / lab.seeds.settings.n_seeds) * timing.n_calls
    n_formats, n_passes = max(len(d.formats) for d in lab.space.decisions), count_passes(lab.space)
    seconds = n_calls * (1 + n_passes + n_formats) * timing.seconds_per_call + seconds_of_fits(lab)
    return Price(seconds, round(n_calls * (1 + n_passes)), MEMORY_BYTES)


def _measure(lab: Lab, task: Task[NoKnobs]) -> Finding:
    probe = probe_sqnr(lab, plan_of(lab, task, LEAST_SAMPLES))
    return Finding(lab.bank, sqnr_table(lab.bank.space, lab.bank.candidates, probe)).with_evidence(probe)


SQNR = Method(
    name=NAME,
    words=Words(
        summary="noise at the layers' own outputs, averaged over samples and timesteps",
        source="Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431)",
        cost="the noise at its own output",
        sees="the exact noise of each format where it arises, at each timestep",
        misses="what becomes of the noise on its way to the output",
    ),
    traits=Traits(least_samples=LEAST_SAMPLES, is_noise=False),
    price=_price,
    measure=_measure,
)
