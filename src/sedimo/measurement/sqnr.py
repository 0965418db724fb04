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
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import content_key
from sedimo.measurement.hooks import Hook, hooked
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.objective import StepBatches, calls_by_step, rows_of
from sedimo.measurement.parts import check_stop, saved_part
from sedimo.measurement.passes import passes, weight_changes, weight_formats
from sedimo.measurement.study import Study
from sedimo.measurement.trial import Execution, Setting
from sedimo.measurement.worker import setting_of, versions
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import record
from sedimo.quant.formats import Format

SQNR_VERSION = 1
MAX_ROWS = 64
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
        """Mean over timesteps. Steps are of the same samples, so their errors are averaged as if they went together."""
        text = str(number_format.weight_format)
        found = [part.noise[decision][text] for part in self.parts if decision in part.noise]
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
    begin = time.perf_counter()
    setting = setting_of(adapter, sampling, weights_digest=bank.weights_digest, objective="step")
    calls = calls_by_step(sampling, record(adapter, sampling).calls)
    groups = passes(bank.space)
    found: list[dict[str, Mapping[str, LocalNoise]]] = [{} for _ in calls]
    progress.start(len(groups) * len(calls), "noise at the layers' own outputs")
    with graceful_interrupt() as stop:
        for decisions in groups:
            work = _Pass(adapter.denoiser, bank, decisions)
            for index, batches in enumerate(calls):
                key = content_key({"sqnr": SQNR_VERSION, "setting": setting, "call": index, "formats": work.named})
                found[index] |= saved_part(study, SqnrPart, key, functools.partial(work.measure, batches)).noise
                progress.advance(1)
                check_stop(stop, study)
    progress.done()
    parts = tuple(SqnrPart(batches[0][0].timestep, noise) for batches, noise in zip(calls, found, strict=True))
    execution = Execution(time.perf_counter() - begin, len(calls), torch.get_num_threads(), versions())
    return SqnrProbe(setting, parts, execution)


class _Pass:
    """The decisions whose weight changes are in memory together; they are loaded when first needed."""

    def __init__(self, denoiser: nn.Module, bank: Bank, decisions: Sequence[str]) -> None:
        self._denoiser, self._bank = denoiser, bank
        self._changes: dict[str, torch.Tensor] | None = None
        self.named = {d: [str(f) for f in weight_formats(bank.space, d)] for d in decisions}

    def measure(self, batches: StepBatches) -> SqnrPart:
        """The part of one step."""
        if self._changes is None:
            self._changes = {d: self._loaded(d) for d in self.named}
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
        step = max(1, MAX_ROWS // n_sets)
        sums: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for first in range(0, n_samples, step):
                units = torch.arange(first, min(first + step, n_samples))
                rows = torch.cat([units + k * n_samples for k in range(n_sets)])
                powers = _Powers(n_sets, len(units))
                with hooked(self._denoiser, self._hooks(powers)):
                    self._denoiser(**rows_of(call, rows.to(call.output.device)))
                for name, (noise, signal) in powers.found.items():
                    sums.setdefault(name, []).append(noise / signal.clamp_min(torch.finfo(torch.float64).tiny))
        return {name: torch.cat(parts, dim=1) for name, parts in sums.items()}

    def _hooks(self, powers: _Powers) -> dict[str, Hook]:
        return {
            layer: functools.partial(powers.add, name, deltas)
            for name, deltas in (self._changes or {}).items()
            for layer in self._bank.space.decision_index[name].layers
        }

    def _loaded(self, decision: str) -> torch.Tensor:
        return weight_changes(self._bank, self._denoiser, decision).to(next(self._denoiser.parameters()).dtype)


class _Powers:
    """Noise `[F, n]` and signal `[n]` powers of the samples of one run, added up over the layers of each decision."""

    def __init__(self, n_sets: int, n_samples: int) -> None:
        self.found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._shape = n_sets, n_samples

    def add(
        self, name: str, deltas: torch.Tensor, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        """The hook of a layer of a decision whose weight changes are `deltas` `[F, out, in, ...]`."""
        noise = torch.stack([self._per_sample(_changed(module, args[0], delta)) for delta in deltas])
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


def _changed(module: nn.Module, inputs: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """What a weight change adds to the output of a layer."""
    if isinstance(module, _ConvNd):
        return module._conv_forward(inputs, delta, None)
    return F.linear(inputs, delta)


def _mean(values: torch.Tensor) -> LocalNoise:
    n = values.numel()
    error = float(values.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    return LocalNoise(_rounded(float(values.mean())), _rounded(error))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
