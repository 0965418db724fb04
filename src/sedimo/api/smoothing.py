"""SmoothQuant on a pipeline: which layers, from what ranges, and whether the function stayed what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from sedimo.api.probing import LEAST_SAMPLES
from sedimo.api.verbs import captured_inputs, trace, weights_of
from sedimo.bank import SILENT, Progress, fit_bank
from sedimo.errors import InputError, StateError
from sedimo.graph.folding import find_folding
from sedimo.graph.model import DenoiserGraph
from sedimo.measurement.ranges import probe_ranges
from sedimo.measurement.smoothing import Smoothing, plan_smoothing, smooth_weights
from sedimo.measurement.sqnr import probe_sqnr
from sedimo.measurement.study import Study
from sedimo.pipelines.adapter import Sampling, WeightSource
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.trajectory import record, replay
from sedimo.quant.formats import Format
from sedimo.quant.smoothing import DEFAULT_ALPHA, check_alpha
from sedimo.sensitivity.sqnr import noisiest_decisions
from sedimo.space import search_space

DEFAULT_SHARE = 0.1
RANKING_FORMAT = Format.parse("uaq4")
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the output; rounding adds up over some hundred layers
_COARSE_TOLERANCE = 0.05  # of float16 and bfloat16


@dataclass(frozen=True, slots=True)
class SmoothOrder:
    """How to smooth: alpha, and the share of the layers, most sensitive first; 1 for all.

    `layers` names them instead; then the share does not matter.
    """

    alpha: float = DEFAULT_ALPHA
    share: float = DEFAULT_SHARE
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses an alpha or a share outside 0..1."""
        check_alpha(self.alpha)
        if not 0 < self.share <= 1:
            raise InputError(f"the share of smoothed layers must lie in 0..1 and not be 0, got {self.share}")

    @property
    def is_ranked(self) -> bool:
        """Whether the layers have to be found out."""
        return not self.layers and self.share < 1


DEFAULT_SMOOTHING = SmoothOrder()


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


def measure_smoothing(
    pipe: DiffusersPipeline,
    graph: DenoiserGraph,
    weights: WeightSource,
    order: SmoothOrder,
    how: tuple[Sampling, Study | None, Progress],
) -> Smoothing:
    """Chooses the layers, finds where their factors go, and measures the ranges of their inputs."""
    sampling, study, progress = how
    layers = order.layers or _ranked_layers(pipe, graph, weights, order.share, how)
    folding = find_folding(pipe.denoiser, layers, capture=lambda: captured_inputs(pipe))
    ranges = probe_ranges(
        pipe, list(folding.inputs), sampling, weights_digest=weights.digest, study=study, progress=progress
    )
    return plan_smoothing(folding, ranges, weights, order.alpha)


def apply_smoothing(pipe: DiffusersPipeline, smoothing: Smoothing, sampling: Sampling) -> Callable[[], None]:
    """Smooths a pipeline's denoiser in place, and compares one call of it before and after; the result undoes it.

    Raises:
        StateError: the output changed by more than rounding.
    """
    calls = record(pipe, sampling.first(2), steps=[0]).calls
    restore = smooth_weights(pipe.denoiser, smoothing)
    with torch.no_grad():
        for call in calls:
            change = (replay(pipe.denoiser, call) - call.output).double().norm() / call.output.double().norm()
            if not float(change) <= _TOLERANCES.get(pipe.dtype, _COARSE_TOLERANCE):
                restore()
                raise StateError(
                    f"smoothing changed the output of {pipe.name} by {float(change):.1e} of it: its calls are not as "
                    "they were traced. Leave smoothing out, and report this denoiser"
                )
    return restore


def _ranked_layers(
    pipe: DiffusersPipeline,
    graph: DenoiserGraph,
    weights: WeightSource,
    share: float,
    how: tuple[Sampling, Study | None, Progress],
) -> Sequence[str]:
    """All layers, or the noisiest share of the decisions at the format that all are compared at."""
    sampling, study, progress = how
    space = search_space(graph, f"{RANKING_FORMAT},fp16")
    if share == 1:
        return [layer for decision in space.decisions for layer in decision.layers]
    bank = fit_bank(weights, space, progress=progress)
    found = probe_sqnr(pipe, bank, sampling, study=study, progress=progress)
    names = noisiest_decisions(bank.space, found, RANKING_FORMAT, share)
    return [layer for name in names for layer in bank.space.decision_index[name].layers]
