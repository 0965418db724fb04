"""The map of the layers: rows are operations, columns blocks, coloured by bits and marked by the kind of format."""

from __future__ import annotations

from collections.abc import Sequence

from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.quant import families
from sedimo.reporting.page import Beside, Block, Legend, Map, Swatch, Text
from sedimo.reporting.placement import OUTSIDE, inside, kind_of, label_of, natural_order, without_numbers
from sedimo.reporting.summary import Summary
from sedimo.reporting.theme import bit_level
from sedimo.reporting.words import byte_size, family, family_words, number, share


def layer_map(summary: Summary) -> tuple[Block, ...]:
    """The map under its heading: what its colours and marks mean, the layers, and how to read it."""
    maps = layer_maps(summary)
    has_copies = any(cell.is_copy for one in maps for cell in one.cells.values())
    about = "Rows are operations, columns blocks from input to output. Point at a cell for its name, size and "
    return (
        Text("Map of the layers", "heading"),
        *_legends(summary, has_copies=has_copies),
        Beside(maps),
        Text(f"{about}{summary.cost_name}.", "quiet"),
    )


def layer_maps(summary: Summary) -> tuple[Map, ...]:
    """One for each kind of block, the largest first, layers outside all blocks last."""
    placed: dict[str, list[tuple[str, str, Swatch]]] = {}
    for cost in summary.chosen:
        operation = summary.table.operations[cost.decision]
        for layer, block in _blocks_of(summary.table, cost.decision):
            row = inside(operation, block) if block else layer
            placed.setdefault(kind_of(block), []).append((row, block, _swatch(summary, cost, layer)))
    made = (_map(kind, entries) for kind, entries in placed.items())
    return tuple(sorted(made, key=lambda one: (one.columns == ("",), -len(one.cells))))


def _blocks_of(table: SensitivityTable, decision: str) -> list[tuple[str, str]]:
    """The layers of a decision and their blocks; layers elsewhere in the tree than the first are left out."""
    block, (first, *others) = table.blocks[decision], table.layers[decision]
    alike = [one for one in others if block and without_numbers(one) == without_numbers(first)]
    depth = len(block.split("."))
    return [(first, block), *((layer, ".".join(layer.split(".")[:depth])) for layer in alike)]


def _map(kind: str, entries: Sequence[tuple[str, str, Swatch]]) -> Map:
    """Of layers with their rows and blocks; outside of blocks, each has a row."""
    if kind == OUTSIDE:
        outside = {(i, 0): cell for i, (*_, cell) in enumerate(entries)}
        return Map("Layers outside all blocks", tuple(row for row, *_ in entries), ("",), outside)
    blocks = sorted({block for _, block, _ in entries}, key=natural_order)
    rows: dict[str, int] = {}
    cells: dict[tuple[int, int], Swatch] = {}
    for row, block, cell in entries:
        name, repeat, column = row, 1, blocks.index(block)
        while (rows.setdefault(name, len(rows)), column) in cells:
            repeat += 1
            name = f"{row} ({repeat})"
        cells[rows[name], column] = cell
    title = f"{len(blocks)} \N{MULTIPLICATION SIGN} {kind}"
    return Map(title, tuple(rows), tuple(map(label_of, blocks)), cells)


def _swatch(summary: Summary, cost: Cost, layer: str) -> Swatch:
    """A layer with all about it in words; a copy, if its weights are stored with another's."""
    first, part = summary.table.layers[cost.decision][0], summary.share([cost])
    name = cost.decision if layer == first else layer
    text = f"{name}: {cost.format} ({family_words(cost.format)}), {byte_size(cost.stored_bytes)}, "
    if part is None:
        text += f"{summary.cost_name} {number(cost.cost, cost.standard_error)}"
    else:
        text += f"{share(part)} of the {summary.cost_name}"
    if layer == first:
        return Swatch(text, format=cost.format)
    return Swatch(f"{text}; stored once with {first}", format=cost.format, is_copy=True)


def _legends(summary: Summary, *, has_copies: bool) -> tuple[Legend, Legend]:
    formats = [cost.format for cost in summary.chosen]
    order = [one.name for one in families.FAMILIES]
    found = {family(f): f for f in reversed(formats) if f.is_quantized}
    quantized = sorted(found.values(), key=lambda f: (order.index(f.family), bool(f.group_size)))
    marks = [Swatch(family_words(f), None, f, family(f)) for f in quantized]
    if has_copies:
        marks.append(Swatch("dashed outline: shares the weights of the first such layer, stored once"))
    levels = enumerate(sorted({bit_level(f.bits) for f in formats}))
    return (
        Legend("Colours: bits per weight", tuple(Swatch("" if i else "bits", n) for i, n in levels)),
        Legend("Marks: method", tuple(marks)),
    )
