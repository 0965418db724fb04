"""What a comparison of methods found, and its page: quality against bits, what each cost, how they agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sedimo.lab.study import Spent
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.reporting.figures import Axis, Chart, Plot, Series, named, only, short
from sedimo.reporting.page import Cell, Column, Figure, Items, Page, Row, Section, Table, Text, columns, rows, shown
from sedimo.reporting.words import joined, name, number, verdict
from sedimo.space import Recipe

_ROW = 26
_MOST_COLUMNS = 4


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """A method at a budget: its recipe measured on the fresh seeds, and what it is ahead of the reference, paired.

    `bops` are those of one sample and denoiser call, attention included; a recipe that `is_full` uses at least 99.5 %
    of the budget. A peer has no recipe in Sedimo's formats, but `formats` of its own by layer.
    """

    method: str
    bits: float
    paper_bits: float
    stored_bits: float
    bops: int
    is_full: bool
    sqnr_db: Estimate
    ahead: Estimate | None
    recipe: Recipe | None
    formats: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method, as it is shown."""
        return f"{self.method} (peer)" if self.recipe is None else self.method


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows; `n_comparisons` paired differences were looked at, `notes` say what is missing or not as ordered.

    `costs` are those of finding a method's recipes at all budgets: what it used of measurements, each once, whoever
    made them and whenever, and its own computing; fits, smoothing and calibration, which all share, are left out.

    `agreement` is Kendall's tau between operations' costs by each method's table and by the measured ablation, at the
    formats nearest to the middle budget.
    """

    source: str
    reference: str
    seeds: str
    n_steps: int
    rows: tuple[ComparedRow, ...]
    costs: Mapping[str, Spent]
    n_comparisons: int
    agreement: Mapping[str, Estimate]
    notes: tuple[str, ...]


def comparison_page(comparison: Comparison) -> Page:
    """All that a comparison tells, as a page."""
    c = comparison
    chart = methods_chart(c.rows, reference=c.reference)
    caption = (
        "SQNR of the final latents, higher is better, with 95 % intervals of the mean over seeds. Most of an "
        "interval's width is common to all methods, because seeds differ; the paired differences below are sharper."
    )
    figure = None if chart is None else Figure(chart, caption)
    quality = Section("quality", "Quality against bits", shown(Text(_about(c)), figure, _recipes(c), Items(c.notes)))
    costs = Section("cost", "What each method took", shown(_costs(c)))
    return Page(f"Methods compared on {c.source}", _headline(c.rows), sections=(quality, costs))


def _about(c: Comparison) -> str:
    peers = " and ".join(dict.fromkeys(row.method for row in c.rows if row.recipe is None))
    text = (
        f"Every method{f' but {peers}' if peers else ''} chose formats from the same candidates under the same "
        f"budgets; each recipe was then sampled from the same fresh seeds ({c.seeds}, {c.n_steps} steps) and compared "
        "with full precision. Uniform recipes may take 0.1 bits more than the budget."
    )
    if not peers:
        return text
    return (
        f"{text} Of a peer, NVIDIA ModelOpt's `auto_quantize`, the recipes were found on the same recorded denoiser "
        "calls, but in formats of its own: symmetric integers with a 16-bit scale per channel or per 128 inputs. Its "
        "bytes are those of codes and scales, at most the budget."
    )


def _recipes(c: Comparison) -> Table:
    """The recipes of each budget, the highest quality first."""
    n = c.n_comparisons
    caption = (
        f"{n} paired differences to {c.reference}, each with its own 95 % interval: of so many, {0.05 * n:.1f} would "
        "miss zero by chance alone. Bits, and bits as stored, are per weight; BOPs are bit operations of one sample "
        "and call."
    )
    if not all(row.is_full for row in c.rows):
        caption += " * leaves more than 0.5 % of its budget unused."
    titles = (
        *columns("method", ("bits", "fine bits"), ("stored", "fine bits"), ("BOPs", "count")),
        Column("SQNR [dB]", note="and interval"),
        Column("ahead [dB]", note="and interval"),
        Column("verdict", "verdict"),
    )
    lines = []
    for row in sorted(c.rows, key=lambda row: (row.bits, -ranked(row.sqnr_db.value))):
        bits = Cell(row.paper_bits, before="" if row.is_full else "* ")
        cells = (row.label, bits, row.stored_bits, row.bops, row.sqnr_db, row.ahead, verdict(row.ahead))
        lines.append(Row(cells, row.ahead is None, f"{row.bits:g} bits"))
    return Table(titles, tuple(lines), caption)


def _costs(c: Comparison) -> Table:
    is_partly_known = any(not spent.is_complete for spent in c.costs.values())
    caption = (
        "All budgets together: the measurements that a method uses, whenever and for whichever method they were made, "
        "and its own computing; the fits that all share are not counted."
        + (' Where it says "at least", the study holds measurements without what they took.' if is_partly_known else "")
        + " Agreement is Kendall's tau between its costs of the operation types and the measured ones (each operation "
        "quantized alone and sampled): 1 is the same order, 0 none. A method that holds the ablation has none."
    )
    titles = columns("method", ("time", "seconds"), "denoiser calls", "agreement with ablation")
    lines = (
        (method, *(Cell(v, before="" if s.is_complete else "at least ") for v in (s.seconds, s.denoiser_calls)), tau)
        for method, s in c.costs.items()
        for tau in [c.agreement.get(method)]
    )
    return Table(titles, rows(lines), caption)


def methods_chart(found: Sequence[ComparedRow], *, reference: str) -> Chart | None:
    """SQNR of each method [dB] with its 95 % interval, the highest mean on top, budget by budget; nothing, no chart."""
    budgets: dict[float, dict[str, Estimate]] = {}
    for row in sorted(found, key=lambda row: row.bits):
        if math.isfinite(row.sqnr_db.value):
            budgets.setdefault(row.bits, {})[row.label] = row.sqnr_db
    if not budgets:
        return None
    values: dict[str, list[float]] = {}
    for measured in budgets.values():
        for one, estimate in measured.items():
            values.setdefault(one, []).append(ranked(estimate.value))
    names = sorted(values, key=lambda one: -sum(values[one]) / len(values[one]))
    labels = {one: short(one, 24) for one in names}
    places = Axis(ticks=named([*labels.values()]), bold=(labels.get(reference, ""),))
    own = tuple(i for i, one in enumerate(names) if one == reference)
    panels = tuple(
        Plot(
            (Series(tuple(measured.get(one, only(math.nan)) for one in names), marked=own),),
            places,
            Axis("SQNR [dB]"),
            ((measured[reference].value, ""),) if reference in measured else (),
            is_flat=True,
            title=f"{bits:g} bits",
        )
        for bits, measured in budgets.items()
    )
    texts = (
        f"{bits:g} bits: {', '.join(f'{one} {number(e.value)} dB' for one, e in measured.items())}"
        for bits, measured in budgets.items()
    )
    n_columns = min(len(panels), _MOST_COLUMNS)
    height = math.ceil(len(panels) / n_columns) * (90 + _ROW * len(names))
    title = "Quality of every method at every budget"
    return Chart("methods", title, "; ".join(texts), panels, height, n_columns=n_columns)


def _headline(found: Sequence[ComparedRow]) -> str:
    """Which method is highest at which budgets."""
    best: dict[str, list[str]] = {}
    for bits in sorted({row.bits for row in found}):
        values = {row.method: ranked(row.sqnr_db.value) for row in found if row.bits == bits}
        first = [name(method) for method, value in values.items() if value == max(values.values())]
        best.setdefault(" and ".join(first), []).append(f"{bits:g}")
    return f"Highest quality: {', '.join(f'{methods} at {joined(bits)} bits' for methods, bits in best.items())}."
