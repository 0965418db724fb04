"""What was measured layer by layer and step by step: numbers that JSON gives, and the page's part that draws them.

Rows are blocks or layers in the order of the denoiser, columns its calls in the order of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sedimo.allocation.table import SensitivityTable
from sedimo.errors import InputError
from sedimo.lab.trajectory import TrajectoryNoise, sqnr_by_call
from sedimo.methods import orthogonality
from sedimo.methods.hybrid import BlockCurves
from sedimo.methods.orthogonality import ImportanceOptions, OrthogonalityProbe
from sedimo.methods.sqnr import SqnrPart, SqnrProbe
from sedimo.metrics.estimate import NORMAL_95, Estimate, normal_estimate, to_digits
from sedimo.metrics.signal import decibel
from sedimo.quant.formats import Format
from sedimo.reporting.figures import WIDTH, Axis, Bar, Heat, Look, Plot, Series, named, only, room, short
from sedimo.reporting.page import Beside, Block, Figure, Page, Row, Section, Table, Text, columns, page_of, rows, shown
from sedimo.reporting.placement import block_labels, stage, stage_labels
from sedimo.reporting.words import name, number, share, with_error

Rows = tuple[tuple[float, ...], ...]
_MATRIX_DIGITS = 3
_DECIBELS = 10 / math.log(10)  # of a relative change
MAX_ROW_LABELS = 64
MAX_STEP_LABELS = 14
MAX_BARS = 320  # more channels share bars, which then reach over all of them
_MOST_BLOCKS = 90  # with a label
_EVERY = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5))
_SOME = 0.99  # rank correlation from which on more timesteps change little
_SMALL = 372  # width of a figure that stands beside another [px]
_NAME = 34  # characters of a layer's label: 20 of its begin, 13 of its end
_CURVES = (
    "Above, blocks are quantized one after the other from the input on: where the curve falls, noise enters. Below, "
    "all are quantized but one: what it gains to leave that block at 16 bits"
)


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

    def matrix(self, name: str) -> npt.NDArray[np.float64]:
        """One of the matrices `[L, L]`."""
        n = len(self.layers)
        found = np.zeros((n, n))
        found[np.triu_indices(n, 1)] = self.upper[name]
        return np.asarray(found + found.T + np.eye(n))


@dataclass(frozen=True, slots=True)
class ChannelRanges:
    """Least and greatest value `[C]` of each channel of a layer's input, before and after smoothing."""

    layer: str
    before_low: tuple[float, ...]
    before_high: tuple[float, ...]
    after_low: tuple[float, ...]
    after_high: tuple[float, ...]

    def __post_init__(self) -> None:
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


def recipe_map(noise: TrajectoryNoise) -> NoiseMap:
    """The noise of a recipe block by block."""
    found = {name: sqnr_by_call(ratios) for name, ratios in noise.blocks.items()}
    return NoiseMap(
        blocks=tuple(found),
        timesteps=noise.timesteps,
        sqnr_db=tuple(tuple(one.value for one in row) for row in found.values()),
        standard_error=tuple(tuple(one.standard_error for one in row) for row in found.values()),
        n=len(noise.step[0]),
    )


def local_map(
    probe: SqnrProbe, table: SensitivityTable, formats: Mapping[str, Format], *, number_format: str = ""
) -> NoiseMap:
    """Local noise of each decision at its format, weight and activations, as the mean power over those of a block.

    Decisions that `formats` lacks and those that were never called are left out. All saw the same samples, so their
    errors are averaged as if they went together; in decibels they are of first order.
    """
    members: dict[str, list[str]] = {}
    for decision, layers in table.layers.items():
        if decision in formats and any(decision in part.noise for part in probe.parts):
            members.setdefault(table.blocks[decision] or layers[0], []).append(decision)
    values, errors = [], []
    for inside in members.values():
        cells = [_mean_noise(part, {decision: formats[decision] for decision in inside}) for part in probe.parts]
        values.append(tuple(decibel(power) for power, _ in cells))
        errors.append(tuple(0.0 if power == 0 else _DECIBELS * error / power for power, error in cells))
    return NoiseMap(
        blocks=tuple(members),
        timesteps=tuple(part.timestep for part in probe.parts),
        sqnr_db=tuple(values),
        standard_error=tuple(errors),
        n=probe.setting.n_samples,
        number_format=number_format,
    )


