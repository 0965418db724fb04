"""How much the outputs of a denoiser's layers repeat each other, per timestep: the matrix of network orthogonality.

For layer i, X_i `[n, p_i]` holds its output for each of n samples, flattened, and K_i = X_i X_i^T their Gram matrix,
centred on both sides. ORM(i, j) = <K_i, K_j> / (|K_i| |K_j|), between 0 and 1 (linear CKA).

Outputs are never kept: Gram matrices are added up while the denoiser runs, in float64 and in slices, those of one
timestep at a time. Where not all samples may run at once, they run in pairs of parts, which gives the same matrices. At
most the plan's batch runs at once, and at most so many samples that three of the largest output take `MEMORY_BYTES`
(an output, what is made of it, and one more), but no fewer than two.

Source:
    Ma et al. 2023, OMPQ (arXiv 2109.07865), with the centring of its code; per timestep as MPQ-Diff (arXiv
    2412.00144).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sedimo.bank import SILENT, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.measurement.hooks import hooked
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.objective import StepBatches, calls_by_step, joined_calls, rows_for, rows_of
from sedimo.measurement.parts import Parts
from sedimo.measurement.study import Study
from sedimo.measurement.trial import Execution, Setting
from sedimo.measurement.worker import setting_of
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling

ORTHOGONALITY_VERSION = 2
N_TIMESTEPS = 10
MIN_SAMPLES = 4
MEMORY_BYTES = 512 << 20  # of outputs at a time
MAX_REPLICATES = 16
_SLICE_BYTES = 32 << 20  # of an output in float64 at a time
_CONSTANT = 1e-9  # share of a layer's power that varies between samples, below which it is rounding
_DIGITS = 5
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OrthogonalityPart:
    """Of one timestep: the upper triangle of the matrix row by row, without its diagonal of ones.

    `replicates` are each layer's sum of its row without its diagonal, by leaving out one part of the samples after
    another. The entries of layers of which nothing is known are 0: `constant` ones gave the same for all samples,
    `unused` ones were not called, `unread` ones gave outputs no axis of which grows with the number of samples.
    """

    timestep: float
    upper: tuple[float, ...]
    replicates: tuple[tuple[float, ...], ...]
    constant: tuple[str, ...]
    unused: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def unknown(self) -> frozenset[str]:
        """Layers without entries."""
        return frozenset((*self.constant, *self.unused, *self.unread))


@dataclass(frozen=True, slots=True)
class OrthogonalityProbe:
    """Parts of the sampled timesteps, in the order of sampling, for `layers`; `n_samples` are behind each."""

    setting: Setting
    layers: tuple[str, ...]
    parts: tuple[OrthogonalityPart, ...]
    execution: Execution

    @property
    def n_samples(self) -> int:
        """Samples behind each matrix."""
        return len(self.setting.seeds)

    @property
    def matrices(self) -> Matrix:
        """The matrices `[T, L, L]`, ones on their diagonals."""
        n = len(self.layers)
        found = np.zeros((len(self.parts), n, n))
        rows, columns = np.triu_indices(n, 1)
        for matrix, part in zip(found, self.parts, strict=True):
            matrix[rows, columns] = part.upper
            matrix += matrix.T + np.eye(n)
        return found

    @property
    def sums(self) -> Matrix:
        """How much each layer repeats the others: its row's sum without the diagonal, `[T, L]`."""
        found: Matrix = self.matrices.sum(axis=2) - 1.0
        return found


