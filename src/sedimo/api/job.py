"""The main job: from a source and a budget to a smaller checkpoint, with a report that says why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from sedimo.allocation.fixed import allocate_given, decided_by
from sedimo.allocation.problem import Allocation
from sedimo.api.additivity import N_RECIPES, NO_NOISE, check_additivity, measure_random_recipes
from sedimo.api.checking import Check, check_recipe
from sedimo.api.hybrid import BlocksResult
from sedimo.api.judging import judge_prediction
from sedimo.api.mapping import maps_of, probe_result
from sedimo.api.measuring import MeasuredTable, decide_by_effects, hybrid_of, make_bank, measure_table, search_recipe
from sedimo.api.opening import Opened, open_source
from sedimo.api.order import Order
from sedimo.api.planning import N_RECIPES_BESIDE, MethodPlan, plan_job
from sedimo.api.publishing import Found, summary_of
from sedimo.api.reconstructing import learned_rounding, reconstruct_recipe, reconstruction_json
from sedimo.api.rereport import keep_report
from sedimo.api.searching import allocated
from sedimo.api.smoothing import smooth_source
from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import content_key, to_plain
from sedimo.errors import InputError
from sedimo.measurement.reconstruction import Reconstruction
from sedimo.measurement.smoothing import Smoothing
from sedimo.measurement.study import Study
from sedimo.pipelines.sources import is_hub_id
from sedimo.quant.activations import InputQuantizers
from sedimo.quant.formats import stored_bytes
from sedimo.quant.tensor import QuantizedTensor
from sedimo.reporting.explanation import Explanation
from sedimo.reporting.html import write_report
from sedimo.reporting.maps import NO_MAPS, Maps
from sedimo.reporting.prediction import Entrant, Prediction
from sedimo.runtime.card import Origin
from sedimo.runtime.weights import replace_weights
from sedimo.runtime.writing import Finish, WriteOptions, WrittenCheckpoint, write_checkpoint
from sedimo.sensitivity.agreement import Agreement
from sedimo.sensitivity.error import error_table
from sedimo.sensitivity.table import SensitivityTable

REPORT_NAME = "report.html"
STORED_BYTES_PER_SOURCE_BYTE = 0.35  # a generous guess for the disk that the result needs


@dataclass(frozen=True)
class JobPlan:
    """What a job will do and take, told before it starts; `unchecked` as in `MethodPlan`."""

    source: str
    method: str
    reason: str
    unchecked: str
    budget: str
    n_decisions: int
    n_formats: int
    seconds: float
    denoiser_calls: int
    memory_bytes: int
    disk_bytes: int

    def as_json(self) -> Mapping[str, object]:
        """Plain values by name."""
        plain: Mapping[str, object] = to_plain(self)
        return plain


@dataclass(frozen=True)
class JobResult:
    """What a job did. `check` is None when the result was not sampled, and `plan.unchecked` says why."""

    allocation: Allocation
    table: SensitivityTable
    written: WrittenCheckpoint
    report: Path
    check: Check | None
    plan: MethodPlan
    seconds: float
    peak_rss_bytes: int
    explanation: Explanation | None = None
    maps: Maps = NO_MAPS
    smoothing: Smoothing | None = None
    reconstruction: Reconstruction | None = None
    blocks: BlocksResult | None = None
    prediction: Prediction | None = None
    entrants: tuple[Entrant, ...] = ()

    def as_json(self) -> Mapping[str, object]:
        """Plain values; scripts may rely on the names (see docs/cli.md)."""
        choice = self.allocation
        found: dict[str, object] = {
            "recipe": {name: str(entry) for name, entry in choice.recipe.layers.items()},
            "method": decided_by(choice.method, choice.rule),
            "reason": self.plan.reason,
            "compensated": self.plan.is_compensated,
            "paper_bits": choice.paper_bits,
            "stored_bits": choice.stored_bits,
            "bops": choice.bops,
            "full_bops": self.table.full_bops,
            "attention_bops": self.table.attention_bops,
            "stored_bytes": self.written.stored_bytes,
            "file_bytes": self.written.file_bytes,
            "objective": choice.objective,
            "bound": choice.bound,
            "gap": choice.gap,
            "status": choice.status,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "out": str(self.written.folder),
            "report": str(self.report),
        }
        if self.explanation is not None:
            found["explanation"] = self.explanation.as_json()
        if not self.maps.is_empty:
            found["maps"] = self.maps.as_json()
        if self.blocks is not None:
            found["hybrid"] = {name: value for name, value in self.blocks.as_json().items() if name != "recipe"}
        if self.prediction is not None:
            found["prediction"] = self.prediction.as_json()
        if self.entrants:
            found["entrants"] = to_plain(self.entrants)
        if self.smoothing is not None:
            found["smoothing"] = {"alpha": self.smoothing.alpha, "layers": self.smoothing.ways}
        if self.reconstruction is not None:
            found["reconstruction"] = reconstruction_json(self.reconstruction)
        return found | ({"unchecked": self.plan.unchecked} if self.check is None else {"check": self.check.as_json()})


def plan(order: Order, progress: Progress = SILENT) -> JobPlan:
    """What the job takes, estimated from one timed call; nothing is measured or written.

    Raises:
        InputError: as `run`.
    """
    progress.start(1, "planning")
    opened = open_source(order)
    method = plan_job(opened)
    progress.done()
    source_bytes = sum(f.stat().st_size for f in opened.weights_files)
    return JobPlan(
        source=opened.name,
        method=method.method,
        reason=method.reason,
        unchecked=method.unchecked,
        budget=str(order.budget),
        n_decisions=len(opened.space.decisions),
        n_formats=len({f for d in opened.space.decisions for f in d.formats}),
        seconds=method.seconds,
        denoiser_calls=method.n_calls,
        memory_bytes=method.memory_bytes + source_bytes,
        disk_bytes=method.disk_bytes + int(STORED_BYTES_PER_SOURCE_BYTE * source_bytes),
    )


def run(order: Order, progress: Progress = SILENT, *, command: str = "") -> JobResult:
    """Writes the smaller checkpoint and its report.

    Raises:
        InputError: the source cannot be used, a budget that cannot be kept (with the least and most possible
            bits), or an output that exists.
        StateError: a damaged source, or a study folder that holds another study.
        Interrupted: Ctrl-C; what was measured is kept, the same order goes on.
    """
    begin = time.monotonic()
    opened = open_source(order)
    order.check_places(opened.folder)
    with Study(_required(order.study_folder)) as study:
        method = _kept_plan(opened, study)
        smooth_source(opened, study, progress)
        opened.is_compensated = method.is_compensated
        measured, allocation = _decide(opened, method, study, progress)
        bank, table = measured.bank, measured.table
        opened.space = bank.space  # without formats that a weight does not fit into
        if not any(f.is_quantized for f in allocation.choice.values()):
            raise InputError("every layer would stay as it is: there is nothing to write. Give a smaller budget")
        rounded = reconstruct_recipe(opened, bank, allocation, study, progress)
        learned = None if rounded is None else rounded.weights
        check = None if method.unchecked else check_recipe(opened, bank, allocation, progress, learned=learned)
        additivity = None if method.unchecked else _additivity(opened, bank, study, (measured, allocation), progress)
        prediction = None if learned else judge_prediction(opened, measured, allocation, check, study, progress)
        probed = None if method.unchecked else probe_result(opened, measured, allocation, study, progress)
        maps = maps_of(opened, measured, allocation, probed)

        def finish(folder: Path, written: WrittenCheckpoint) -> None:
            facts = {"command": command, "seconds": f"{time.monotonic() - begin:.0f}"}
            rounding = None if rounded is None else learned_rounding(rounded)
            evidence = Found(
                check, additivity, measured.scaling, measured.explanation, maps, rounding, prediction, measured.entrants
            )
            summary = summary_of(opened, (table, allocation), written, evidence, facts)
            keep_report(study, table, summary)
            write_report(summary, folder / REPORT_NAME)

        packed = bank.quantize(allocation.recipe) if learned is None else learned
        _keep_budget(bank, allocation, packed)
        written = _write(opened, allocation, (packed, bank.input_quantizers(allocation.recipe)), finish)
    report = written.folder / REPORT_NAME
    seconds = time.monotonic() - begin
    memory = peak_rss_bytes()
    found = measured.explanation, maps, opened.smoothing, rounded, measured.blocks, prediction, measured.entrants
    return JobResult(allocation, table, written, report, check, method, seconds, memory, *found)


def peak_rss_bytes() -> int:
    """Most memory that this process has held so far [bytes]; the present one where the system does not tell."""
    process = psutil.Process()
    try:
        import resource
    except ImportError:  # Windows keeps its own count
        return int(getattr(process.memory_info(), "peak_wset", process.memory_info().rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if psutil.MACOS else peak * 1024)


def _required(path: Path | None) -> Path:
    if path is None:
        raise InputError("an output folder is needed: -o OUT")
    return path


def _kept_plan(opened: Opened, study: Study) -> MethodPlan:
    """The plan of this order, made once: a resumed run must not take another method because it is slower now."""
    order = opened.order
    more = [part for part in (order.ends, order.keep_db, order.keep) if part is not None]
    more += [] if order.minutes is None else [f"minutes {order.minutes:g}"]
    more += [] if order.compensate is None else [f"compensate {order.compensate}"]
    asked = (order.method, order.formats, str(order.budget), order.check, *more, *opened.space.streams)
    parts = (order.search, order.importance, order.activations, order.sampling, order.compute, order.smooth)
    facts = (*asked, *(to_plain(part) for part in (*parts, order.reconstruct)))
    name = f"plan:{content_key([opened.weights.digest, *facts])[:16]}"
    if name not in study.record_names():
        study.put_record(name, plan_job(opened))
    return study.record(MethodPlan, name)


def _decide(opened: Opened, method: MethodPlan, study: Study, progress: Progress) -> tuple[MeasuredTable, Allocation]:
    order = opened.order
    if method.method == "gnn":
        return search_recipe(opened, study, progress)
    if method.method == "adjoint":
        return decide_by_effects(opened, study, progress, n_samples=method.n_samples)
    if order.hybrid_format is not None:
        return hybrid_of(opened, order.hybrid_format, study, progress)
    if not order.is_given:
        measured = measure_table(opened, method.method, study, progress)
        return measured, allocated(measured.table, order.budget, rule=order.rule)
    bank = make_bank(opened, study, is_exact=False, progress=progress)
    table = error_table(bank.space, bank.candidates)
    if order.recipe is not None:
        return MeasuredTable(bank, table), allocate_given(table, bank.space.choice(order.recipe))
    return MeasuredTable(bank, table), allocated(table, order.budget, rule=order.method)


def _additivity(
    opened: Opened, bank: Bank, study: Study, decided: tuple[MeasuredTable, Allocation], progress: Progress
) -> Agreement | None:
    measured, allocation = decided
    if measured.table.method in NO_NOISE:
        return None
    plan = (opened.order.sampling.searching(opened.pipe), progress)
    n = N_RECIPES if measured.effects is None else N_RECIPES_BESIDE
    trials = measure_random_recipes(opened.pipe, bank, study, allocation.paper_bits, plan, n=n)
    return check_additivity(measured.table, trials, measured.effects)


def _keep_budget(bank: Bank, allocation: Allocation, packed: Mapping[str, QuantizedTensor]) -> None:
    """Refuses the rare weight whose stored form is larger than estimated (a codebook that float16 cannot hold)."""
    if allocation.accounting != "stored" or allocation.budget_bytes is None:
        return
    stored = bank.stored_bytes(allocation.recipe)
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


def _write(
    opened: Opened,
    allocation: Allocation,
    quantized: tuple[Mapping[str, QuantizedTensor], InputQuantizers],
    finish: Finish,
) -> WrittenCheckpoint:
    order = opened.order
    packed, inputs = quantized
    decided = [decided_by(allocation.method, allocation.rule), allocation.rule]
    decided += ["learned rounding"] if order.reconstruct else []
    decided += ["error feedback"] if opened.is_compensated else []
    replace_weights(opened.denoiser, packed, inputs=inputs)
    origin = Origin(
        base_model=order.source if is_hub_id(order.source) else opened.name,
        method=", ".join(dict.fromkeys(decided)),
        recipe_json=allocation.recipe.to_json(),
        smoothing="" if opened.smoothing is None else str(opened.smoothing),
    )
    return write_checkpoint(
        opened.folder,
        _required(order.out),
        opened.denoiser,
        origin,
        component=opened.component,
        options=WriteOptions(link=order.link, variant=order.variant, overwrite=order.overwrite),
        finish=finish,
    )