def _mean_noise(part: SqnrPart, formats: Mapping[str, Format]) -> tuple[float, float]:
    """Mean power of decisions at their formats, and its standard error; not a number without any."""
    found = [part.of(d, one) for d, one in formats.items() if d in part.noise or not one.changes]
    n = len(found) or math.nan
    return sum(one.mean for one in found) / n, sum(one.standard_error for one in found) / n


def repetition(
    probe: OrthogonalityProbe, table: SensitivityTable, choice: Mapping[str, Format], options: ImportanceOptions
) -> Repetition:
    """The matrix of a probe, what follows from it, and the bits that a choice gave to each layer."""
    matrices = probe.matrices
    decisions: dict[str, list[str]] = {}  # of a layer: several if each of its streams has one
    for decision, layers in table.layers.items():
        for layer in layers:
            decisions.setdefault(layer, []).append(decision)
    bits = []
    for layer in probe.layers:
        params = {decision: table.params[decision] for decision in decisions[layer]}
        bits.append(sum(n * choice[decision].bits for decision, n in params.items()) / sum(params.values()))
    triangle = np.triu_indices(len(probe.layers), 1)
    kinds = {"mean": matrices.mean(axis=0), "first": matrices[0], "last": matrices[-1]}
    return Repetition(
        layers=probe.layers,
        blocks=tuple(table.blocks[decisions[layer][0]] for layer in probe.layers),
        bits=tuple(bits),
        timesteps=tuple(part.timestep for part in probe.parts),
        n=probe.setting.n_samples,
        upper={kind: tuple(to_digits(v, _MATRIX_DIGITS) for v in one[triangle]) for kind, one in kinds.items()},
        theta=tuple(orthogonality.importance(probe, options).tolist()),
        standard_error=tuple(orthogonality.importance_error(probe, options).tolist()),
        per_step=tuple(map(tuple, orthogonality.importance_per_step(probe, options).tolist())),
        converged=orthogonality.converged(probe, options),
    )


def blocks_page(curves: BlockCurves) -> Page:
    """All that the curves of blocks tell, as a page."""
    c = curves
    caption = f"{_CURVES}, paired with all blocks quantized. Bars are 95 % intervals of the mean over seeds."
    titles = columns(
        ("block", "name"),
        "weights",
        ("more at 16 bits", "bytes"),
        "this and all before [dB]",
        "gained by keeping it [dB]",
        "kept",
    )
    lines = []
    for one in c.rows:
        kept = "16 bits" if one.block in c.kept else ""
        lines.append(Row((one.block, one.params, one.extra_bytes, one.up_to, one.alone_kept, kept), bool(kept)))
    return page_of(
        f"Blocks of {c.source} at {c.number_format}",
        _most_gained(c),
        Text(
            f"Measured by {name(c.objective)} on seeds {c.seeds}, {c.n_steps} step{'' if c.n_steps == 1 else 's'}, "
            "against full precision on the same seeds."
        ),
        blocks_figure(c, caption),
        Text(_hybrid(c)),
        Table(
            titles,
            tuple(lines),
            f"{len(c.rows)} blocks, each gain with its own 95 % interval; gains of several blocks do not add up.",
        ),
        name="curves",
        part="Where noise enters",
    )


def blocks_figure(curves: BlockCurves, caption: str, heading: str = "", table: Table | None = None) -> Figure | None:
    """Both curves over the same blocks with 95 % intervals; blocks that make no noise have no figure."""
    c = curves
    if not any(math.isfinite(row.up_to.value) for row in c.rows):
        return None
    labels, common = block_labels([row.block for row in c.rows])
    names = [short(label, 28) for label in labels]
    along = f"{common or 'block'}, from input to output"
    places = Axis(along, named(names, n_most=_MOST_BLOCKS), are_turned=room(names) > 0)
    whole = f"all blocks: {number(c.everything.value, c.everything.standard_error)} dB"
    kept = tuple(i for i, row in enumerate(c.rows) if row.block in c.kept)
    alone = tuple(row.alone_kept for row in c.rows)
    marks = (Series((), (), "stays at 16 bits", "this", "D"), Series((), (), "quantized")) if kept else ()
    panels = (
        Plot(
            (Series(tuple(row.up_to for row in c.rows), line="-"),),
            places,
            Axis("SQNR [dB]\nthis block and all before"),
            ((c.everything.value, whole),) if math.isfinite(c.everything.value) else (),
        ),
        Plot(
            (Series(alone, marked=kept), *marks),
            places,
            Axis("gain [dB]\nby keeping this block alone"),
            () if c.gain_db is None else ((c.gain_db, f"threshold: {c.gain_db:g} dB"),),
            zero=True,
        ),
    )
    gains = {row.block: row.alone_kept.value for row in c.rows if math.isfinite(row.alone_kept.value)}
    most = max(gains, key=lambda block: gains[block], default=None)
    gain = "" if most is None else f" Keeping {most} gains most, {number(gains[most])} dB."
    return Figure(
        "block-curves",
        f"Noise entering through {len(c.rows)} blocks",
        f"All blocks quantized: {number(c.everything.value)} dB.{gain}",
        panels,
        490 + room(names),
        caption,
        heading,
        table=table,
    )


