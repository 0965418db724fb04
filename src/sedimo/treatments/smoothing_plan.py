"""Smoothing a denoiser: the record of what is scaled by which powers of two, put into a denoiser and taken out again.

As in `probe.py`, original parameters are never written to: they are exchanged for others and exchanged back, so that
restoring is bit-exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import nn

from sedimo.bank import Bank
from sedimo.errors import InputError
from sedimo.graph.folding import NONE, Folding
from sedimo.pipelines.adapter import WeightSource
from sedimo.quant.smoothing import DEFAULT_ALPHA, check_alpha, factor_exponents, smoothing_factors
from sedimo.runtime.diffusers_plugin import attach
from sedimo.runtime.smoothed import How, mark_smoothed, remove_divisor, set_divisor, smoothed_layers
from sedimo.treatments.ranges import ChannelRange, RangesProbe


@dataclass(frozen=True, slots=True)
class SmoothedLayer:
    """Input channel j is divided by 2 to the power of `exponents[j]`, and the weight's column multiplied by it.

    `into` names what divides it: parameters of other modules, or nothing if the layer does it.
    """

    exponents: tuple[int, ...]
    into: tuple[str, ...] = ()

    @property
    def how(self) -> How:
        """Whether the layer divides its input itself."""
        return "folded" if self.into else "divided"


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
class Smoothing:
    """All that smoothing changes in a denoiser. `refused` tells why layers that were asked for were left out.

    `ranges` are those of the layers' inputs before it.
    """

    alpha: float
    layers: Mapping[str, SmoothedLayer]
    parameters: Mapping[str, ScaledParameter]
    refused: Mapping[str, str]
    ranges: Mapping[str, ChannelRange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses an alpha that is none."""
        check_alpha(self.alpha)

    def ranges_after(self, layer: str) -> ChannelRange:
        """What the range of a layer's input becomes: every channel divided by its power of two."""
        before, factors = self.ranges[layer], np.exp2(self.layers[layer].exponents)
        low, high = np.asarray(before.low) / factors, np.asarray(before.high) / factors
        return ChannelRange(tuple(low.tolist()), tuple(high.tolist()))

    @property
    def ways(self) -> dict[str, How]:
        """How each layer is smoothed."""
        return {name: layer.how for name, layer in self.layers.items()}

    def enter(self, denoiser: nn.Module, *, is_stored: bool) -> Callable[[], None]:
        """Smooths a denoiser in place; the result undoes it. Weights that are stored may become wider."""
        return smooth_weights(denoiser, self, widen=is_stored)

    def on(self, bank: Bank) -> Bank:
        """The bank as it is: its weights are smoothed already."""
        return bank

    def as_json(self) -> Mapping[str, object]:
        """What scripts are told."""
        return {"smoothing": {"alpha": self.alpha, "layers": self.ways}}

    def __str__(self) -> str:
        """For people."""
        n_divided = sum(how == "divided" for how in self.ways.values())
        n_folded = len(self.layers) - n_divided
        ways = f"{n_folded} by the operation before them, {n_divided} by a divisor"
        left = f", {len(self.refused)} left out" if self.refused else ""
        return f"SmoothQuant, alpha {self.alpha:g}: inputs of {len(self.layers)} layers smoothed, {ways}{left}"


def plan_smoothing(
    folding: Folding, ranges: RangesProbe, weights: WeightSource, alpha: float = DEFAULT_ALPHA
) -> Smoothing:
    """The powers of two for every layer of a folding, from the ranges of its input and the columns of its weight.

    Channels of one class share a factor, from the largest range and the largest weight among them.

    Raises:
        InputError: alpha outside 0..1, or a layer whose range was not measured or is not finite.
    """
    input_max, weight_max = np.zeros(folding.n_classes), np.zeros(folding.n_classes)
    for name, classes in folding.inputs.items():
        largest = ranges.largest(name)
        if largest is None:
            raise InputError(f"the range of the input of layer {name!r} was not measured; measure ranges with it")
        np.maximum.at(input_max, classes, largest)
        np.maximum.at(weight_max, classes, _column_max(weights.read(name)))
    factors = smoothing_factors(torch.from_numpy(input_max), torch.from_numpy(weight_max), alpha)
    exponents = np.zeros(folding.n_classes, dtype=np.int64)
    for together in _groups(folding):
        parts = (factors[together], torch.from_numpy(input_max[together]), torch.from_numpy(weight_max[together]))
        exponents[together] = factor_exponents(*parts).numpy()
    layers = _layers(folding, exponents)
    before = {name: found for name in layers if (found := ranges.over_time(name)) is not None}
    return Smoothing(alpha, layers, _parameters(folding, exponents), dict(folding.refused), before)


