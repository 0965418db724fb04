"""The first-order noise that each format of each decision puts on the denoiser's output, ||J dW||^2.

For sample s, step t and a random u ~ N(0, I) on the output, let G be the gradient of <u, output> with respect to
a weight, for that sample alone. The mean over u of <G, dW>^2 is exactly ||J dW||^2, so the squared inner products
are averaged over steps and a few u. All decisions and formats come from one recorded trajectory.

Where guidance computes a sample in several rows, u is put on the prediction that the scheduler makes of them, if the
trajectory shows how (see `guidance.py`). Else, and without `combine_rows`, each row counts as a sample of its own,
relative to the power of its own output, and a sample's value is the mean over its rows.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError, UnsupportedError
from sedimo.measurement.guidance import find_row_weights
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.objective import batches_of, rows_for, rows_of
from sedimo.measurement.parts import Parts
from sedimo.measurement.passes import MEMORY_BYTES, change_names, input_roundings, passes, weight_changes
from sedimo.measurement.study import Study
from sedimo.measurement.taps import Changes, InputChangedError, Taps
from sedimo.measurement.trial import Execution, Setting
from sedimo.measurement.worker import setting_of
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import output_tensor
from sedimo.space import SearchSpace

logger = logging.getLogger(__name__)

JACOBIAN_VERSION = 1
_DIGITS = 8
Noise = Mapping[str, Mapping[str, tuple[float, ...]]]


@dataclass(frozen=True, slots=True)
class JacobianOptions:
    """How precisely, and in how much memory.

    `n_directions` random directions per call from `seed`; weight changes of as many decisions at a time as fit in
    `memory_bytes`; `max_rows` of a call at a time. `combine_rows` looks at guided rows as the
    sampler does, together; else each counts for itself.
    """

    n_directions: int = 4
    seed: int = 0
    memory_bytes: int = MEMORY_BYTES
    max_rows: int = 64
    combine_rows: bool = True


@dataclass(frozen=True, slots=True)
class JacobianPart:
    """Of one recorded call: relative noise of its samples by decision and format text; `unused` decisions."""

    noise: Noise
    unused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JacobianProbe:
    """Relative noise power per sample, averaged over steps and directions, by decision and format text.

    `unused` decisions were never called by the denoiser on this trajectory; their noise is 0. `row_weights` say how
    a sample's rows were combined; `(1.0,)` when each counted for itself.
    """

    setting: Setting
    n_directions: int
    seed: int
    row_weights: tuple[float, ...]
    noise: Noise
    unused: tuple[str, ...]
    execution: Execution


def probe_jacobian(
    adapter: PipelineAdapter,
    bank: Bank,
    sampling: Sampling,
    *,
    study: Study | None = None,
    options: JacobianOptions | None = None,
    progress: Progress = SILENT,
) -> JacobianProbe:
    """Measures all decisions and formats of the bank on one recorded trajectory.

    With a study, each call's part is saved when it is finished and not measured again.

    Raises:
        InputError: an output that is zero or not finite.
        Interrupted: the user stopped it (with a study, calling again goes on).
        UnsupportedError: a weight is used in a way that hooks on its layer do not see.
    """
    options, kept = options or JacobianOptions(), Parts(adapter, study)
    setting = setting_of(adapter, sampling, weights_digest=bank.digest, objective="step")
    trajectory = kept.trajectory(sampling, setting)
    calls = tuple(batches_of(sampling, trajectory.calls))
    weights = (find_row_weights(trajectory) if options.combine_rows else None) or (1.0,)
    groups = passes(bank.space, options.memory_bytes)
    totals = _Totals(len(sampling.seeds))
    progress.start(len(groups) * len(calls), "first-order noise")
    with graceful_interrupt() as stop:
        for decisions in groups:
            work = _Pass(adapter.denoiser, bank, decisions, (options, weights))
            for index, (call, samples) in enumerate(calls):
                measure = functools.partial(work.measure, call, index, len(samples))
                totals.add(kept.part(JacobianPart, work.key(setting, index), measure), samples)
                progress.advance(1)
                kept.check(stop)
    progress.done()
    how = (options.n_directions, options.seed, weights)
    return JacobianProbe(setting, *how, totals.noise(), totals.unused, kept.execution)


def count_passes(space: SearchSpace, options: JacobianOptions | None = None) -> int:
    """How often the trajectory is gone through because weight changes do not fit in memory at once."""
    return len(passes(space, (options or JacobianOptions()).memory_bytes))


class _Pass:
    """The decisions whose weight changes are in memory together; they are loaded when first needed."""

    def __init__(
        self,
        denoiser: nn.Module,
        bank: Bank,
        decisions: Sequence[str],
        how: tuple[JacobianOptions, tuple[float, ...]],
    ) -> None:
        self.denoiser, (self.options, self._weights) = denoiser, how
        self.formats = {d: change_names(bank.space, d) for d in decisions}
        self._bank = bank
        self._changes: dict[str, Changes] | None = None
        self._copies_inputs = False

    def key(self, setting: Setting, index: int) -> str:
        return content_key(
            {
                "jacobian": JACOBIAN_VERSION,
                "setting": setting,
                "call": index,
                "n_directions": self.options.n_directions,
                "seed": self.options.seed,
                **({} if self._weights == (1.0,) else {"row_weights": [f"{w:.3f}" for w in self._weights]}),
                "formats": self.formats,
            }
        )

    def measure(self, call: DenoiserCall, index: int, n_samples: int) -> JacobianPart:
        """The part of one call."""
        plan = _RowPlan(call, self._weights)
        directions = _directions(plan, index, self.options)
        try:
            squares, unused = self._squares(plan, directions)
        except InputChangedError as error:
            logger.info("%s; inputs are copied from now on", error)
            self._copies_inputs = True
            squares, unused = self._squares(plan, directions)
        noise = {}
        for decision, formats in self.formats.items():
            found = squares.get(decision, torch.zeros(plan.n_units, len(formats), dtype=torch.float64))
            means = found.reshape(-1, n_samples, len(formats)).mean(0).T.tolist()
            noise[decision] = {f: tuple(_rounded(v) for v in m) for f, m in zip(formats, means, strict=True)}
        return JacobianPart(noise, unused)

    def _squares(
        self, plan: _RowPlan, directions: Sequence[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        """Mean over directions of the squared inner products, `[units, F]` by decision."""
        found: dict[str, list[torch.Tensor]] = {}
        unused: tuple[str, ...] = ()
        if self._changes is None:
            self._changes = {d: self._loaded(d) for d in self.formats}
        with Taps(self.denoiser, self._changes, copy_inputs=self._copies_inputs) as taps:
            for units in plan.slices(self.options.max_rows):
                taps.begin(plan.call.output.device, plan.call.timestep)
                rows = plan.rows(units)
                with torch.enable_grad():
                    output = output_tensor(self.denoiser(**rows_of(plan.call, rows)))
                unused = taps.unused
                for decision, squares in _mean_squares(taps, output, [d[rows] for d in directions], len(units)).items():
                    found.setdefault(decision, []).append(squares)
        refuse_hidden_use(self.denoiser, plan.call, [layer for d in unused for layer in self._changes[d].layers])
        return {d: torch.cat(parts) for d, parts in found.items()}, unused

    def _loaded(self, decision: str) -> Changes:
        deltas = weight_changes(self._bank, self.denoiser, decision)
        known = self._bank.space.decision_index[decision]
        return Changes(known.layers, deltas.flatten(2), input_roundings(self._bank, known), known.stream)


class _RowPlan:
    """Which rows of a call are measured together: the units are samples, or rows when they stay apart."""

    def __init__(self, call: DenoiserCall, weights: tuple[float, ...]) -> None:
        self.call, self.weights = call, weights
        self.n_units = call.output.shape[0] // len(weights)

    def slices(self, max_rows: int) -> list[range]:
        """Units at a time."""
        step = max(1, max_rows // len(self.weights))
        return [range(i, min(i + step, self.n_units)) for i in range(0, self.n_units, step)]

    def rows(self, units: range) -> torch.Tensor:
        """Positions of the rows of some units, first rows first."""
        first = torch.arange(units.start, units.stop, device=self.call.output.device)
        return rows_for(first, self.n_units, len(self.weights))

    def combined(self) -> torch.Tensor:
        """The prediction of each unit, float32 `[units, ...]`."""
        rows = self.call.output.float().reshape(len(self.weights), self.n_units, *self.call.output.shape[1:])
        return torch.einsum("k,ku...->u...", torch.tensor(self.weights, device=rows.device), rows)

    def spread(self, direction: torch.Tensor) -> torch.Tensor:
        """A direction on the predictions as one on the rows."""
        return torch.cat([weight * direction for weight in self.weights])


class _Totals:
    """Sums of parts over calls, by decision and format."""

    def __init__(self, n_samples: int) -> None:
        self._n_samples = n_samples
        self._sums: dict[tuple[str, str], np.ndarray] = {}
        self._counts: dict[tuple[str, str], np.ndarray] = {}
        self._used: set[str] = set()

    def add(self, part: JacobianPart, samples: range) -> None:
        for decision, formats in part.noise.items():
            for text, values in formats.items():
                key = (decision, text)
                sums = self._sums.setdefault(key, np.zeros(self._n_samples))
                counts = self._counts.setdefault(key, np.zeros(self._n_samples))
                sums[samples.start : samples.stop] += values
                counts[samples.start : samples.stop] += 1
        self._used |= part.noise.keys() - set(part.unused)

    def noise(self) -> dict[str, dict[str, tuple[float, ...]]]:
        found: dict[str, dict[str, tuple[float, ...]]] = {}
        for (decision, text), sums in self._sums.items():
            found.setdefault(decision, {})[text] = tuple((sums / self._counts[decision, text]).tolist())
        return found

    @property
    def unused(self) -> tuple[str, ...]:
        return tuple(sorted({d for d, _ in self._sums} - self._used))


def _directions(plan: _RowPlan, index: int, options: JacobianOptions) -> list[torch.Tensor]:
    """Random u on the predictions, divided by their norms and spread over the rows, `[R, ...]` each."""
    prediction = plan.combined()
    norms = prediction.flatten(1).norm(dim=1)
    wrong = norms[~(norms > 0) | norms.isinf()]
    if len(wrong):
        raise InputError(
            f"noise is measured beside the output, whose norm must be positive and finite, but at timestep "
            f"{plan.call.timestep:g} it is {float(wrong[0]):g} for a sample. Repair "
            "the checkpoint, or take a method that does not look at the output: error, or sqnr"
        )
    found = []
    for number in range(options.n_directions):
        words = f"sedimo direction {options.seed} {index} {number}"
        generator = torch.Generator().manual_seed(int(content_key(words)[:12], 16))
        direction = torch.randn(prediction.shape, generator=generator).to(prediction.device)
        found.append(plan.spread(direction / norms.reshape(-1, *[1] * (prediction.ndim - 1))))
    return found


def _mean_squares(
    taps: Taps, output: torch.Tensor, directions: Sequence[torch.Tensor], n_units: int
) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    boost = output[0].numel() ** 0.5  # keeps gradients near 1, within the range of half precision
    for direction in directions:
        for decision, squares in taps.squared_products(
            output, (direction * boost).to(output.dtype), n_samples=n_units
        ).items():
            mean = squares.cpu() / (output[0].numel() * len(directions))
            total[decision] = total[decision] + mean if decision in total else mean
    return total


def refuse_hidden_use(denoiser: nn.Module, call: DenoiserCall, layers: Sequence[str]) -> None:
    """Layers that were not called must have no influence: their weights must get no gradient."""
    if not layers:
        return
    weights = [denoiser.get_submodule(layer).get_parameter("weight") for layer in layers]
    first = rows_of(call, torch.arange(1, device=call.output.device))
    wanting = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            output = output_tensor(denoiser(**first))
            if not output.requires_grad:
                return
            gradients = torch.autograd.grad(output.sum(), weights, allow_unused=True)
    finally:
        for weight, before in zip(weights, wanting, strict=True):
            weight.requires_grad_(before)
    hidden = [layer for layer, gradient in zip(layers, gradients, strict=True) if gradient is not None]
    if hidden:
        raise UnsupportedError(
            f"the weight of layer {hidden[0]!r} is used without calling the layer, so its first-order noise cannot "
            "be measured. Use method='ablation' or 'error', or leave the layer out of the space."
        )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
