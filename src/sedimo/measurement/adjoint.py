"""The first-order effect of each format of each decision on the final latents, through the whole sampling run.

For a sample with final latents x and a random u ~ N(0, I), let G be the gradient of <u, x> / ||x|| with respect to a
weight, through all steps, guidance, and the sampler's own arithmetic. A change dW moves the final latents by J dW, and
the mean over u of <G, dW>^2 is ||J dW||^2 / ||x||^2: the relative noise of the final latents, to first order.

What an error does at different steps is added before it is squared, as the sampler does. The looks of one step alone
(see `jacobian.py`) miss that: an error that is the same at every step and every token, such as that of a timestep
embedder, hardly moves one step's output, and pushes the final latents in one direction, step after step.

The products <G, dW> are kept with their signs. The effect of a whole recipe is the sum of the effects of its decisions,
so its noise is the mean square of the sum of their products; where errors of layers point the same way, that is more
than the sum of their squares.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.jacobian import refuse_hidden_use
from sedimo.measurement.objective import rows_for, rows_of
from sedimo.measurement.parts import Parts
from sedimo.measurement.passes import (
    MEMORY_BYTES,
    change_names,
    input_roundings,
    passes,
    weight_changes,
)
from sedimo.measurement.study import Study
from sedimo.measurement.taps import Changes, InputChangedError, Taps
from sedimo.measurement.trial import Execution, Setting
from sedimo.measurement.worker import setting_of
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.pipelines.differentiable import CutCall, DifferentiableRun, Tensors, make_again, pull_through

logger = logging.getLogger(__name__)

ADJOINT_VERSION = 1
_DIGITS = 7

Products = Mapping[str, Mapping[str, tuple[float, ...]]]


class DifferentiableAdapter(PipelineAdapter, Protocol):
    """A pipeline whose sampling runs can be differentiated."""

    def differentiable(self, sampling: Sampling) -> DifferentiableRun:
        """The samples of a plan as one batch, with what it takes to differentiate their final latents."""


@dataclass(frozen=True, slots=True)
class AdjointOptions:
    """How precisely, and in how much memory; as `JacobianOptions`, the directions being those of final latents."""

    n_directions: int = 4
    seed: int = 0
    memory_bytes: int = MEMORY_BYTES
    max_rows: int = 64


@dataclass(frozen=True, slots=True)
class AdjointPart:
    """Of one batch of n samples: the products by decision and change, `[n * directions]`; `unused` decisions.

    Those of a sample follow one another.
    """

    products: Products
    unused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdjointProbe:
    """Signed first-order effects on the final latents, by decision and change (`uaq4`, `a8`), `[n * directions]`.

    Each number is the product of the gradient of one sample in one random direction with what the change does, relative
    to the norm of the sample's final latents; those of a sample follow one another. Their mean square is the relative
    noise of the change. `unused` decisions were never called; their products are 0.
    """

    setting: Setting
    n_directions: int
    seed: int
    products: Products
    unused: tuple[str, ...]
    execution: Execution

    @property
    def n_samples(self) -> int:
        """Samples behind the numbers."""
        return len(self.setting.seeds)

    def vectors(self, decision: str, changes: Sequence[str]) -> npt.NDArray[np.float64]:
        """What several changes of a decision do together, `[n, directions]`.

        Raises:
            InputError: the probe does not know one of them.
        """
        known = self.products.get(decision, {})
        missing = [name for name in changes if name not in known]
        if missing:
            raise InputError(f"the probe has no {decision} at {missing[0]}; measure it again for this space")
        total = np.sum([known[name] for name in changes], axis=0) if changes else np.zeros(1)
        return np.broadcast_to(total, self.n_samples * self.n_directions).reshape(self.n_samples, self.n_directions)


def probe_adjoint(
    adapter: DifferentiableAdapter,
    bank: Bank,
    sampling: Sampling,
    *,
    study: Study | None = None,
    options: AdjointOptions | None = None,
    progress: Progress = SILENT,
) -> AdjointProbe:
    """Measures all decisions and formats of the bank on the sampling runs of a plan.

    With a study, each batch's part is saved when it is finished and not measured again.

    Raises:
        InputError: final latents that are zero or not finite.
        Interrupted: the user stopped it (with a study, calling again goes on).
        UnsupportedError: the sampler has no derivative, or a weight is used without calling its layer.
    """
    options, kept = options or AdjointOptions(), Parts(adapter, study)
    setting = setting_of(adapter, sampling, weights_digest=bank.digest, objective="final_latents")
    groups = [_Pass(adapter, bank, decisions, options) for decisions in passes(bank.space, options.memory_bytes)]
    found: dict[str, dict[str, list[float]]] = {}
    used: set[str] = set()
    progress.start(len(groups) * sampling.n_batches, "first-order noise on the final latents")
    with graceful_interrupt() as stop:
        for batch in sampling.batches():
            run = functools.cache(functools.partial(adapter.differentiable, batch))
            own = setting_of(adapter, batch, weights_digest=bank.digest, objective="final_latents")
            for one in groups:
                measure = functools.partial(one.measure, run, batch)
                part = kept.part(AdjointPart, one.key(own), measure)
                for decision, changes in part.products.items():
                    for name, values in changes.items():
                        found.setdefault(decision, {}).setdefault(name, []).extend(values)
                used |= part.products.keys() - set(part.unused)
                progress.advance(1)
                kept.check(stop)
    progress.done()
    products = {d: {name: tuple(values) for name, values in changes.items()} for d, changes in found.items()}
    unused = tuple(sorted(products.keys() - used))
    return AdjointProbe(setting, options.n_directions, options.seed, products, unused, kept.execution)


class _MixedError(StateError):
    """A layer's rows do not tell samples apart; one sample at a time helps."""


