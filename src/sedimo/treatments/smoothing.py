"""SmoothQuant on a pipeline: which layers, from what ranges, and whether the function stayed what it was.

Ranges are the least and the greatest value of each channel of a layer's input, which is the last axis of a Linear's
and the second of a convolution's. The denoiser runs at full precision on a recorded trajectory, some samples at a time;
only minima and maxima are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sedimo.bank import SILENT, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.graph.folding import Folding, find_folding
from sedimo.lab.bench import captured_inputs
from sedimo.lab.exchange import hooked
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.methods.method import Price, Words
from sedimo.methods.sqnr import LEAST_SAMPLES, noisiest_decisions, probe_sqnr
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.trajectory import calls_by_step, inputs_by_samples, record, replay
from sedimo.quant.activations import InputRange
from sedimo.quant.formats import Format
from sedimo.settings import Checked, checked, option, within
from sedimo.space import search_space
from sedimo.treatments.smoothing_plan import (
    DEFAULT_ALPHA,
    Smoothing,
    check_alpha,
    plan_smoothing,
    smooth_weights,
)
from sedimo.treatments.treatment import Treatment

RANGES_VERSION = 1
DEFAULT_SHARE = 0.1
RANKING_FORMAT = Format.parse("uaq4")
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the output; rounding adds up over some hundred layers
_COARSE_TOLERANCE = 0.05  # of float16 and bfloat16
check_share = within(above=0, most=1)


@dataclass(frozen=True, slots=True)
class SmoothingSettings(Checked):
    """How to smooth: alpha, and the share of the layers, most sensitive first; 1 for all.

    `layers` names them instead; then the share does not matter.

    Raises:
        InputError: an alpha or a share outside 0..1.
    """

    alpha: float = checked(DEFAULT_ALPHA, check_alpha)
    share: float = checked(DEFAULT_SHARE, check_share)
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"alpha {self.alpha:g} on {', '.join(self.layers) or f'{self.share:g} of the layers'}"


DEFAULT_SMOOTHING = SmoothingSettings()


@dataclass(frozen=True, slots=True)
class SmoothingKnobs(Checked):
    """What people set to have a model smoothed: alpha, and the share of the layers if it is not the usual one."""

    alpha: float | None = option(
        None,
        "--smooth",
        metavar="ALPHA",
        check=check_alpha,
        help="SmoothQuant first: how much of the inputs' range moves into weights, such as 0.7.",
    )
    share: float | None = option(
        None,
        "--smooth-share",
        check=check_share,
        help=f"Share of the layers to smooth, most sensitive first; 1 for all; default: {DEFAULT_SHARE:g}.",
    )

    def check_together(self) -> None:
        """Refuses a share without an alpha."""
        if self.alpha is None and self.share is not None:
            raise InputError("--smooth-share says which layers to smooth: give --smooth 0.7, too")

    @property
    def settings(self) -> SmoothingSettings | None:
        """How to smooth, None: not at all."""
        if self.alpha is None:
            return None
        return SmoothingSettings(self.alpha, DEFAULT_SHARE if self.share is None else self.share)

    def __str__(self) -> str:
        return "no smoothing" if self.settings is None else str(self.settings)


@dataclass(frozen=True, slots=True)
class RangesPart:
    """Of one denoiser step: ranges by layer; calls of a layer within the step are merged. Uncalled ones are absent."""

    timestep: float
    ranges: Mapping[str, InputRange]


def smooth(
    pipe: DiffusersPipeline,
    settings: SmoothingSettings = DEFAULT_SMOOTHING,
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
    on = sampling or pipe.default_sampling(range(LEAST_SAMPLES), 10)
    with nullcontext() if store is None else Study(store) as study:
        lab = Lab.on(pipe, study=study, progress=progress)
        folding, ranges = measure_inputs(lab, settings, on)
        found = plan_smoothing(folding, ranges, lab.weights, settings.alpha)
    apply_smoothing(pipe, found, on)
    return found


def plan_smoothings(lab: Lab, wanted: Sequence[SmoothingSettings]) -> tuple[Smoothing, ...]:
    """How settings that differ in alpha alone smooth a lab's model; ranges are measured once, plans are kept."""
    _refuse_unsampled(lab)
    on, study = lab.seeds.more(LEAST_SAMPLES), lab.study
    setting = lab.setting(on, "step", weights_digest=lab.weights.digest)
    names = [f"smoothing:{content_key([one, setting])[:16]}" for one in wanted]
    kept = {} if study is None else {name: study.record(Smoothing, name) for name in names if study.has_record(name)}
    missing = {name: one for name, one in zip(names, wanted, strict=True) if name not in kept}
    if missing:
        folding, ranges = measure_inputs(lab, wanted[0], on)
        for name, one in missing.items():
            kept[name] = plan_smoothing(folding, ranges, lab.weights, one.alpha)
            if study is not None:
                study.put_record(name, kept[name])
                kept[name] = study.record(Smoothing, name)  # as a later run finds it
    for found in kept.values():
        apply_smoothing(lab.pipe, found, on)()  # in force, looked at, and taken out again
    return tuple(kept[name] for name in names)


