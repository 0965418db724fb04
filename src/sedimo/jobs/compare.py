"""All methods side by side on SRC: same formats, same budgets, same fresh seeds, paired.

Example: sedimo compare zoo:cifar-dit --bits 3.5,4.0 --store runs/compare -o compare.html
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from sedimo import methods
from sedimo.allocation.budget import BopsLimit, BudgetSettings
from sedimo.allocation.combine import agreement_about_operations
from sedimo.allocation.table import SensitivityTable, of_family
from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.jobs.job import Job, all_offers
from sedimo.jobs.quantize import refuse_impossible
from sedimo.jobs.settings import COMPARABLE, FORMATS, SAMPLING, FormatSettings, open_lab, parts_of, treated
from sedimo.lab.bench import SourceSettings
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Execution, Ledger, Spent, Study, add_up
from sedimo.methods import method_named
from sedimo.methods.ablation import ABLATION
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Finding, Method, Task
from sedimo.methods.modelopt import LEAST_USED, PeerRecipe, measure_peers, wanted_methods
from sedimo.methods.uniform import UNIFORM
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.metrics.signal import mean_sqnr, paired_difference
from sedimo.progress import SILENT, Progress
from sedimo.quant.families import family_named
from sedimo.reporting.figures import Axis, Plot, Series, named, only, short
from sedimo.reporting.html import write_page
from sedimo.reporting.page import Cell, Figure, Items, Page, Row, Table, Text, columns, rows, section
from sedimo.reporting.words import joined, name, number, verdict
from sedimo.settings import REQUIRED, Checked, block, option
from sedimo.space import Recipe

REFERENCE = JACOBIAN  # what all others are compared with
_ROW, _MOST_COLUMNS = 26, 4  # of the chart: a row's height [px], panels beside each other


def compared_methods() -> tuple[Method[Any], ...]:
    """The methods that can be compared, in the order in which they are listed."""
    return tuple(method for method in methods.METHODS if not method.needs_format)


def read_numbers(text: str) -> tuple[float, ...]:
    """Different numbers, ascending, from a text such as `3.0,3.5`."""
    try:
        return tuple(sorted({float(part) for part in parts_of(text)}))
    except ValueError as error:
        raise InputError(f"bits are numbers separated by commas, such as 3.0,3.5,4.0; got {text!r}") from error


@dataclass(frozen=True, slots=True)
class CompareSettings(Checked):
    """Which methods at which paper bits; treatments that are `chosen` are those of all methods but peers."""

    source: SourceSettings = block(REQUIRED, "Source")
    bits: tuple[float, ...] = option(
        REQUIRED, "--bits", parse=read_numbers, metavar="LIST", help="Budgets in paper bits, such as 3.0,3.5,4.0."
    )
    store: Path = option(REQUIRED, "--store", help="Folder of the study.")
    bops: BopsLimit | None = option(
        None, "--bops", parse=BopsLimit.parse, help="Bit operations besides: 350G, 1.5T, or 12.5% of those at 16 bits."
    )
    methods: str = option("all", "--methods", metavar="LIST", help="all, or some of them, separated by commas.")
    out: Path | None = option(None, "-o", "--out", help="File for the page.")
    n_fresh: int = option(64, "--fresh", check=COMPARABLE, help="Fresh seeds that every recipe is measured on.")
    formats: FormatSettings = block(FORMATS, "Formats")
    sampling: SamplingSettings = block(SAMPLING, "Sampling")
    chosen: Mapping[str, object] = field(default_factory=dict)

    def check_together(self) -> None:
        """Refuses unknown methods, no budget, and what a method cannot do."""
        known = [method.name for method in compared_methods()]
        names = known if self.methods == "all" else parts_of(self.methods)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise InputError(f"methods to compare are {', '.join(known)}; got {unknown or 'none'}")
        if not self.bits:
            raise InputError("comparing needs at least one budget: --bits 3.0,3.5,4.0")
        for bits in self.bits:
            budget = BudgetSettings(bits=bits, bops=self.bops)
            for method in self.chosen_methods:
                method.check(self.task(method, budget), self.formats.choices)

    @property
    def chosen_methods(self) -> tuple[Method[Any], ...]:
        """The methods, as they are always listed."""
        names = parts_of(self.methods)
        return tuple(one for one in compared_methods() if self.methods == "all" or one.name in names)

    def task(self, method: Method[Any], budget: BudgetSettings) -> Task[Any]:
        """What a method is asked for at a budget; nothing of it is checked or written."""
        knobs = self.chosen.get(method.name) or method.compared or method.knobs()
        return Task(knobs, budget, is_checked=False)


def compare_methods(settings: CompareSettings, progress: Progress = SILENT) -> Comparison:
    """Every method's recipe at every budget on the same fresh seeds, on a page if there is a place for it. Resumes."""
    compared, missing = wanted_methods(settings.chosen_methods, everything=compared_methods())
    sampling = replace(settings.sampling, n_check_seeds=settings.n_fresh)
    lab = open_lab(settings.source, settings.formats, chosen=settings.chosen, sampling=sampling, progress=progress)
    budgets = {bits: BudgetSettings(bits=bits, bops=settings.bops) for bits in settings.bits}
    for budget in budgets.values():
        refuse_impossible(budget, lab.space)
    findings: dict[tuple[str, float], Finding] = {}
    used: dict[str, list[Ledger]] = {method.name: [] for method in compared}
    with Study(settings.store) as study:
        lab = lab.kept_in(study)
        with study.ledger() as shared:
            lab = treated(lab, settings.chosen)
            _ = lab.bank
        for budget in budgets.values():
            refuse_impossible(budget, lab.bank.space)
            for method in compared:
                method.prepare(lab, settings.task(method, budget))
        for (bits, budget), method in itertools.product(budgets.items(), compared):
            findings[method.name, bits], ledger = _accounted(lab, study, method, settings.task(method, budget))
            used[method.name].append(ledger.without(shared))
        rows = [row for bits in budgets for row in _rows(lab, bits, findings)]
    middle = sorted(settings.bits)[len(settings.bits) // 2]
    tables = {m.name: findings[m.name, middle].table for m in compared if not m.is_described}
    plan = lab.seeds.check
    notes = (f"{m} at {b:g} bits: {note}" for (m, b), finding in findings.items() for note in finding.notes)
    found = Comparison(
        source=lab.bench.name,
        reference=_reference(list(used)),
        seeds=f"{plan.seeds[0]} to {plan.seeds[-1]}",
        n_steps=plan.n_steps,
        rows=tuple(rows),
        costs={name: add_up(ledgers) for name, ledgers in used.items()},
        n_comparisons=sum(row.ahead is not None for row in rows),
        agreement=agreement(tables, middle),
        notes=(*missing, *lab.rules, *notes),
    )
    if settings.out is not None:
        write_page(comparison_page(found), settings.out)
    return found


def _accounted(lab: Lab, study: Study, method: Method[Any], task: Task[Any]) -> tuple[Finding, Ledger]:
    """What a method decides, and what it used, its own computing as one part; that took what it took the first time."""
    asked = [method.name, task, lab.rules, lab.weights.digest, lab.space, lab.seeds.settings]
    key = f"computing:{content_key(asked)[:16]}"
    begin = time.monotonic()
    with study.ledger() as used:
        measured = method.measure(lab, task)
        if method.family:  # that it was published for; it knows no other
            measured = replace(measured, table=of_family(measured.table, family_named(method.family)))
        finding = method.decide(lab, task, measured)
    if key not in study.record_names():
        study.put_record(key, max(0.0, time.monotonic() - begin - used.measuring_seconds))
    used.parts[key] = Execution(study.record(float, key), n_calls=0, threads=1, versions={})
    return finding, used


def _rows(lab: Lab, bits: float, findings: Mapping[tuple[str, float], Finding]) -> Iterator[ComparedRow]:
    here = {method: finding for (method, at), finding in findings.items() if at == bits}
    chosen = {m: one.of(PeerRecipe) if one.allocation is None else one.allocation.recipe for m, one in here.items()}
    found = {method: recipe for method, recipe in chosen.items() if recipe is not None}  # others have none so small
    own = iter(lab.measure([one for one in found.values() if isinstance(one, Recipe)], lab.seeds.check))
    peers = measure_peers(lab, lab.seeds.check, [one for one in found.values() if isinstance(one, PeerRecipe)])
    powers = {m: peers[one.key] if isinstance(one, PeerRecipe) else next(own).powers for m, one in found.items()}
    reference, space = _reference(list(found)), lab.bank.space
    for method, recipe in found.items():
        if isinstance(recipe, PeerRecipe):
            paper_bits, stored_bits, bops = recipe.paper_bits, recipe.paper_bits, recipe.bops
        else:
            paper_bits, stored_bits = space.paper_bits(recipe), 8 * lab.bank.stored_bytes(recipe) / space.params
            bops = space.bops(recipe)
        yield ComparedRow(
            method=method,
            bits=bits,
            paper_bits=paper_bits,
            stored_bits=stored_bits,
            bops=bops,
            is_full=paper_bits >= LEAST_USED * bits,
            sqnr_db=mean_sqnr(powers[method]),
            ahead=None if method == reference else paired_difference(powers[method], powers[reference]).estimate,
            recipe=recipe if isinstance(recipe, Recipe) else None,
            formats=recipe.formats if isinstance(recipe, PeerRecipe) else {},
        )


def _reference(methods: Sequence[str]) -> str:
    """What all others are compared with: first-order noise, or the first method that has a recipe at every budget."""
    if REFERENCE.name in methods:
        return REFERENCE.name
    return next((m for m in methods if m != UNIFORM.name), UNIFORM.name)


def agreement(tables: Mapping[str, SensitivityTable], bits: float) -> dict[str, Estimate]:
    """How each method agrees with the ablation about operations; methods that contain the ablation are left out."""
    if ABLATION.name not in tables:
        return {}
    independent = {m: t for m, t in tables.items() if ABLATION.name not in (m, *method_named(m)[0].contains)}
    return agreement_about_operations(tables[ABLATION.name], independent, bits)


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

    `costs` are those of a method's recipes at all budgets: the measurements that it used, each once, whoever made them
    and whenever, and its own computing; not what all share: fits, smoothing, calibration. `agreement` is Kendall's tau
    between operations' costs by each table and by the ablation, at the formats nearest to the middle budget.
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
    figure = methods_figure(c.rows, reference=c.reference)
    quality = section("quality", "Quality against bits", Text(_about(c)), figure, _recipes(c), Items(c.notes))
    costs = section("cost", "What each method took", _costs(c))
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
    titles = columns(
        "method",
        ("bits", "fine bits"),
        ("stored", "fine bits"),
        ("BOPs", "count"),
        ("SQNR [dB]", None, "and interval"),
        ("ahead [dB]", None, "and interval"),
        ("verdict", "verdict"),
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


def methods_figure(found: Sequence[ComparedRow], *, reference: str) -> Figure | None:
    """SQNR of each method [dB] with its 95 % interval, the highest mean on top, budget by budget; or nothing."""
    budgets: dict[float, dict[str, Estimate]] = {}
    for row in sorted(found, key=lambda row: row.bits):
        if math.isfinite(row.sqnr_db.value):
            budgets.setdefault(row.bits, {})[row.label] = row.sqnr_db
    if not budgets:
        return None
    labelled = dict.fromkeys(one for measured in budgets.values() for one in measured)
    names = sorted(labelled, key=lambda one: -fmean(ranked(m[one].value) for m in budgets.values() if one in m))
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
    return Figure(
        "methods",
        "Quality of every method at every budget",
        "; ".join(texts),
        panels,
        height,
        "SQNR of the final latents, higher is better, with 95 % intervals of the mean over seeds. Most of an "
        "interval's width is common to all methods, because seeds differ; the paired differences below are sharper.",
        n_columns=n_columns,
    )


def _headline(found: Sequence[ComparedRow]) -> str:
    """Which method is highest at which budgets."""
    best: dict[str, list[str]] = {}
    for bits in sorted({row.bits for row in found}):
        values = {row.method: ranked(row.sqnr_db.value) for row in found if row.bits == bits}
        first = [name(method) for method, value in values.items() if value == max(values.values())]
        best.setdefault(" and ".join(first), []).append(f"{bits:g}")
    return f"Highest quality: {', '.join(f'{methods} at {joined(bits)} bits' for methods, bits in best.items())}."


JOB = Job(__doc__, CompareSettings, compare_methods, comparison_page, offers=all_offers)
