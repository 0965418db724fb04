"""The page of block curves: where noise enters, the same as a table, and the hybrid recipe."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from sedimo.pipelines.folder import write_file
from sedimo.reporting.block_charts import blocks_curves
from sedimo.reporting.block_phrasing import headline, hybrid_sentence
from sedimo.reporting.explanation_tables import figure
from sedimo.reporting.html import page
from sedimo.reporting.maps import BlockCurves
from sedimo.reporting.rounding import byte_size


def write_block_page(blocks: BlockCurves, path: Path) -> None:
    """Writes the page; an existing file is replaced at once or not at all."""
    write_file(path, render_block_page(blocks).encode())


def render_block_page(blocks: BlockCurves) -> str:
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
        {
            "b": b,
            "headline": headline(b),
            "hybrid": hybrid_sentence(b),
            "chart": Markup(chart),
            "rows": rows,
        },  # escaped
    )