def measure_inputs(lab: Lab, settings: SmoothingSettings, on: Sampling) -> tuple[Folding, Mapping[str, InputRange]]:
    """Where the factors of some layers go, and the ranges of their inputs: all that does not depend on alpha."""
    layers = settings.layers or _ranked_layers(lab, settings.share, on)
    folding = find_folding(lab.pipe.denoiser, layers, capture=lambda: captured_inputs(lab.pipe))
    return folding, probe_ranges(lab, list(folding.inputs), on)


def _ranked_layers(lab: Lab, share: float, on: Sampling) -> Sequence[str]:
    """All layers, or the noisiest share of the decisions at the format that all are compared at."""
    space = search_space(lab.graph, f"{RANKING_FORMAT},fp16", streams=False)
    if share == 1:
        return [layer for decision in space.decisions for layer in decision.layers]
    ranking = lab.decided_on(space)
    names = noisiest_decisions(ranking.bank.space, probe_sqnr(ranking, on), RANKING_FORMAT, share)
    return [layer for name in names for layer in ranking.bank.space.decision_index[name].layers]


def probe_ranges(lab: Lab, layers: Sequence[str], on: Sampling) -> dict[str, InputRange]:
    """The ranges of the inputs of layers over all steps of one recorded trajectory; of those that are called.

    With a study, each step's part is saved when it is finished and not measured again.
    """
    parts, pipe = lab.parts(), lab.pipe
    setting = lab.setting(on, "step", weights_digest=lab.weights.digest)
    calls = calls_by_step(on, parts.trajectory(on, setting).calls)
    named = {"ranges": RANGES_VERSION, "setting": setting, "layers": list(layers)}
    works = (
        (content_key({**named, "call": index}), functools.partial(_measure_part, pipe.denoiser, layers, batches))
        for index, batches in enumerate(calls)
    )
    steps = tuple(parts.each(RangesPart, "ranges of inputs", len(calls), works))
    found = {}
    for layer in layers:
        if seen := [step.ranges[layer] for step in steps if layer in step.ranges]:
            low, high = np.min([one.low for one in seen], axis=0), np.max([one.high for one in seen], axis=0)
            found[layer] = InputRange(tuple(low.tolist()), tuple(high.tolist()))
    return found


def _measure_part(
    denoiser: nn.Module, layers: Sequence[str], batches: Sequence[tuple[DenoiserCall, range]]
) -> RangesPart:
    """The part of one step. Rows of a sample, several with guidance, run together."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def look(name: str, module: nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
        axis = -1 if isinstance(module, nn.Linear) else 1
        rows = args[0].detach().movedim(axis, 0).flatten(1).float()
        low, high = rows.amin(1), rows.amax(1)
        known = found.get(name, (low, high))
        found[name] = torch.minimum(low, known[0]), torch.maximum(high, known[1])

    with torch.no_grad(), hooked(denoiser, {name: functools.partial(look, name) for name in layers}):
        for call, samples in batches:
            for _, inputs in inputs_by_samples(call, len(samples)):
                denoiser(**inputs)
    return RangesPart(batches[0][0].timestep, {name: _range(name, *ends) for name, ends in found.items()})


def _range(layer: str, low: torch.Tensor, high: torch.Tensor) -> InputRange:
    try:
        return InputRange(_numbers(low), _numbers(high))
    except InputError as error:
        raise InputError(f"layer {layer!r}: {error}; use another --dtype, or leave out --smooth") from error


def _numbers(values: torch.Tensor) -> tuple[float, ...]:
    """Short texts that are exactly the float32 values."""
    return tuple(float(str(value)) for value in values.cpu().numpy())


def apply_smoothing(pipe: DiffusersPipeline, smoothing: Smoothing, on: Sampling) -> Callable[[], None]:
    """Smooths a pipeline's denoiser in place, and compares one call of it before and after; the result undoes it."""
    calls = record(pipe, replace(on.first(2), n_steps=1)).calls
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


def _refuse_unsampled(lab: Lab) -> None:
    lab.refuse_unsampled("smoothing runs the pipeline to learn ranges", "Leave out --smooth")


def _apply(lab: Lab, knobs: SmoothingKnobs) -> Smoothing | None:
    return None if knobs.settings is None else plan_smoothings(lab, [knobs.settings])[0]


def _price(lab: Lab, knobs: SmoothingKnobs) -> Price:
    """The trajectory and its calls again for the ranges; ranking layers takes three such runs more, and fits."""
    if knobs.alpha is None:
        return Price()
    _refuse_unsampled(lab)
    timing, is_ranked = lab.time_calls(lab.seeds.search), knobs.share != 1
    share = max(1.0, LEAST_SAMPLES / lab.seeds.settings.n_seeds)
    n_calls = round(share * timing.n_calls * (5 if is_ranked else 2))
    fits = lab.space.params * lab.seconds_per_fit if is_ranked else 0.0
    return Price(n_calls * timing.seconds_per_call + fits, n_calls)


SMOOTHING = Treatment(
    name="smoothing",
    words=Words(
        "moves part of the range of layers' inputs into their weights; the float function stays what it was",
        source="Xiao et al. 2022, SmoothQuant (arXiv 2211.10438)",
    ),
    knobs=SmoothingKnobs,
    apply=_apply,
    price=_price,
    is_wanted=lambda knobs: knobs.alpha is not None,
)
