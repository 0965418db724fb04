"""Changes of decisions in memory together, and inner products of per-sample weight gradients with them.

The products are taken during one backward pass. Rounded activations are one more change: of the layer's output, which
the output gradient is multiplied with directly.

For a layer with inputs X_s and output gradients D_s, the gradient of sample s with respect to the weight is
G_s = D_s^T X_s. It is formed for one layer at a time (in slices of output channels), multiplied with the layer's
weight changes, and dropped: the gradients of all layers never exist together.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn import grad as weight_gradients
from torch.nn.modules.conv import _ConvNd

from sedimo.codec import content_key
from sedimo.errors import InputError, StateError, UnsupportedError
from sedimo.graph.model import Stream
from sedimo.lab.exchange import (
    MEMORY_BYTES,
    hooked,
    input_roundings,
    passes,
    rounding_change,
    stream_of,
    weight_changes,
)
from sedimo.lab.lab import Lab
from sedimo.lab.study import Setting
from sedimo.metrics.estimate import to_digits
from sedimo.pipelines.adapter import DenoiserCall
from sedimo.pipelines.trajectory import MAX_ROWS, output_tensor, rows_of
from sedimo.quant.activations import InputQuantizers

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Part = TypeVar("Part")
Call = TypeVar("Call")
Values = npt.NDArray[np.float64]
Numbers = Mapping[str, Mapping[str, tuple[float, ...]]]  # by decision and change: `uaq4`, `a8`
_WEIGHT_GRADIENTS: Mapping[int, Callable[..., torch.Tensor]] = {  # by the number of axes of a kernel
    1: weight_gradients.conv1d_weight,
    2: weight_gradients.conv2d_weight,
    3: weight_gradients.conv3d_weight,
}
_GRADIENT_BYTES = 64 << 20  # of the slice of G that exists at a time


@dataclass(frozen=True, slots=True)
class FirstOrder:
    """What all decisions and changes do to first order: `numbers` `[n * each]`, those of a sample one after another.

    `unused` decisions were never called; their numbers are 0. `row_weights` say how a sample's rows were combined;
    `(1.0,)` when each counted for itself.
    """

    setting: Setting
    n_directions: int
    numbers: Numbers
    unused: tuple[str, ...]
    row_weights: tuple[float, ...] = (1.0,)

    def total(self, decision: str, changes: Sequence[str]) -> Values:
        """What several changes of a decision do together, `[n, each]`."""
        known, n = measured(self.numbers.get(decision, {}), decision, changes), self.setting.n_samples
        found: Values = np.sum(known, axis=0).reshape(n, -1) if known else np.zeros((n, 1))
        return found

    def described(self, **more: str) -> dict[str, str]:
        """The settings of a table that is made of it."""
        return {
            "n_samples": str(self.setting.n_samples),
            "n_steps": str(self.setting.n_steps),
            "n_directions": str(self.n_directions),
            "unused_decisions": ", ".join(self.unused) or "none",
            **more,
        }


def measured(known: Mapping[str, Result], decision: str, changes: Iterable[str]) -> list[Result]:
    """What is known of several changes of a decision."""
    missing = [name for name in changes if name not in known]
    if missing:
        raise InputError(f"the probe has no {decision} at {missing[0]}; measure it again for this space")
    return [known[name] for name in changes]


def kept(names: Iterable[str], rows: Iterable[Iterable[float]], digits: int) -> dict[str, tuple[float, ...]]:
    """The numbers of each change, as they are kept."""
    return {name: tuple(to_digits(v, digits) for v in row) for name, row in zip(names, rows, strict=True)}


@dataclass(frozen=True)
class Changes:
    """Changes of the layers of one decision; their products are `[..., F + A]`.

    `deltas` of the weight `[F, out, in, ...]`, one per format, or of the part of it that reads a `stream`; by layer, A
    `roundings` of its inputs.
    """

    layers: tuple[str, ...]
    deltas: torch.Tensor
    roundings: Mapping[str, tuple[InputQuantizers, ...]] = field(default_factory=dict)
    stream: Stream | None = None


def decisions_by_layer(changes: Mapping[str, Changes]) -> dict[str, list[str]]:
    """Which decisions change a layer, such as one of each stream that it reads."""
    found: dict[str, list[str]] = {}
    for name, one in changes.items():
        for layer in one.layers:
            found.setdefault(layer, []).append(name)
    return found


class ChangedDecisions:
    """Some decisions whose changes are in memory together; they are loaded when needed.

    `names` are those of the changes by decision: weight formats, then widths of activations. Of a call `max_rows` are
    looked at at a time.
    """

    def __init__(self, lab: Lab, decisions: Iterable[str]) -> None:
        self.denoiser, self._bank = lab.pipe.denoiser, lab.bank
        self.names = {d: lab.bank.space.decision_index[d].changes for d in decisions}
        self.max_rows, self._copies_inputs = MAX_ROWS, False

    @cached_property
    def changes(self) -> dict[str, Changes]:
        """By decision."""
        bank, found = self._bank, {}
        for name in self.names:
            d = bank.space.decision_index[name]
            deltas = weight_changes(bank, self.denoiser, name)
            found[name] = Changes(d.layers, deltas, input_roundings(bank, d), d.stream)
        return found

    def forget(self) -> None:
        """Frees the changes until they are needed again."""
        self.__dict__.pop("changes", None)

    def tapped(self, measure: Callable[[Taps], Result]) -> Result:
        """What is measured with hooks on the layers; again with inputs copied, or samples apart, if need be."""
        try:
            with Taps(self.denoiser, self.changes, copy_inputs=self._copies_inputs) as taps:
                return measure(taps)
        except InputChangedError as error:
            logger.info("%s; inputs are copied from now on", error)
            self._copies_inputs = True
        except MixedRowsError as error:
            logger.info("%s; one sample at a time from now on", error)
            self.max_rows = 1
        return self.tapped(measure)

    def refuse_hidden_use(self, call: DenoiserCall, unused: Iterable[str]) -> None:
        """Layers that were not called must have no influence: their weights must get no gradient."""
        layers = [layer for d in unused for layer in self.changes[d].layers]
        weights = [self.denoiser.get_submodule(layer).get_parameter("weight") for layer in layers]
        first = rows_of(call, torch.arange(1, device=call.output.device))
        gradients: Sequence[torch.Tensor | None] = [None] * len(weights)
        with contextlib.ExitStack() as stack, torch.enable_grad():
            for weight in weights:
                stack.callback(weight.requires_grad_, weight.requires_grad)
                weight.requires_grad_(True)
            output = output_tensor(self.denoiser(**first)) if weights else torch.zeros(())
            if output.requires_grad:
                gradients = torch.autograd.grad(output.sum(), weights, allow_unused=True)
        hidden = [layer for layer, gradient in zip(layers, gradients, strict=True) if gradient is not None]
        if hidden:
            raise UnsupportedError(
                f"the weight of layer {hidden[0]!r} is used without calling the layer, so its first-order noise cannot "
                "be measured. Use method='ablation' or 'error', or leave the layer out of the space."
            )


def each_part(
    lab: Lab,
    kind: type[Part],
    label: str,
    calls: Sequence[Call],
    named: Mapping[str, object],
    measure: Callable[[ChangedDecisions, Call], Part],
) -> Iterator[Part]:
    """The parts of recorded calls, one after another, for as many decisions at a time as fit in memory; resumable."""
    groups = passes(lab.bank.space, MEMORY_BYTES)

    def works() -> Iterator[tuple[str, Callable[[], Part]]]:
        for group in groups:
            decisions = ChangedDecisions(lab, group)
            for index, call in enumerate(calls):
                key = content_key({**named, "call": index, "formats": decisions.names})
                yield key, functools.partial(measure, decisions, call)

    return lab.parts().each(kind, label, len(groups) * len(calls), works())


class InputChangedError(StateError):
    """A layer's input was overwritten before the backward pass; `Taps(copy_inputs=True)` helps."""


