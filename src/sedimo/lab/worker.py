"""A pipeline, its bank and a reference: what turns a recipe into a trial."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata

import torch

from sedimo.bank import Bank
from sedimo.lab.exchange import Prober
from sedimo.lab.objective import Reference, measure, measure_reference
from sedimo.lab.trial import Execution, ObjectiveName, Setting, Trial
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.pipelines.zoo import feature_extractor
from sedimo.space import Recipe

References = dict[tuple[ObjectiveName, Sampling], Reference]


def setting_of(
    adapter: PipelineAdapter, sampling: Sampling, *, weights_digest: str, objective: ObjectiveName = "final_latents"
) -> Setting:
    """The setting that names the trials of a pipeline under a sampling plan."""
    parameter = next(adapter.denoiser.parameters())
    return Setting(
        weights_digest=weights_digest,
        pipeline=adapter.identity,
        objective=objective,
        seeds=sampling.seeds,
        n_steps=sampling.n_steps,
        conditions=sampling.conditions,
        guidance=sampling.guidance,
        resolution=sampling.resolution,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
        extractor=feature_extractor()[0] if objective == "fid" else None,
    )


class TrialWorker:
    """Measures recipes on one pipeline. The reference is sampled when the first one comes.

    Workers whose denoisers are the same function at full precision may share the `references` that were sampled.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        bank: Bank,
        sampling: Sampling,
        *,
        objective: ObjectiveName,
        references: References | None = None,
    ) -> None:
        self._adapter, self._sampling = adapter, sampling
        self.setting = setting_of(adapter, sampling, weights_digest=bank.digest, objective=objective)
        self._prober = Prober(adapter.denoiser, bank.quantize, bank.input_quantizers)
        self._references: References = {} if references is None else references

    @property
    def reference(self) -> Reference:
        """What the full-precision pipeline gives."""
        wanted = (self.setting.objective, self._sampling)
        if wanted not in self._references:
            self._prober.restore()
            self._references[wanted] = measure_reference(self.setting.objective, self._adapter, self._sampling)
        return self._references[wanted]

    def measure(self, recipe: Recipe) -> Trial:
        """The trial of a recipe."""
        reference = self.reference
        begin = time.perf_counter()
        self._prober.switch(recipe)
        found = measure(self._adapter, reference)
        execution = Execution(
            seconds=time.perf_counter() - begin,
            n_calls=reference.n_calls,
            threads=torch.get_num_threads(),
            versions=versions(),
        )
        return Trial(self.setting, recipe, found.powers, execution, found.measures)

    def close(self) -> None:
        """Gives the denoiser back at full precision."""
        self._prober.restore()


@dataclass(frozen=True, slots=True)
class CallTiming:
    """How long a denoiser call of the plan's batch takes, scheduler included [s], and how many a run has."""

    seconds_per_call: float
    n_calls: int


def time_calls(adapter: PipelineAdapter, sampling: Sampling) -> CallTiming:
    """Times two steps of the first batch, after a first step that warms up."""
    n_steps = min(2, sampling.n_steps)
    first = replace(sampling, seeds=sampling.seeds[: sampling.batch_size], n_steps=n_steps)
    adapter.sample(replace(first, n_steps=1))
    counted: list[int] = []
    begin = time.perf_counter()
    adapter.sample(first, observer=lambda call: counted.append(call.step))
    seconds = (time.perf_counter() - begin) / max(1, len(counted))
    return CallTiming(seconds, round(len(counted) / n_steps * sampling.n_steps) * sampling.n_batches)


def versions() -> Mapping[str, str]:
    """Versions of what computes numbers."""
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in ("torch", "diffusers", "numpy")}}
