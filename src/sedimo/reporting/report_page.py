"""The page of a quantized denoiser: what was decided, why, what it cost, how it was made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from sedimo.metrics.estimate import Estimate, normal_estimate
from sedimo.metrics.signal import decibel
from sedimo.quant import families
from sedimo.quant.formats import Format
from sedimo.reporting import phrasing
from sedimo.reporting.explanation_page import explanation_section, matters_section
from sedimo.reporting.figures import LETTER, ROW, Axis, Chart, Plot, Series, are_long, named, only, short
from sedimo.reporting.maps_page import maps_section
from sedimo.reporting.page import (
    Beside,
    BitsBar,
    Block,
    Cell,
    Column,
    Facts,
    Figure,
    Items,
    Legend,
    LegendEntry,
    Map,
    MapCell,
    Page,
    Row,
    Section,
    Table,
    Text,
    columns,
    shown,
)
from sedimo.reporting.placement import OUTSIDE, Place, natural_order, place, stage_labels, without_numbers
from sedimo.reporting.summary import MEASURES, Choice, DecisionRow, GroupRow, RecipeRow, Sizes, Step, Summary
from sedimo.reporting.theme import bit_level
from sedimo.reporting.words import (
    EXPLANATION_GLOSSARY,
    GLOSSARY,
    MINUS,
    byte_size,
    count,
    duration,
    family,
    family_words,
    number,
    said,
    share,
    with_error,
)

MAX_ROWS = 24  # operations that are drawn
_MOST_LABELS = 40
_TENTH = 0.5  # an error with which decibels are told to one decimal
_BITS_AHEAD = 3.0  # how far beyond this recipe the frontier is drawn
_MANY_TIMES = 30  # the least cost, beyond which a curve of costs has a logarithmic axis


def report_page(summary: Summary) -> Page:
    """All that a summary tells, as a page."""
    explanation = summary.evidence.explanation
    sections = (
        None if explanation is None else matters_section(explanation),
        _decided(summary),
        _why(summary),
        None if explanation is None else explanation_section(explanation, here=summary.sizes.paper_bits),
        maps_section(summary.evidence.maps),
        _cost(summary),
        _how(summary),
        Section(
            "words", "Words used here", (Facts((*GLOSSARY, *(EXPLANATION_GLOSSARY if explanation else ())), True),)
        ),
    )
    return Page(
        title=f"{summary.model} at {summary.sizes.paper_bits:.2f} bits",
        headline=phrasing.headline(summary),
        tiles=phrasing.tiles(summary),
        warnings=phrasing.warning_sentences(summary),
        sections=tuple(section for section in sections if section is not None),
        created=summary.provenance.created,
    )


def _decided(summary: Summary) -> Section:
    sizes = summary.sizes
    formats = "Each weight layer got a number format: how many bits every weight keeps, and how they are used."
    shared = (
        f" {sizes.n_layers} layers make {sizes.n_decisions} decisions, because layers with equal weights are stored "
        "once."
    )
    weights: dict[int, int] = {}
    for row in summary.decisions:
        weights[row.format.bits] = weights.get(row.format.bits, 0) + row.params
    maps = layer_maps(summary.decisions, cost_name=_cost_name(summary))
    return Section(
        "decided",
        "What was decided",
        shown(
            Text(formats + (shared if sizes.n_decisions < sizes.n_layers else "")),
            Items(phrasing.decision_sentences(summary), "findings"),
            BitsBar(tuple((bits, weights[bits] / sizes.params) for bits in sorted(weights))),
            Text(
                f"All {sizes.params:,} weights by the bits of their codes; scales and codebooks come on top "
                f"({sizes.stored_bits:.2f} bits per weight as stored).",
                "quiet",
            ),
            Text("Map of the layers", "heading"),
            _legends(summary, has_copies=any(cell.is_copy for one in maps for cell in one.cells)),
            Beside(maps),
            Text(
                "Rows are operations, columns blocks from input to output. Point at a cell for its name, size and "
                f"{_cost_name(summary)}.",
                "quiet",
            ),
            _decisions(summary),
        ),
    )


def _decisions(summary: Summary) -> Section:
    cost_name = _cost_name(summary)
    table = Table(
        columns(
            ("layer", "name"),
            "format",
            "shape",
            ("stored", "bytes"),
            (cost_name, "plus-minus"),
            ("share", "share"),
            "one step up",
            "one step down",
        ),
        tuple(
            Row(
                (
                    Cell(row.name, note=f"+{len(row.layers) - 1} equal" if len(row.layers) > 1 else ""),
                    row.format,
                    "\N{MULTIPLICATION SIGN}".join(map(str, row.shape)),
                    row.stored_bytes,
                    normal_estimate(row.cost, row.standard_error, row.n),
                    "" if row.share is None else row.share,
                    _step(row.larger),
                    _step(row.smaller),
                )
            )
            for row in summary.decisions
        ),
    )
    change = ": the change of the whole recipe's predicted noise, and of the size" if summary.choice.is_noise else ""
    about = f'{cost_name.capitalize()} with its 95 % interval. "One step" is the next useful format of that layer alone'
    return Section(
        "", f"All {len(summary.decisions)} decisions as a table", (table, Text(f"{about}{change}.", "quiet"))
    )


def _step(step: Step | None) -> str:
    if step is None:
        return ""
    change = number(step.cost_change, signed=True)
    if step.noise_db is not None:
        relative = 10 ** (step.noise_db / 10) - 1
        change = f"{'+' if relative > 0 else MINUS}{share(abs(relative))}"
    return f"{step.format}: {change}, {said(step.stored_bytes_change, 'change of bytes')[0]}"


def _legends(summary: Summary, *, has_copies: bool) -> tuple[Legend, Legend]:
    levels = sorted({bit_level(d.format.bits) for d in summary.decisions})
    found: dict[str, Format] = {}
    for decision in summary.decisions:
        found.setdefault(family(decision.format), decision.format)
    order = [one.name for one in families.FAMILIES]
    quantized = sorted(
        (f for f in found.values() if f.is_quantized), key=lambda f: (order.index(f.family), bool(f.group_size))
    )
    marks = [LegendEntry(family_words(f), None, f, family(f)) for f in quantized]
    if has_copies:
        marks.append(LegendEntry("dashed outline: shares the weights of the first such layer, stored once"))
    return (
        Legend("Colours: bits per weight", tuple(LegendEntry("" if i else "bits", n) for i, n in enumerate(levels))),
        Legend("Marks: method", tuple(marks)),
    )


def layer_maps(decisions: Sequence[DecisionRow], *, cost_name: str = "noise") -> tuple[Map, ...]:
    """The map: one for each kind of block, the largest first, layers outside all blocks last."""
    placed: dict[str, list[tuple[Place, MapCell, str]]] = {}
    for decision in decisions:
        for layer, found in _places(decision):
            is_copy = layer != decision.layers[0]
            text = _about_cell(decision, layer if is_copy else decision.name, cost_name, is_copy=is_copy)
            placed.setdefault(found.kind, []).append((found, MapCell(0, 0, decision.format, text, is_copy), layer))
    made = [_outside(placed[kind]) if kind == OUTSIDE else _map(kind, placed[kind]) for kind in placed]
    return tuple(sorted(made, key=lambda one: (one.columns == ("",), -len(one.cells))))


def _places(decision: DecisionRow) -> list[tuple[str, Place]]:
    """The places of all layers of a decision; layers elsewhere in the tree than the first have none."""
    first, depth = decision.layers[0], len(decision.block.split(".")) if decision.block else 0
    found = [(first, place(decision.operation, decision.block))]
    for layer in decision.layers[1:]:
        if depth and without_numbers(layer) == without_numbers(first):
            block = ".".join(layer.split(".")[:depth])
            found.append((layer, place(decision.operation, block)))
    return found


def _map(kind: str, entries: Sequence[tuple[Place, MapCell, str]]) -> Map:
    blocks = sorted({p.block: p.label for p, *_ in entries}.items(), key=lambda item: natural_order(item[0]))
    of_block = {block: i for i, (block, _) in enumerate(blocks)}
    names: dict[str, int] = {}
    cells: dict[tuple[int, int], MapCell] = {}
    for found, cell, _ in entries:
        name, repeat = found.operation, 1
        while (names.setdefault(name, len(names)), of_block[found.block]) in cells:
            repeat += 1
            name = f"{found.operation} ({repeat})"
        at = names[name], of_block[found.block]
        cells[at] = MapCell(*at, cell.format, cell.text, cell.is_copy)
    title = f"{len(blocks)} \N{MULTIPLICATION SIGN} {kind}"
    return Map(title, tuple(names), tuple(label for _, label in blocks), tuple(cells.values()))


def _outside(entries: Sequence[tuple[Place, MapCell, str]]) -> Map:
    """One row per layer: there are no blocks to stand in."""
    cells = tuple(MapCell(i, 0, cell.format, cell.text, cell.is_copy) for i, (_, cell, _) in enumerate(entries))
    return Map("Layers outside all blocks", tuple(layer for *_, layer in entries), ("",), cells)


def _about_cell(row: DecisionRow, name: str, cost_name: str, *, is_copy: bool) -> str:
    text = f"{name}: {row.format} ({family_words(row.format)}), {byte_size(row.stored_bytes)}"
    if row.share is not None:
        text += f", {share(row.share)} of the {cost_name}"
    else:
        text += f", {cost_name} {number(row.cost, row.standard_error)}"
    return f"{text}; stored once with {row.layers[0]}" if is_copy else text


def _why(summary: Summary) -> Section:
    operations, blocks = _comparable(summary.operations), _comparable(summary.blocks)
    return Section(
        "why",
        "Why",
        shown(
            Text(phrasing.method_sentence(summary)),
            Items(phrasing.reason_sentences(summary), "findings"),
            _operations_figure(summary, operations) if operations else None,
            _blocks_figure(summary, blocks) if operations and len(blocks) > 1 else None,
        ),
    )


def _comparable(groups: Sequence[GroupRow]) -> list[GroupRow]:
    return [g for g in groups if g.n_reference and g.reference_cost > 0]


def _reference_costs(groups: Sequence[GroupRow]) -> Series:
    """Costs at the reference format, coloured by the bits that the groups got."""
    values = (normal_estimate(g.reference_cost, g.reference_standard_error) for g in groups)
    return Series(tuple(values), bits=tuple(g.paper_bits for g in groups))


def _operations_figure(summary: Summary, groups: Sequence[GroupRow]) -> Figure:
    rows = sorted(groups, key=lambda g: -g.reference_cost)[:MAX_ROWS]
    reference, choice = summary.reference_format, summary.choice
    notes = tuple(f"{g.paper_bits:.1f} bits, {share(g.params / summary.sizes.params)}" for g in rows)
    what = "noise" if choice.is_noise else f"cost [{choice.unit}]"
    label = f"{what} if all its layers were at {reference}\n(logarithmic; bars: 95 % interval)"
    plot = Plot(
        (_reference_costs(rows),),
        Axis(ticks=named([short(g.name, 40) for g in rows]), notes=notes),
        Axis(label, is_logarithmic=True),
        is_flat=True,
    )
    description = "; ".join(f"{g.name} {g.reference_cost:.2e}, {g.paper_bits:.1f} bits" for g in rows)
    title = f"Sensitivity by operation, all at {reference}"
    return Figure(
        Chart("operations", title, description, (plot,), 86 + ROW * len(rows)),
        f"If every layer of the operation were at `{reference}`: further right is more sensitive. The colour and the "
        "numbers at the right tell what it got: average bits, and its share of the weights. Sensitive operations get "
        "more bits, unless their many weights make every bit expensive.",
        "By operation",
    )


def _blocks_figure(summary: Summary, groups: Sequence[GroupRow]) -> Figure:
    rows = sorted(groups, key=lambda g: g.name == OUTSIDE)
    names, common = stage_labels([g.name for g in rows])
    noise = "noise" if summary.choice.is_noise else "cost"
    plot = Plot(
        (_reference_costs(rows),),
        Axis(common, named(names, n_most=_MOST_LABELS), are_turned=are_long(names)),
        Axis(f"{noise} at {summary.reference_format}", is_logarithmic=True),
    )
    chart = Chart(
        "blocks",
        f"Sensitivity by block, all at {summary.reference_format}",
        "; ".join(f"{g.name} {g.reference_cost:.2e}" for g in rows),
        (plot,),
        240 + (LETTER * max(map(len, names)) if are_long(names) else 0),
    )
    caption = "The same, with all layers of an outermost block taken together."
    return Figure(chart, caption, "By block, from input to output")


def _cost(summary: Summary) -> Section | None:
    evidence = summary.evidence
    curve = [_frontier_figure(summary)] if len(evidence.frontier) > 1 else []
    agreed = [] if evidence.agreement is None else [_agreement_figure(summary)]
    if not (evidence.recipes or evidence.differences or curve or agreed or evidence.pictures):
        return None
    return Section(
        "cost",
        "What it cost",
        shown(
            Items(phrasing.cost_sentences(summary), "findings"),
            _entrants(summary),
            _recipes_figure(summary),
            _recipes(evidence.recipes),
            _differences(summary),
            Beside((*curve, *agreed)),
            Text("The same seeds, before and after", "heading") if evidence.pictures else None,
            Beside(evidence.pictures),
        ),
    )


def _entrants(summary: Summary) -> tuple[Block, ...]:
    entrants = summary.evidence.entrants
    if not entrants:
        return ()
    rows = tuple(
        Row(
            (
                f"{one.name} (this report)" if one.is_winner else one.name,
                one.stored_bits,
                "" if one.predicted_db is None else Estimate(one.predicted_db, _TENTH, -math.inf, math.inf, 0),
                one.searched,
                "" if one.final is None else one.final,
            ),
            one.is_winner,
        )
        for one in entrants
    )
    titles = columns(
        "recipe by",
        ("stored bits", "bits"),
        "predicted [dB]",
        ("on the searched seeds [dB]", "plus-minus"),
        ("in the final [dB]", "plus-minus"),
    )
    caption = (
        "Mean SQNR with its 95 % interval; higher is better. The final is held on seeds that nothing was searched on, "
        "and the figures of the recipes there are known better than the errors suggest, because all ran on the same "
        "seeds."
    )
    return (
        Text("What it was chosen among", "heading"),
        Table(titles, rows, caption),
    )


def _recipes_figure(summary: Summary) -> Figure | None:
    measured = [(r, r.measures["sqnr_db"]) for r in summary.evidence.recipes if "sqnr_db" in r.measures]
    if len(measured) < 2:
        return None
    rows = sorted(measured, key=lambda pair: -pair[1].value)
    names = [
        ("this recipe: " if r.kind == "this" else "") + f"{short(r.name, 36)} ({r.paper_bits:.2f} bits)"
        for r, _ in rows
    ]
    own = tuple(i for i, (r, _) in enumerate(rows) if r.kind == "this")
    plot = Plot(
        (Series(tuple(value for _, value in rows), marked=own),),
        Axis(ticks=named(names), bold=tuple(names[i] for i in own)),
        Axis("SQNR [dB], higher is better"),
        is_flat=True,
    )
    description = "; ".join(f"{r.name} {with_error(value, 'dB')}" for r, value in rows)
    chart = Chart("recipes", "Quality of all measured recipes", description, (plot,), 60 + ROW * len(rows))
    caption = (
        "Each with its 95 % interval over seeds. All recipes ran on the same seeds, so differences between them are "
        "known better than the bars suggest."
    )
    return Figure(chart, caption, "Compared with other recipes")


def _recipes(recipes: Sequence[RecipeRow]) -> Table | None:
    """All measured recipes, this one first; a number of samples that all share stands in the title."""
    names = [m for m in MEASURES if any(m in row.measures for row in recipes)]
    if not names:
        return None
    common = {m: _common_n(row.measures[m] for row in recipes if m in row.measures) for m in names}
    titles = (
        *columns("recipe", ("bits", "bits"), ("stored bits", "bits")),
        *(Column(_title(m), "plus-minus", f"n = {n}" if n else "") for m, n in common.items()),
    )

    def cell(row: RecipeRow, measure: str) -> Cell:
        value = row.measures.get(measure, "")
        is_own = isinstance(value, Estimate) and not common[measure]
        return Cell(value, note=f"n = {value.n}" if is_own and isinstance(value, Estimate) else "")

    rows = (
        Row(
            (
                f"{row.name} (this report)" if row.kind == "this" else row.name,
                row.paper_bits,
                "" if row.stored_bits is None else row.stored_bits,
                *(cell(row, m) for m in names),
            ),
            row.kind == "this",
        )
        for row in sorted(recipes, key=lambda row: row.kind != "this")
    )
    return Table(titles, tuple(rows))


def _common_n(estimates: Iterable[Estimate]) -> int:
    """The number of samples if all have the same, else 0: then every value tells its own."""
    found = {estimate.n for estimate in estimates}
    return found.pop() if len(found) == 1 else 0


def _differences(summary: Summary) -> tuple[Block, ...]:
    found = summary.evidence.differences
    if not found:
        return ()
    difference = Column("difference", "change", "95 % interval")
    titles = (*columns("this recipe minus", "measure"), difference, *columns("samples", ("verdict", "verdict")))
    rows = tuple(Row((r.other, _title(r.measure), r.difference, r.difference.n, r.verdict)) for r in found)
    return Text("Differences on the same seeds", "heading"), Table(titles, rows)


def _title(measure: str) -> str:
    found = MEASURES[measure]
    return f"{found.title}{f' [{found.unit}]' if found.unit else ''} {'↑' if found.is_higher_better else '↓'}"


def _frontier_figure(summary: Summary) -> Figure:
    """Predicted quality over bits: the curve of best recipes, and this one on it."""
    choice, points = summary.choice, summary.evidence.frontier
    here = summary.sizes.paper_bits if choice.accounting == "paper" else summary.sizes.stored_bits
    scale = decibel if choice.is_noise else float
    drawn = [p for p in points if (p.cost > 0 or not choice.is_noise) and p.bits <= here + _BITS_AHEAD]
    costs = [p.cost for p in drawn]
    curve = Series(
        tuple(only(scale(c)) for c in costs), tuple(p.bits for p in drawn), "the best at each budget", line="-"
    )
    this = Series((only(scale(choice.cost.value)),), (here,), "this recipe", "this", "D")
    is_logarithmic = bool(costs) and not choice.is_noise and max(costs) > _MANY_TIMES * min(costs) > 0
    plot = Plot(
        (curve, this) if choice.cost.value > 0 or not choice.is_noise else (curve,),
        Axis(f"bits per weight, {'as in the papers' if choice.accounting == 'paper' else 'as stored'}"),
        Axis("predicted SQNR [dB]" if choice.is_noise else "predicted cost", is_logarithmic=is_logarithmic),
    )
    description = "; ".join(f"{p.bits:.2f} bits {scale(p.cost):.3g}" for p in points if p.cost > 0)
    limit = "" if choice.budget_bops is None else f" within {count(choice.budget_bops)} bit operations"
    return Figure(
        Chart("frontier", "What more bits would buy", description, (plot,), 340, 500),
        f"The best recipe at each budget{limit}, as predicted from the costs.",
        "What more bits would buy",
    )


def _agreement_figure(summary: Summary) -> Figure:
    """Predicted against measured noise; on the line, costs simply add up."""
    agreement = summary.evidence.agreement
    assert agreement is not None  # noqa: S101  # the caller has looked
    plot = Plot(
        (Series(tuple(map(only, agreement.measured)), tuple(agreement.predicted), look="this"),),
        Axis("predicted noise (sum of costs)", is_logarithmic=True),
        Axis("measured noise", is_logarithmic=True),
        diagonal=True,
    )
    description = f"{agreement.n} recipes; rank correlation {agreement.srcc:.2f}, slope {agreement.slope:.2f}"
    return Figure(
        Chart("agreement", "Do costs add up?", description, (plot,), 340, 420),
        f"{agreement.n} {summary.evidence.agreement_of}. On the dashed line the prediction is exact.",
        "Do costs add up?",
    )


def _how(summary: Summary) -> Section:
    choice, origin = summary.choice, summary.provenance
    limits = choice.rule if choice.decided_by == choice.rule else f"{choice.rule}, at most {_limits(choice)}"
    found = [
        ("Sensitivity by", choice.method),
        ("Chosen by", limits),
        ("Bit operations", _operations(summary.sizes)),
        ("Denoiser", summary.denoiser),
        ("Seeds", origin.seeds),
        *((key.removeprefix("n_").replace("_", " ").capitalize(), value) for key, value in origin.sampling.items()),
        ("Time", _listed({name: duration(value) for name, value in origin.seconds.items()})),
        ("Machine", origin.machine),
        ("Versions", _listed(origin.versions)),
        ("Made", origin.created),
    ]
    notes = (*choice.notes, *origin.notes)
    return Section(
        "how",
        "How it was made",
        shown(
            Text(origin.command, "code"),
            Facts(tuple((key, value) for key, value in found if value)),
            Section("", "Notes", shown(Items(notes))),
        ),
    )


def _listed(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _limits(choice: Choice) -> str:
    accounting = "as in the papers" if choice.accounting == "paper" else "as stored"
    size = "" if choice.budget_bits is None else f"{choice.budget_bits:.3f} bits per weight {accounting}"
    bops = "" if choice.budget_bops is None else f"{count(choice.budget_bops)} bit operations"
    return " and ".join(text for text in (size, bops) if text)


def _operations(sizes: Sizes) -> str:
    """Of one sample and call; nothing if they were not counted."""
    if not sizes.full_bops:
        return ""
    return (
        f"{count(sizes.bops)} a sample and denoiser call, {share(sizes.bops / sizes.full_bops)} of those at 16 bits; "
        f"the products of attention are {count(sizes.attention_bops)} of them in any case"
    )


def _cost_name(summary: Summary) -> str:
    return "noise" if summary.choice.is_noise else "cost"