class _Pass:
    """The decisions whose weight changes are in memory together; they are loaded when first needed."""

    def __init__(
        self, adapter: DifferentiableAdapter, bank: Bank, decisions: Sequence[str], options: AdjointOptions
    ) -> None:
        self._denoiser, self._bank, self._options = adapter.denoiser, bank, options
        self.changes = {d: change_names(bank.space, d) for d in decisions}
        self._loaded: dict[str, Changes] | None = None
        self._copies_inputs, self._max_rows = False, options.max_rows

    def key(self, setting: Setting) -> str:
        return content_key(
            {
                "adjoint": ADJOINT_VERSION,
                "setting": setting,
                "n_directions": self._options.n_directions,
                "seed": self._options.seed,
                "formats": self.changes,
            }
        )

    def measure(self, run: Callable[[], DifferentiableRun], batch: Sampling) -> AdjointPart:
        """The part of one batch."""
        try:
            return self._measured(run(), batch)
        except InputChangedError as error:
            logger.info("%s; inputs are copied from now on", error)
            self._copies_inputs = True
        except _MixedError as error:
            logger.info("%s; one sample at a time from now on", error)
            self._max_rows = 1
        return self.measure(run, batch)

    def _measured(self, run: DifferentiableRun, batch: Sampling) -> AdjointPart:
        if self._loaded is None:
            self._loaded = {d: self._load(d) for d in self.changes}
        directions = [_directions(run.latents, batch, n, self._options.seed) for n in range(self._options.n_directions)]
        with Taps(self._denoiser, self._loaded, copy_inputs=self._copies_inputs) as taps:
            walk = _Walk(taps, self._denoiser, len(batch.seeds), self._max_rows)
            run.walk_back(directions, walk.handle)
        unused = tuple(d for d in self.changes if d not in walk.used)
        first = next(cut.call for cut in run.cuts if cut.network is self._denoiser)
        refuse_hidden_use(self._denoiser, first, [layer for d in unused for layer in self._loaded[d].layers])
        boost = math.sqrt(run.latents[0].numel())
        found = {}
        for decision, names in self.changes.items():
            values = walk.totals.get(decision, np.zeros((len(directions), len(batch.seeds), len(names)))) / boost
            columns = values.transpose(2, 1, 0).reshape(len(names), -1)  # [changes, n * directions]
            found[decision] = {n: tuple(_rounded(v) for v in c.tolist()) for n, c in zip(names, columns, strict=True)}
        return AdjointPart(found, unused)

    def _load(self, decision: str) -> Changes:
        deltas = weight_changes(self._bank, self._denoiser, decision)
        known = self._bank.space.decision_index[decision]
        return Changes(known.layers, deltas.flatten(2), input_roundings(self._bank, known), known.stream)


