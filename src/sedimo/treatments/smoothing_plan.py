"""SmoothQuant's numerics: the powers of two that scale a denoiser, put into it and taken out again.

Dividing channel j of the input by s_j and multiplying column j of the weight by s_j leaves the layer's function as it
is. Here s_j is a power of two, which floating-point numbers in their normal range take without rounding: the
smoothed denoiser is the same function bit for bit where no constant is involved, and can be undone (in float16, weights
far below the largest of their column may become subnormal and lose bits). Its distance from the
published factor is at most the square root of two, less than what one step of alpha changes.

Original parameters are never written to: they are exchanged for others and exchanged back, so that restoring is
bit-exact.

Source:
    Xiao et al. 2023, SmoothQuant (arXiv 2211.10438), equation 4; alpha = 0.7 as in Efficient Quantization Strategies
    for Latent Diffusion Models (arXiv 2312.05431).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import nn

from sedimo.checkpoint.diffusers_plugin import attach
from sedimo.checkpoint.inputs import mark_smoothed, remove_divisor, set_divisor, smoothed_layers
from sedimo.checkpoint.layout import How
from sedimo.errors import InputError
from sedimo.graph.folding import NONE, Folding
from sedimo.lab.bench import InForce
from sedimo.pipelines.adapter import WeightSource
from sedimo.quant.activations import InputRange
from sedimo.settings import within

DEFAULT_ALPHA = 0.7
MAX_EXPONENT = 8
_LARGEST = 15  # float16 ends at 2^16: weights stay below half of that
_SMALLEST = -14  # the smallest normal float16 is 2^-14: the largest weight of a column stays above it
check_alpha = within(least=0, most=1, hint="0: all of the range stays in the input; 0.7 is usual")
Array = npt.NDArray[Any]


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
    """All that smoothing changes in a denoiser. `refused` tells why layers that were asked for were left out.

    `ranges` are those of the layers' inputs before it.
    """

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
        """Smooths a denoiser in place; the result undoes it. Weights that are stored may become wider."""
        return smooth_weights(denoiser, self, widen=is_stored)

    def as_json(self) -> Mapping[str, object]:
        """What scripts are told."""
        return {"smoothing": {"alpha": self.alpha, "layers": self.ways}}

    def __str__(self) -> str:
        n_divided = list(self.ways.values()).count("divided")
        n_folded = len(self.layers) - n_divided
        ways = f"{n_folded} by the operation before them, {n_divided} by a divisor"
        left = f", {len(self.refused)} left out" if self.refused else ""
        return f"SmoothQuant, alpha {self.alpha:g}: inputs of {len(self.layers)} layers smoothed, {ways}{left}"


def smoothing_factors(input_max: torch.Tensor, weight_max: torch.Tensor, alpha: float = DEFAULT_ALPHA) -> torch.Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) `[C]` float64; 1 where either is zero, for nothing is to be moved.

    `input_max` and `weight_max` `[C]` are the largest magnitudes of each channel of the input and column of the weight.

    Example:
        >>> smoothing_factors(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0]), 0.5)
        tensor([2., 1.], dtype=torch.float64)
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


def smooth_weights(denoiser: nn.Module, smoothing: Smoothing, *, widen: bool = False) -> Callable[[], None]:
    """Smooths a denoiser in place; calling the result gives every original parameter back.

    A diffusers model then saves itself with its divisors. Parameters keep their dtype; with `widen`, those that it
    cannot hold exactly become float32, as suits weights that are to be stored and not computed with.
    """
    if smoothed_layers(denoiser):
        raise InputError("the denoiser is smoothed already: undo that first, or load it anew")
    fresh = _exchanged(denoiser, smoothing, widen)
    places = [  # every module that has the original, which may be shared
        (module, name, parameter)
        for module in denoiser.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in fresh
    ]
    divided = {name: denoiser.get_submodule(name) for name, how in smoothing.ways.items() if how == "divided"}

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
        divisor = torch.exp2(torch.tensor(smoothing.layers[name].exponents, dtype=torch.float32))
        set_divisor(module, divisor.to(module.get_parameter("weight").device))
    mark_smoothed(denoiser, smoothing.ways)
    attach(denoiser)
    return restore


def _exchanged(denoiser: nn.Module, smoothing: Smoothing, widen: bool) -> dict[int, nn.Parameter]:
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
        is_kept = not widen or torch.equal(kept.double(), values)
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
