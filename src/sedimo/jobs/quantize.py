"""Write a smaller checkpoint of SRC under a budget, with a report that says why.

Example: sedimo quantize zoo:cifar-dit --bits 3.5 -o small
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import psutil

from sedimo import methods, targets, treatments
from sedimo.allocation.budget import NO_BUDGET, BudgetSettings, allocated
from sedimo.allocation.solve import Allocation, allocate_given
from sedimo.allocation.table import EXACTLY_NOTHING, build_table
from sedimo.bank import Candidate
from sedimo.checkpoint.writing import Origin, WriteOptions, WrittenCheckpoint
from sedimo.codec import content_key, from_json, to_json
from sedimo.errors import InputError
from sedimo.jobs.check import N_CHECKED, Check, check_recipe, price_of_check
from sedimo.jobs.describe import read_recipe
from sedimo.jobs.evidence import find_evidence, summary_of
from sedimo.jobs.job import Job, all_offers, as_json, outlook, outlook_page
from sedimo.jobs.report import REPORT, TABLE
from sedimo.jobs.settings import (
    FORMATS,
    SAMPLING,
    FormatSettings,
    one_format,
    open_lab,
    refuse_together,
    treated,
    treatments_of,
)
from sedimo.lab.bench import InForce, SourceSettings
from sedimo.lab.lab import PATIENCE_SECONDS, Lab, too_slow, why_too_slow
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study
from sedimo.methods import method_named
from sedimo.methods.auto import AUTO
from sedimo.methods.error import ERROR, decided_by, describe
from sedimo.methods.hybrid import BlockCurves
from sedimo.methods.method import Finding, Method, Price, Resolved, Task
from sedimo.methods.uniform import UNIFORM
from sedimo.pipelines.loading import is_hub_id
from sedimo.progress import SILENT, Progress
from sedimo.quant.formats import Format, stored_bytes
from sedimo.quant.tensor import QuantizedTensor
from sedimo.reporting.html import write_page
from sedimo.reporting.page import Facts, Page, Table, Text, columns, page_of, rows
from sedimo.reporting.phrasing import prediction_sentence, prediction_warnings
from sedimo.reporting.report_page import report_page
from sedimo.reporting.summary import Evidence
from sedimo.reporting.words import byte_size, count, duration, share
from sedimo.settings import REQUIRED, Checked, block, leaves, option, set_in
from sedimo.space import Recipe, SearchSpace
from sedimo.targets import target_named
from sedimo.targets.diffusers import DIFFUSERS
from sedimo.targets.target import Packed
from sedimo.treatments.smoothing import Smoothing
from sedimo.treatments.treatment import Finished

REPORT_NAME = "report.html"
STORED_BYTES_PER_SOURCE_BYTE = 0.35  # a generous guess for the disk that the result needs
_OF_THE_CHOICE = ("paper_bits", "stored_bits", "bops", "objective", "bound", "gap", "status")


@dataclass(frozen=True, slots=True)
class QuantizeSettings(Checked):
    """One run of the main job; `chosen` has what was set for single methods and treatments, by their names."""

    source: SourceSettings = block(REQUIRED, "Source")
    budget: BudgetSettings = block(NO_BUDGET, "Budget")
    out: Path | None = option(None, "-o", "--out", help="Folder to write.")
    method: str = option(AUTO.name, "--method", metavar="NAME", help="How to find what matters: a method below.")
    formats: FormatSettings = block(FORMATS, "Formats")
    recipe: Recipe | None = option(None, "--recipe", parse=read_recipe, place="file", help="Use this recipe as it is.")
    sampling: SamplingSettings = block(SAMPLING, "Sampling")
    store: Path | None = option(None, "--store", help="Folder for measurements; default: OUT.study beside OUT.")
    target: str = option(
        DIFFUSERS.name,
        "--target",
        check=target_named,
        help=lambda: f"Where the result is to run: {', '.join(one.name for one in targets.TARGETS)}.",
    )
    link: bool = option(False, "--link", help="Hard-link the other components instead of copying them.")
    check: bool = option(True, no="--no-check", help="Skip the sampled comparison and what else explains the result.")
    overwrite: bool = False
    chosen: Mapping[str, object] = field(default_factory=dict)
    command: str = ""

    def check_together(self) -> None:
        """Refuses what a recipe, a single format, the method or treatments leave no choice of."""
        if self.recipe is not None and (self.budget.is_given or self.method != AUTO.name or self.formats.ends):
            raise InputError("a recipe decides everything: leave out --method, --ends and the budget")
        method, number_format = method_named(self.method)
        if self.formats.act is not None and (self.recipe is not None or number_format is not None):
            raise InputError(
                "--act widens --formats; a recipe or a single format has its own: write uniform:uaq4a8 or hybrid:uaq4a8"
            )
        if self.recipe is None and number_format is None:
            self.formats.refuse_nothing()
        self._check_chosen(method)
        refuse_together(self.chosen)
        if self.recipe is None:
            method.check(self.task, self.formats.choices)

    def _check_chosen(self, method: Method[Any]) -> None:
        known = () if self.recipe is not None else (method.name, *method.contains)
        read = {leaf.word for one in methods.METHODS if one.name in known for leaf in leaves(one.knobs)}
        for name in (one.name for one in methods.METHODS if one.name in self.chosen and one.name not in known):
            if any(leaf.word not in read for leaf in set_in(self.chosen[name])):
                what = "a recipe" if self.recipe is not None else f"--method {self.method}"
                raise InputError(f"options of {name} do nothing with {what}: leave them out (--help-method {name})")

    @property
    def task(self) -> Task[Any]:
        """What the method is asked for."""
        method, number_format = method_named(self.method)
        knobs = self.chosen.get(method.name) or method.knobs()
        return Task(knobs, self.budget, is_checked=self.check, number_format=number_format)

    @property
    def is_given(self) -> bool:
        """Whether the recipe is given and nothing has to be found out."""
        method, number_format = method_named(self.method)
        return self.recipe is not None or (number_format is not None and method.name == UNIFORM.name)

    @property
    def folder(self) -> Path:
        """The folder to write; an error if there is none."""
        if self.out is None:
            raise InputError("an output folder is needed: -o OUT")
        return self.out

    @property
    def study_folder(self) -> Path:
        """Where measurements are kept, so that an interrupted run goes on."""
        return self.store or self.folder.absolute().with_name(self.folder.resolve().name + ".study")

    def check_places(self, source: Path) -> None:
        """Refuses, before anything is measured, no output, one in use, and one in source or study or around them."""
        out = self.folder
        if out.resolve() == Path.cwd():
            raise InputError("the output cannot be the working folder, which it would replace: name a folder with -o")
        is_used = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if is_used and not self.overwrite:
            raise InputError(f"{out} exists already and is not an empty folder; choose another or remove it")
        places = {"the source": source, "the output": out, "the study": self.study_folder}
        for (name, path), (other, outer) in permutations(places.items(), 2):
            if path.resolve().is_relative_to(outer.resolve()):
                raise InputError(f"{name} {path} must not lie in {other} {outer}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Which method and why, and what it takes; kept: a resumed run must not take another because it is slower now.

    `knobs` is the method's record as JSON, `n_samples` how many it looks at (0: its own number). `unchecked` says why
    the result will not be sampled, empty if it will; `treatments` are those that come with the method.
    """

    method: str
    knobs: str
    n_samples: int
    reason: str
    unchecked: str
    treatments: tuple[str, ...]
    price: Price


