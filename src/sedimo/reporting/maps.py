"""What was measured layer by layer and step by step, as numbers that charts draw and JSON gives.

Rows are blocks or layers in the order of the denoiser, columns its calls in the order of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from sedimo.methods.sqnr import SqnrPart, SqnrProbe
from sedimo.metrics.estimate import Estimate, to_digits
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
    """SQNR at each call [dB]: of outputs on full-precision inputs and on the recipe's own path, and of the latents."""

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
        """Refuses different numbers of channels, none, and ranges that are none."""
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
    """All that was measured in detail: noise of the recipe at block outputs, `local` noise of layers by themselves."""

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
    return TrajectoryLines(probe.timesteps, probe.of("step"), probe.of("path"), probe.of("latents"))


def local_map(
    probe: SqnrProbe, table: SensitivityTable, formats: Mapping[str, Format], *, number_format: str = ""
) -> NoiseMap:
    """Local noise of each decision at its format, weight and activations, as the mean power over those of a block.

    Decisions that `formats` lacks and those that were never called are left out. All saw the same samples, so their
    errors are averaged as if they went together; in decibels they are of first order.
    """
    members: dict[str, list[str]] = {}
    for name in table.layers:
        if name in formats and any(name in part.noise for part in probe.parts):
            members.setdefault(table.blocks[name] or table.layers[name][0], []).append(name)
    values, errors = [], []
    for names in members.values():
        cells = [_mean_noise(part, {name: formats[name] for name in names}) for part in probe.parts]
        values.append(tuple(decibel(power) for power, _ in cells))
        errors.append(tuple(0.0 if power == 0 else _DECIBELS * error / power for power, error in cells))
    return NoiseMap(
        blocks=tuple(members),
        timesteps=tuple(part.timestep for part in probe.parts),
        sqnr_db=tuple(values),
        standard_error=tuple(errors),
        n=probe.n_samples,
        number_format=number_format,
    )


def _mean_noise(part: SqnrPart, formats: Mapping[str, Format]) -> tuple[float, float]:
    """Mean power of decisions at their formats, and its standard error; not a number without any."""
    found = [part.of(name, one) for name, one in formats.items() if name in part.noise or not one.changes]
    n = len(found) or math.nan
    return sum(one.mean for one in found) / n, sum(one.standard_error for one in found) / n


def repetition(
    probe: OrthogonalityProbe,
    table: SensitivityTable,
    choice: Mapping[str, Format],
    options: ImportanceOptions = DEFAULT_IMPORTANCE,
) -> Repetition:
    """The matrix of a probe, what follows from it, and the bits that a choice gave to each layer."""
    found, matrices, convergence = importance(probe, options), probe.matrices, converged(probe, options)
    decisions: dict[str, list[str]] = {}
    for name, layers in table.layers.items():
        for layer in layers:
            decisions.setdefault(layer, []).append(name)
    triangle = np.triu_indices(len(probe.layers), 1)
    named = {"mean": matrices.mean(axis=0), "first": matrices[0], "last": matrices[-1]}
    return Repetition(
        layers=probe.layers,
        blocks=tuple(table.blocks[decisions[layer][0]] for layer in probe.layers),
        bits=tuple(_bits_of(decisions[layer], table, choice) for layer in probe.layers),
        timesteps=tuple(part.timestep for part in probe.parts),
        n=probe.n_samples,
        upper={name: tuple(to_digits(v, _MATRIX_DIGITS) for v in one[triangle]) for name, one in named.items()},
        theta=tuple(found.theta.tolist()),
        standard_error=tuple(found.standard_error.tolist()),
        per_step=tuple(map(tuple, found.per_step.tolist())),
        converged=tuple(convergence[n] for n in sorted(convergence)),
    )


def _bits_of(decisions: Sequence[str], table: SensitivityTable, choice: Mapping[str, Format]) -> float:
    """Bits per weight of a layer, the mean over its streams if each has a decision."""
    params = [table.params[name] for name in decisions]
    return sum(n * choice[name].bits for n, name in zip(params, decisions, strict=True)) / sum(params)