def probe_orthogonality(
    adapter: PipelineAdapter,
    layers: Sequence[str],
    sampling: Sampling,
    *,
    weights_digest: str,
    study: Study | None = None,
    n_timesteps: int = N_TIMESTEPS,
    progress: Progress = SILENT,
) -> OrthogonalityProbe:
    """Measures the matrix of `layers` at some timesteps, uniform over one recorded trajectory.

    With a study, each timestep's part is saved when it is finished and not measured again.

    Raises:
        InputError: fewer than four samples or no timestep, or a layer whose output is not finite.
        Interrupted: the user stopped it (with a study, calling again goes on).
    """
    n, kept = len(sampling.seeds), Parts(adapter, study)
    if n < MIN_SAMPLES or n_timesteps < 1:
        raise InputError(
            f"orthogonality is measured between samples and needs at least {MIN_SAMPLES} and a timestep, got {n} "
            f"samples and {n_timesteps} timesteps"
        )
    setting = setting_of(adapter, sampling, weights_digest=weights_digest, objective="step")
    calls = calls_by_step(sampling, kept.trajectory(sampling, setting, at_most=n_timesteps).calls)
    named = {"orthogonality": ORTHOGONALITY_VERSION, "setting": setting, "layers": tuple(layers)}
    parts: list[OrthogonalityPart] = []
    progress.start(len(calls), "orthogonality of layers")
    with graceful_interrupt() as stop:
        for batches in calls:

            def measure(batches: StepBatches = batches) -> OrthogonalityPart:
                return measure_part(adapter.denoiser, layers, joined_calls(batches), n, sampling.batch_size)

            key = content_key({**named, "call": batches[0][0].step})
            parts.append(kept.part(OrthogonalityPart, key, measure))
            progress.advance(1)
            kept.check(stop)
    progress.done()
    return OrthogonalityProbe(setting, tuple(layers), tuple(parts), kept.execution)