def _most_gained(c: BlockCurves) -> str:
    """Which block gains most when it is spared, if any is shown to."""
    gaining = [row for row in c.rows if row.alone_kept.low > 0]
    whole = f"All blocks at {name(c.number_format)} have {with_error(c.everything, 'dB')} SQNR"
    if not gaining:
        return f"{whole}; no single block is shown to gain by staying at 16 bits."
    best = max(gaining, key=lambda row: row.alone_kept.value)
    return f"{whole}; leaving {name(best.block)} alone at 16 bits gains most, {with_error(best.alone_kept, 'dB')}."


def _hybrid(c: BlockCurves) -> str:
    """Which blocks stay at 16 bits and what that gains; empty when none do."""
    if c.hybrid is None or c.hybrid_gain is None:
        return ""
    return (
        f"Chosen by {c.rule}: {', '.join(map(name, c.kept))} {'stays' if len(c.kept) == 1 else 'stay'} at 16 bits, "
        f"which makes {number(c.paper_bits)} bits per weight. On {c.hybrid.n} fresh seeds that has "
        f"{with_error(c.hybrid, 'dB')}, {with_error(c.hybrid_gain, 'dB', signed=True)} against all blocks at "
        f"{name(c.number_format)}, paired."
    )


def maps_section(maps: Maps) -> Section | None:
    """All that was measured in detail; None where nothing was."""
    blocks = shown(
        None if maps.blocks is None else _curves(maps.blocks),
        None if maps.recipe is None else noise_figure(maps.recipe),
        None if maps.trajectory is None else trajectory_figure(maps.trajectory),
        (noise_figure(found, i) for i, found in enumerate(maps.local)),
        () if maps.repetition is None else _repetition(maps.repetition),
        (ranges_figure(found, i) for i, found in enumerate(maps.ranges)),
    )
    if not blocks:
        return None
    numbers = Text("All numbers, those of the matrices too: `sedimo report RUN --json`.", "quiet")
    return Section("steps", "Layer by layer, step by step", (*blocks, numbers))


def _curves(found: BlockCurves) -> Figure | None:
    text = f"{_most_gained(found)} {_CURVES}. Bars are 95 % intervals, on seeds {found.seeds}. {_hybrid(found)}"
    table = Table(
        columns("block", ("this and all before", "plus-minus"), ("gained by keeping it", "plus-minus"), "kept"),
        rows((r.block, r.up_to, r.alone_kept, "16 bits" if r.block in found.kept else "") for r in found.rows),
        "SQNR [dB] with its 95 % interval",
    )
    return blocks_figure(found, text, "Where noise enters", table)


def noise_figure(found: NoiseMap, position: int | None = None) -> Figure | None:
    """SQNR of each block at each step: of a recipe, or the local one at a `position`; nothing finite has no figure."""
    if not np.isfinite(found.sqnr_db).any():
        return None
    if position is None:
        key, title, heading = "recipe", "SQNR of the recipe by block and step", "Noise block by block"
        about = (
            f"SQNR of each block's output, means of {found.n} samples; rows are blocks from input to output. Each call "
            "has the inputs of full precision, so this is the noise that one step makes on its way through the "
            "denoiser."
        )
    else:
        what = f"all at {name(found.number_format)}" if found.number_format else "at the formats of this recipe"
        key, heading = f"local-{position}", f"Noise at the layers' own outputs, {what}"
        title = f"Local SQNR {what.replace('`', '')} by block and step"
        about = (
            f"SQNR of layers' own outputs, {what}, on full-precision inputs: noise of other layers is not in it. "
            f"Noise is averaged over the layers of a block and {found.n} samples."
        )
    labels, common = block_labels(found.blocks)
    panel = Heat(
        found.sqnr_db,
        Axis(common, named([short(label, 40) for label in labels])),
        steps_axis(found.timesteps),
        "SQNR [dB], higher is better",
    )
    cells = zip(found.blocks, found.sqnr_db, found.standard_error, strict=True)
    table = Table(
        columns("block", *(str(i + 1) for i in range(len(found.timesteps)))),
        rows((block, *map(_cell, values, errors)) for block, values, errors in cells),
        "SQNR [dB] by block and denoiser call, ± standard error",
    )
    height = 110 + max(120, _row_height(len(labels)) * len(labels))  # the scale's name needs room, too
    caption = f"{about} {_about(found)}"
    return Figure(f"noise-{key}", title, _extremes(found), (panel,), height, caption, heading, table=table)


