"""How much the outputs of a denoiser's layers repeat each other, per timestep: the matrix of network orthogonality.

For layer i, X_i `[n, p_i]` holds its output for each of n samples, flattened, and K_i = X_i X_i^T their Gram matrix,
centred on both sides. ORM(i, j) = <K_i, K_j> / (|K_i| |K_j|), between 0 and 1 (linear CKA). Gram matrices are taken
while the denoiser runs, in float64 and in slices; outputs are never kept, and one timestep's matrices at a time are
in memory. Where not all samples fit at once, they are run in pairs of parts, which gives the same matrices.

Source:
    Ma et al. 2023, OMPQ (arXiv 2109.07865), with the centring of its code; per timestep as MPQ-Diff (arXiv
    2412.00144).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sedimo.bank import SILENT, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.measurement.hooks import hooked
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.objective import rows_of
from sedimo.measurement.parts import Parts
from sedimo.measurement.study import Study
from sedimo.measurement.trial import Execution, Setting
from sedimo.measurement.worker import setting_of
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling

ORTHOGONALITY_VERSION = 1
MIN_SAMPLES = 4
MAX_REPLICATES = 16
_SLICE_BYTES = 32 << 20  # of an output in float64 at a time
_CONSTANT = 1e-9  # share of a layer's power that varies between samples, below which it is rounding
_DIGITS = 5
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OrthogonalityOptions:
    """At how many timesteps, uniform over the trajectory, and how many rows the denoiser gets at a time."""

    n_timesteps: int = 10
    max_rows: int = 64

    def __post_init__(self) -> None:
        """Refuses numbers that measure nothing."""
        if self.n_timesteps < 1 or self.max_rows < 4:
            raise InputError(
                f"orthogonality needs a timestep and at least 4 rows at a time, got {self.n_timesteps}, {self.max_rows}"
            )


@dataclass(frozen=True, slots=True)
class OrthogonalityPart:
    """Of one timestep: the upper triangle of the matrix row by row, without its diagonal of ones.

    `replicates` are each layer's sum of its row without its diagonal, by leaving out one part of the samples after
    another. `constant` layers gave the same for all samples; their entries are 0.
    """

    timestep: float
    upper: tuple[float, ...]
    replicates: tuple[tuple[float, ...], ...]
    constant: tuple[str, ...]


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
    options: OrthogonalityOptions | None = None,
    progress: Progress = SILENT,
) -> OrthogonalityProbe:
    """Measures the matrix of `layers` at some timesteps of one recorded trajectory.

    With a study, each timestep's part is saved when it is finished and not measured again.

    Raises:
        InputError: fewer than four samples.
        Interrupted: the user stopped it (with a study, calling again goes on).
    """
    options, kept, n = options or OrthogonalityOptions(), Parts(adapter, study), len(sampling.seeds)
    if n < MIN_SAMPLES:
        raise InputError(f"orthogonality is measured between samples and needs at least {MIN_SAMPLES}, got {n}")
    setting = setting_of(adapter, sampling, weights_digest=weights_digest, objective="step")
    calls = kept.trajectory(replace(sampling, batch_size=n), setting).calls
    chosen = sorted({round(i) for i in np.linspace(0, len(calls) - 1, min(options.n_timesteps, len(calls)))})
    named = {"orthogonality": ORTHOGONALITY_VERSION, "setting": setting, "layers": tuple(layers)}

    def part(index: int) -> OrthogonalityPart:
        def measure() -> OrthogonalityPart:
            return measure_part(adapter.denoiser, layers, calls[index], n, options.max_rows)

        return kept.part(OrthogonalityPart, content_key({**named, "call": index}), measure)

    parts: list[OrthogonalityPart] = []
    progress.start(len(chosen), "orthogonality of layers")
    with graceful_interrupt() as stop:
        for index in chosen:
            parts.append(part(index))
            progress.advance(1)
            kept.check(stop)
    progress.done()
    return OrthogonalityProbe(setting, tuple(layers), tuple(parts), kept.execution)


def measure_part(
    denoiser: nn.Module, layers: Sequence[str], call: DenoiserCall, n_samples: int, max_rows: int = 64
) -> OrthogonalityPart:
    """The part of one recorded call, whose row r belongs to sample r mod `n_samples`."""
    grams, n_sets = _Grams(n_samples), call.output.shape[0] // n_samples
    with torch.no_grad(), hooked(denoiser, {name: functools.partial(grams.add, name) for name in layers}):
        for samples in _runs(n_samples, max(4, max_rows // n_sets)):
            rows = torch.cat([samples + k * n_samples for k in range(n_sets)])
            grams.begin(samples, n_sets)
            denoiser(**rows_of(call, rows.to(call.output.device)))
    centred = {name: _centred(gram) for name, gram in grams.found.items()}
    return _part(call.timestep, [centred.get(name) for name in layers], layers)


def orthogonality(grams: Sequence[Matrix | None]) -> Matrix:
    """ORM `[L, L]` of centred Gram matrices `[n, n]`; rows and columns of None are 0, the diagonal is 1."""
    n = max((len(g) for g in grams if g is not None), default=1)
    flat = np.stack([np.zeros(n * n) if g is None else g.ravel() / np.linalg.norm(g) for g in grams])
    found: Matrix = np.clip(flat @ flat.T, 0.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found


class _Grams:
    """Adds up the Gram matrix of each layer's output, pair of samples by pair of samples."""

    def __init__(self, n_samples: int) -> None:
        self.found: dict[str, Matrix] = {}
        self._n_samples, self._done = n_samples, np.zeros((n_samples, n_samples), dtype=bool)

    def begin(self, samples: torch.Tensor, n_sets: int) -> None:
        """Tells which samples the next run is of; every sample has `n_sets` rows."""
        where = samples.numpy()
        self._place, self._n_sets = np.ix_(where, where), n_sets
        self._wanted = ~self._done[self._place]
        self._done[self._place] = True

    def add(self, name: str, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        """The hook of a layer."""
        n_units = len(self._wanted)
        if not isinstance(output, torch.Tensor) or output.shape[0] != self._n_sets * n_units:
            return  # the same for all samples
        gram = self.found.setdefault(name, np.zeros((self._n_samples, self._n_samples)))
        total = sum(_gram(rows) for rows in output.detach().reshape(self._n_sets, n_units, -1))
        gram[self._place] += np.where(self._wanted, np.asarray(total), 0.0)


def _gram(rows: torch.Tensor) -> Matrix:
    """X X^T of `[n, p]` in float64, a slice of features at a time."""
    step = max(1, _SLICE_BYTES // (8 * rows.shape[0]))
    found = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    for first in range(0, rows.shape[1], step):
        part = rows[:, first : first + step].double()
        found += part @ part.T
    plain: Matrix = found.cpu().numpy()
    return plain


def _runs(n_samples: int, at_once: int) -> Iterator[torch.Tensor]:
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
    total = float(np.trace(gram))
    return None if not np.isfinite(found).all() or np.trace(found) <= _CONSTANT * total else found


def _part(timestep: float, grams: Sequence[Matrix | None], layers: Sequence[str]) -> OrthogonalityPart:
    matrix = orthogonality(grams)
    upper = matrix[np.triu_indices(len(layers), 1)]
    return OrthogonalityPart(
        timestep,
        tuple(_rounded(v) for v in upper),
        tuple(tuple(_rounded(v) for v in sums) for sums in _replicates(grams)),
        tuple(name for name, gram in zip(layers, grams, strict=True) if gram is None),
    )


def _replicates(grams: Sequence[Matrix | None]) -> Iterator[Matrix]:
    """Sums of the rows without some samples, `[L]` each; the samples left out are another part each time."""
    n = max((len(g) for g in grams if g is not None), default=0)
    for left_out in np.array_split(np.arange(n), min(n, MAX_REPLICATES)) if n else ():
        kept = np.setdiff1d(np.arange(n), left_out)
        smaller = [None if g is None else _centred(g[np.ix_(kept, kept)]) for g in grams]
        yield orthogonality(smaller).sum(axis=1) - 1.0


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def row_sums(probe: OrthogonalityProbe) -> Mapping[str, tuple[float, ...]]:
    """gamma: how much each layer repeats the others, its row's sum without the diagonal, per timestep."""
    sums = probe.sums
    return {name: tuple(sums[:, i].tolist()) for i, name in enumerate(probe.layers)}