@dataclass(frozen=True)
class JobResult:
    """What a job did; without a `check`, `plan.unchecked` says why. `treatments` are what they tell scripts, by key."""

    finding: Finding
    written: WrittenCheckpoint
    report: Path
    check: Check | None
    plan: Plan
    seconds: float
    peak_rss_bytes: int
    evidence: Evidence
    treatments: Mapping[str, object]

    @property
    def allocation(self) -> Allocation:
        """The recipe that was written."""
        return self.finding.decided

    def as_json(self) -> Mapping[str, object]:
        """Plain values; scripts may rely on the names (see the reference of JSON keys)."""
        choice, table, evidence = self.allocation, self.finding.table, self.evidence
        found: dict[str, object] = {
            "recipe": {name: str(entry) for name, entry in choice.recipe.layers.items()},
            "method": decided_by(choice.method, choice.rule),
            "reason": self.plan.reason,
            "compensated": self.finding.bank.moments is not None,
            **{name: getattr(choice, name) for name in _OF_THE_CHOICE},
            "full_bops": table.full_bops,
            "attention_bops": table.attention_bops,
            "stored_bytes": self.written.stored_bytes,
            "file_bytes": self.written.file_bytes,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "out": str(self.written.folder),
            "report": str(self.report),
            **self.treatments,
        }
        parts = {
            "hybrid": self.finding.of(BlockCurves),
            "prediction": evidence.prediction,
            "entrants": evidence.entrants or None,
            "check": self.check,
        }
        found |= evidence.as_json() | {name: as_json(part) for name, part in parts.items() if part is not None}
        return found | ({"unchecked": self.plan.unchecked} if self.check is None else {})