def _row_height(n_rows: int) -> float:
    """Of one row of a map [px]: room for its label as long as there are labels."""
    return max(420 / n_rows, 3.5) if n_rows > MAX_ROW_LABELS else 20 if n_rows <= 20 else 14


def steps_axis(timesteps: Sequence[float], *, n_most: int = MAX_STEP_LABELS, label: str = "") -> Axis:
    """Steps counted from 1, with the noise level that the denoiser was told."""
    every = next(n for n in _EVERY if n * n_most >= len(timesteps))
    places = [0, *(i for i in range(1, len(timesteps)) if (i + 1) % every == 0 and i > every / 2)]
    told = all(math.isfinite(t) for t in timesteps)
    ticks = tuple((i, f"{i + 1}\n{timesteps[i]:.4g}" if told else str(i + 1)) for i in places)
    return Axis(label or "denoiser call, from noise to image" + ("; below, its timestep" if told else ""), ticks)


def _extremes(found: NoiseMap) -> str:
    values = np.where(np.isfinite(found.sqnr_db), found.sqnr_db, np.nan)
    places = []
    for word, at in (("Least", np.nanargmin(values)), ("most", np.nanargmax(values))):
        row, column = np.unravel_index(at, values.shape)
        places.append(f"{word} {number(float(values[row, column]))} dB at {found.blocks[row]}, call {column + 1}")
    n_blocks, n_calls = values.shape
    return f"{n_blocks} blocks at {n_calls} denoiser calls. {', '.join(places)}"


def _about(found: NoiseMap) -> str:
    """What the colours do not tell: errors, and cells that have none."""
    values, errors = np.array(found.sqnr_db, dtype=float), np.array(found.standard_error, dtype=float)
    is_known = np.isfinite(values) & np.isfinite(errors)
    parts = []
    if is_known.any():
        parts.append(f"Standard errors are {number(float(np.median(errors[is_known])))} dB in the median cell.")
    for is_so, what in ((np.isposinf, "are empty: no noise at all"), (np.isneginf, "have a cross: they diverged")):
        count = int(is_so(values).sum())
        if count:
            parts.append(f"{share(count / values.size)} of the cells {what}.")
    return " ".join(parts)


