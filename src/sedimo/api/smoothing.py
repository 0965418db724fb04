"""SmoothQuant on a pipeline: which layers, from what ranges, and whether the function stayed what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sedimo.api.opening import OpenedSource
from sedimo.api.probing import LEAST_SAMPLES
from sedimo.api.smooth_order import DEFAULT_SMOOTHING, SmoothOrder
from sedimo.api.verbs import captured_inputs, trace, weights_of
from sedimo.bank import SILENT, Progress, fit_bank
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.graph.folding import Folding, find_folding
from sedimo.graph.model import DenoiserGraph
from sedimo.measurement.ranges import RangesProbe, probe_ranges
from sedimo.measurement.smoothing import Smoothing, plan_smoothing, smooth_weights
from sedimo.measurement.sqnr import probe_sqnr
from sedimo.measurement.study import Study
from sedimo.measurement.worker import setting_of
from sedimo.pipelines.adapter import Sampling, WeightSource
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.trajectory import record, replay
from sedimo.pipelines.weights import ModuleWeights
from sedimo.quant.formats import Format
from sedimo.sensitivity.sqnr import noisiest_decisions
from sedimo.space import search_space

RANKING_FORMAT = Format.parse("uaq4")
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the output; rounding adds up over some hundred layers
_COARSE_TOLERANCE = 0.05  # of float16 and bfloat16


def smooth(
    pipe: DiffusersPipeline,
    order: SmoothOrder = DEFAULT_SMOOTHING,
    *,
    store: Path | str | None = None,
    sampling: Sampling | None = None,
    progress: Progress = SILENT,
) -> Smoothing:
    """Smooths a pipeline's denoiser in place and tells what was done; its float function stays what it was.

    Ranges and sensitivities come from one trajectory, of 64 samples in 10 steps unless `sampling` says otherwise. With
    `store`, a folder, what is measured is kept in a study there. `sedimo.fit` then takes the smoothed weights.

    Raises:
        InputError: alpha or share outside 0..1, an unknown layer, or a denoiser that is smoothed already.
        StateError: the output changed; the denoiser is given back as it was.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    plan = sampling or pipe.default_sampling(range(LEAST_SAMPLES["sqnr"]), 10)
    with nullcontext() if store is None else Study(store) as study:
        found = measure_smoothing(pipe, trace(pipe), weights_of(pipe), order, (plan, study, progress))
    apply_smoothing(pipe, found, plan)
    return found


def smooth_source(opened: OpenedSource, study: Study, progress: Progress = SILENT) -> None:
    """Smooths a source if its order says so, in place: the pipeline that is measured and the weights that are packed.

    To be done before a bank is made. Both get the same powers of two, so that what is measured is what is written. The
    plan is kept in the study.

    Raises:
        InputError: the pipeline cannot be sampled.
        StateError: as `smooth`.
    """
    if opened.order.smooth is None:
        return
    (found,) = plan_source(opened, [opened.order.smooth], study, progress)
    smooth_opened(opened, found)
    opened.smoothing = found


def plan_source(
    opened: OpenedSource, orders: Sequence[SmoothOrder], study: Study, progress: Progress = SILENT
) -> tuple[Smoothing, ...]:
    """How orders that differ in alpha alone smooth what a source is about; ranges are measured once, plans are kept.

    Raises:
        InputError: the pipeline cannot be sampled.
    """
    obstacle = opened.why_not_sampled()
    if obstacle is not None:
        raise InputError(f"smoothing runs the pipeline to learn ranges, but {obstacle}. Leave out --smooth")
    sampling = _ranges_plan(opened)
    setting = setting_of(opened.pipe, sampling, weights_digest=opened.weights.digest, objective="step")
    names = {f"smoothing:{content_key([order, setting])[:16]}": order for order in orders}
    missing = names.keys() - study.record_names()
    if missing:
        how = (sampling, study, progress)
        folding, ranges = measure_inputs(opened.pipe, opened.graph, opened.weights, orders[0], how)
        for name in missing:
            study.put_record(name, plan_smoothing(folding, ranges, opened.weights, names[name].alpha))
    return tuple(study.record(Smoothing, name) for name in names)


