"""What was measured layer by layer and step by step, as numbers that charts draw and JSON gives.

Rows are blocks or layers in the order of the denoiser, columns its calls in the order of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sedimo.allocation.table import SensitivityTable
from sedimo.errors import InputError
from sedimo.lab.trajectory import TrajectoryProbe
from sedimo.methods.hybrid import BlockCurves
from sedimo.methods.orthogonality import (
    DEFAULT_IMPORTANCE,
    ImportanceOptions,
    OrthogonalityProbe,
    converged,
    importance,
)
from sedimo.methods.sqnr import LocalNoise, SqnrPart, SqnrProbe
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import decibel
from sedimo.quant.formats import Format

Rows = tuple[tuple[float, ...], ...]
Matrix = npt.NDArray[np.float64]
_MATRIX_DIGITS = 3
_DECIBELS = 10 / math.log(10)  # of a relative change


@dataclass(frozen=True, slots=True)
class NoiseMap:
    """SQNR `[B, T]` [dB] and its standard errors, of `n` samples; infinite where there is no noise at all.

    `number_format` is the one format of all layers, empty where each has the recipe's.
    """

    blocks: tuple[str, ...]
    timesteps: tuple[float, ...]
    sqnr_db: Rows
    standard_error: Rows
    n: int
    number_format: str = ""


@dataclass(frozen=True, slots=True)
class TrajectoryLines:
    """SQNR [dB] at each call, three times.

    Of the denoiser's output on full-precision inputs (`step`) and on the recipe's own `path`, and of the `latents`
    after the call.
    """

    timesteps: tuple[float, ...]
    step: tuple[Estimate, ...]
    path: tuple[Estimate, ...]
    latents: tuple[Estimate, ...]


@dataclass(frozen=True, slots=True)
class Repetition:
    """How much layers' outputs repeat each other, how important that makes them, and what bits they got.

    `upper` holds upper triangles of the matrix row by row, without the diagonal of ones: the `mean` over timesteps, the
    `first` and the `last`. `theta` is the importance with its jackknife error, `per_step` `[T, L]` that of single
    timesteps (not a number where a layer gave the same for all samples). `converged` `[T]` is the rank correlation of
    theta from 1, 2, ... timesteps with that from all.
    """

    layers: tuple[str, ...]
    blocks: tuple[str, ...]
    bits: tuple[float, ...]
    timesteps: tuple[float, ...]
    n: int
    upper: Mapping[str, tuple[float, ...]]
    theta: tuple[float, ...]
    standard_error: tuple[float, ...]
    per_step: Rows
    converged: tuple[float, ...]

    def matrix(self, name: str) -> Matrix:
        """One of the matrices `[L, L]`."""
        n = len(self.layers)
        found = np.zeros((n, n))
        found[np.triu_indices(n, 1)] = self.upper[name]
        whole: Matrix = found + found.T + np.eye(n)
        return whole


@dataclass(frozen=True, slots=True)
class ChannelRanges:
    """Least and greatest value `[C]` of each channel of a layer's input, before and after smoothing."""

    layer: str
    before_low: tuple[float, ...]
    before_high: tuple[float, ...]
    after_low: tuple[float, ...]
    after_high: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses ranges that are none.

        Raises:
            InputError: no channels, different numbers of them, or a least value above the greatest.
        """
        lists = (self.before_low, self.before_high, self.after_low, self.after_high)
        lengths = [len(one) for one in lists]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise InputError(f"ranges of layer {self.layer!r} need one value per channel each, got {lengths} values")
        for low, high in (lists[:2], lists[2:]):
            for channel, (least, greatest) in enumerate(zip(low, high, strict=True)):
                if not -math.inf < least <= greatest < math.inf:
                    raise InputError(
                        f"a range goes from a finite least to a greatest value, got {least} to {greatest} in channel "
                        f"{channel} of layer {self.layer!r}"
                    )


@dataclass(frozen=True, slots=True)
class Maps:
    """All that was measured in detail; each may be absent.

    `recipe` is noise at block outputs on full-precision inputs, `local` that at layers' own outputs, in which no other
    layer's noise takes part, `blocks` the curves that hybrid precision follows from.
    """

    recipe: NoiseMap | None = None
    trajectory: TrajectoryLines | None = None
    local: tuple[NoiseMap, ...] = ()
    repetition: Repetition | None = None
    ranges: tuple[ChannelRanges, ...] = ()
    blocks: BlockCurves | None = None


NO_MAPS = Maps()


def recipe_map(probe: TrajectoryProbe) -> NoiseMap:
    """The noise of a recipe block by block."""
    found = probe.of_blocks
    return NoiseMap(
        blocks=tuple(found),
        timesteps=probe.timesteps,
        sqnr_db=tuple(tuple(one.value for one in row) for row in found.values()),
        standard_error=tuple(tuple(one.standard_error for one in row) for row in found.values()),
        n=probe.n_samples,
    )


def trajectory_lines(probe: TrajectoryProbe) -> TrajectoryLines:
    """The noise of a recipe step by step."""
    return TrajectoryLines(probe.timesteps, probe.of_steps, probe.of_path, probe.of_latents)


def local_map(
    probe: SqnrProbe, table: SensitivityTable, formats: Mapping[str, Format], *, number_format: str = ""
) -> NoiseMap:
    """Local noise of each decision at its format, weight and activations, as the mean power over those of a block.

    Decisions that `formats` lacks and those that were never called are left out.
    """
    members: dict[str, list[str]] = {}
    for name in table.layers:
        if name in formats and any(name in part.noise for part in probe.parts):
            members.setdefault(table.blocks[name] or table.layers[name][0], []).append(name)
    cells = [[_mean(_noise_of(part, names, formats)) for part in probe.parts] for names in members.values()]
    return NoiseMap(
        blocks=tuple(members),
        timesteps=tuple(part.timestep for part in probe.parts),
        sqnr_db=tuple(tuple(decibel(cell.mean) for cell in row) for row in cells),
        standard_error=tuple(tuple(_error(cell) for cell in row) for row in cells),
        n=probe.n_samples,
        number_format=number_format,
    )


def repetition(
    probe: OrthogonalityProbe,
    table: SensitivityTable,
    choice: Mapping[str, Format],
    options: ImportanceOptions = DEFAULT_IMPORTANCE,
) -> Repetition:
    """The matrix of a probe, what follows from it, and the bits that a choice gave to each layer."""
    found, matrices = importance(probe, options), probe.matrices
    decisions: dict[str, list[str]] = {}
    for name, layers in table.layers.items():
        for layer in layers:
            decisions.setdefault(layer, []).append(name)
    rows = np.triu_indices(len(probe.layers), 1)
    named = {"mean": matrices.mean(axis=0), "first": matrices[0], "last": matrices[-1]}
    convergence = converged(probe, options)
    return Repetition(
        layers=probe.layers,
        blocks=tuple(table.blocks[decisions[layer][0]] for layer in probe.layers),
        bits=tuple(_bits_of(decisions[layer], table, choice) for layer in probe.layers),
        timesteps=tuple(part.timestep for part in probe.parts),
        n=probe.n_samples,
        upper={name: _rounded(matrix[rows], _MATRIX_DIGITS) for name, matrix in named.items()},
        theta=tuple(found.theta.tolist()),
        standard_error=tuple(found.standard_error.tolist()),
        per_step=tuple(tuple(row) for row in found.per_step.tolist()),
        converged=tuple(convergence[n] for n in sorted(convergence)),
    )


def _bits_of(decisions: Sequence[str], table: SensitivityTable, choice: Mapping[str, Format]) -> float:
    """Bits per weight of a layer, the mean over its streams if each has a decision."""
    params = [table.params[name] for name in decisions]
    return sum(n * choice[name].bits for n, name in zip(params, decisions, strict=True)) / sum(params)


def _noise_of(part: SqnrPart, names: Sequence[str], formats: Mapping[str, Format]) -> Iterable[LocalNoise]:
    return (part.of(name, formats[name]) for name in names if name in part.noise or not formats[name].changes)


def _mean(cells: Iterable[LocalNoise]) -> LocalNoise:
    """The mean of layers; they saw the same samples, so their errors are averaged as if they went together."""
    found = list(cells)
    if not found:
        return LocalNoise(math.nan, math.nan)
    return LocalNoise(sum(c.mean for c in found) / len(found), sum(c.standard_error for c in found) / len(found))


def _error(cell: LocalNoise) -> float:
    """Of the decibels, to first order."""
    return 0.0 if cell.mean == 0 else _DECIBELS * cell.standard_error / cell.mean


def _rounded(values: Matrix, digits: int) -> tuple[float, ...]:
    return tuple(float(f"{value:.{digits}g}") for value in values)