def plan(settings: QuantizeSettings, progress: Progress = SILENT) -> dict[str, Any]:
    """What the job takes, estimated from one timed call; nothing is measured or written."""
    lab = _open(settings, progress)
    found = _plan(lab, settings)
    price = found.price + Price(disk_bytes=int(STORED_BYTES_PER_SOURCE_BYTE * lab.source_bytes))
    price = replace(price, memory_bytes=price.memory_bytes + lab.source_bytes)
    own = {"method": found.method, "reason": found.reason, "unchecked": found.unchecked, "budget": str(settings.budget)}
    return own | outlook(lab.bench.name, lab.space, price)


def run(settings: QuantizeSettings, progress: Progress = SILENT) -> JobResult:
    """Writes the smaller checkpoint and its report."""
    begin = time.monotonic()
    lab = _open(settings, progress)
    settings.check_places(lab.folder)
    with Study(settings.study_folder) as study:
        lab = lab.kept_in(study)
        plan = _kept_plan(lab, settings, study)
        chosen = _with_brought(settings, plan.treatments)
        lab = treated(lab, chosen)
        finding = _find(lab, settings, plan)
        if not any(f.is_quantized for f in finding.decided.choice.values()):
            raise InputError("every layer would stay as it is: there is nothing to write. Give a smaller budget")
        ways = ((one.finish, knobs) for one, knobs in treatments_of(chosen) if one.finish is not None)
        finished = next((way(lab, knobs, finding.bank, finding.decided) for way, knobs in ways), None)
        check = None if plan.unchecked else check_recipe(lab, finding, finished)
        evidence = find_evidence(lab, finding, _method(settings, plan), check, finished, is_explained=settings.check)
        weights = finding.bank.quantize(finding.decided.recipe) if finished is None else finished.weights
        _keep_budget(finding, weights)

        def report(folder: Path, written: WrittenCheckpoint) -> None:
            seconds = time.monotonic() - begin
            summary = summary_of(lab, finding, written, evidence, check, command=settings.command, seconds=seconds)
            study.put_record(TABLE, finding.table)
            study.put_record(REPORT, summary)
            write_page(report_page(summary), folder / REPORT_NAME)

        packed = Packed(lab, finding.bank, finding.decided.recipe, weights, _origin(lab, settings, finding, finished))
        options = WriteOptions(link=settings.link, variant=settings.source.variant, overwrite=settings.overwrite)
        written = target_named(settings.target).write_verified(packed, settings.folder, options, report)
    done: list[InForce | Finished] = [*lab.treatments, *([] if finished is None else [finished])]
    return JobResult(
        finding=finding,
        written=written,
        report=written.folder / REPORT_NAME,
        check=check,
        plan=plan,
        seconds=time.monotonic() - begin,
        peak_rss_bytes=peak_rss_bytes(),
        evidence=evidence,
        treatments={name: facts for one in done for name, facts in one.as_json().items()},
    )


