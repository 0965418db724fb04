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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import content_key
from sedimo.graph.model import Stream
from sedimo.measurement.hooks import Hook, hooked, linear_part, rounding_change, stream_of
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.objective import StepBatches, calls_by_step, inputs_by_samples
from sedimo.measurement.parts import Parts
from sedimo.measurement.passes import change_names, input_roundings, passes, weight_changes
from sedimo.measurement.study import Study
from sedimo.measurement.trial import Execution, Setting
from sedimo.measurement.worker import setting_of
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling
from sedimo.quant.activations import InputQuantizers
from sedimo.quant.formats import Format

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


def probe_sqnr(
    adapter: PipelineAdapter,
    bank: Bank,
    sampling: Sampling,
    *,
    study: Study | None = None,
    progress: Progress = SILENT,
) -> SqnrProbe:
    """Measures the local noise of all decisions and formats of the bank on one recorded trajectory.

    With a study, the part of each timestep is saved when it is finished and not measured again.

    Raises:
        Interrupted: the user stopped it (with a study, calling again goes on).
    """
    kept = Parts(adapter, study)
    setting = setting_of(adapter, sampling, weights_digest=bank.digest, objective="step")
    calls = calls_by_step(sampling, kept.trajectory(sampling, setting).calls)
    groups = passes(bank.space)
    found: list[dict[str, Mapping[str, LocalNoise]]] = [{} for _ in calls]
    progress.start(len(groups) * len(calls), "noise at the layers' own outputs")
    with graceful_interrupt() as stop:
        for decisions in groups:
            work = _Pass(adapter.denoiser, bank, decisions)
            for index, batches in enumerate(calls):
                key = content_key({"sqnr": SQNR_VERSION, "setting": setting, "call": index, "formats": work.named})
                found[index] |= kept.part(SqnrPart, key, functools.partial(work.measure, batches)).noise
                progress.advance(1)
                kept.check(stop)
    progress.done()
    parts = tuple(SqnrPart(batches[0][0].timestep, noise) for batches, noise in zip(calls, found, strict=True))
    return SqnrProbe(setting, parts, kept.execution)


class _Pass:
    """The decisions whose weight changes are in memory together; they are loaded when first needed."""

    def __init__(self, denoiser: nn.Module, bank: Bank, decisions: Sequence[str]) -> None:
        self._denoiser, self._bank = denoiser, bank
        self._changes: dict[str, torch.Tensor] | None = None
        self._roundings = {d: input_roundings(bank, bank.space.decision_index[d]) for d in decisions}
        self.named = {d: change_names(bank.space, d) for d in decisions}

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
    return LocalNoise(_rounded(float(values.mean())), _rounded(error))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