def smooth_opened(opened: OpenedSource, found: Smoothing) -> Callable[[], None]:
    """Smooths the pipeline and the weights of a source in place; the result gives both back bit-exactly.

    Raises:
        StateError: as `smooth`.
    """
    weights = opened.weights
    undo = [apply_smoothing(opened.pipe, found, _ranges_plan(opened))]
    smoothed, restore_stored = smooth_stored(opened.denoiser, found)
    undo.append(restore_stored)
    opened.weights = smoothed

    def restore() -> None:
        for one in undo:
            one()
        opened.weights = weights

    return restore


def smooth_stored(denoiser: nn.Module, found: Smoothing) -> tuple[ModuleWeights, Callable[[], None]]:
    """Smooths a denoiser in the dtype that it is stored in, in place: the weights to pack, and what undoes it."""
    restore = smooth_weights(denoiser, found, widen=True)
    return ModuleWeights(denoiser), restore


def measure_smoothing(
    pipe: DiffusersPipeline,
    graph: DenoiserGraph,
    weights: WeightSource,
    order: SmoothOrder,
    how: tuple[Sampling, Study | None, Progress],
) -> Smoothing:
    """Chooses the layers, finds where their factors go, and measures the ranges of their inputs."""
    folding, ranges = measure_inputs(pipe, graph, weights, order, how)
    return plan_smoothing(folding, ranges, weights, order.alpha)


def measure_inputs(
    pipe: DiffusersPipeline,
    graph: DenoiserGraph,
    weights: WeightSource,
    order: SmoothOrder,
    how: tuple[Sampling, Study | None, Progress],
) -> tuple[Folding, RangesProbe]:
    """Where the factors of an order's layers go, and the ranges of their inputs: all that does not depend on alpha."""
    sampling, study, progress = how
    layers = order.layers or _ranked_layers(pipe, graph, weights, order.share, how)
    folding = find_folding(pipe.denoiser, layers, capture=lambda: captured_inputs(pipe))
    ranges = probe_ranges(
        pipe, list(folding.inputs), sampling, weights_digest=weights.digest, study=study, progress=progress
    )
    return folding, ranges


def apply_smoothing(pipe: DiffusersPipeline, smoothing: Smoothing, sampling: Sampling) -> Callable[[], None]:
    """Smooths a pipeline's denoiser in place, and compares one call of it before and after; the result undoes it.

    Raises:
        StateError: the output changed by more than rounding.
    """
    calls = record(pipe, replace(sampling.first(2), n_steps=1)).calls
    restore = smooth_weights(pipe.denoiser, smoothing)
    with torch.no_grad():
        for call in calls:
            before = call.output.double()
            change, size = (float(x.norm()) for x in (replay(pipe.denoiser, call).double() - before, before))
            if not change <= _TOLERANCES.get(pipe.dtype, _COARSE_TOLERANCE) * size:  # nothing but zeros stay zeros
                restore()
                raise StateError(
                    f"smoothing changed the output of {pipe.name}, of norm {size:.3g}, by {change:.1e}: its calls are "
                    "not as they were traced. Leave smoothing out, and report this denoiser"
                )
    return restore


def _ranges_plan(opened: OpenedSource) -> Sampling:
    """The samples that ranges and the ranking of layers come from."""
    return opened.order.sampling.sampling_many(opened.pipe, LEAST_SAMPLES["sqnr"])


def _ranked_layers(
    pipe: DiffusersPipeline,
    graph: DenoiserGraph,
    weights: WeightSource,
    share: float,
    how: tuple[Sampling, Study | None, Progress],
) -> Sequence[str]:
    """All layers, or the noisiest share of the decisions at the format that all are compared at."""
    sampling, study, progress = how
    space = search_space(graph, f"{RANKING_FORMAT},fp16", streams=False)
    if share == 1:
        return [layer for decision in space.decisions for layer in decision.layers]
    cache = None if study is None else study.path.parent
    bank = fit_bank(weights, space, cache=cache, progress=progress)
    found = probe_sqnr(pipe, bank, sampling, study=study, progress=progress)
    names = noisiest_decisions(bank.space, found, RANKING_FORMAT, share)
    return [layer for name in names for layer in bank.space.decision_index[name].layers]
