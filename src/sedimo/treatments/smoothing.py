"""SmoothQuant: powers of two that scale the inputs of layers, put into a denoiser and taken out again.

Dividing channel j of the input by s_j and multiplying column j of the weight by s_j leaves the layer's function as it
is. Here s_j is a power of two, which floating-point numbers in their normal range take without rounding: the
smoothed denoiser is the same function bit for bit where no constant is involved, and can be undone (in float16, weights
far below the largest of their column may become subnormal and lose bits). Its distance from the
published factor is at most the square root of two, less than what one step of alpha changes.

Original parameters are never written to: they are exchanged for others and exchanged back, so that restoring is
bit-exact.

Ranges are the least and the greatest value of each channel of a layer's input, which is the last axis of a Linear's
and the second of a convolution's. The denoiser runs at full precision on a recorded trajectory, some samples at a time;
only minima and maxima are kept.

Source:
    Xiao et al. 2022, SmoothQuant (arXiv 2211.10438), equation 4; alpha = 0.7 as in Efficient Quantization Strategies
    for Latent Diffusion Models (arXiv 2312.05431).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import nn

from sedimo.checkpoint.diffusers_plugin import attach
from sedimo.checkpoint.inputs import mark_smoothed, remove_divisor, set_divisor, smoothed_layers
from sedimo.checkpoint.layout import How
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.graph.folding import NONE, Folding, find_folding
from sedimo.lab.bench import InForce, captured_inputs
from sedimo.lab.exchange import hooked
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.methods.method import Price, Words
from sedimo.methods.sqnr import LEAST_SAMPLES, noisiest_decisions, probe_sqnr
from sedimo.pipelines.adapter import DenoiserCall, Sampling, WeightSource
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.trajectory import calls_by_step, inputs_by_samples, record, replay
from sedimo.progress import SILENT, Progress
from sedimo.quant.activations import InputRange
from sedimo.quant.formats import Format
from sedimo.settings import Checked, option, within
from sedimo.space import search_space
from sedimo.treatments.treatment import Treatment

RANGES_VERSION = 1
DEFAULT_ALPHA = 0.7
DEFAULT_SHARE = 0.1
RANKING_FORMAT = Format.parse("uaq4")
MAX_EXPONENT = 8
_LARGEST = 15  # float16 ends at 2^16: weights stay below half of that
_SMALLEST = -14  # the smallest normal float16 is 2^-14: the largest weight of a column stays above it
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the output; rounding adds up over some hundred layers
_COARSE_TOLERANCE = 0.05  # of float16 and bfloat16
check_alpha = within(least=0, most=1, hint="0: all of the range stays in the input; 0.7 is usual")
check_share = within(above=0, most=1)
Array = npt.NDArray[Any]


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
        check_alpha(self.alpha, "alpha")
        check_share(self.share, "share")

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
        help="SmoothQuant first: how much range moves into weights, as 0.7.",
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
        share = DEFAULT_SHARE if self.share is None else self.share
        return None if self.alpha is None else SmoothingSettings(self.alpha, share)

    def __str__(self) -> str:
        return str(self.settings)


@dataclass(frozen=True, slots=True)
class SmoothedLayer:
    """Input channel j is divided by 2 to the power of `exponents[j]`, and the weight's column multiplied by it.

    `into` names what divides it: parameters of other modules, or nothing if the layer does it.
    """

    exponents: tuple[int, ...]
    into: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScaledParameter:
    """Row (or element) i of a parameter and of its `bias` is divided by 2 to the power of `exponents[i]`.

    Where its output is used as x + k, `constants[i]` is k, and k (2^-exponent - 1) is added to the bias, or to the
    parameter itself if it has elements and no bias.
    """

    exponents: tuple[int, ...]
    constants: tuple[float, ...] = ()
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Smoothing(InForce):
    """All that smoothing changes in a denoiser, with the `ranges` of inputs before it, and why layers are left out."""

    alpha: float
    layers: Mapping[str, SmoothedLayer]
    parameters: Mapping[str, ScaledParameter]
    refused: Mapping[str, str]
    ranges: Mapping[str, InputRange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_alpha(self.alpha, "alpha")

    def ranges_after(self, layer: str) -> InputRange:
        """What the range of a layer's input becomes: every channel divided by its power of two."""
        before, factors = self.ranges[layer], np.exp2(self.layers[layer].exponents)
        low, high = np.asarray(before.low) / factors, np.asarray(before.high) / factors
        return InputRange(tuple(low.tolist()), tuple(high.tolist()))

    @property
    def ways(self) -> dict[str, How]:
        """How each layer is smoothed: by other modules, or dividing its input itself."""
        return {name: "folded" if layer.into else "divided" for name, layer in self.layers.items()}

    def enter(self, denoiser: nn.Module, *, is_stored: bool) -> Callable[[], None]:
        """Smooths a denoiser in place; calling the result gives every original parameter back.

        A diffusers model then saves itself with its divisors. Parameters keep their dtype; those that are stored and
        not computed with become float32 where theirs cannot hold them exactly.
        """
        if smoothed_layers(denoiser):
            raise InputError("the denoiser is smoothed already: undo that first, or load it anew")
        fresh = _exchanged(denoiser, self, is_wide=is_stored)
        places = [  # every module that has the original, which may be shared
            (module, name, parameter)
            for module in denoiser.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in fresh
        ]
        divided = {name: denoiser.get_submodule(name) for name, how in self.ways.items() if how == "divided"}

        def restore() -> None:
            for module, name, original in places:
                module._parameters[name] = original
            for module in divided.values():
                remove_divisor(module)
            mark_smoothed(denoiser, {})
            attach(denoiser)

        for module, name, original in places:
            module._parameters[name] = fresh[id(original)]
        for name, module in divided.items():
            divisor = torch.exp2(torch.tensor(self.layers[name].exponents, dtype=torch.float32))
            set_divisor(module, divisor.to(module.get_parameter("weight").device))
        mark_smoothed(denoiser, self.ways)
        attach(denoiser)
        return restore

    def as_json(self) -> Mapping[str, object]:
        """What scripts are told."""
        return {"smoothing": {"alpha": self.alpha, "layers": self.ways}}

    def __str__(self) -> str:
        n_divided = list(self.ways.values()).count("divided")
        n_folded = len(self.layers) - n_divided
        ways = f"{n_folded} by the operation before them, {n_divided} by a divisor"
        left = f", {len(self.refused)} left out" if self.refused else ""
        return f"SmoothQuant, alpha {self.alpha:g}: inputs of {len(self.layers)} layers smoothed, {ways}{left}"


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
        lab = Lab(pipe, study=study, progress=progress)
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


