"""The page's part about blocks, layers and steps: what was measured in detail, drawn, told and as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sedimo.methods.hybrid import BlockCurves
from sedimo.metrics.estimate import NORMAL_95, normal_estimate
from sedimo.reporting.figures import (
    LETTER,
    WIDTH,
    Axis,
    Bar,
    Chart,
    Heat,
    Look,
    Plot,
    Series,
    are_long,
    named,
    only,
    short,
)
from sedimo.reporting.maps import ChannelRanges, Maps, NoiseMap, Repetition, TrajectoryLines
from sedimo.reporting.page import Beside, Block, Figure, Page, Row, Section, Table, Text, columns, page_of, rows, shown
from sedimo.reporting.placement import block_labels, stage, stage_labels
from sedimo.reporting.words import name, number, share, with_error

MAX_ROW_LABELS = 64
MAX_STEP_LABELS = 14
MAX_BARS = 320  # more channels share bars, which then reach over all of them
_MOST_BLOCKS = 90  # with a label
_EVERY = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5))
_SOME = 0.99  # rank correlation from which on more timesteps change little
_SMALL = 372  # width of a chart that stands beside another [px]
_NAME = 34  # characters of a layer's label
_TITLES = {"mean": "mean of the timesteps", "first": "first timestep", "last": "last timestep"}
_CURVES = (
    "Above, blocks are quantized one after the other from the input on: where the curve falls, noise enters. Below, "
    "all are quantized but one: what it gains to leave that block at 16 bits"
)


def blocks_page(curves: BlockCurves) -> Page:
    """All that the curves of blocks tell, as a page."""
    c = curves
    chart = blocks_chart(c)
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
        None if chart is None else Figure(chart, caption),
        Text(_hybrid(c)),
        Table(
            titles,
            tuple(lines),
            f"{len(c.rows)} blocks, each gain with its own 95 % interval; gains of several blocks do not add up.",
        ),
        name="curves",
        part="Where noise enters",
    )


def blocks_chart(curves: BlockCurves) -> Chart | None:
    """Both curves over the same blocks with 95 % intervals; blocks that make no noise have no chart."""
    c = curves
    if not any(math.isfinite(row.up_to.value) for row in c.rows):
        return None
    labels, common = block_labels([row.block for row in c.rows])
    names = [short(label, 28) for label in labels]
    places = Axis(
        f"{common or 'block'}, from input to output", named(names, n_most=_MOST_BLOCKS), are_turned=are_long(names)
    )
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
    return Chart(
        "block-curves",
        f"Noise entering through {len(c.rows)} blocks",
        f"All blocks quantized: {number(c.everything.value)} dB.{gain}",
        panels,
        490 + (LETTER * max(map(len, names)) if are_long(names) else 0),
    )


def _most_gained(curves: BlockCurves) -> str:
    """Which block gains most when it is spared, if any is shown to."""
    c = curves
    gaining = [row for row in c.rows if row.alone_kept.low > 0]
    whole = f"All blocks at {name(str(c.number_format))} have {with_error(c.everything, 'dB')} SQNR"
    if not gaining:
        return f"{whole}; no single block is shown to gain by staying at 16 bits."
    best = max(gaining, key=lambda row: row.alone_kept.value)
    return f"{whole}; leaving {name(best.block)} alone at 16 bits gains most, {with_error(best.alone_kept, 'dB')}."


def _hybrid(curves: BlockCurves) -> str:
    """Which blocks stay at 16 bits and what that gains; empty when none do."""
    c = curves
    if c.hybrid is None or c.hybrid_gain is None:
        return ""
    return (
        f"Chosen by {c.rule}: {', '.join(map(name, c.kept))} {'stays' if len(c.kept) == 1 else 'stay'} at 16 bits, "
        f"which makes {number(c.paper_bits)} bits per weight. On {c.hybrid.n} fresh seeds that has "
        f"{with_error(c.hybrid, 'dB')}, {with_error(c.hybrid_gain, 'dB', signed=True)} against all blocks at "
        f"{name(str(c.number_format))}, paired."
    )


def maps_section(maps: Maps) -> Section | None:
    """All that was measured in detail; None where nothing was."""
    blocks = shown(
        () if maps.blocks is None else _blocks(maps.blocks),
        _noise(maps),
        () if maps.repetition is None else _repetition(maps.repetition),
        (
            Figure(
                ranges_chart(found, i),
                "Bars reach from the least to the greatest value of a channel. Each panel has its own scale.",
                f"Activation ranges of {name(found.layer)}",
            )
            for i, found in enumerate(maps.ranges)
        ),
    )
    if not blocks:
        return None
    numbers = Text("All numbers, those of the matrices too: `sedimo report RUN --json`.", "quiet")
    return Section("steps", "Layer by layer, step by step", (*blocks, numbers))


def _blocks(found: BlockCurves) -> Iterator[Figure]:
    if chart := blocks_chart(found):
        text = f"{_most_gained(found)} {_CURVES}. Bars are 95 % intervals, on seeds {found.seeds}. {_hybrid(found)}"
        table = Table(
            columns("block", ("this and all before", "plus-minus"), ("gained by keeping it", "plus-minus"), "kept"),
            rows((r.block, r.up_to, r.alone_kept, "16 bits" if r.block in found.kept else "") for r in found.rows),
            "SQNR [dB] with its 95 % interval",
        )
        yield Figure(chart, text, "Where noise enters", table=table)


def _noise(maps: Maps) -> Iterator[Figure]:
    """Of the recipe by block, along the trajectory, and of layers by themselves."""
    found, lines = maps.recipe, maps.trajectory
    if found and (chart := noise_chart(found, "SQNR of the recipe by block and step", "recipe")):
        text = (
            f"SQNR of each block's output, means of {found.n} samples; rows are blocks from input to output. Each call "
            "has the inputs of full precision, so this is the noise that one step makes on its way through the "
            f"denoiser. {_about(found)}"
        )
        yield Figure(chart, text, "Noise block by block", table=_noise_table(found))
    if lines and (chart := trajectory_chart(lines)):
        text = (
            "Quantized against full precision on the same seeds, with 95 % intervals of the mean as bands. *Same "
            "inputs* is what one step does alone; on its *own path* the recipe also has the noise of earlier steps in "
            "its inputs. Latents are those after the step; the last are the result."
        )
        kinds = ("output, same inputs", "output, own path", "latents after it")
        calls = enumerate(zip(lines.timesteps, lines.step, lines.path, lines.latents, strict=True), 1)
        table = Table(
            columns("call", "timestep", *((kind, "plus-minus") for kind in kinds)),
            rows((i, f"{timestep:.4g}", *values) for i, (timestep, *values) in calls),
            "SQNR [dB] with its 95 % interval",
        )
        yield Figure(chart, text, "Along the trajectory", table=table)
    for i, found in enumerate(maps.local):
        what = f"all at {name(found.number_format)}" if found.number_format else "at the formats of this recipe"
        if chart := noise_chart(found, f"Local SQNR {what.replace('`', '')} by block and step", f"local-{i}"):
            text = (
                f"SQNR of layers' own outputs, {what}, on full-precision inputs: noise of other layers is not in it. "
                f"Noise is averaged over the layers of a block and {found.n} samples. {_about(found)}"
            )
            yield Figure(chart, text, f"Noise at the layers' own outputs, {what}", table=_noise_table(found))


def noise_chart(found: NoiseMap, title: str, key: str) -> Chart | None:
    """SQNR of each block at each step; without any finite number there is no chart."""
    if not np.isfinite(found.sqnr_db).any():
        return None
    labels, common = block_labels(found.blocks)
    panel = Heat(
        found.sqnr_db,
        Axis(common, named([short(label, 40) for label in labels])),
        steps_axis(found.timesteps),
        "SQNR [dB], higher is better",
    )
    height = 110 + max(120, _row_height(len(labels)) * len(labels))  # the scale's name needs room, too
    return Chart(f"noise-{key}", title, _extremes(found), (panel,), height)


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
    """Where noise is most and least, in words."""
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


def _noise_table(found: NoiseMap) -> Table:
    lines = (
        (block, *map(_cell, values, errors))
        for block, values, errors in zip(found.blocks, found.sqnr_db, found.standard_error, strict=True)
    )
    titles = columns("block", *(str(i + 1) for i in range(len(found.timesteps))))
    return Table(titles, rows(lines), "SQNR [dB] by block and denoiser call, ± standard error")


def _cell(value: float, error: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else "diverged"
    return f"{value:.1f}" if math.isnan(error) else f"{value:.1f} ± {error:.1f}"


def trajectory_chart(found: TrajectoryLines) -> Chart | None:
    """SQNR at each step as lines with 95 % intervals as bands; without any finite number there is no chart."""
    if not any(math.isfinite(one.value) for line in (found.step, found.path, found.latents) for one in line):
        return None
    series = (
        Series(found.step, (), "output, same inputs as full precision", "other", "s", line=":", has_band=True),
        Series(found.path, (), "output, on its own path", "this", "D", line="-", has_band=True),
        Series(found.latents, (), "latents after the step", "ink", "o", line="--", has_band=True),
    )
    panel = Plot(series, steps_axis(found.timesteps), Axis("SQNR [dB], higher is better"))
    ends = "; ".join(f"{one.label} {number(one.values[-1].value)} dB" for one in series)
    description = f"At the last of {len(found.timesteps)} steps: {ends}"
    return Chart("trajectory", "Noise along the trajectory", description, (panel,), 380)


def _repetition(found: Repetition) -> Iterator[Block]:
    n_steps, n_dark = len(found.timesteps), int(np.isnan(np.array(found.per_step)).all(axis=0).sum())
    text = (
        f"How alike the outputs of two layers are between {found.n} samples (linear CKA, 0 to 1), mean of {n_steps} "
        "timesteps. At the right, the bits that each layer got, coloured as in the map above."
    )
    if n_dark:
        which = "The dark line is a layer" if n_dark == 1 else f"Dark lines are the {n_dark} layers"
        text += f" {which} whose outputs do not tell samples apart, such as those that see the timestep alone."
    yield Figure(matrix_chart(found, "mean"), text, "What repeats what")
    if n_steps > 1:
        single = (
            Figure(matrix_chart(found, which, is_small=True), "Colours as above.", f"The {which} timestep alone")
            for which in ("first", "last")
        )
        yield Beside(tuple(single))
    text = (
        "A layer that repeats others less is more important. Left, by timestep (empty: its output does not tell "
        "samples apart); middle, over all timesteps, the greatest being 1; right, the bits that it got."
    )
    layers = zip(found.layers, found.theta, found.standard_error, found.bits, strict=True)
    table = Table(
        columns("layer", "importance", "bits"),
        rows((layer, f"{theta:.3f} ± {NORMAL_95 * error:.3f}", f"{bits:.3g}") for layer, theta, error, bits in layers),
        "Importance with its 95 % interval",
    )
    yield Figure(importance_chart(found), text, "Importance, and the bits it led to", table=table)
    if chart := convergence_chart(found):
        too_few = max((i + 1 for i, value in enumerate(found.converged) if not value >= _SOME), default=0)
        enough = f"From {too_few + 1} on, the rank correlation is at least {_SOME}."
        if too_few + 1 >= len(found.converged):
            enough = f"No fewer than all {len(found.converged)} keep the rank correlation at {_SOME} or above."
        text = f"How soon importances from few timesteps have the order of those from all. {enough}"
        yield Figure(chart, text, "Enough timesteps?")


def matrix_chart(found: Repetition, which: str, *, is_small: bool = False) -> Chart:
    """One matrix of a probe, layers in the order of the denoiser, with the bits of each beside it."""
    matrix, width = found.matrix(which), _SMALL if is_small else WIDTH
    layers = layers_axis(found, n_most=round(width / 17))
    panel = Heat(
        matrix,
        layers,
        Axis(ticks=layers.ticks, are_turned=True),
        "" if is_small else "correlation of outputs (linear CKA)",
        (0.0, 1.0),
        is_square=True,
        strip=found.bits,
    )
    across, down = np.triu_indices(len(matrix), 1)
    most = int(np.argmax(matrix[across, down]))
    pair = f"{found.layers[across[most]]} and {found.layers[down[most]]}"
    return Chart(
        f"orthogonality-{which}",
        f"Orthogonality of {len(matrix)} layers, {_TITLES[which]}",
        f"Most alike are {pair}, {number(float(matrix[across, down][most]))}",
        (panel,),
        width * (0.95 if is_small else 0.8),
        width,
    )


def importance_chart(found: Repetition) -> Chart:
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
    return Chart(
        "importance",
        "Importance of layers and the bits they got",
        f"{n} layers. Most and least important: {ends}",
        panels,
        90 + _row_height(n) * n,
        n_columns=3,
        ratios=(3, 3, 2),
    )


def convergence_chart(found: Repetition) -> Chart | None:
    """How soon importances from few timesteps have the order of those from all; one timestep has no chart."""
    if np.isfinite(found.converged).sum() < 2:
        return None
    span = max(1.0 - float(np.nanmin(found.converged)), 0.05)
    panel = Plot(
        (Series(tuple(map(only, found.converged)), tuple(range(1, len(found.converged) + 1)), look="this", line="-"),),
        Axis("timesteps sampled, evenly over the trajectory", is_whole=True),
        Axis("rank correlation with all", low=1.0 - 1.08 * span, high=1.0 + 0.08 * span),
        ((1.0, ""),),
    )
    texts = "; ".join(f"{i + 1}: {value:.3f}" for i, value in enumerate(found.converged))
    return Chart("convergence", "Convergence over timesteps", texts, (panel,), 300, 500)


def layers_axis(found: Repetition, *, n_most: int) -> Axis:
    """Every layer by its name while there is room, else where an outermost block begins, as far as there is room."""
    n = len(found.layers)
    if n <= n_most:
        return Axis(ticks=named([_begin_and_end(layer) for layer in found.layers], n_most=n_most))
    begins: dict[str, int] = {}
    for i, block in enumerate(found.blocks):
        if block:
            begins.setdefault(stage(block), i)
    labelled: list[tuple[float, str]] = []
    for place, label in zip(begins.values(), stage_labels(list(begins))[0], strict=True):
        if not labelled or place - labelled[-1][0] >= n / n_most:
            labelled.append((place, label))
    return Axis("layers, labelled where a block begins", tuple(labelled))


def _begin_and_end(text: str) -> str:
    """Begin and end of a long name: layers differ in the one, operations in the other."""
    return text if len(text) <= _NAME else f"{text[:20]}\N{HORIZONTAL ELLIPSIS}{text[-(_NAME - 21) :]}"


def ranges_chart(found: ChannelRanges, position: int = 0) -> Chart:
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
    return Chart(
        f"ranges-{position}",
        f"Activation ranges per channel of {found.layer}",
        f"{len(found.before_low)} channels; {'; '.join(texts)}",
        tuple(panels),
        360,
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
