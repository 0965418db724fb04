"""What a job will do and take, before it starts: the method, and whether the result is checked by sampling.

Seconds come from one timed denoiser call and one timed fit on this machine. Where the number of operations alone
says that a call would take too long, none is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch

from sedimo.api.additivity import N_RECIPES, NO_NOISE
from sedimo.api.opening import Opened, OpenedSource
from sedimo.api.order import FINAL_FACTOR, refuse_blind
from sedimo.api.portfolio import FINAL_FACTOR as FINAL_SEEDS_FACTOR
from sedimo.api.portfolio import N_FINALISTS as N_FINALISTS_OF_DEFAULT
from sedimo.api.probing import LEAST_SAMPLES, AblationOptions, ProbeMethod
from sedimo.api.smooth_order import SmoothOrder
from sedimo.bank import fit_bank, possible, read_weight
from sedimo.errors import InputError, UnsupportedError
from sedimo.measurement.campaign import plan_campaign
from sedimo.measurement.jacobian import count_passes
from sedimo.measurement.moments import block_columns, moments_bytes
from sedimo.measurement.orthogonality import MEMORY_BYTES, N_TIMESTEPS, sample_runs
from sedimo.measurement.reconstruction import ReconstructionOptions, plan_reconstruction
from sedimo.measurement.trajectory import TRAJECTORY_RUNS, TRAJECTORY_SAMPLES
from sedimo.measurement.worker import CallTiming, setting_of, time_calls
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.quant.fitting import fit_parameters
from sedimo.quant.formats import parse_formats
from sedimo.sensitivity.ablation import DEFAULT_BITS, plan_probes
from sedimo.sensitivity.blocks import blocks_of
from sedimo.space import Recipe, SearchSpace

MeasuredMethod = Literal[
    "error", "adjoint", "jacobian", "ablation", "combined", "sqnr", "orthogonality", "gnn", "hybrid"
]
PARTS: Mapping[MeasuredMethod, tuple[ProbeMethod, ...]] = {
    "error": (),
    "adjoint": ("adjoint",),
    "jacobian": ("jacobian",),
    "ablation": ("ablation",),
    "combined": ("ablation", "jacobian"),
    "sqnr": ("sqnr",),
    "orthogonality": ("orthogonality",),
    "gnn": ("jacobian",),
    "hybrid": (),
}
FITTED = frozenset({"adjoint", "jacobian", "sqnr"})  # probes that look at the weight changes of all formats
TRAINING_FACTOR = 3e-3  # seconds per trial and node, of training a predictor in five folds
PATIENCE_SECONDS = 30 * 60
SAMPLE_CHANNELS = 16  # output channels that stand for a weight when only its error is wanted
N_SCALING_CHECKS = 12  # formats measured to see how well the others are scaled
N_CHECKED = 5  # full precision, the result and three uniform recipes
JACOBIAN_FACTOR = 12.0  # a call with gradients and inner products in all directions, in plain calls
ADJOINT_FACTOR = 14.0  # the same, with gradients of the inputs
JACOBIAN_MEMORY_BYTES = 2 << 30
N_ENTRANTS = 5  # recipes of the default on the searched seeds, at most
N_RECIPES_BESIDE = 6  # random recipes beside those of the default
MOMENTS_CALL_FACTOR = 2.0  # a call whose inputs are looked at, in plain ones
SECONDS_PER_FEEDBACK = 1e-7  # of one weight in one format on one core
SECONDS_PER_FACTOR = 3e-10  # of a block of n columns, per n cubed
TIMED_WEIGHTS = 1 << 18
ROWS_PER_SAMPLE = 2  # with guidance
N_RECONSTRUCTED = 32  # samples that rounding is learned from, unless more are searched on
GRADIENT_FACTOR = 3.0  # a pass with gradients, in plain ones
N_EXPLAINED = 12  # recipes of the measured curve, and about as many changes on the seeds of the check
N_FINALISTS = 5  # at most
TRIAL_BYTES = 6_000  # of a trial's row
FASTEST_MACS_PER_SECOND = {"cpu": 5e11, "other": 1e15}  # of any such device: a lower bound of time


@dataclass(frozen=True, slots=True)
class MethodPlan:
    """A method and what it takes on this machine, the check of the result included.

    `reason` says why this method, for people; `unchecked` why the result will not be sampled, empty if it will.
    `memory_bytes` is needed besides the loaded pipeline. `n_samples` are those that method adjoint looks at, 0 its own
    number. `is_compensated` tells whether codes are chosen by error feedback.
    """

    method: MeasuredMethod
    reason: str
    unchecked: str
    seconds: float
    n_calls: int
    memory_bytes: int
    disk_bytes: int
    n_samples: int = 0
    is_compensated: bool = False


@dataclass(frozen=True, slots=True)
class _Cost:
    seconds: float = 0.0
    n_calls: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0


def plan_job(opened: Opened) -> MethodPlan:
    """The method of an order, or the one that serves best in reasonable time for `auto`, the check, learned rounding.

    Raises:
        InputError: what runs the pipeline (a method, smoothing, learned rounding), where it cannot run.
    """
    found, order = _plan_method(opened), opened.order
    costs = [_smoothing_cost(opened, order.smooth)] if order.smooth else []
    costs += [_reconstruction_cost(opened, order.reconstruct)] if order.reconstruct else []
    is_compensated = _is_compensated(opened, found)
    costs += [_compensation_cost(opened)] if is_compensated else []
    return replace(
        found,
        is_compensated=is_compensated,
        seconds=found.seconds + sum(cost.seconds for cost in costs),
        n_calls=found.n_calls + sum(cost.n_calls for cost in costs),
        memory_bytes=max([found.memory_bytes, *(cost.memory_bytes for cost in costs)]),
        disk_bytes=found.disk_bytes + sum(cost.disk_bytes for cost in costs),
    )


def _is_compensated(opened: Opened, found: MethodPlan) -> bool:
    """Whether codes are chosen by error feedback: as ordered, else with method `auto` where it runs the pipeline.

    Raises:
        InputError: it was ordered, and the pipeline cannot run.
    """
    order = opened.order
    if order.compensate is None:
        return order.method == "auto" and not order.is_given and order.reconstruct is None and found.n_calls > 0
    obstacle = opened.why_not_sampled() if order.compensate else None
    if obstacle is not None:
        raise InputError(f"--compensate runs the pipeline to see inputs of layers, but {obstacle}. Leave it out")
    return order.compensate


def _compensation_cost(opened: Opened) -> _Cost:
    """A run of some samples with sums beside it, factors of the sums, rounding of every format, and what is kept."""
    timing = time_calls(opened.pipe, opened.order.sampling.compensating(opened.pipe))
    columns = [math.prod(weight.shape[1:]) for weight in opened.space.weights]
    width, n_formats = block_columns(columns), max(len(d.formats) for d in opened.space.decisions)
    running = MOMENTS_CALL_FACTOR * timing.n_calls * timing.seconds_per_call
    factors = SECONDS_PER_FACTOR * sum(n * min(n, width) ** 2 for n in columns)
    rounding = SECONDS_PER_FEEDBACK * opened.space.params * n_formats
    n_bytes = moments_bytes(columns, width)
    return _Cost(running + factors + rounding, timing.n_calls, 2 * n_bytes, n_bytes)


def _smoothing_cost(opened: Opened, smooth: SmoothOrder) -> _Cost:
    """The trajectory and its calls again for the ranges; ranking layers takes three such runs more, and fits."""
    obstacle = opened.why_not_sampled()
    if obstacle is not None:
        raise InputError(f"smoothing runs the pipeline to learn ranges, but {obstacle}. Leave out --smooth")
    timing = time_calls(opened.pipe, opened.order.sampling.searching(opened.pipe))
    n_calls = round(_share_of(opened, "sqnr") * timing.n_calls * (2 if smooth.is_given else 5))
    fits = 0.0 if smooth.is_given else opened.space.params * seconds_per_fit(opened)
    return _Cost(n_calls * timing.seconds_per_call + fits, n_calls)


def _plan_method(opened: Opened) -> MethodPlan:
    if opened.order.is_given:
        return _unsampled(opened, _Cost(), "the recipe is given; costs are for the report only")
    wanted = opened.order.measured_method
    refuse_blind(wanted, parse_formats(opened.order.formats), opened.order.importance)
    if wanted == "error":
        return _unsampled(opened, _error_cost(opened), "as ordered")
    obstacle = opened.why_not_sampled()
    if obstacle is not None and wanted != "auto":
        raise InputError(f"method {wanted!r} runs the pipeline, but {obstacle}. Use --method error")
    if wanted == "auto":
        obstacle = obstacle or _why_too_slow(opened, _n_search_rows(opened), "measuring")
        return _best(opened) if obstacle is None else _unsampled(opened, _error_cost(opened), _resort(obstacle))
    timing = time_calls(opened.pipe, opened.order.sampling.searching(opened.pipe))
    return _sampled(opened, "hybrid" if opened.order.hybrid_format else _known(wanted), timing, "as ordered")


def _reconstruction_cost(opened: Opened, options: ReconstructionOptions) -> _Cost:
    """The trajectory, its calls again twice per block, and in all blocks together as many passes as there are steps."""
    obstacle = opened.why_not_sampled()
    if obstacle is not None:
        raise InputError(f"--reconstruct runs the pipeline, but {obstacle}. Leave it out")
    sampling = opened.order.sampling.sampling_many(opened.pipe, N_RECONSTRUCTED)
    timing = time_calls(opened.pipe, sampling)
    share = min(1.0, options.n_timesteps / sampling.n_steps)
    n_units = len(plan_reconstruction(opened.graph, Recipe({})).units)
    n_calls = round(timing.n_calls * (1 + 2 * share * n_units))
    rows_of_a_call = ROWS_PER_SAMPLE * min(sampling.batch_size, len(sampling.seeds))
    learning = options.schedule.n_steps * GRADIENT_FACTOR * options.batch_rows / rows_of_a_call
    codes = opened.space.params  # a byte each, packed and written as text
    return _Cost((n_calls + learning) * timing.seconds_per_call, n_calls, disk_bytes=codes)


def near_bits(opened: Opened) -> tuple[float, ...]:
    """Around which bits to probe: half a bit below and a bit above the budget, where it limits the size."""
    if not opened.order.budget.has_size:
        return DEFAULT_BITS
    bits = opened.order.budget.in_bits(opened.space.params)
    return max(2.2, bits - 0.5), bits + 1.0


def ablation_options(opened: Opened) -> AblationOptions:
    """Where the ablation probes, and what it takes as one."""
    return AblationOptions(near_bits(opened), opened.graph.groups if opened.order.probe_groups else ())


def _best(opened: Opened) -> MethodPlan:
    """First-order effects on the final latents, with a final of several recipes, if that is quick enough.

    No other method was ahead of it on the models that were looked at (docs/results.md). Where the sampler has
    no derivative, or where that takes too long, the noise of single steps.
    """
    sampling = opened.order.sampling.searching(opened.pipe)
    timing = time_calls(opened.pipe, sampling)
    reason = "the best that takes less than half an hour"
    obstacle = why_not_differentiated(opened.pipe, sampling)
    order = opened.order.sampling
    for n_samples in () if obstacle else (order.n_adjoint, order.n_seeds):
        cost = _adjoint_cost(opened, timing, n_samples)
        if cost.seconds <= PATIENCE_SECONDS:
            check = _check_cost(opened, timing, n_random=N_RECIPES_BESIDE)
            return replace(_joined(opened, "adjoint", reason, cost, check), n_samples=n_samples)
    reason = f"{obstacle or _too_slow('looking through the whole run', cost.seconds)}, so single steps have to do"
    cost = _search_cost(opened, "jacobian", timing)
    if cost.seconds <= PATIENCE_SECONDS:
        return _sampled(opened, "jacobian", timing, reason)
    return _unsampled(opened, _error_cost(opened), _resort(_too_slow("measuring", cost.seconds)), timing)


def why_not_differentiated(pipe: DiffusersPipeline, sampling: Sampling) -> str | None:
    """Why final latents cannot be differentiated, shown by a short run of one sample; None when they can."""
    short = replace(sampling.first(1), n_steps=min(2, sampling.n_steps))
    try:
        pipe.differentiable(short)
    except UnsupportedError as error:
        return str(error)
    return None


def _resort(obstacle: str) -> str:
    return f"{obstacle}, so weight error has to do"


def _too_slow(what: str, seconds: float, how_sure: str = "about") -> str:
    return f"{what} would take {how_sure} {max(1, round(seconds / 60))} minutes"


def _sampled(opened: Opened, method: MeasuredMethod, timing: CallTiming, reason: str) -> MethodPlan:
    cost = _search_cost(opened, method, timing)
    n_random = N_RECIPES_BESIDE if method == "adjoint" else N_RECIPES
    check = _check_cost(opened, timing, n_random=0 if method in NO_NOISE else n_random)
    return _joined(opened, method, reason, cost, check)


def _unsampled(opened: Opened, cost: _Cost, reason: str, timing: CallTiming | None = None) -> MethodPlan:
    """A plan whose costs need no denoiser call; the check of its result still may."""
    if not opened.order.check:
        return _joined(opened, "error", reason, cost, _Cost())
    sampling = opened.order.sampling
    why_not = opened.why_not_sampled() or _why_too_slow(
        opened, N_CHECKED * sampling.n_check_seeds * sampling.n_steps, "sampling the result"
    )
    if why_not is not None:
        return MethodPlan("error", reason, why_not, cost.seconds, 0, cost.memory_bytes, cost.disk_bytes)
    timing = timing or time_calls(opened.pipe, sampling.searching(opened.pipe))
    return _joined(opened, "error", reason, cost, _check_cost(opened, timing, n_random=0))


def _joined(opened: Opened, method: MeasuredMethod, reason: str, cost: _Cost, check: _Cost) -> MethodPlan:
    """Search and check as one plan; a check that takes longer than half an hour and than the search is left out."""
    unchecked = "" if opened.order.check else "not asked for"
    if not unchecked and check.seconds > max(PATIENCE_SECONDS, cost.seconds):
        unchecked = _too_slow("sampling the result", check.seconds)
    done = _Cost() if unchecked else check
    return MethodPlan(
        method,
        reason,
        unchecked,
        cost.seconds + done.seconds,
        cost.n_calls + done.n_calls,
        cost.memory_bytes,
        cost.disk_bytes,
    )


def _why_too_slow(opened: Opened, n_rows: int, what: str) -> str | None:
    """Whether operations alone say that so many denoiser rows take longer than half an hour."""
    device = opened.order.compute.device or ("cuda" if torch.cuda.is_available() else "cpu")
    speed = FASTEST_MACS_PER_SECOND.get(device, FASTEST_MACS_PER_SECOND["other"])
    seconds = ROWS_PER_SAMPLE * n_rows * opened.graph.macs / speed
    return _too_slow(what, seconds, "at least") if seconds > PATIENCE_SECONDS else None


def _n_search_rows(opened: Opened) -> int:
    sampling = opened.order.sampling
    return round(JACOBIAN_FACTOR * sampling.n_seeds * sampling.n_steps)


def _check_cost(opened: Opened, timing: CallTiming, *, n_random: int) -> _Cost:
    """The result beside its rivals on fresh seeds and block by block, and random recipes to see whether costs add."""
    sampling = opened.order.sampling
    share = max(1.0, sampling.n_check_seeds / sampling.n_seeds)
    mapped = TRAJECTORY_RUNS * min(1.0, TRAJECTORY_SAMPLES / sampling.n_check_seeds)
    calls = round((n_random + bool(n_random) + (N_CHECKED + mapped) * share) * timing.n_calls)
    return _Cost(calls * timing.seconds_per_call, calls)


def _search_cost(opened: Opened, method: MeasuredMethod, timing: CallTiming) -> _Cost:
    parts = PARTS[method]
    costs = []
    if "adjoint" in parts:
        costs.append(_adjoint_cost(opened, timing, opened.order.sampling.n_adjoint))
    if "jacobian" in parts:
        costs.append(_jacobian_cost(opened, timing))
    if "ablation" in parts:
        costs.append(_ablation_cost(opened, timing, is_fitted="jacobian" in parts))
    if "sqnr" in parts:
        costs.append(_sqnr_cost(opened, timing))
    if "orthogonality" in parts:
        costs.append(_orthogonality_cost(opened, timing))
    if method == "gnn":
        costs.append(_trials_cost(opened, timing))
    if method == "hybrid":
        costs.append(_hybrid_cost(opened, timing))
    return _Cost(
        sum(c.seconds for c in costs),
        sum(c.n_calls for c in costs),
        max(c.memory_bytes for c in costs),
        sum(c.disk_bytes for c in costs),
    )


def _hybrid_cost(opened: Opened, timing: CallTiming) -> _Cost:
    """Two recipes per block and full precision; the result and its one format on the fresh seeds; fits."""
    sampling = opened.order.sampling
    share = sampling.n_check_seeds / sampling.n_seeds
    n_calls = round((2 * len(blocks_of(opened.space)) + 1 + 3 * share) * timing.n_calls)
    return _Cost(n_calls * timing.seconds_per_call + _full_fits(opened), n_calls)


def _sqnr_cost(opened: Opened, timing: CallTiming) -> _Cost:
    """A trajectory of more samples, all its calls again with all formats, which are fitted in full."""
    n_calls = _share_of(opened, "sqnr") * timing.n_calls
    n_formats, n_passes = max(len(d.formats) for d in opened.space.decisions), count_passes(opened.space)
    seconds = n_calls * (1 + n_passes + n_formats) * timing.seconds_per_call + _full_fits(opened)
    return _Cost(seconds, round(n_calls * (1 + n_passes)), JACOBIAN_MEMORY_BYTES)


def _orthogonality_cost(opened: Opened, timing: CallTiming) -> _Cost:
    """A trajectory of more samples, some of its calls again in pairs of halves of a batch, and errors estimated.

    Fewer samples run at once where outputs are large, which is known only when they are there.
    """
    sampling = opened.order.sampling.sampling_many(opened.pipe, LEAST_SAMPLES["orthogonality"])
    n_timesteps, n = min(N_TIMESTEPS, sampling.n_steps), len(sampling.seeds)
    runs = [len(samples) for samples in sample_runs(n, max(2, sampling.batch_size))]
    share = _share_of(opened, "orthogonality")
    calls = round(share * timing.n_calls)
    again = n_timesteps * share * timing.n_calls / sampling.n_steps * sum(runs) / n
    seconds = (calls + again) * timing.seconds_per_call + _error_cost(opened).seconds
    return _Cost(seconds, calls + n_timesteps * (1 + len(runs)), MEMORY_BYTES)


def _share_of(opened: Opened, method: ProbeMethod) -> float:
    """How many times the searched samples a method takes."""
    return max(1.0, LEAST_SAMPLES[method] / opened.order.sampling.n_seeds)


def _full_fits(opened: Opened) -> float:
    """Seconds of fitting every format in full."""
    return sum(d.params * len(d.formats) for d in opened.space.decisions) * seconds_per_fit(opened)


def _trials_cost(opened: Opened, timing: CallTiming) -> _Cost:
    """The recipes that a search measures, and the training of its predictor."""
    order = opened.order.search
    n_trials = order.n_trials
    prior_seconds, prior_calls = cost_of_prior(order.prior, opened.space, timing)
    if order.prior == "jacobian":  # counted with the fits
        prior_seconds, prior_calls = 0.0, 0
    explained = N_EXPLAINED * (1 + opened.order.sampling.n_check_seeds / opened.order.sampling.n_seeds)
    final = FINAL_FACTOR * (1 + N_FINALISTS)
    calls = round((n_trials + 1 + final + opened.order.check * explained) * timing.n_calls) + prior_calls
    seconds = (
        (calls - prior_calls) * timing.seconds_per_call
        + prior_seconds
        + TRAINING_FACTOR * n_trials * len(opened.graph.nodes)
    )
    return _Cost(seconds, calls, 8 * opened.space.params, n_trials * TRIAL_BYTES)


def _jacobian_cost(opened: Opened, timing: CallTiming) -> _Cost:
    """Every format fitted in full, and the trajectory gone through as often as memory demands."""
    seconds, n_calls = cost_of_prior("jacobian", opened.space, timing)
    return _Cost(seconds + _full_fits(opened), n_calls, JACOBIAN_MEMORY_BYTES)


def _adjoint_cost(opened: Opened, timing: CallTiming, n_samples: int) -> _Cost:
    """Every format fitted, runs of more samples gone back through, and the default's recipes measured."""
    seconds, n_calls = cost_of_prior("adjoint", opened.space, timing)
    measured = (N_ENTRANTS + FINAL_SEEDS_FACTOR * (2 + N_FINALISTS_OF_DEFAULT)) * timing.n_calls
    measured = round(measured) if opened.order.method == "auto" else 0
    share = max(1.0, n_samples / opened.order.sampling.n_seeds)
    seconds = share * seconds + measured * timing.seconds_per_call + _full_fits(opened)
    refining = 60 * (opened.order.minutes or 0.0)
    return _Cost(seconds + refining, round(share * n_calls) + measured, JACOBIAN_MEMORY_BYTES)


