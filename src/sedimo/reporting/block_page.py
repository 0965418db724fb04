"""The page of block curves: where noise enters, the same as a table, and the hybrid recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from sedimo.metrics.estimate import Estimate
from sedimo.pipelines.folder import write_file
from sedimo.reporting.block_charts import blocks_curves
from sedimo.reporting.explanation_tables import figure
from sedimo.reporting.html import page
from sedimo.reporting.rounding import byte_size, number, with_error
from sedimo.sensitivity.blocks import BlockRow


@dataclass(frozen=True)
class BlockPage:
    """All that the page tells; `seeds` and `n_steps` say on what the curves were measured.

    `rule` says by what blocks stay at 16 bits, `gain_db` is its threshold, when it has one; the hybrid recipe
    was measured on other seeds.
    """

    source: str
    number_format: str
    objective: str
    seeds: str
    n_steps: int
    rule: str
    gain_db: float | None
    rows: Sequence[BlockRow]
    everything: Estimate
    kept: Sequence[str]
    paper_bits: float
    hybrid: Estimate | None
    hybrid_gain: Estimate | None


def write_block_page(blocks: BlockPage, path: Path) -> None:
    """Writes the page; an existing file is replaced at once or not at all."""
    write_file(path, render_block_page(blocks).encode())


def render_block_page(blocks: BlockPage) -> str:
    """The page as HTML text."""
    b = blocks
    chart = blocks_curves(b.rows, b.everything, kept=b.kept, gain_db=b.gain_db)
    rows = [
        (
            row.block,
            f"{row.params:,}",
            byte_size(row.extra_bytes),
            figure(row.up_to),
            figure(row.alone_kept),
            "16 bits" if row.block in b.kept else "",
        )
        for row in b.rows
    ]
    return page(
        "blocks.html.j2",
        {"b": b, "headline": _headline(b), "hybrid": _hybrid(b), "chart": Markup(chart), "rows": rows},  # escaped
    )


def _headline(b: BlockPage) -> str:
    """Which block gains most when it is spared, if any is shown to."""
    shown = [row for row in b.rows if row.alone_kept.low > 0]
    whole = f"All blocks at `{b.number_format}` have {with_error(b.everything, 'dB')} SQNR"
    if not shown:
        return f"{whole}; no single block is shown to gain by staying at 16 bits."
    best = max(shown, key=lambda row: row.alone_kept.value)
    return f"{whole}; leaving `{best.block}` alone at 16 bits gains most, {with_error(best.alone_kept, 'dB')}."


def _hybrid(b: BlockPage) -> str:
    if b.hybrid is None or b.hybrid_gain is None:
        return ""
    names = ", ".join(f"`{name}`" for name in b.kept)
    return (
        f"Chosen by {b.rule}: {names} {'stays' if len(b.kept) == 1 else 'stay'} at 16 bits, which makes "
        f"{number(b.paper_bits)} bits per weight. On {b.hybrid.n} fresh seeds that has {with_error(b.hybrid, 'dB')}, "
        f"{with_error(b.hybrid_gain, 'dB', signed=True)} against all blocks at `{b.number_format}`, paired."
    )
