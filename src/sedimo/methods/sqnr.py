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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sedimo.allocation.table import SensitivityTable, build_table
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.lab.exchange import MEMORY_BYTES, hooked, linear_part, passes, rounding_change, stream_of
from sedimo.lab.lab import Lab, seconds_of_fits
from sedimo.lab.study import Setting
from sedimo.methods.method import N_RANDOM, Finding, Method, NoKnobs, Price, Task, Words, plan_of
from sedimo.methods.taps import ChangedDecisions, Changes, decisions_by_layer, each_part, measured
from sedimo.metrics.estimate import to_digits
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.trajectory import StepBatches, calls_by_step, inputs_by_samples
from sedimo.quant.families.family import CostEstimate
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

    def over_time(self, decision: str, number_format: Format) -> LocalNoise:
        """Mean over timesteps, of weight and activations together.

        Steps are of the same samples, so their errors are averaged as if they went together.
        """
        found = [part.of(decision, number_format) for part in self.parts if decision in part.noise]
        n = max(1, len(found))
        return LocalNoise(sum(one.mean for one in found) / n, sum(one.standard_error for one in found) / n)


def probe_sqnr(lab: Lab, on: Sampling) -> SqnrProbe:
    """Measures the local noise of all decisions and formats of the lab's bank on one recorded trajectory.

    With a study, the part of each timestep is saved when it is finished and not measured again.
    """
    setting = lab.setting(on, "step")
    calls = calls_by_step(on, lab.parts().trajectory(on, setting).calls)
    named = {"sqnr": SQNR_VERSION, "setting": setting}
    noise: list[dict[str, Mapping[str, LocalNoise]]] = [{} for _ in calls]
    parts = each_part(lab, SqnrPart, "noise at the layers' own outputs", calls, named, measure_part)
    for part, known in zip(parts, itertools.cycle(noise), strict=False):
        known |= part.noise
    timesteps = (batches[0][0].timestep for batches in calls)
    return SqnrProbe(setting, tuple(map(SqnrPart, timesteps, noise)))


def sqnr_table(space: SearchSpace, candidates: Iterable[Candidate], probe: SqnrProbe) -> SensitivityTable:
    """Cost = relative noise power at the decision's own outputs, averaged over samples and timesteps.

    A sum of such costs treats noise at all layers alike, wherever it goes from there.
    """
    names = [d.name for d in space.decisions]
    known = {d: dict.fromkeys(text for part in probe.parts for text in part.noise.get(d, ())) for d in names}

    def estimate(candidate: Candidate) -> CostEstimate:
        if known[candidate.decision]:
            measured(known[candidate.decision], candidate.decision, candidate.format.changes)
        found = probe.over_time(candidate.decision, candidate.format)
        return CostEstimate(found.mean, found.standard_error, probe.setting.n_samples)

    settings = {
        "n_samples": str(probe.setting.n_samples),
        "n_steps": str(len(probe.parts)),
        "unused_decisions": ", ".join(sorted(d for d in known if not known[d])) or "none",
    }
    return build_table(NAME, space, candidates, estimate, settings, sees_activations=True)


def noisiest_decisions(space: SearchSpace, probe: SqnrProbe, number_format: Format, share: float) -> tuple[str, ...]:
    """The share of the decisions, at least one, whose own outputs `number_format` disturbs most, averaged over time.

    The paper corrects a tenth.
    """
    if not 0 < share <= 1:
        raise InputError(f"the share of layers must lie in 0..1 and not be 0, got {share}; 0.1 is usual")
    noise = {d.name: probe.over_time(d.name, number_format).mean for d in space.decisions}
    n = max(1, math.floor(share * len(noise) + 0.5))
    return tuple(sorted(noise, key=lambda name: -noise[name])[:n])


def measure_part(decisions: ChangedDecisions, batches: StepBatches) -> SqnrPart:
    """The part of one step, of the decisions whose changes are in memory."""
    by_layer, ratios = decisions_by_layer(decisions.changes), dict[str, list[torch.Tensor]]()
    for call, samples in batches:
        n_sets = call.output.shape[0] // len(samples)
        for n, inputs in inputs_by_samples(call, len(samples)):
            powers = _Powers(decisions.changes, n_sets, n, call.timestep)
            hooks = {layer: functools.partial(powers.add, layer, names) for layer, names in by_layer.items()}
            with torch.no_grad(), hooked(decisions.denoiser, hooks):
                decisions.denoiser(**inputs)
            for name, noise in powers.noise.items():
                ratio = noise / powers.signal[name].clamp_min(torch.finfo(torch.float64).tiny)
                ratios.setdefault(name, []).append(ratio)
    noise_of = {name: torch.cat(parts, dim=1) for name, parts in ratios.items()}
    return SqnrPart(
        batches[0][0].timestep,
        {name: dict(zip(decisions.names[name], map(_mean, found), strict=True)) for name, found in noise_of.items()},
    )


class _Powers:
    """`noise` `[F, n]` and `signal` `[n]` of the samples of one run, added up over the layers of each decision."""

    def __init__(self, changes: Mapping[str, Changes], n_sets: int, n: int, timestep: float) -> None:
        self.noise, self.signal = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        self._changes, self._n_sets, self._n, self._timestep = changes, n_sets, n, timestep

    def add(
        self,
        layer: str,
        decisions: Sequence[str],
        module: nn.Module,
        args: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> None:
        """The hook of a layer."""
        signal = self._per_sample(output.detach())
        for name in decisions:
            changes = self._changes[name]
            read = stream_of(module, args[0], changes.stream)
            noise = [self._per_sample(linear_part(module, read, delta)) for delta in changes.deltas]
            for how in changes.roundings[layer]:
                noise.append(self._per_sample(rounding_change(module, layer, args[0], how, self._timestep)))
            self.noise[name] = self.noise.get(name, 0.0) + torch.stack(noise)
            self.signal[name] = self.signal.get(name, 0.0) + signal

    def _per_sample(self, output: torch.Tensor) -> torch.Tensor:
        """Sums of squares `[n]` float64; what is the same for all samples is counted for each."""
        squares = output.double().square()
        if output.shape[0] != self._n_sets * self._n:
            return squares.sum().expand(self._n).cpu()
        return squares.flatten(1).sum(1).reshape(self._n_sets, self._n).sum(0).cpu()


def _mean(values: torch.Tensor) -> LocalNoise:
    n = values.numel()
    error = float(values.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    return LocalNoise(to_digits(float(values.mean()), _DIGITS), to_digits(error, _DIGITS))


def _price(lab: Lab, _task: Task[NoKnobs]) -> Price:
    """A trajectory of more samples, all its calls again with all formats, which are fitted in full."""
    timing = lab.time_calls(lab.seeds.search)
    n_calls = max(1.0, LEAST_SAMPLES / lab.seeds.settings.n_seeds) * timing.n_calls
    n_formats, n_passes = max(len(d.formats) for d in lab.space.decisions), len(passes(lab.space))
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
    n_random=N_RANDOM,
    price=_price,
    measure=_measure,
)