def peak_rss_bytes() -> int:
    """Most memory that this process has held so far [bytes]; the present one where the system does not tell."""
    process = psutil.Process()
    try:
        import resource
    except ImportError:  # Windows keeps its own count
        return int(getattr(process.memory_info(), "peak_wset", process.memory_info().rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if psutil.MACOS else peak * 1024)


def _open(settings: QuantizeSettings, progress: Progress) -> Lab:
    """The lab of a job, whose budget some recipe keeps."""
    formats, streams, recipe = settings.formats, None, settings.recipe
    _, number_format = method_named(settings.method)
    if number_format is not None:
        formats = replace(one_format(number_format), ends=formats.ends)
    if recipe is not None:
        formats = FormatSettings(",".join(sorted({str(f) for f in recipe.formats} | {"fp16"})))
        streams = [layer for layer, entry in recipe.layers.items() if not isinstance(entry, Format)]
    lab = open_lab(
        settings.source, formats, chosen=settings.chosen, sampling=settings.sampling, progress=progress, streams=streams
    )
    lab = lab.decided_on(target_named(settings.target).constrain(lab.space))
    if recipe is not None:
        lab.space.check(recipe)
    elif not settings.is_given and settings.budget.is_given:
        refuse_impossible(settings.budget, lab.space)
    return lab


def refuse_impossible(budget: BudgetSettings, space: SearchSpace) -> None:
    """Refuses a budget that no choice of formats keeps, before anything is measured: all formats cost nothing here."""
    candidates = [
        Candidate(d.name, f, 0.0, 0.0, 0, d.paper_bytes(f), d.stored_bytes(f))
        for d in space.decisions
        for f in d.formats
    ]
    table = build_table("none", space, candidates, lambda _: EXACTLY_NOTHING, {}, sees_activations=True)
    try:
        allocated(table, budget)
    except InputError as error:
        raise InputError(f"{budget} cannot be kept: {error}") from error


def _kept_plan(lab: Lab, settings: QuantizeSettings, study: Study) -> Plan:
    """The plan of these settings, made once and kept."""
    asked = replace(settings, out=None, store=None, link=False, overwrite=False, command="")
    name = f"plan:{content_key([lab.weights.digest, asked, lab.space.streams])[:16]}"
    if not study.has_record(name):
        study.put_record(name, _plan(lab, settings))
    return study.record(Plan, name)


def _plan(lab: Lab, settings: QuantizeSettings) -> Plan:
    """The method and what all of it takes; refuses what runs the pipeline, where it cannot run."""
    method, _ = method_named(settings.method)
    found = _resolved(lab, settings, method)
    unchecked, price = _with_check(lab, settings, found)
    brought = tuple(
        one.name
        for one in treatments.TREATMENTS
        if one.name in method.treatments and one.name not in settings.chosen and settings.recipe is None
        if price.n_calls and not any(one.name in other.excludes for other, _ in treatments_of(settings.chosen))
    )
    wanted = treatments_of(_with_brought(settings, brought))
    return Plan(
        method=found.method.told_as or found.method.name,
        knobs=to_json(found.task.knobs),
        n_samples=found.task.n_samples,
        reason=found.reason,
        unchecked=unchecked,
        treatments=brought,
        price=sum((one.price(lab, knobs) for one, knobs in wanted), price),
    )


def _with_brought(settings: QuantizeSettings, names: Collection[str]) -> Mapping[str, object]:
    """What was set of methods and treatments, and treatments as they come with a method."""
    brought = {one.name: one.knobs() for one in treatments.TREATMENTS if one.name in names}
    return {**brought, **settings.chosen}


def _resolved(lab: Lab, settings: QuantizeSettings, method: Method[Any]) -> Resolved:
    """The method that is asked for, or that it stands for here, with its price."""
    task = settings.task
    if settings.is_given:
        return Resolved(method, task, "the recipe is given; costs are for the report only", Price())
    if method.resolve is not None:
        return method.resolve(lab, task)
    if method.runs_pipeline:
        lab.refuse_unsampled(f"method {settings.method!r} runs the pipeline", f"Use --method {ERROR.name}")
    return Resolved(method, task, "as ordered", method.price(lab, task))


def _with_check(lab: Lab, settings: QuantizeSettings, found: Resolved) -> tuple[str, Price]:
    """Why the result is not checked, if it is not: it may take too long; and the price, with a check that is made."""
    if not settings.check:
        return "not asked for", found.price
    is_run = found.method.runs_pipeline and not settings.is_given
    sampling = settings.sampling
    n_rows = N_CHECKED * sampling.n_check_seeds * sampling.n_steps
    why_not = None if is_run else lab.why_not_sampled() or why_too_slow(lab, n_rows, "sampling the result")
    if why_not is not None:
        return why_not, found.price
    check = price_of_check(lab, n_random=found.method.n_random if is_run else 0)
    if check.seconds > max(PATIENCE_SECONDS, found.price.seconds):
        return too_slow("sampling the result", check.seconds), found.price
    return "", found.price + check


def _find(lab: Lab, settings: QuantizeSettings, plan: Plan) -> Finding:
    """What the planned method finds, or the recipe that is given, described by weight error."""
    if settings.recipe is not None:
        finding = describe(lab.estimated)
        choice = finding.bank.space.choice(settings.recipe)
        return replace(finding, allocation=allocate_given(finding.table, choice))
    method = _method(settings, plan)
    knobs = from_json(method.knobs, plan.knobs, place="the plan of the job")
    return method.find(lab, replace(settings.task, knobs=knobs, n_samples=plan.n_samples))


def _method(settings: QuantizeSettings, plan: Plan) -> Method[Any]:
    """The method that decides, or weight error, which describes a recipe that is given."""
    if settings.recipe is not None:
        return ERROR
    asked, _ = method_named(settings.method)
    return asked if asked.resolve is None else next(one for one in methods.METHODS if one.name == plan.method)


def _keep_budget(finding: Finding, packed: Mapping[str, QuantizedTensor]) -> None:
    """Refuses the rare weight whose stored form is larger than estimated (a codebook that float16 cannot hold)."""
    allocation = finding.decided
    if allocation.accounting != "stored" or allocation.budget_bytes is None:
        return
    stored = finding.bank.stored_bytes(allocation.recipe)
    surplus = sum(
        part.stored_bytes - stored_bytes(part.format, part.shape_in(weight.shape))
        for weight in {id(w): w for w in packed.values()}.values()  # tied layers share one
        for part in weight.parts
        if part.format.is_quantized
    )
    if stored + surplus > allocation.budget_bytes:
        raise InputError(
            f"the weights take {stored + surplus} bytes as stored, {surplus} more than was estimated, and the budget "
            f"is {allocation.budget_bytes}: some codebooks need float32. Lower the budget by {surplus} bytes"
        )


def _origin(lab: Lab, settings: QuantizeSettings, finding: Finding, finished: Finished | None) -> Origin:
    allocation, source, smoothing = finding.decided, settings.source.source, lab.in_force(Smoothing)
    decided = [decided_by(allocation.method, allocation.rule), allocation.rule]
    decided += [] if finished is None else [str(finished)]
    decided += ["error feedback"] if finding.bank.moments is not None else []
    return Origin(
        base_model=source if is_hub_id(source) else lab.bench.name,
        method=", ".join(dict.fromkeys(decided)),
        recipe_json=allocation.recipe.to_json(),
        smoothing="" if smoothing is None else str(smoothing),
    )


def page(found: JobResult) -> Page:
    """What a job did, and where its report is."""
    choice, params, written = found.allocation, found.finding.table.total_params, found.written
    prediction, learned = found.evidence.prediction, found.evidence.rounding
    told = [*prediction_sentence(prediction), *prediction_warnings(prediction)]
    if learned is not None:
        told.append(
            f"Rounding learned in {learned.n_learned} of {learned.n_blocks} blocks, from {learned.n_samples} samples."
        )
    check = Text(f"The result was not sampled: {found.plan.unchecked}.") if found.check is None else _table(found.check)
    before, after = byte_size(2 * params), byte_size(choice.stored_bits * params / 8)
    facts = {
        "method": f"{decided_by(choice.method, choice.rule)} ({found.plan.reason}); {choice.status}, "
        f"gap {choice.gap:.1e}",
        "size": f"{choice.paper_bits:.3f} paper bits, {choice.stored_bits:.3f} stored bits per weight; Linear and Conv "
        f"weights {before} at 16 bits \N{RIGHTWARDS ARROW} {after}, denoiser file {byte_size(written.file_bytes)}",
        "work": f"{count(choice.bops)} bit operations a sample and call, "
        f"{share(choice.bops / found.finding.table.full_bops)} of those at 16 bits",
        "checkpoint": str(written.folder),
        "report": str(found.report),
        "took": f"{duration(found.seconds)}, peak memory {byte_size(found.peak_rss_bytes)}",
    }
    return page_of("", "", check, *map(Text, told), Facts(tuple(facts.items())))


def _table(check: Check) -> Table:
    lines = ((one.name, one.paper_bits, one.stored_bits, one.measures["sqnr_db"]) for one in check.recipes)
    titles = columns("recipe", ("paper bits", "bits"), ("stored bits", "bits"), ("SQNR [dB]", "plus-minus"))
    seeds = f"seeds {check.seeds[0]} to {check.seeds[-1]}"
    return Table(titles, rows(lines), f"Final latents against full precision, {seeds}, {check.n_steps} steps")


def plan_page(found: Mapping[str, Any]) -> Page:
    """What a job would take."""
    checked = "on fresh seeds: beside uniform recipes, block by block, step by step"
    facts = {
        "method": f"{found['method']} ({found['reason']})",
        "check": f"none: {found['unchecked']}" if found["unchecked"] else checked,
    }
    return outlook_page(found, f", {found['budget']}", facts, memory=" besides the loaded pipeline")


JOB = Job(__doc__, QuantizeSettings, run, page, plan=plan, plan_page=plan_page, offers=all_offers)
