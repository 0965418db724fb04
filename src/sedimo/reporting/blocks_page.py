"""The page of block curves: where noise enters, the same as a table, and the hybrid recipe."""

from __future__ import annotations

import math

from sedimo.reporting.figures import LETTER, Axis, Chart, Plot, Series, are_long, named, short
from sedimo.reporting.maps import BlockCurves
from sedimo.reporting.page import Figure, Page, Row, Section, Table, Text, columns, shown
from sedimo.reporting.placement import block_labels
from sedimo.reporting.words import name, number, with_error

_MOST_LABELS = 90


def blocks_page(curves: BlockCurves) -> Page:
    """All that the curves tell, as a page."""
    c = curves
    chart = blocks_chart(c)
    caption = (
        "Above, blocks are quantized one after the other from the input on: where the curve falls, noise enters. "
        "Below, all are quantized but one: what it gains to leave that block at 16 bits, paired with all blocks "
        "quantized. Bars are 95 % intervals of the mean over seeds."
    )
    about = (
        f"Measured by {name(c.objective)} on seeds {c.seeds}, {c.n_steps} step{'' if c.n_steps == 1 else 's'}, against "
        "full precision on the same seeds."
    )
    table = Table(
        columns(
            ("block", "name"),
            "weights",
            ("more at 16 bits", "bytes"),
            "this and all before [dB]",
            "gained by keeping it [dB]",
            "kept",
        ),
        tuple(
            Row(
                (r.block, r.params, r.extra_bytes, r.up_to, r.alone_kept, "16 bits" if r.block in c.kept else ""),
                r.block in c.kept,
            )
            for r in c.rows
        ),
        f"{len(c.rows)} blocks, each gain with its own 95 % interval; gains of several blocks do not add up.",
    )
    blocks = shown(Text(about), None if chart is None else Figure(chart, caption), Text(hybrid_sentence(c)), table)
    return Page(
        f"Blocks of {c.source} at {c.number_format}",
        headline(c),
        sections=(Section("curves", "Where noise enters", blocks),),
    )


def blocks_chart(curves: BlockCurves) -> Chart | None:
    """Both curves over the same blocks with 95 % intervals; blocks that make no noise have no chart."""
    c = curves
    if not any(math.isfinite(row.up_to.value) for row in c.rows):
        return None
    labels, common = block_labels([row.block for row in c.rows])
    names = [short(label, 28) for label in labels]
    places = Axis(
        f"{common or 'block'}, from input to output", named(names, n_most=_MOST_LABELS), are_turned=are_long(names)
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


def headline(curves: BlockCurves) -> str:
    """Which block gains most when it is spared, if any is shown to."""
    c = curves
    gaining = [row for row in c.rows if row.alone_kept.low > 0]
    whole = f"All blocks at {name(c.number_format)} have {with_error(c.everything, 'dB')} SQNR"
    if not gaining:
        return f"{whole}; no single block is shown to gain by staying at 16 bits."
    best = max(gaining, key=lambda row: row.alone_kept.value)
    return f"{whole}; leaving {name(best.block)} alone at 16 bits gains most, {with_error(best.alone_kept, 'dB')}."


def hybrid_sentence(curves: BlockCurves) -> str:
    """Which blocks stay at 16 bits and what that gains; empty when none do."""
    c = curves
    if c.hybrid is None or c.hybrid_gain is None:
        return ""
    return (
        f"Chosen by {c.rule}: {', '.join(map(name, c.kept))} {'stays' if len(c.kept) == 1 else 'stay'} at 16 bits, "
        f"which makes {number(c.paper_bits)} bits per weight. On {c.hybrid.n} fresh seeds that has "
        f"{with_error(c.hybrid, 'dB')}, {with_error(c.hybrid_gain, 'dB', signed=True)} against all blocks at "
        f"{name(c.number_format)}, paired."
    )