def cost_of_prior(prior: str, space: SearchSpace, timing: CallTiming) -> tuple[float, int]:
    """Seconds and denoiser calls of measuring a prior whose formats are fitted; an ablation's are an upper limit."""
    if prior in ("adjoint", "jacobian"):
        factor = ADJOINT_FACTOR if prior == "adjoint" else JACOBIAN_FACTOR
        n_calls = timing.n_calls * (1 + count_passes(space))
        return timing.seconds_per_call * (timing.n_calls + factor * (n_calls - timing.n_calls)), n_calls
    if prior == "ablation":
        families = [len({(f.family, f.group_size) for f in d.formats if f.is_quantized}) for d in space.decisions]
        n_calls = timing.n_calls * (1 + len(DEFAULT_BITS) * sum(families))
        return timing.seconds_per_call * n_calls, n_calls
    return 0.0, 0


def _ablation_cost(opened: Opened, timing: CallTiming, *, is_fitted: bool) -> _Cost:
    """The probes and the checks of their scaling; formats that are probed are fitted, others estimated."""
    bank = fit_bank(opened.weights, opened.space, sample_channels=SAMPLE_CHANNELS)
    options = ablation_options(opened)
    probes = plan_probes(bank.space, bank.candidates, near_bits=options.near_bits, groups=options.groups)
    campaign = plan_campaign(
        [one.recipe(bank.space) for one in probes],
        study=None,
        setting=setting_of(
            opened.pipe, opened.order.sampling.searching(opened.pipe), weights_digest=opened.weights.digest
        ),
        timing=timing,
        weights_bytes=4 * opened.space.params,
    )
    fitted = sum(opened.space.decision_index[d].params for one in probes for d in one.choice)
    fit = 0.0 if is_fitted else _error_cost(opened).seconds + fitted * seconds_per_fit(opened)
    checks = N_SCALING_CHECKS * timing.n_calls
    seconds = campaign.seconds + checks * timing.seconds_per_call + fit
    return _Cost(seconds, campaign.n_calls + checks, campaign.memory_bytes, campaign.disk_bytes)