def measure_part(
    denoiser: nn.Module, layers: Sequence[str], call: DenoiserCall, n_samples: int, batch_size: int = 64
) -> OrthogonalityPart:
    """The part of one recorded call, whose row r belongs to sample r mod `n_samples`; `batch_size` run at once.

    Raises:
        InputError: a layer whose output is not finite.
    """
    n_sets = call.output.shape[0] // n_samples

    def run(samples: torch.Tensor, hook: Callable[..., None]) -> None:
        rows = rows_for(samples, n_samples, n_sets)
        with torch.no_grad(), hooked(denoiser, {name: functools.partial(hook, name) for name in layers}):
            denoiser(**rows_of(call, rows.to(call.output.device)))

    alone = _Shapes()
    run(torch.arange(1), alone.add)
    grams = _Grams(n_samples, n_sets, alone.found)
    for samples in sample_runs(n_samples, max(2, min(batch_size, MEMORY_BYTES // max(1, 3 * alone.most_bytes)))):
        grams.begin(samples)
        run(samples, grams.add)
    for name, gram in grams.found.items():
        if not np.isfinite(gram).all():
            raise InputError(
                f"the output of layer {name!r} is not finite at timestep {call.timestep:g}, so it cannot be compared "
                "with others; compute in a wider dtype (--dtype fp32), or leave the layer out of the space"
            )
    centred = {name: _centred(gram) for name, gram in grams.found.items() if name not in grams.unread}
    called = set(alone.found)
    return _part(
        call.timestep,
        [centred.get(name) for name in layers],
        layers,
        n_samples,
        unused=tuple(name for name in layers if name not in called),
        unread=tuple(name for name in layers if name in grams.unread),
    )


def orthogonality(grams: Sequence[Matrix | None]) -> Matrix:
    """ORM `[L, L]` of centred Gram matrices `[n, n]`; rows and columns of None are 0, the diagonal is 1."""
    n = max((len(g) for g in grams if g is not None), default=1)
    flat = np.stack([np.zeros(n * n) if g is None else g.ravel() / np.linalg.norm(g) for g in grams])
    found: Matrix = np.clip(flat @ flat.T, 0.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found


class _Shapes:
    """The shapes of each layer's outputs, call by call, when one sample runs; `most_bytes` has the largest [bytes]."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, ...]]] = {}
        self.most_bytes = 0

    def add(self, name: str, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        """The hook of a layer."""
        self.found.setdefault(name, []).append(tuple(output.shape))
        self.most_bytes = max(self.most_bytes, output.nbytes)


class _Grams:
    """Adds up the Gram matrix of each layer's outputs, pair of samples by pair of samples.

    `alone` are the shapes of outputs for one sample: the axis that is as many times longer as there are samples holds
    them, `n_sets` times, one after the other, each with the rows into which a denoiser may have folded others.
    """

    def __init__(self, n_samples: int, n_sets: int, alone: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
        self.found = {name: np.zeros((n_samples, n_samples)) for name in alone}
        self.unread: set[str] = set()
        self._n_sets, self._alone = n_sets, alone
        self._done = np.zeros((n_samples, n_samples), dtype=bool)

    def begin(self, samples: torch.Tensor) -> None:
        """Tells which samples the next run is of."""
        where = samples.numpy()
        self._place = np.ix_(where, where)
        self._wanted = ~self._done[self._place]
        self._done[self._place] = True
        self._calls = {name: iter(shapes) for name, shapes in self._alone.items()}

    def add(self, name: str, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        """The hook of a layer."""
        n_units, alone = len(self._wanted), next(self._calls.get(name, iter(())), ())
        if alone == output.shape:
            return  # the same for all samples
        axis = _grown_axis(alone, output.shape, n_units)
        if axis is None:
            self.unread.add(name)
            return
        units = output.detach().movedim(axis, 0).reshape(self._n_sets, n_units, -1)
        total = sum(_gram(rows) for rows in units)
        self.found[name][self._place] += np.where(self._wanted, np.asarray(total), 0.0)


def _grown_axis(alone: Sequence[int], shape: Sequence[int], times: int) -> int | None:
    """The one axis that is so many times longer."""
    if len(alone) != len(shape):
        return None
    differing = [axis for axis, (one, many) in enumerate(zip(alone, shape, strict=True)) if one != many]
    return differing[0] if len(differing) == 1 and shape[differing[0]] == times * alone[differing[0]] else None


def _gram(rows: torch.Tensor) -> Matrix:
    """X X^T of `[n, p]` in float64, a slice of features at a time."""
    step = max(1, _SLICE_BYTES // (8 * rows.shape[0]))
    found = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    for first in range(0, rows.shape[1], step):
        part = rows[:, first : first + step].double()
        found += part @ part.T
    plain: Matrix = found.cpu().numpy()
    return plain


def sample_runs(n_samples: int, at_once: int) -> Iterator[torch.Tensor]:
    """Samples of each run, such that every pair of samples meets in one."""
    if n_samples <= at_once:
        yield torch.arange(n_samples)
        return
    step = at_once // 2
    parts = [torch.arange(first, min(first + step, n_samples)) for first in range(0, n_samples, step)]
    for one, other in itertools.combinations(parts, 2):
        yield torch.cat([one, other])


def _centred(gram: Matrix) -> Matrix | None:
    """H K H with H = I - 1/n, also of a part of a centred matrix; None where samples do not differ."""
    rows = gram - gram.mean(axis=0, keepdims=True)
    found: Matrix = rows - rows.mean(axis=1, keepdims=True)
    return None if np.trace(found) <= _CONSTANT * np.trace(gram) else found


def _part(
    timestep: float,
    grams: Sequence[Matrix | None],
    layers: Sequence[str],
    n_samples: int,
    *,
    unused: tuple[str, ...],
    unread: tuple[str, ...],
) -> OrthogonalityPart:
    matrix = orthogonality(grams)
    constant = {name for name, gram in zip(layers, grams, strict=True) if gram is None} - {*unused, *unread}
    return OrthogonalityPart(
        timestep,
        tuple(_rounded(v) for v in matrix[np.triu_indices(len(layers), 1)]),
        tuple(tuple(_rounded(v) for v in sums) for sums in _replicates(grams, n_samples)),
        tuple(name for name in layers if name in constant),
        unused,
        unread,
    )


def _replicates(grams: Sequence[Matrix | None], n_samples: int) -> Iterator[Matrix]:
    """Sums of the rows without some samples, `[L]` each; the samples left out are another part each time."""
    for left_out in np.array_split(np.arange(n_samples), min(n_samples, MAX_REPLICATES)):
        kept = np.setdiff1d(np.arange(n_samples), left_out)
        smaller = [None if g is None else _centred(g[np.ix_(kept, kept)]) for g in grams]
        yield orthogonality(smaller).sum(axis=1) - 1.0


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
