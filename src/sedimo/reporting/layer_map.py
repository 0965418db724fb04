"""The map of the layers: rows are operations, columns blocks, coloured by bits and marked by the kind of format."""

from __future__ import annotations

from collections.abc import Sequence

from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.quant import families
from sedimo.reporting.page import Legend, LegendEntry, Map, MapCell
from sedimo.reporting.placement import OUTSIDE, inside, kind_of, label_of, natural_order, without_numbers
from sedimo.reporting.summary import Summary
from sedimo.reporting.theme import bit_level
from sedimo.reporting.words import byte_size, family, family_words, number, share


def layer_maps(summary: Summary) -> tuple[Map, ...]:
    """The map: one for each kind of block, the largest first, layers outside all blocks last."""
    placed: dict[str, list[tuple[str, str, str, MapCell]]] = {}
    for cost in summary.chosen:
        operation = summary.table.operations[cost.decision]
        for layer, block in _blocks_of(summary.table, cost.decision):
            cell = MapCell(cost.format, *_about_cell(summary, cost, layer))
            placed.setdefault(kind_of(block), []).append((layer, block, inside(operation, block), cell))
    made = [_outside(placed[kind]) if kind == OUTSIDE else _map(kind, placed[kind]) for kind in placed]
    return tuple(sorted(made, key=lambda one: (one.columns == ("",), -len(one.cells))))


def _blocks_of(table: SensitivityTable, decision: str) -> list[tuple[str, str]]:
    """The layers of a decision and their blocks; layers elsewhere in the tree than the first are left out."""
    block, (first, *others) = table.blocks[decision], table.layers[decision]
    alike = [layer for layer in others if block and without_numbers(layer) == without_numbers(first)]
    depth = len(block.split("."))
    return [(first, block), *((layer, ".".join(layer.split(".")[:depth])) for layer in alike)]


def _map(kind: str, entries: Sequence[tuple[str, str, str, MapCell]]) -> Map:
    blocks = sorted({block for _, block, *_ in entries}, key=natural_order)
    rows: dict[str, int] = {}
    cells: dict[tuple[int, int], MapCell] = {}
    for _, block, operation, cell in entries:
        name, repeat, column = operation, 1, blocks.index(block)
        while (rows.setdefault(name, len(rows)), column) in cells:
            repeat += 1
            name = f"{operation} ({repeat})"
        cells[rows[name], column] = cell
    return Map(f"{len(blocks)} \N{MULTIPLICATION SIGN} {kind}", tuple(rows), tuple(map(label_of, blocks)), cells)


def _outside(entries: Sequence[tuple[str, str, str, MapCell]]) -> Map:
    """One row per layer: there are no blocks to stand in."""
    cells = {(i, 0): cell for i, (*_, cell) in enumerate(entries)}
    return Map("Layers outside all blocks", tuple(layer for layer, *_ in entries), ("",), cells)


def _about_cell(summary: Summary, cost: Cost, layer: str) -> tuple[str, bool]:
    """All about a layer in words, and whether its weights are stored with another's."""
    first, part = summary.table.layers[cost.decision][0], summary.share([cost])
    name = cost.decision if layer == first else layer
    text = f"{name}: {cost.format} ({family_words(cost.format)}), {byte_size(cost.stored_bytes)}"
    if part is not None:
        text += f", {share(part)} of the {summary.cost_name}"
    else:
        text += f", {summary.cost_name} {number(cost.cost, cost.standard_error)}"
    return (text, False) if layer == first else (f"{text}; stored once with {first}", True)


def legends(summary: Summary, *, has_copies: bool) -> tuple[Legend, Legend]:
    """What the colours and marks of the map mean."""
    formats = [cost.format for cost in summary.chosen]
    order = [one.name for one in families.FAMILIES]
    found = {family(f): f for f in reversed(formats) if f.is_quantized}
    quantized = sorted(found.values(), key=lambda f: (order.index(f.family), bool(f.group_size)))
    marks = [LegendEntry(family_words(f), None, f, family(f)) for f in quantized]
    if has_copies:
        marks.append(LegendEntry("dashed outline: shares the weights of the first such layer, stored once"))
    levels = enumerate(sorted({bit_level(f.bits) for f in formats}))
    return (
        Legend("Colours: bits per weight", tuple(LegendEntry("" if i else "bits", n) for i, n in levels)),
        Legend("Marks: method", tuple(marks)),
    )
