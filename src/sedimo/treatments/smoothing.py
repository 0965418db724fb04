"""SmoothQuant on a pipeline: which layers, from what ranges, and whether the function stayed what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sedimo.bank import SILENT, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.graph.folding import Folding, find_folding
from sedimo.lab.bench import captured_inputs
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.methods.method import Price, Words
from sedimo.methods.sqnr import LEAST_SAMPLES, noisiest_decisions, probe_sqnr
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.trajectory import record, replay
from sedimo.quant.formats import Format
from sedimo.quant.smoothing import DEFAULT_ALPHA, check_alpha
from sedimo.settings import option
from sedimo.space import search_space
from sedimo.treatments.ranges import RangesProbe, probe_ranges
from sedimo.treatments.smoothing_plan import Smoothing, plan_smoothing, smooth_weights
from sedimo.treatments.treatment import Treatment

DEFAULT_SHARE = 0.1
RANKING_FORMAT = Format.parse("uaq4")
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the output; rounding adds up over some hundred layers
_COARSE_TOLERANCE = 0.05  # of float16 and bfloat16


@dataclass(frozen=True, slots=True)
class SmoothingSettings:
    """How to smooth: alpha, and the share of the layers, most sensitive first; 1 for all.

    `layers` names them instead; then the share does not matter.

    Raises:
        InputError: an alpha or a share outside 0..1.
    """

    alpha: float = DEFAULT_ALPHA
    share: float = DEFAULT_SHARE
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks alpha and share."""
        check_alpha(self.alpha)
        if not 0 < self.share <= 1:
            raise InputError(f"the share of smoothed layers must lie in 0..1 and not be 0, got {self.share}")

    def __str__(self) -> str:
        """For people."""
        which = ", ".join(self.layers) or f"{self.share:g} of the layers"
        return f"alpha {self.alpha:g} on {which}"

    @property
    def is_given(self) -> bool:
        """Whether the layers need not be ranked."""
        return bool(self.layers) or self.share == 1


DEFAULT_SMOOTHING = SmoothingSettings()


@dataclass(frozen=True, slots=True)
class SmoothingKnobs:
    """What people set to have a model smoothed: alpha, and the share of the layers if it is not the usual one.

    Raises:
        InputError: a share without an alpha, or what `SmoothingSettings` refuses.
    """

    alpha: float | None = option(
        None,
        "--smooth",
        metavar="ALPHA",
        help="SmoothQuant first: how much of the inputs' range moves into the weights, such as 0.7.",
    )
    share: float | None = option(
        None,
        "--smooth-share",
        help=f"Share of the layers to smooth, most sensitive first; 1 for all; default: {DEFAULT_SHARE:g}.",
    )

    def __post_init__(self) -> None:
        """Checks them together."""
        if self.alpha is None and self.share is not None:
            raise InputError("--smooth-share says which layers to smooth: give --smooth 0.7, too")
        _ = self.settings

    @property
    def settings(self) -> SmoothingSettings | None:
        """How to smooth, None: not at all."""
        if self.alpha is None:
            return None
        return SmoothingSettings(self.alpha, DEFAULT_SHARE if self.share is None else self.share)

    def __str__(self) -> str:
        """For people."""
        return "no smoothing" if self.settings is None else str(self.settings)


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
    """How settings that differ in alpha alone smooth a lab's model; ranges are measured once, plans are kept.

    Raises:
        InputError: the pipeline cannot be sampled.
        StateError: smoothing would change what the denoiser computes.
    """
    _refuse_unsampled(lab)
    on, study = _ranges_plan(lab), lab.study
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


def measure_inputs(lab: Lab, settings: SmoothingSettings, on: Sampling) -> tuple[Folding, RangesProbe]:
    """Where the factors of some layers go, and the ranges of their inputs: all that does not depend on alpha."""
    layers = settings.layers or _ranked_layers(lab, settings.share, on)
    folding = find_folding(lab.pipe.denoiser, layers, capture=lambda: captured_inputs(lab.pipe))
    return folding, probe_ranges(lab, list(folding.inputs), on)


def apply_smoothing(pipe: DiffusersPipeline, smoothing: Smoothing, on: Sampling) -> Callable[[], None]:
    """Smooths a pipeline's denoiser in place, and compares one call of it before and after; the result undoes it.

    Raises:
        StateError: the output changed by more than rounding.
    """
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


def _ranges_plan(lab: Lab) -> Sampling:
    """The samples that ranges and the ranking of layers come from."""
    return lab.seeds.more(LEAST_SAMPLES)


def _ranked_layers(lab: Lab, share: float, on: Sampling) -> Sequence[str]:
    """All layers, or the noisiest share of the decisions at the format that all are compared at."""
    space = search_space(lab.graph, f"{RANKING_FORMAT},fp16", streams=False)
    if share == 1:
        return [layer for decision in space.decisions for layer in decision.layers]
    ranking = lab.decided_on(space)
    names = noisiest_decisions(ranking.bank.space, probe_sqnr(ranking, on), RANKING_FORMAT, share)
    return [layer for name in names for layer in ranking.bank.space.decision_index[name].layers]


def _apply(lab: Lab, knobs: SmoothingKnobs) -> Smoothing | None:
    return None if knobs.settings is None else plan_smoothings(lab, [knobs.settings])[0]


def _price(lab: Lab, knobs: SmoothingKnobs) -> Price:
    """The trajectory and its calls again for the ranges; ranking layers takes three such runs more, and fits."""
    settings = knobs.settings
    if settings is None:
        return Price()
    _refuse_unsampled(lab)
    timing = lab.time_calls(lab.seeds.search)
    share = max(1.0, LEAST_SAMPLES / lab.seeds.settings.n_seeds)
    n_calls = round(share * timing.n_calls * (2 if settings.is_given else 5))
    fits = 0.0 if settings.is_given else lab.space.params * lab.seconds_per_fit
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
    is_wanted=lambda knobs: knobs.settings is not None,
)