def _error_cost(opened: Opened) -> _Cost:
    """Errors from some output channels, and the chosen formats fitted."""
    decisions = opened.space.decisions
    sampled = sum(min(1.0, SAMPLE_CHANNELS / d.shape[0]) * d.params * len(d.formats) for d in decisions)
    seconds = (sampled + opened.space.params) * seconds_per_fit(opened)
    return _Cost(seconds, memory_bytes=16 * max(d.params for d in decisions))


def seconds_per_fit(opened: OpenedSource) -> float:
    """Seconds that one weight in one format takes here, timed on some rows of the largest weight."""
    decision = max(opened.space.decisions, key=lambda d: d.params)
    formats = [f for f in decision.formats if f.is_quantized]
    if not formats:
        return 0.0
    weight = read_weight(opened.weights, decision)
    rows = weight[: max(1, TIMED_WEIGHTS * weight.shape[0] // weight.numel())]
    fitting = list(possible(lambda some: fit_parameters(rows, some), formats))  # compiles, or loads what was compiled
    if not fitting:
        return 0.0
    begin = time.perf_counter()
    fit_parameters(rows, fitting)
    return (time.perf_counter() - begin) / (rows.numel() * len(fitting))


def _known(method: str) -> MeasuredMethod:
    if method not in get_args(MeasuredMethod):
        raise InputError(f"no such method: {method!r}")
    return cast("MeasuredMethod", method)
