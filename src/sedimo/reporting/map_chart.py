"""The map of blocks by operations: coloured by bits, marked by method.

Written as SVG directly, because every cell has its own tooltip and a map of hundreds of cells must stay small.
Colours are the page's custom properties, as in the other charts.
"""

from __future__ import annotations

from html import escape

from sedimo.quant.formats import Format
from sedimo.reporting.phrasing import FAMILIES, family
from sedimo.reporting.placement import OUTSIDE, Cell, Panel
from sedimo.reporting.rounding import byte_size, number, share
from sedimo.reporting.theme import bit_level

_LETTER = 7.1  # mean width of a character of a row label [px]
_WIDE, _NARROW = 36, 19  # width of a cell with and without its digit [px]
_HEIGHT = 26
_COLUMNS_WITH_DIGITS = 24
_GAP = 2


def panel_svg(panel: Panel, *, cost_name: str = "noise") -> str:
    """One panel of the map; as wide as its cells need, so that a small screen scrolls."""
    left = 14 + _LETTER * max(len(row) for row in panel.rows)
    cell_width = _WIDE if len(panel.columns) <= _COLUMNS_WITH_DIGITS else _NARROW
    is_upright = any(len(label) * _LETTER > cell_width for label in panel.columns)
    top = 12 + (_LETTER * max(len(label) for label in panel.columns) if is_upright else 10)
    width, height = left + cell_width * len(panel.columns) + 4, top + _HEIGHT * len(panel.rows) + 4
    parts = [
        f'<svg class="map" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="{escape(_description(panel))}">'
    ]
    for i, row in enumerate(panel.rows):
        y = top + _HEIGHT * (i + 0.5) + 4
        parts.append(f'<text class="row" x="{left - 8:.0f}" y="{y:.1f}">{escape(row)}</text>')
    for j, label in enumerate(panel.columns):
        x, y = left + cell_width * (j + 0.5), top - 6
        turn = f' transform="rotate(-90 {x + 4:.1f} {y:.1f})" x="{x + 4:.1f}"' if is_upright else f' x="{x:.1f}"'
        parts.append(f'<text class="column{" turned" if is_upright else ""}" y="{y:.1f}"{turn}>{escape(label)}</text>')
    for cell in panel.cells:
        parts.append(_cell(cell, left + cell_width * cell.column, top + _HEIGHT * cell.row, cell_width, cost_name))
    return "".join([*parts, "</svg>"])


def mark_svg(number_format: Format) -> str:
    """The mark of a method alone, for the legend."""
    return (
        f'<svg class="mark" width="18" height="18" viewBox="0 0 18 18" aria-hidden="true">'
        f"{_mark(number_format, 9, 9, 'legend')}</svg>"
    )


def _cell(cell: Cell, x: float, y: float, width: float, cost_name: str) -> str:
    row = cell.decision
    level, has_digit = bit_level(row.format.bits), width >= _WIDE
    box_width, box_height = width - _GAP, _HEIGHT - _GAP
    middle = y + box_height / 2
    digit = (
        f'<text class="on{level}" x="{x + 11:.1f}" y="{middle + 4.5:.1f}">{row.format.bits}</text>' if has_digit else ""
    )
    place = x + (26 if has_digit else box_width / 2)
    return (
        f'<g class="cell{" copy" if cell.is_copy else ""}"><title>{escape(_tooltip(cell, cost_name))}</title>'
        f'<rect class="b{level}" x="{x:.1f}" y="{y:.1f}" width="{box_width:.1f}" height="{box_height}" rx="3"/>'
        f"{digit}{_mark(row.format, place, middle, f'on{level}')}</g>"
    )


def _mark(number_format: Format, x: float, y: float, ink: str) -> str:
    """Dash: uniform; three dashes: uniform in groups; dot: codebook per channel; ring: one codebook."""
    kind = family(number_format)
    if kind == "fp":
        return ""
    if kind == "kmc":
        return f'<circle class="{ink} filled" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    if kind == "kma":
        return f'<circle class="{ink} line" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
    rows = (-3.5, 0.0, 3.5) if kind == "uaq in groups" else (0.0,)
    path = "".join(f"M{x - 4.5:.1f} {y + dy:.1f}h9" for dy in rows)
    return f'<path class="{ink} line" d="{path}"/>'


def _tooltip(cell: Cell, cost_name: str) -> str:
    row = cell.decision
    what = cell.layer if cell.is_copy else row.name
    text = f"{what}: {row.format} ({FAMILIES[family(row.format)]}), {byte_size(row.stored_bytes)}"
    if row.share is not None:
        text += f", {share(row.share)} of the {cost_name}"
    else:
        text += f", {cost_name} {number(row.cost, row.standard_error)}"
    return f"{text}; stored once with {row.layers[0]}" if cell.is_copy else text


def _description(panel: Panel) -> str:
    where = "layers outside all blocks" if panel.kind == OUTSIDE else f"{len(panel.columns)} {panel.kind}"
    return f"Map of {len(panel.cells)} layers in {where}; the table of all decisions below has the same content"
