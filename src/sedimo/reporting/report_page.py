"""The page of a quantized denoiser: what was decided, why, what it cost, how it was made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from sedimo.allocation.combine import Agreement
from sedimo.allocation.table import Cost
from sedimo.methods.portfolio import Entrant
from sedimo.metrics.estimate import Estimate, normal_estimate
from sedimo.metrics.signal import decibel
from sedimo.reporting import phrasing
from sedimo.reporting.explanation import explanation_section, matters_section
from sedimo.reporting.figures import ROW, Axis, Plot, Series, named, only, room, short
from sedimo.reporting.layer_map import layer_map
from sedimo.reporting.measured_maps import maps_section
from sedimo.reporting.page import (
    Beside,
    Cell,
    Facts,
    Figure,
    Items,
    Legend,
    Page,
    Row,
    Section,
    Swatch,
    Table,
    Text,
    columns,
    rows,
    section,
    titled,
)
from sedimo.reporting.placement import OUTSIDE, stage_labels
from sedimo.reporting.summary import MeasuredRecipe, Summary, added
from sedimo.reporting.words import (
    EXPLANATION_GLOSSARY,
    GLOSSARY,
    MINUS,
    count,
    duration,
    number,
    said,
    share,
    verdict,
    with_error,
)

MAX_ROWS = 24  # operations that are drawn
_MOST_LABELS = 40
_TENTH = 0.5  # an error with which decibels are told to one decimal
_BITS_AHEAD = 3.0  # how far beyond this recipe the frontier is drawn
_MEASURES = {"sqnr_db": "SQNR [dB] ↑", "psnr_db": "PSNR [dB] ↑", "fid": "FID ↓", "kid": "KID ↓"}
_COUNTED = {"paper": "as in the papers", "stored": "as stored"}
_MANY_TIMES = 30  # the least cost, beyond which a curve of costs has a logarithmic axis


def report_page(summary: Summary) -> Page:
    """All that a summary tells, as a page."""
    explanation = summary.evidence.explanation
    words = GLOSSARY | (EXPLANATION_GLOSSARY if explanation else {})
    sections = (
        None if explanation is None else matters_section(explanation),
        _decided(summary),
        _why(summary),
        None if explanation is None else explanation_section(explanation, here=summary.allocation.paper_bits),
        maps_section(summary.evidence.maps),
        _cost(summary),
        _how(summary),
        section("words", "Words used here", Facts(tuple(words.items()), is_glossary=True)),
    )
    return Page(
        title=f"{summary.model} at {summary.allocation.paper_bits:.2f} bits",
        headline=phrasing.headline(summary),
        tiles=phrasing.tiles(summary),
        warnings=phrasing.prediction_warnings(summary.evidence.prediction),
        sections=tuple(section for section in sections if section is not None),
        created=summary.provenance.created,
    )


def _decided(summary: Summary) -> Section:
    n_layers, n_decisions, n_params = summary.n_layers, len(summary.chosen), summary.table.total_params
    about = "Each weight layer got a number format: how many bits every weight keeps, and how they are used."
    if n_decisions < n_layers:
        about += f" {n_layers} layers make {n_decisions} decisions, because layers with equal weights are stored once."
    weights: Counter[int] = Counter()
    for cost in summary.chosen:
        weights[cost.format.bits] += summary.params([cost])
    shares = {bits: weights[bits] / n_params for bits in sorted(weights)}
    parts = tuple(Swatch(f"{bits} bits {share(part)}", bits) for bits, part in shares.items())
    return section(
        "decided",
        "What was decided",
        Text(about),
        Items(phrasing.decision_sentences(summary), "findings"),
        Legend("Share of the weights at each number of bits", parts, tuple(shares.values())),
        Text(
            f"All {n_params:,} weights by the bits of their codes; scales and codebooks come on top "
            f"({summary.allocation.stored_bits:.2f} bits per weight as stored).",
            "quiet",
        ),
        layer_map(summary),
        _decisions(summary),
    )


def _decisions(summary: Summary) -> Section:
    titles = columns(
        ("layer", "name"),
        "format",
        "shape",
        ("stored", "bytes"),
        (summary.cost_name, "plus-minus"),
        ("share", "share"),
        "one step up",
        "one step down",
    )
    lines = []
    for cost in summary.chosen:
        n_equal, part = len(summary.table.layers[cost.decision]) - 1, summary.share([cost])
        lines.append(
            (
                Cell(cost.decision, note=f"+{n_equal} equal" if n_equal else ""),
                cost.format,
                "\N{MULTIPLICATION SIGN}".join(map(str, summary.shapes.get(cost.decision, ()))),
                cost.stored_bytes,
                normal_estimate(cost.cost, cost.standard_error, cost.n),
                "" if part is None else part,
                *(_step(summary, cost, summary.step(cost, larger=larger)) for larger in (True, False)),
            )
        )
    change = ": the change of the whole recipe's predicted noise, and of the size" if summary.is_noise else ""
    name = summary.cost_name.capitalize()
    about = f'{name} with its 95 % interval. "One step" is the next useful format of that layer alone{change}.'
    return section("", f"All {len(lines)} decisions as a table", Table(titles, rows(lines)), Text(about, "quiet"))


def _step(summary: Summary, cost: Cost, other: Cost | None) -> str:
    if other is None:
        return ""
    change, db = number(other.cost - cost.cost, signed=True), summary.noise_db(cost, other)
    if db is not None:
        relative = 10 ** (db / 10) - 1
        change = f"{'+' if relative > 0 else MINUS}{share(abs(relative))}"
    return f"{other.format}: {change}, {said(other.stored_bytes - cost.stored_bytes, 'change of bytes')[0]}"


def _why(summary: Summary) -> Section:
    operations, blocks = _compared(summary, summary.operations), _compared(summary, summary.blocks)
    return section(
        "why",
        "Why",
        Text(phrasing.method_sentence(summary)),
        Items(phrasing.reason_sentences(summary), "findings"),
        _operations_figure(summary, operations) if operations else None,
        _blocks_figure(summary, blocks) if operations and len(blocks) > 1 else None,
    )


def _compared(summary: Summary, groups: Mapping[str, Sequence[Cost]]) -> dict[str, Estimate]:
    """What groups would cost at the reference format, as far as they can take it."""
    referred = {name: [c for c in map(summary.at_reference, costs) if c is not None] for name, costs in groups.items()}
    found = {name: added(costs) for name, costs in referred.items() if costs}
    return {name: total for name, total in found.items() if total.value > 0}


def _operations_figure(summary: Summary, costs: Mapping[str, Estimate]) -> Figure:
    names = sorted(costs, key=lambda name: -costs[name].value)[:MAX_ROWS]
    groups = [summary.operations[name] for name in names]
    bits = tuple(map(summary.paper_bits, groups))
    notes = tuple(f"{b:.1f} bits, {share(summary.params_share(g))}" for b, g in zip(bits, groups, strict=True))
    what = "noise" if summary.is_noise else f"cost [{summary.table.unit}]"
    scale = f"{what} if all its layers were at {summary.reference}\n(logarithmic; bars: 95 % interval)"
    plot = Plot(
        (Series(tuple(costs[name] for name in names), bits=bits),),
        Axis(ticks=named([short(name, 40) for name in names]), notes=notes),
        Axis(scale, is_logarithmic=True),
        is_flat=True,
    )
    return Figure(
        "operations",
        f"Sensitivity by operation, all at {summary.reference}",
        "; ".join(f"{name} {costs[name].value:.2e}, {b:.1f} bits" for name, b in zip(names, bits, strict=True)),
        (plot,),
        86 + ROW * len(names),
        f"If every layer of the operation were at `{summary.reference}`: further right is more sensitive. The colour "
        "and the numbers at the right tell what it got: average bits, and its share of the weights. Sensitive "
        "operations get more bits, unless their many weights make every bit expensive.",
        "By operation",
    )


def _blocks_figure(summary: Summary, costs: Mapping[str, Estimate]) -> Figure:
    blocks = sorted(costs, key=lambda name: name == OUTSIDE)
    names, common = stage_labels(blocks)
    bits = tuple(summary.paper_bits(summary.blocks[name]) for name in blocks)
    plot = Plot(
        (Series(tuple(costs[name] for name in blocks), bits=bits),),
        Axis(common, named(names, n_most=_MOST_LABELS), are_turned=room(names) > 0),
        Axis(f"{summary.cost_name} at {summary.reference}", is_logarithmic=True),
    )
    return Figure(
        "blocks",
        f"Sensitivity by block, all at {summary.reference}",
        "; ".join(f"{name} {costs[name].value:.2e}" for name in blocks),
        (plot,),
        240 + room(names),
        "The same, with all layers of an outermost block taken together.",
        "By block, from input to output",
    )


def _cost(summary: Summary) -> Section | None:
    evidence = summary.evidence
    curves = [_frontier_figure(summary)] if len(evidence.frontier) > 1 else []
    if evidence.agreement is not None:
        curves.append(_agreement_figure(evidence.agreement, evidence.agreement_of))
    if not (evidence.recipes or curves or evidence.pictures):
        return None
    differences = Table(
        columns(
            "this recipe minus", "measure", ("difference", "change", "95 % interval"), "samples", ("verdict", "verdict")
        ),
        rows((one, _MEASURES["sqnr_db"], it, it.n, verdict(it)) for one, it in evidence.differences),
    )
    return section(
        "cost",
        "What it cost",
        Items(phrasing.cost_sentences(summary), "findings"),
        titled("What it was chosen among", _entrants(evidence.entrants)),
        _recipes_figure(evidence.recipes),
        _recipes(evidence.recipes),
        titled("Differences on the same seeds", differences),
        Beside(tuple(curves)),
        titled("The same seeds, before and after", Beside(evidence.pictures)),
    )


def _entrants(entrants: Sequence[Entrant]) -> Table:
    titles = columns(
        "recipe by",
        ("stored bits", "bits"),
        "predicted [dB]",
        ("on the searched seeds [dB]", "plus-minus"),
        ("in the final [dB]", "plus-minus"),
    )
    lines = []
    for one in entrants:
        label = f"{one.name} (this report)" if one.is_winner else one.name
        predicted = "" if one.predicted_db is None else Estimate(one.predicted_db, _TENTH, -math.inf, math.inf, 0)
        lines.append(Row((label, one.stored_bits, predicted, one.searched, one.final or ""), one.is_winner))
    caption = (
        "Mean SQNR with its 95 % interval; higher is better. The final is held on seeds that nothing was searched on, "
        "and the figures of the recipes there are known better than the errors suggest, because all ran on the same "
        "seeds."
    )
    return Table(titles, tuple(lines), caption)


def _recipes_figure(recipes: Sequence[MeasuredRecipe]) -> Figure | None:
    measured = [(one, one.measures["sqnr_db"]) for one in recipes if "sqnr_db" in one.measures]
    if len(measured) < 2:
        return None
    measured.sort(key=lambda pair: -pair[1].value)
    names = [
        f"{'this recipe: ' if one.ahead is None else ''}{short(one.name, 36)} ({one.paper_bits:.2f} bits)"
        for one, _ in measured
    ]
    own = tuple(i for i, (one, _) in enumerate(measured) if one.ahead is None)
    plot = Plot(
        (Series(tuple(value for _, value in measured), marked=own),),
        Axis(ticks=named(names), bold=tuple(names[i] for i in own)),
        Axis("SQNR [dB], higher is better"),
        is_flat=True,
    )
    return Figure(
        "recipes",
        "Quality of all measured recipes",
        "; ".join(f"{one.name} {with_error(value, 'dB')}" for one, value in measured),
        (plot,),
        60 + ROW * len(names),
        "Each with its 95 % interval over seeds. All recipes ran on the same seeds, so differences between them are "
        "known better than the bars suggest.",
        "Compared with other recipes",
    )


def _recipes(recipes: Sequence[MeasuredRecipe]) -> Table:
    """All measured recipes; a number of samples that all share stands in the title."""
    counts = {m: {one.measures[m].n for one in recipes if m in one.measures} for m in _MEASURES}
    common = {m: ns.pop() if len(ns) == 1 else 0 for m, ns in counts.items() if ns}
    titles = columns(
        "recipe",
        ("bits", "bits"),
        ("stored bits", "bits"),
        *((_MEASURES[m], "plus-minus", f"n = {n}" if n else "") for m, n in common.items()),
    )
    lines = []
    for one in recipes:
        label = f"{one.name} (this report)" if one.ahead is None else one.name
        measured = (
            Cell(one.measures[m], note="" if n else f"n = {one.measures[m].n}") if m in one.measures else ""
            for m, n in common.items()
        )
        lines.append(Row((label, one.paper_bits, one.stored_bits, *measured), one.ahead is None))
    return Table(titles, tuple(lines))


def _frontier_figure(summary: Summary) -> Figure:
    """Predicted quality over bits: the curve of best recipes, and this one on it."""
    allocation, is_noise, points = summary.allocation, summary.is_noise, summary.evidence.frontier
    scale = decibel if is_noise else float
    drawn = [(x, cost) for x, cost in points if (cost > 0 or not is_noise) and x <= allocation.bits + _BITS_AHEAD]
    curve = Series(
        tuple(only(scale(cost)) for _, cost in drawn), tuple(x for x, _ in drawn), "the best at each budget", line="-"
    )
    own, costs = summary.cost.value, [cost for _, cost in drawn]
    this = Series((only(scale(own)),), (allocation.bits,), "this recipe", "this", "D")
    is_logarithmic = bool(costs) and not is_noise and max(costs) > _MANY_TIMES * min(costs) > 0
    plot = Plot(
        (curve, this) if own > 0 or not is_noise else (curve,),
        Axis(f"bits per weight, {_COUNTED[allocation.accounting]}"),
        Axis("predicted SQNR [dB]" if is_noise else "predicted cost", is_logarithmic=is_logarithmic),
    )
    limit = "" if allocation.budget_bops is None else f" within {count(allocation.budget_bops)} bit operations"
    return Figure(
        "frontier",
        "What more bits would buy",
        "; ".join(f"{x:.2f} bits {scale(cost):.3g}" for x, cost in points if cost > 0),
        (plot,),
        340,
        f"The best recipe at each budget{limit}, as predicted from the costs.",
        "What more bits would buy",
        500,
    )


def _agreement_figure(agreement: Agreement, of: str) -> Figure:
    """Predicted against measured noise; on the line, costs simply add up."""
    plot = Plot(
        (Series(tuple(map(only, agreement.measured)), tuple(agreement.predicted), look="this"),),
        Axis("predicted noise (sum of costs)", is_logarithmic=True),
        Axis("measured noise", is_logarithmic=True),
        diagonal=True,
    )
    return Figure(
        "agreement",
        "Do costs add up?",
        f"{agreement.n} recipes; rank correlation {agreement.srcc:.2f}, slope {agreement.slope:.2f}",
        (plot,),
        340,
        f"{agreement.n} {of}. On the dashed line the prediction is exact.",
        "Do costs add up?",
        420,
    )


def _how(summary: Summary) -> Section:
    allocation, origin = summary.allocation, summary.provenance
    table, bops = summary.table, allocation.bops
    operations = ""
    if table.full_bops:
        operations = (
            f"{count(bops)} a sample and denoiser call, {share(bops / table.full_bops)} of those at 16 bits; the "
            f"products of attention are {count(table.attention_bops)} of them in any case"
        )
    found = [
        ("Sensitivity by", table.method),
        ("Chosen by", _rule(summary)),
        ("Bit operations", operations),
        ("Denoiser", table.denoiser),
        ("Seeds", origin.seeds),
        *((key.removeprefix("n_").replace("_", " ").capitalize(), value) for key, value in origin.sampling.items()),
        ("Time", ", ".join(f"{name} {duration(value)}" for name, value in origin.seconds.items())),
        ("Machine", origin.machine),
        ("Versions", ", ".join(f"{name} {value}" for name, value in origin.versions.items())),
        ("Made", origin.created),
    ]
    return section(
        "how",
        "How it was made",
        Text(origin.command, "code"),
        Facts(tuple((key, value) for key, value in found if value)),
        section("", "Notes", Items((*allocation.notes, *origin.notes))),
    )


def _rule(summary: Summary) -> str:
    """The rule, and the limits that it kept if it is one that searches."""
    allocation = summary.allocation
    limits = []
    if allocation.budget_bytes is not None:
        budget = 8 * allocation.budget_bytes / summary.table.total_params
        limits.append(f"{budget:.3f} bits per weight {_COUNTED[allocation.accounting]}")
    if allocation.budget_bops is not None:
        limits.append(f"{count(allocation.budget_bops)} bit operations")
    is_searched = limits and summary.decided_by != allocation.rule
    return f"{allocation.rule}, at most {' and '.join(limits)}" if is_searched else allocation.rule