def smooth_weights(denoiser: nn.Module, smoothing: Smoothing, *, widen: bool = False) -> Callable[[], None]:
    """Smooths a denoiser in place; calling the result gives every original parameter back.

    A diffusers model then saves itself with its divisors. Parameters keep their dtype; with `widen`, those that it
    cannot hold exactly become float32, as suits weights that are to be stored and not computed with.

    Raises:
        InputError: the denoiser is smoothed already, lacks a parameter, or has one of another size.
    """
    if smoothed_layers(denoiser):
        raise InputError("the denoiser is smoothed already: undo that first, or load it anew")
    fresh = {name: _exchanged(denoiser, name, change, widen) for name, change in _changes(smoothing).items()}
    places = _places(denoiser, fresh)
    originals = [(module, name, module._parameters[name]) for module, name, _ in places]
    divided = [denoiser.get_submodule(name) for name, how in smoothing.ways.items() if how == "divided"]

    def restore() -> None:
        for module, name, original in originals:
            module._parameters[name] = original
        for module in divided:
            remove_divisor(module)
        mark_smoothed(denoiser, {})
        attach(denoiser)

    for module, name, parameter in places:
        module._parameters[name] = parameter
    for name, how in smoothing.ways.items():
        if how == "divided":
            module = denoiser.get_submodule(name)
            weight = module.get_parameter("weight")
            divisor = torch.exp2(torch.tensor(smoothing.layers[name].exponents, dtype=torch.float32))
            set_divisor(module, divisor.to(weight.device))
    mark_smoothed(denoiser, smoothing.ways)
    attach(denoiser)
    return restore


@contextlib.contextmanager
def smoothed(denoiser: nn.Module, smoothing: Smoothing) -> Iterator[nn.Module]:
    """The denoiser smoothed; on leaving it is bit-exactly what it was."""
    restore = smooth_weights(denoiser, smoothing)
    try:
        yield denoiser
    finally:
        restore()


@dataclass(slots=True)
class _Change:
    """What happens to one parameter: powers of two by row or element and by column, and constants that are added."""

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    added: np.ndarray | None = None


def _changes(smoothing: Smoothing) -> dict[str, _Change]:
    found: dict[str, _Change] = {}
    for name, layer in smoothing.layers.items():
        found.setdefault(f"{name}.weight", _Change()).columns = np.array(layer.exponents)
    for name, scaled in smoothing.parameters.items():
        rows = -np.array(scaled.exponents)
        added = None if not scaled.constants else np.array(scaled.constants) * (np.exp2(rows) - 1)
        found.setdefault(name, _Change()).rows = rows
        taker = name if scaled.bias is None else scaled.bias
        found.setdefault(taker, _Change()).rows = rows
        found[taker].added = added
    return found


def _exchanged(denoiser: nn.Module, name: str, change: _Change, widen: bool) -> nn.Parameter:
    """The changed parameter."""
    try:
        original = denoiser.get_parameter(name)
    except AttributeError as error:
        raise InputError(f"the smoothing is of another denoiser: {type(denoiser).__name__} has no {name!r}") from error
    values = original.detach().double()
    for exponents, axis in ((change.rows, 0), (change.columns, 1)):
        if exponents is not None:
            values = values * _aligned(np.exp2(exponents), values, axis, name)
    if change.added is not None:
        values = values + _aligned(change.added, values, 0, name)
    kept = values.to(original.dtype)
    is_exact = torch.equal(kept.double(), values)
    return nn.Parameter(kept if is_exact or not widen else values.float(), requires_grad=original.requires_grad)


def _aligned(numbers: np.ndarray, values: torch.Tensor, axis: int, name: str) -> torch.Tensor:
    """Numbers along an axis of a parameter, or one for each of its elements."""
    tensor = torch.from_numpy(numbers).to(values.device, torch.float64)
    if len(numbers) == values.shape[axis]:
        return tensor.reshape(*[1] * axis, -1, *[1] * (values.ndim - axis - 1))
    if axis or len(numbers) != values.numel():
        raise InputError(f"the smoothing is of another denoiser: {name!r} is {tuple(values.shape)}, not {len(numbers)}")
    return tensor.reshape(values.shape)


def _places(denoiser: nn.Module, fresh: Mapping[str, nn.Parameter]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Where the changed parameters go: every module that has the original, which may be shared."""
    by_original = {id(denoiser.get_parameter(name)): parameter for name, parameter in fresh.items()}
    return [
        (module, name, by_original[id(parameter)])
        for module in denoiser.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in by_original
    ]


def _column_max(weight: torch.Tensor) -> np.ndarray:
    found: np.ndarray = weight.detach().double().abs().transpose(0, 1).flatten(1).amax(1).cpu().numpy()
    return found


def _groups(folding: Folding) -> list[list[int]]:
    """Classes that go together because a layer reads them all."""
    sets = DisjointSet(range(folding.n_classes))
    for classes in folding.inputs.values():
        for one in classes[1:]:
            sets.merge(int(classes[0]), int(one))
    return [sorted(group) for group in sets.subsets()]


def _layers(folding: Folding, exponents: np.ndarray) -> dict[str, SmoothedLayer]:
    found = {}
    for name, classes in folding.inputs.items():
        own = set(classes.tolist())
        carriers = [p for p, rows in folding.parameters.items() if not own.isdisjoint(rows.classes.tolist())]
        into = () if name in folding.divided else tuple(carriers)
        found[name] = SmoothedLayer(tuple(exponents[classes].tolist()), into)
    return found


def _parameters(folding: Folding, exponents: np.ndarray) -> dict[str, ScaledParameter]:
    found = {}
    for name, rows in folding.parameters.items():
        own = np.where(rows.classes == NONE, 0, exponents[rows.classes])
        constants = tuple(rows.offsets.tolist()) if rows.offsets.any() else ()
        found[name] = ScaledParameter(tuple(own.tolist()), constants, rows.bias)
    return found