class _Walk:
    """What is collected on the way back through a run: products `[directions, n, changes]` by decision."""

    def __init__(self, taps: Taps, denoiser: torch.nn.Module, n_samples: int, max_rows: int) -> None:
        self._taps, self._denoiser, self._n, self._max_rows = taps, denoiser, n_samples, max_rows
        self.totals: dict[str, npt.NDArray[np.float64]] = {}
        self.used: set[str] = set()

    def handle(self, cut: CutCall, gradients: Sequence[Tensors]) -> Sequence[Tensors]:
        """Makes a call of the denoiser again, some samples at a time, and adds the products of its layers."""
        if cut.network is not self._denoiser:
            return pull_through(cut, gradients)
        n_rows = len(cut.call.output)
        if n_rows % self._n:
            raise StateError(f"a call of {n_rows} rows does not fit a batch of {self._n} samples")
        answers: list[Tensors] = [[None] * len(cut.places) for _ in gradients]
        step = max(1, self._max_rows * self._n // n_rows)
        for first in range(0, self._n, step):
            units = torch.arange(first, min(first + step, self._n), device=cut.call.output.device)
            rows = rows_for(units, self._n, n_rows // self._n)
            self._taps.begin(cut.call.output.device, cut.call.timestep)
            outputs, entries = make_again(cut, rows_of(cut.call, rows))
            self.used.update(self._taps.used)
            for number, one in enumerate(gradients):
                given = [None if g is None else _of_rows(g, rows, n_rows) for g in one]
                products, found = self._taps.products(outputs, given, n_samples=len(units), entries=entries)
                self._add(products, units, number, len(gradients))
                for place, part in enumerate(found):
                    if part is not None:
                        answers[number][place] = _joined(answers[number][place], part, cut.entries[place], rows, n_rows)
        return answers

    def _add(self, products: Mapping[str, torch.Tensor], units: torch.Tensor, number: int, n_directions: int) -> None:
        for decision, values in products.items():
            if len(values) != len(units):
                raise _MixedError(f"rows of {decision} belong to several samples")
            shape = (n_directions, self._n, values.shape[1])
            total = self.totals.setdefault(decision, np.zeros(shape))
            total[number, units.cpu().numpy()] += values.cpu().numpy()


def _of_rows(gradient: torch.Tensor, rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    return gradient[rows] if gradient.ndim and len(gradient) == n_rows else gradient


def _joined(
    before: torch.Tensor | None, part: torch.Tensor, entry: torch.Tensor, rows: torch.Tensor, n_rows: int
) -> torch.Tensor:
    """The gradient of a whole input from those of some rows; parts of an input without rows are added."""
    total = torch.zeros_like(entry) if before is None else before
    if entry.ndim and len(entry) == n_rows:
        total[rows] += part
    else:
        total += part
    return total


def _directions(latents: torch.Tensor, batch: Sampling, number: int, seed: int) -> torch.Tensor:
    """Random u on the final latents of each sample, divided by their root mean square, `[B, ...]`.

    That keeps gradients near 1, within the range of half precision; a sample's u does not depend on its batch.
    """
    plain = latents.detach().float()
    levels = plain.flatten(1).square().mean(1).sqrt()
    wrong = levels[~(levels > 0) | levels.isinf()]
    if len(wrong):
        raise InputError(
            f"noise is measured beside the final latents, whose norm must be positive and finite, but a sample has a "
            f"root mean square of {float(wrong[0]):g}. Repair the checkpoint, or take a method that does not "
            "sample: error"
        )
    drawn = []
    for sample_seed in batch.seeds:
        words = f"sedimo adjoint {seed} {sample_seed} {number}"
        generator = torch.Generator().manual_seed(int(content_key(words)[:12], 16))
        drawn.append(torch.randn(plain.shape[1:], generator=generator))
    directions = torch.stack(drawn).to(plain.device) / levels.reshape(-1, *[1] * (plain.ndim - 1))
    return directions.to(latents.dtype)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