@dataclass(frozen=True, slots=True)
class RangesPart:
    """Of one denoiser step: ranges by layer; calls of a layer within the step are merged. Uncalled ones are absent."""

    timestep: float
    ranges: Mapping[str, InputRange]


def probe_ranges(lab: Lab, layers: Sequence[str], on: Sampling) -> dict[str, InputRange]:
    """The ranges of the inputs of layers that are called, over a recorded trajectory; a study keeps each step."""
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
    ranges = {}
    for name, ends in found.items():
        low, high = (tuple(float(str(value)) for value in end.cpu().numpy()) for end in ends)  # short texts, exact
        try:
            ranges[name] = InputRange(low, high)
        except InputError as error:
            raise InputError(f"layer {name!r}: {error}; use another --dtype, or leave out --smooth") from error
    return RangesPart(batches[0][0].timestep, ranges)


def smoothing_factors(input_max: torch.Tensor, weight_max: torch.Tensor, alpha: float = DEFAULT_ALPHA) -> torch.Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) `[C]` float64; 1 where either is zero, for nothing is to be moved.

    `input_max` and `weight_max` `[C]` are the largest magnitudes of each channel of the input and column of the weight.
    """
    check_alpha(alpha, "alpha")
    if input_max.shape != weight_max.shape or input_max.ndim != 1:
        raise InputError(f"maxima must be [C] both, got {list(input_max.shape)} and {list(weight_max.shape)}")
    inputs, weights = input_max.double(), weight_max.double()
    for name, values in (("inputs", inputs), ("weights", weights)):
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise InputError(f"the largest magnitudes of {name} must be finite and not negative, got {values.tolist()}")
    found = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), found, torch.ones_like(found))


def factor_exponents(factors: torch.Tensor, input_max: torch.Tensor, weight_max: torch.Tensor) -> torch.Tensor:
    """The exponents `[C]` int64 of the powers of two that are used for `factors` `[C]` of channels that go together.

    The geometric mean of the live channels is taken out, because a factor common to all channels changes no rounding
    of a layer; dead channels get 0. Exponents lie in -8..8, and are limited so that no weight that fits float16 leaves
    its range: the largest weight of a column stays in 2^-14..2^15 if it was there.
    """
    weights = weight_max.double()
    is_live = (input_max > 0) & (weights > 0)
    logs = factors.double().log2()
    middle = logs[is_live].mean() if bool(is_live.any()) else logs.new_zeros(())
    size = torch.where(is_live, weights, torch.ones_like(weights)).log2()
    upper = (_LARGEST - size).floor().clamp(0, MAX_EXPONENT)
    lower = (_SMALLEST - size).ceil().clamp(-MAX_EXPONENT, 0)
    rounded = (logs - middle).round().clamp(lower, upper)
    return torch.where(is_live, rounded, torch.zeros_like(rounded)).long()


def plan_smoothing(
    folding: Folding, ranges: Mapping[str, InputRange], weights: WeightSource, alpha: float = DEFAULT_ALPHA
) -> Smoothing:
    """The powers of two for every layer of a folding, from the ranges of its input and the columns of its weight.

    Channels of one class share a factor, from the largest range and the largest weight among them; classes that some
    layer reads together are limited together.
    """
    input_max, weight_max = np.zeros(folding.n_classes), np.zeros(folding.n_classes)
    together = DisjointSet(range(folding.n_classes))
    for name, classes in folding.inputs.items():
        if name not in ranges:
            raise InputError(f"the range of the input of layer {name!r} was not measured; measure ranges with it")
        columns = weights.read(name).detach().double().abs().transpose(0, 1).flatten(1).amax(1).cpu().numpy()
        np.maximum.at(input_max, classes, np.maximum(np.abs(ranges[name].low), np.abs(ranges[name].high)))
        np.maximum.at(weight_max, classes, columns)
        for one in classes[1:]:
            together.merge(int(classes[0]), int(one))
    inputs, columns_max = torch.from_numpy(input_max), torch.from_numpy(weight_max)
    factors, exponents = smoothing_factors(inputs, columns_max, alpha), np.zeros(folding.n_classes, dtype=np.int64)
    for group in map(sorted, together.subsets()):
        exponents[group] = factor_exponents(factors[group], inputs[group], columns_max[group]).numpy()
    layers = {name: _layer(folding, name, exponents[classes]) for name, classes in folding.inputs.items()}
    parameters = {
        name: ScaledParameter(
            tuple(np.where(rows.classes == NONE, 0, exponents[rows.classes]).tolist()),
            tuple(rows.offsets.tolist()) if rows.offsets.any() else (),
            rows.bias,
        )
        for name, rows in folding.parameters.items()
    }
    return Smoothing(alpha, layers, parameters, dict(folding.refused), {name: ranges[name] for name in layers})


def _layer(folding: Folding, name: str, exponents: Array) -> SmoothedLayer:
    own = set(folding.inputs[name].tolist())
    carriers = (p for p, rows in folding.parameters.items() if not own.isdisjoint(rows.classes.tolist()))
    return SmoothedLayer(tuple(exponents.tolist()), () if name in folding.divided else tuple(carriers))


def _exchanged(denoiser: nn.Module, smoothing: Smoothing, *, is_wide: bool) -> dict[int, nn.Parameter]:
    """The changed parameters by the identity of the original."""
    rows, added = dict[str, Array](), dict[str, Array]()
    columns = {f"{name}.weight": np.exp2(layer.exponents) for name, layer in smoothing.layers.items()}
    for name, scaled in smoothing.parameters.items():
        taker, factors = scaled.bias or name, np.exp2(-np.array(scaled.exponents))
        rows |= {name: factors, taker: factors}
        if scaled.constants:
            added[taker] = np.array(scaled.constants) * (factors - 1)
    found = {}
    for name in {**columns, **rows}:
        try:
            original = denoiser.get_parameter(name)
        except AttributeError as error:
            kind = type(denoiser).__name__
            raise InputError(f"the smoothing is of another denoiser: {kind} has no {name!r}") from error
        values = original.detach().double()
        for factors, axis in ((rows.get(name), 0), (columns.get(name), 1)):
            values = values if factors is None else values * _aligned(factors, values, axis, name)
        values = values + _aligned(added[name], values, 0, name) if name in added else values
        kept = values.to(original.dtype)
        is_kept = not is_wide or torch.equal(kept.double(), values)
        found[id(original)] = nn.Parameter(kept if is_kept else values.float(), requires_grad=original.requires_grad)
    return found


def _aligned(numbers: Array, values: torch.Tensor, axis: int, name: str) -> torch.Tensor:
    """Numbers along an axis of a parameter, or one for each of its elements."""
    tensor = torch.from_numpy(numbers).to(values.device, torch.float64)
    if len(numbers) == values.shape[axis]:
        return tensor.reshape(*[1] * axis, -1, *[1] * (values.ndim - axis - 1))
    if axis or len(numbers) != values.numel():
        raise InputError(f"the smoothing is of another denoiser: {name!r} is {tuple(values.shape)}, not {len(numbers)}")
    return tensor.reshape(values.shape)


def apply_smoothing(pipe: DiffusersPipeline, smoothing: Smoothing, on: Sampling) -> Callable[[], None]:
    """Smooths a pipeline's denoiser in place, and compares one call of it before and after; the result undoes it."""
    calls = record(pipe, replace(on.first(2), n_steps=1)).calls
    restore = smoothing.enter(pipe.denoiser, is_stored=False)
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


def _price(lab: Lab, knobs: SmoothingKnobs) -> Price:
    """The trajectory and its calls again for the ranges; ranking layers takes three such runs more, and fits."""
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
    apply=lambda lab, knobs: None if knobs.settings is None else plan_smoothings(lab, [knobs.settings])[0],
    price=_price,
    is_wanted=lambda knobs: knobs.alpha is not None,
)
