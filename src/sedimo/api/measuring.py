"""Which method finds out what matters, what that takes, and the table that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from sedimo.api.additivity import N_RECIPES
from sedimo.api.opening import Opened
from sedimo.api.probing import AblationOptions, Probe, ProbeMethod, attribute, probe
from sedimo.bank import SILENT, Bank, Progress, fit_bank
from sedimo.errors import InputError
from sedimo.graph.model import Group
from sedimo.measurement.campaign import plan_campaign
from sedimo.measurement.study import Study
from sedimo.measurement.trial import Setting
from sedimo.measurement.worker import CallTiming, setting_of, time_calls
from sedimo.sensitivity.ablation import plan_probes
from sedimo.sensitivity.combine import geometric_mean
from sedimo.sensitivity.error import error_table
from sedimo.sensitivity.table import SensitivityTable

MeasuredMethod = Literal["error", "jacobian", "ablation", "combined"]
PARTS: Mapping[str, tuple[ProbeMethod, ...]] = {
    "jacobian": ("jacobian",),
    "ablation": ("ablation",),
    "combined": ("ablation", "jacobian"),
}
COMBINED_BELOW_BITS = 3.75  # above it first-order noise alone was as good or better
PATIENCE_SECONDS = 30 * 60
SAMPLE_CHANNELS = 16  # output channels that stand for a weight when only its error is wanted
N_CHECKED = 5  # full precision, the result and three uniform recipes
JACOBIAN_FACTOR = 12.0  # a call with gradients and inner products in all directions, in plain calls
FIT_SECONDS_PER_WEIGHT = 5e-7  # one format fitted on two cores, the mean over the wide set


@dataclass(frozen=True, slots=True)
class MethodPlan:
    """A method and what it takes on this machine, estimated from one timed call.

    `reason` says why this method, for people. `memory_bytes` is needed besides the loaded pipeline.
    """

    method: MeasuredMethod
    reason: str
    seconds: float
    n_calls: int
    memory_bytes: int
    disk_bytes: int


def plan_method(opened: Opened) -> MethodPlan:
    """The method of an order, or the one that serves best in reasonable time for `auto`."""
    wanted = opened.order.method
    if wanted == "error":
        return _error_plan(opened, "as ordered")
    obstacle = opened.why_not_sampled()
    if obstacle is not None:
        if wanted == "auto":
            return _error_plan(opened, f"{obstacle}, so weight error has to do")
        raise InputError(f"method {wanted!r} runs the pipeline, but {obstacle}. Use --method error")
    timing = time_calls(opened.pipe, opened.order.sampling.searching(opened.pipe))
    if wanted != "auto":
        return _sampled_plan(opened, _known(wanted), timing, "as ordered")
    for method in _preferred(opened):
        plan = _sampled_plan(opened, method, timing, "the best at this budget that takes less than half an hour")
        if plan.seconds <= PATIENCE_SECONDS:
            return plan
    return _error_plan(opened, f"measuring would take {plan.seconds / 60:.0f} minutes, so weight error has to do")


def measure_table(
    opened: Opened, method: MeasuredMethod, study: Study, progress: Progress = SILENT
) -> tuple[Bank, SensitivityTable]:
    """The bank and the table of a method. What the study holds already is not measured again."""
    bank = make_bank(opened, is_exact=method != "error", cache=study.path.parent, progress=progress)
    if method == "error":
        return bank, error_table(bank.space, bank.candidates)
    tables = [attribute(_probe(opened, bank, name, study, progress)) for name in PARTS[method]]
    return bank, tables[0] if len(tables) == 1 else geometric_mean(*tables)


def _probe(opened: Opened, bank: Bank, method: ProbeMethod, study: Study, progress: Progress) -> Probe:
    sampling = opened.order.sampling.searching(opened.pipe)
    options = AblationOptions(near_bits(opened), probed_groups(opened))
    return probe(opened.pipe, bank, method, store=study, sampling=sampling, ablation=options, progress=progress)


def make_bank(opened: Opened, *, is_exact: bool, cache: Path | None = None, progress: Progress = SILENT) -> Bank:
    """All candidates: fitted in full, or with errors estimated from some output channels."""
    channels = None if is_exact else SAMPLE_CHANNELS
    return fit_bank(opened.weights, opened.space, sample_channels=channels, cache=cache, progress=progress)


def probed_groups(opened: Opened) -> tuple[Group, ...]:
    """The groups that an ablation takes as one, none when it goes by decisions."""
    return opened.graph.groups if opened.order.probe_groups else ()


def near_bits(opened: Opened) -> tuple[float, ...]:
    """Around which bits to probe: half a bit below and a bit above the budget."""
    bits = _ordered_bits(opened)
    return (3.0, 4.5) if bits is None else (max(2.2, bits - 0.5), bits + 1.0)


def _ordered_bits(opened: Opened) -> float | None:
    order = opened.order.budget
    if order.n_bytes is not None:
        return 8 * order.n_bytes / opened.space.params
    return order.stored_bits if order.bits is None else order.bits


def _preferred(opened: Opened) -> tuple[MeasuredMethod, ...]:
    """Methods from the best on, by what was measured at this budget (docs/results.md)."""
    bits = _ordered_bits(opened)
    return ("combined", "jacobian") if bits is not None and bits < COMBINED_BELOW_BITS else ("jacobian",)


def search_setting(opened: Opened) -> Setting:
    """What names the trials of the search."""
    sampling = opened.order.sampling.searching(opened.pipe)
    return setting_of(opened.pipe, sampling, weights_digest=opened.weights.digest)


def _known(method: str) -> MeasuredMethod:
    if method not in get_args(MeasuredMethod):
        raise InputError(f"no such method: {method!r}")
    return cast("MeasuredMethod", method)


def _fit_seconds(opened: Opened) -> float:
    return sum(d.params * len(d.formats) for d in opened.space.decisions) * FIT_SECONDS_PER_WEIGHT


def _error_plan(opened: Opened, reason: str) -> MethodPlan:
    channels = sum(min(1.0, SAMPLE_CHANNELS / d.shape[0]) * d.params * len(d.formats) for d in opened.space.decisions)
    seconds = channels * FIT_SECONDS_PER_WEIGHT + opened.space.params * FIT_SECONDS_PER_WEIGHT
    largest = max(d.params for d in opened.space.decisions)
    return MethodPlan("error", reason, seconds, 0, 16 * largest, 0)


def _checking(opened: Opened, timing: CallTiming) -> tuple[float, int]:
    """Seconds and calls of the checks that follow: additivity, and the result beside its rivals on fresh seeds."""
    order = opened.order
    if not order.check:
        return 0.0, 0
    share = order.sampling.n_check_seeds / order.sampling.n_seeds
    calls = round((1 + N_RECIPES) * timing.n_calls + N_CHECKED * max(1.0, share) * timing.n_calls)
    return calls * timing.seconds_per_call, calls


def _sampled_plan(opened: Opened, method: MeasuredMethod, timing: CallTiming, reason: str) -> MethodPlan:
    seconds, calls = _checking(opened, timing)
    seconds, memory, disk = seconds + _fit_seconds(opened), 0, 0
    weights_bytes = 4 * opened.space.params
    if method in ("jacobian", "combined"):
        calls += timing.n_calls
        seconds += timing.n_calls * timing.seconds_per_call * JACOBIAN_FACTOR
        memory = max(memory, 2 << 30)
    if method in ("ablation", "combined"):
        quick = make_bank(opened, is_exact=False)
        probes = plan_probes(quick.space, quick.candidates, near_bits=near_bits(opened), groups=probed_groups(opened))
        recipes = [one.recipe(quick.space) for one in probes]
        campaign = plan_campaign(
            recipes, study=None, setting=search_setting(opened), timing=timing, weights_bytes=weights_bytes
        )
        calls, disk = calls + campaign.n_calls, campaign.disk_bytes
        seconds, memory = seconds + campaign.seconds, max(memory, campaign.memory_bytes)
    return MethodPlan(method, reason, seconds, calls, memory, disk)