class MixedRowsError(StateError):
    """A layer's rows do not tell samples apart; one sample at a time helps."""


class Taps:
    """Hooks on the layers of some decisions; a context manager that removes them.

    Inside it no parameter asks for a gradient of its own. Call `begin`, run the denoiser with gradients enabled,
    then call `products` for each direction.
    """

    def __init__(self, denoiser: nn.Module, changes: Mapping[str, Changes], *, copy_inputs: bool = False) -> None:
        self._denoiser, self._changes, self._copy_inputs = denoiser, changes, copy_inputs
        self._decisions_of = decisions_by_layer(changes)
        self._anchor = torch.zeros((), requires_grad=True)
        self._leaving = contextlib.ExitStack()
        self._called: set[str] = set()
        self._sums: dict[str, torch.Tensor] = {}
        self._n_rows, self._n_samples, self._timestep = 0, 0, math.nan

    def __enter__(self) -> Taps:
        for parameter in self._denoiser.parameters():
            if parameter.requires_grad:
                self._leaving.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        hooks = {layer: functools.partial(self._tap, layer) for layer in self._decisions_of}
        self._leaving.enter_context(hooked(self._denoiser, hooks))
        return self

    def __exit__(self, *_raised: object) -> None:
        self._leaving.close()

    def begin(self, device: torch.device, timestep: float = math.nan) -> None:
        """Forgets earlier calls; to be called before the denoiser is, with the noise level that it will be told."""
        self._called, self._sums, self._timestep = set(), {}, timestep
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    @property
    def unused(self) -> tuple[str, ...]:
        """Decisions none of whose layers was called since `begin`."""
        return tuple(name for name, one in self._changes.items() if self._called.isdisjoint(one.layers))

    def products(
        self,
        outputs: Sequence[torch.Tensor],
        directions: Sequence[torch.Tensor | None],
        *,
        n_samples: int,
        entries: Sequence[torch.Tensor] = (),
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor | None]]:
        """<G_s, delta_f> `[n, F]` float64 by decision, and the gradients with respect to `entries`, None where zero.

        G_s is the gradient of the sum of <direction_s, output_s> over the outputs; a direction that is None counts as
        zero. Row r belongs to sample `r mod n_samples`; where samples mix, there is one row `[1, F]` for all of them.
        The graph is kept for further directions. Decisions that were not used are absent.
        """
        self._sums, self._n_rows, self._n_samples = {}, outputs[0].shape[0], n_samples
        pairs = [(o, d) for o, d in zip(outputs, directions, strict=True) if d is not None and o.requires_grad]
        gradients: list[torch.Tensor | None] = [None] * len(entries)
        if pairs:
            roots, given = zip(*pairs, strict=True)
            try:
                wanted = [self._anchor, *entries]
                found = torch.autograd.grad(roots, wanted, given, retain_graph=True, allow_unused=True)
                gradients = list(found[1:])
            except InputChangedError:
                raise
            except RuntimeError as error:
                raise UnsupportedError(f"the denoiser cannot be differentiated on its own inputs: {error}") from error
        return {name: one.double() for name, one in self._sums.items()}, gradients

    def _tap(self, layer: str, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        inputs = args[0].detach()
        self._called.add(layer)
        tapped = output if output.requires_grad else output + self._anchor.to(output.dtype)
        kept_inputs = inputs.clone() if self._copy_inputs else inputs
        add = functools.partial(self._add, layer, module, kept_inputs, inputs._version)
        tapped.register_hook(add)  # type: ignore[no-untyped-call]  # torch
        return tapped

    def _add(self, layer: str, module: nn.Module, inputs: torch.Tensor, version: int, gradient: torch.Tensor) -> None:
        """Adds the products of one call of a layer, those of all samples as one where its first axis is not theirs."""
        if inputs._version != version and not self._copy_inputs:
            raise InputChangedError(f"the input of layer {layer!r} was overwritten before the backward pass")
        per_row = gradient.shape[0] == inputs.shape[0] == self._n_rows and gradient.ndim > 1
        n = self._n_samples if per_row else 1
        for decision in self._decisions_of[layer]:
            with torch.no_grad():
                products = self._products(layer, module, inputs, gradient, self._changes[decision], n)
            before = self._sums.get(decision, torch.zeros_like(products))
            if len(before) != len(products):
                before, products = (one.double().sum(0, keepdim=True) for one in (before, products))
            self._sums[decision] = before + products

    def _products(
        self, layer: str, module: nn.Module, inputs: torch.Tensor, gradient: torch.Tensor, changes: Changes, n: int
    ) -> torch.Tensor:
        """The products of one use with the changes of one decision, `[n or 1, F + A]`."""
        read = stream_of(module, inputs, changes.stream)
        if isinstance(module, _ConvNd):
            products = _conv_products(module, read, gradient, changes.deltas, n)
        else:
            products = _linear_products(_matrices(read, n), _matrices(gradient, n), changes.deltas)
        rounded = (
            rounding_change(module, layer, inputs, quantizers, self._timestep) * gradient.float()
            for quantizers in changes.roundings.get(layer, ())
        )
        return torch.cat([products, *(r.flatten(1).sum(1).reshape(-1, n, 1).sum(0) for r in rounded)], 1)


def drawn(words: str, shape: Sequence[int]) -> torch.Tensor:
    """A random direction that its name determines, on the CPU."""
    generator = torch.Generator().manual_seed(int(content_key(words)[:12], 16))
    return torch.randn(tuple(shape), generator=generator)


def over(directions: torch.Tensor, sizes: torch.Tensor, *, of: str, remedy: str) -> torch.Tensor:
    """Directions `[n, ...]` divided by the sizes `[n]` of what noise is measured beside, which must have one."""
    wrong = sizes[~(sizes > 0) | sizes.isinf()]
    if len(wrong):
        raise InputError(
            f"noise is measured beside {of}, whose norm must be positive and finite, but a sample has {wrong[0]:g}. "
            f"Repair the checkpoint, or take a method that does not {remedy}"
        )
    return directions.to(sizes.device) / sizes.reshape(-1, *[1] * (directions.ndim - 1))


def _matrices(tensor: torch.Tensor, n: int) -> torch.Tensor:
    """`[B, ..., K]`, row r of sample r mod n, as `[n, N, K]`: a sample's rows become more of its positions."""
    grouped = tensor.reshape(-1, n, math.prod(tensor.shape[1:-1]), tensor.shape[-1])
    return grouped.transpose(0, 1).reshape(n, -1, tensor.shape[-1])


def _linear_products(inputs: torch.Tensor, gradient: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """<D_s^T X_s, delta_f> `[n, F]` of inputs `[n, N, in]`, gradients `[n, N, out]` and deltas `[F, out, in]`."""
    n, n_formats, n_out, n_in = inputs.shape[0], *deltas.shape
    step = max(1, _GRADIENT_BYTES // (4 * n * n_in))
    found = torch.zeros(n, n_formats, device=deltas.device, dtype=torch.float32)
    for begin in range(0, n_out, step):
        weight_gradient = torch.bmm(gradient[:, :, begin : begin + step].transpose(1, 2), inputs)  # [n, step, in]
        changes = deltas[:, begin : begin + step].flatten(1)
        found += (weight_gradient.reshape(n, -1).to(changes.dtype) @ changes.T).float()
    return found


def _conv_products(
    module: _ConvNd, inputs: torch.Tensor, gradient: torch.Tensor, deltas: torch.Tensor, n: int
) -> torch.Tensor:
    """<G_s, delta_f> `[n, F]` of a convolution; G_s by the framework's own weight gradient, one sample at a time.

    Row r belongs to sample r mod n.
    """
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    changes, size = deltas.flatten(1), (module.out_channels, inputs.shape[1] // module.groups, *module.kernel_size)
    weight_gradient = _WEIGHT_GRADIENTS[len(padding)]
    rows = []
    for i in range(n):
        found = weight_gradient(
            inputs[i::n], size, gradient[i::n], module.stride, padding, module.dilation, module.groups
        )
        rows.append((changes @ found.reshape(-1).to(changes.dtype)).float())
    return torch.stack(rows)