def _cell(value: float, error: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else "diverged"
    return f"{value:.1f}" if math.isnan(error) else f"{value:.1f} ± {error:.1f}"


def trajectory_figure(found: TrajectoryLines) -> Figure | None:
    """SQNR at each step as lines with 95 % intervals as bands; without any finite number there is no figure."""
    if not any(math.isfinite(one.value) for line in (found.step, found.path, found.latents) for one in line):
        return None
    series = (
        Series(found.step, (), "output, same inputs as full precision", "other", "s", line=":", has_band=True),
        Series(found.path, (), "output, on its own path", "this", "D", line="-", has_band=True),
        Series(found.latents, (), "latents after the step", "ink", "o", line="--", has_band=True),
    )
    ends = "; ".join(f"{one.label} {number(one.values[-1].value)} dB" for one in series)
    kinds = ("output, same inputs", "output, own path", "latents after it")
    calls = enumerate(zip(found.timesteps, found.step, found.path, found.latents, strict=True), 1)
    return Figure(
        "trajectory",
        "Noise along the trajectory",
        f"At the last of {len(found.timesteps)} steps: {ends}",
        (Plot(series, steps_axis(found.timesteps), Axis("SQNR [dB], higher is better")),),
        380,
        "Quantized against full precision on the same seeds, with 95 % intervals of the mean as bands. *Same "
        "inputs* is what one step does alone; on its *own path* the recipe also has the noise of earlier steps in "
        "its inputs. Latents are those after the step; the last are the result.",
        "Along the trajectory",
        table=Table(
            columns("call", "timestep", *((kind, "plus-minus") for kind in kinds)),
            rows((i, f"{timestep:.4g}", *values) for i, (timestep, *values) in calls),
            "SQNR [dB] with its 95 % interval",
        ),
    )


def _repetition(found: Repetition) -> Iterator[Block | None]:
    yield matrix_figure(found, "mean")
    if len(found.timesteps) > 1:
        yield Beside((matrix_figure(found, "first"), matrix_figure(found, "last")))
    yield importance_figure(found)
    yield convergence_figure(found)


def matrix_figure(found: Repetition, which: str) -> Figure:
    """One matrix of a probe, layers in the order of the denoiser, with the bits of each beside it."""
    is_mean, matrix = which == "mean", found.matrix(which)
    width = WIDTH if is_mean else _SMALL
    layers = layers_axis(found, n_most=round(width / 17))
    panel = Heat(
        matrix,
        layers,
        Axis(ticks=layers.ticks, are_turned=True),
        "correlation of outputs (linear CKA)" if is_mean else "",
        (0.0, 1.0),
        is_square=True,
        strip=found.bits,
    )
    text = (
        f"How alike the outputs of two layers are between {found.n} samples (linear CKA, 0 to 1), mean of "
        f"{len(found.timesteps)} timesteps. At the right, the bits that each layer got, coloured as in the map above."
    )
    n_dark = int(np.isnan(np.array(found.per_step)).all(axis=0).sum())
    if n_dark:
        lines = "The dark line is a layer" if n_dark == 1 else f"Dark lines are the {n_dark} layers"
        text += f" {lines} whose outputs do not tell samples apart, such as those that see the timestep alone."
    across, down = np.triu_indices(len(matrix), 1)
    most = int(np.argmax(matrix[across, down]))
    pair = f"{found.layers[across[most]]} and {found.layers[down[most]]}"
    return Figure(
        f"orthogonality-{which}",
        f"Orthogonality of {len(matrix)} layers, {which} {'of the timesteps' if is_mean else 'timestep'}",
        f"Most alike are {pair}, {number(float(matrix[across, down][most]))}",
        (panel,),
        width * (0.8 if is_mean else 0.95),
        text if is_mean else "Colours as above.",
        "What repeats what" if is_mean else f"The {which} timestep alone",
        width,
    )


def importance_figure(found: Repetition) -> Figure:
    """Importance of each layer by timestep and over all of them, and beside it the bits that it got."""
    n, per_step = len(found.layers), np.array(found.per_step, dtype=float).T
    places = layers_axis(found, n_most=MAX_ROW_LABELS)
    bare = Axis(ticks=places.ticks)
    values = tuple(normal_estimate(theta, e) for theta, e in zip(found.theta, found.standard_error, strict=True))
    panels = (
        Heat(
            per_step,
            places,
            steps_axis(found.timesteps, n_most=5, label="sampled timestep"),
            "at the timestep (logarithmic)",
            is_logarithmic=True,
        ),
        Plot(
            (Series(values, look="this"),),
            bare,
            Axis("importance over all\n(bars: 95 % interval)", low=0, high=1.05),
            is_flat=True,
        ),
        Plot(
            tuple(Bar(i, 0, b, 0.86, b) for i, b in enumerate(found.bits)),
            bare,
            Axis("bits it got", is_whole=True, low=0, high=max(found.bits) + 0.5),
            is_flat=True,
        ),
    )
    order = np.argsort(found.theta)
    ends = "; ".join(f"{found.layers[i]} {found.theta[i]:.2f}, {found.bits[i]:.3g} bits" for i in (order[-1], order[0]))
    layers = zip(found.layers, found.theta, found.standard_error, found.bits, strict=True)
    return Figure(
        "importance",
        "Importance of layers and the bits they got",
        f"{n} layers. Most and least important: {ends}",
        panels,
        90 + _row_height(n) * n,
        "A layer that repeats others less is more important. Left, by timestep (empty: its output does not tell "
        "samples apart); middle, over all timesteps, the greatest being 1; right, the bits that it got.",
        "Importance, and the bits it led to",
        n_columns=3,
        ratios=(3, 3, 2),
        table=Table(
            columns("layer", "importance", "bits"),
            rows((layer, f"{theta:.3f} ± {NORMAL_95 * e:.3f}", f"{bits:.3g}") for layer, theta, e, bits in layers),
            "Importance with its 95 % interval",
        ),
    )


def convergence_figure(found: Repetition) -> Figure | None:
    """How soon importances from few timesteps have the order of those from all; one timestep has no figure."""
    n = len(found.converged)
    if np.isfinite(found.converged).sum() < 2:
        return None
    span = max(1.0 - float(np.nanmin(found.converged)), 0.05)
    panel = Plot(
        (Series(tuple(map(only, found.converged)), tuple(range(1, n + 1)), look="this", line="-"),),
        Axis("timesteps sampled, evenly over the trajectory", is_whole=True),
        Axis("rank correlation with all", low=1.0 - 1.08 * span, high=1.0 + 0.08 * span),
        ((1.0, ""),),
    )
    too_few = max((i + 1 for i, value in enumerate(found.converged) if not value >= _SOME), default=0)
    enough = f"From {too_few + 1} on, the rank correlation is at least {_SOME}."
    if too_few + 1 >= n:
        enough = f"No fewer than all {n} keep the rank correlation at {_SOME} or above."
    return Figure(
        "convergence",
        "Convergence over timesteps",
        "; ".join(f"{i + 1}: {value:.3f}" for i, value in enumerate(found.converged)),
        (panel,),
        300,
        f"How soon importances from few timesteps have the order of those from all. {enough}",
        "Enough timesteps?",
        500,
    )


def layers_axis(found: Repetition, *, n_most: int) -> Axis:
    """Every layer by its name while there is room, else where an outermost block begins, as far as there is room."""
    n = len(found.layers)
    if n <= n_most:  # of a long name, begin and end: layers differ in the one, operations in the other
        names = [one if len(one) <= _NAME else f"{one[:20]}\N{HORIZONTAL ELLIPSIS}{one[-13:]}" for one in found.layers]
        return Axis(ticks=named(names, n_most=n_most))
    begins: dict[str, int] = {}
    for i, block in enumerate(found.blocks):
        if block:
            begins.setdefault(stage(block), i)
    labelled: list[tuple[float, str]] = []
    for place, label in zip(begins.values(), stage_labels(list(begins))[0], strict=True):
        if not labelled or place - labelled[-1][0] >= n / n_most:
            labelled.append((place, label))
    return Axis("layers, labelled where a block begins", tuple(labelled))


def ranges_figure(found: ChannelRanges, position: int = 0) -> Figure:
    """Least to greatest value of every channel as a bar, before on top and after below, each with its own scale."""
    looks: dict[str, Look] = {"before": "other", "after": "this"}
    both = ((found.before_low, found.before_high), (found.after_low, found.after_high))
    panels, texts = [], []
    for (when, look), (low, high) in zip(looks.items(), both, strict=True):
        bars = tuple(
            Bar(first + count / 2, least, greatest, count, look=look)
            for first, count, least, greatest in merged(low, high, MAX_BARS).T.tolist()
        )
        title = f"{when} smoothing: {_spread(low, high)}"
        panels.append(Plot(bars, Axis("input channel" if when == "after" else ""), Axis(), title=title))
        texts.append(f"{when} {_spread(low, high)}")
    return Figure(
        f"ranges-{position}",
        f"Activation ranges per channel of {found.layer}",
        f"{len(found.before_low)} channels; {'; '.join(texts)}",
        tuple(panels),
        360,
        "Bars reach from the least to the greatest value of a channel. Each panel has its own scale.",
        f"Activation ranges of {name(found.layer)}",
        label="activation",
    )


def merged(low: npt.ArrayLike, high: npt.ArrayLike, n_most: int) -> npt.NDArray[np.float64]:
    """Neighbouring channels `[4, N]`: the first, their number, least and greatest value; no outlier is lost."""
    lows, highs = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    edges = np.unique(np.linspace(0, len(lows), min(n_most, len(lows)) + 1).round().astype(int))
    starts = edges[:-1]
    return np.stack([starts, np.diff(edges), np.minimum.reduceat(lows, starts), np.maximum.reduceat(highs, starts)])


def _spread(low: npt.ArrayLike, high: npt.ArrayLike) -> str:
    """How far the widest channel is from the usual one, which is what quantization of the whole tensor suffers from."""
    size = np.maximum(np.abs(low), np.abs(high))
    middle, widest = float(np.median(size)), float(size.max())
    text = f"largest {number(widest)}, median channel {number(middle)}"
    return f"{text}, ratio {number(widest / middle)}" if middle > 0 else text
