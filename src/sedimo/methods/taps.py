"""Inner products of per-sample weight gradients with given weight changes, taken during one backward pass.

Rounded activations are one more change: of the layer's output, which the output gradient is multiplied with directly.

For a layer with inputs X_s and output gradients D_s, the gradient of sample s with respect to the weight is
G_s = D_s^T X_s. It is formed for one layer at a time (in slices of output channels), multiplied with the layer's
weight changes, and dropped: the gradients of all layers never exist together.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from sedimo.codec import content_key
from sedimo.errors import StateError, UnsupportedError
from sedimo.graph.model import Stream
from sedimo.lab.exchange import change_names, input_roundings, rounding_change, stream_of, weight_changes
from sedimo.lab.lab import Lab
from sedimo.pipelines.adapter import DenoiserCall
from sedimo.pipelines.trajectory import output_tensor, rows_of
from sedimo.quant.activations import InputQuantizers

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_GRADIENT_BYTES = 64 << 20  # of the slice of G that exists at a time


@dataclass(frozen=True)
class Changes:
    """Changes of the layers of one decision; their products are `[..., F + A]`.

    `deltas` of the weight `[F, out, in * kernel size]`, one per format, or of the part of it that reads a `stream`; by
    layer, A `roundings` of its inputs.
    """

    layers: tuple[str, ...]
    deltas: torch.Tensor
    roundings: Mapping[str, tuple[InputQuantizers, ...]] = field(default_factory=dict)
    stream: Stream | None = None


@dataclass
class _Sums:
    """<G_s, delta_f> summed over all uses of a decision in one backward pass."""

    own: torch.Tensor | None = None  # [n, F]
    pooled: torch.Tensor | None = None  # [1, F], of uses whose first axis is not the batch

    def add(self, products: torch.Tensor, *, per_row: bool) -> None:
        if per_row:
            self.own = products if self.own is None else self.own + products
        else:
            self.pooled = products if self.pooled is None else self.pooled + products

    def products(self) -> torch.Tensor:
        """Inner products `[n, F]`, a sample's rows added; `[1, F]`, of all samples together, where they mix."""
        if self.pooled is None:
            return torch.zeros(()) if self.own is None else self.own.double()
        return self.pooled.double() if self.own is None else self.pooled.double() + self.own.double().sum(0)


@dataclass
class _Use:
    """One call of a layer in the forward pass."""

    name: str
    inputs: torch.Tensor
    version: int


@dataclass
class _State:
    sums: dict[str, _Sums] = field(default_factory=dict)
    uses: set[str] = field(default_factory=set)


class InputChangedError(StateError):
    """A layer's input was overwritten before the backward pass; `Taps(copy_inputs=True)` helps."""


class Taps:
    """Hooks on the layers of some decisions; a context manager that removes them.

    Inside it no parameter asks for a gradient of its own. Call `begin`, run the denoiser with gradients enabled,
    then call `squared_products` for each direction.
    """

    def __init__(self, denoiser: nn.Module, changes: Mapping[str, Changes], *, copy_inputs: bool = False) -> None:
        self._denoiser, self._changes, self._copy_inputs = denoiser, changes, copy_inputs
        self._decisions_of: dict[str, list[str]] = {}
        for name, change in changes.items():
            for layer in change.layers:
                self._decisions_of.setdefault(layer, []).append(name)
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._wanting: list[nn.Parameter] = []
        self._state, self._timestep = _State(), math.nan
        self._n_rows = self._n_samples = 0

    def __enter__(self) -> Taps:
        self._wanting = [p for p in self._denoiser.parameters() if p.requires_grad]
        for parameter in self._wanting:
            parameter.requires_grad_(False)
        for layer in self._decisions_of:
            module = self._denoiser.get_submodule(layer)
            self._handles.append(module.register_forward_hook(functools.partial(self._tap, layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._wanting:
            parameter.requires_grad_(True)
        self._handles.clear()

    def begin(self, device: torch.device, timestep: float = math.nan) -> None:
        """Forgets earlier calls; to be called before the denoiser is, with the noise level that it will be told."""
        self._state, self._timestep = _State(), timestep
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    @property
    def used(self) -> tuple[str, ...]:
        """Decisions of which a layer was called since `begin`."""
        return tuple(n for n, c in self._changes.items() if self._state.uses.intersection(c.layers))

    @property
    def unused(self) -> tuple[str, ...]:
        """Decisions none of whose layers was called since `begin`."""
        used = set(self.used)
        return tuple(n for n in self._changes if n not in used)

    def squared_products(
        self, output: torch.Tensor, direction: torch.Tensor, *, n_samples: int | None = None
    ) -> dict[str, torch.Tensor]:
        """<G_s, delta_f>^2 `[n, F]` float64 by decision, G_s the gradient of <direction_s, output_s>.

        Row r belongs to sample `r mod n_samples` (to a sample of its own by default); the products of a sample's
        rows are added before they are squared, and samples that mix get the mean each. The graph is kept for further
        directions. Decisions that were not used are absent.
        """
        n = n_samples or output.shape[0]
        found, _ = self.products([output], [direction], n_samples=n)
        return {name: (p.square() * len(p) / n).expand(n, -1) for name, p in found.items()}

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
        zero. Rows, and decisions that were not used, as in `squared_products`; where samples mix, there is one row
        `[1, F]` for all of them.
        """
        self._state.sums, self._n_rows, self._n_samples = {}, outputs[0].shape[0], n_samples
        pairs = [(o, d) for o, d in zip(outputs, directions, strict=True) if d is not None and o.requires_grad]
        gradients: list[torch.Tensor | None] = [None] * len(entries)
        if pairs:
            roots, given = [o for o, _ in pairs], [d for _, d in pairs]
            wanted = [self._anchor, *entries]
            try:
                found = torch.autograd.grad(roots, wanted, given, retain_graph=True, allow_unused=True)
            except InputChangedError:
                raise
            except RuntimeError as error:
                raise UnsupportedError(f"the denoiser cannot be differentiated on its own inputs: {error}") from error
            gradients = list(found[1:])
        return {name: sums.products() for name, sums in self._state.sums.items()}, gradients

    def _tap(self, layer: str, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        inputs = args[0].detach()
        use = _Use(layer, inputs.clone() if self._copy_inputs else inputs, inputs._version)
        self._state.uses.add(layer)
        tapped = output if output.requires_grad else output + self._anchor.to(output.dtype)
        tapped.register_hook(functools.partial(self._add, module, use))  # type: ignore[no-untyped-call]  # torch
        return tapped

    def _add(self, module: nn.Module, use: _Use, gradient: torch.Tensor) -> None:
        if use.inputs._version != use.version and not self._copy_inputs:
            raise InputChangedError(f"the input of layer {use.name!r} was overwritten before the backward pass")
        per_row = gradient.shape[0] == use.inputs.shape[0] == self._n_rows and gradient.ndim > 1
        for decision in self._decisions_of[use.name]:
            with torch.no_grad():
                products = self._products(module, use, gradient, self._changes[decision], per_row=per_row)
            self._state.sums.setdefault(decision, _Sums()).add(products, per_row=per_row)

    def _products(
        self, module: nn.Module, use: _Use, gradient: torch.Tensor, changes: Changes, *, per_row: bool
    ) -> torch.Tensor:
        """The products of one use with the changes of one decision, `[n or 1, F + A]`."""
        inputs = stream_of(module, use.inputs, changes.stream)
        n = self._n_samples if per_row else 1
        if isinstance(module, _ConvNd):
            products = _conv_products(module, inputs, gradient, changes.deltas, n)
        else:
            products = _linear_products(_matrices(inputs, n), _matrices(gradient, n), changes.deltas)
        rounded = [
            self._rounding_products(module, use, gradient, quantizers).reshape(-1, n, 1).sum(0)
            for quantizers in changes.roundings.get(use.name, ())
        ]
        return torch.cat([products, *rounded], 1)

    def _rounding_products(
        self, module: nn.Module, use: _Use, gradient: torch.Tensor, quantizers: InputQuantizers
    ) -> torch.Tensor:
        """<D_b, layer(rounded X_b) - layer(X_b)> `[B, 1]`."""
        change = rounding_change(module, use.name, use.inputs, quantizers, self._timestep)
        return (change * gradient.float()).flatten(1).sum(1, keepdim=True)


class TappedDecisions:
    """Some decisions whose weight changes are in memory together; they are loaded when first needed.

    `names` are those of the changes by decision: weight formats, then widths of activations.
    """

    def __init__(self, lab: Lab, decisions: Iterable[str]) -> None:
        self.denoiser, self._bank = lab.pipe.denoiser, lab.bank
        self.names = {d: change_names(lab.bank.space, d) for d in decisions}
        self._copies_inputs = False

    @cached_property
    def _changes(self) -> dict[str, Changes]:
        return {d: self._loaded(d) for d in self.names}

    def _loaded(self, decision: str) -> Changes:
        deltas = weight_changes(self._bank, self.denoiser, decision)
        known = self._bank.space.decision_index[decision]
        return Changes(known.layers, deltas.flatten(2), input_roundings(self._bank, known), known.stream)

    def tapped(self, measure: Callable[[Taps], Result]) -> Result:
        """What is measured with hooks on the layers; where a layer's input is overwritten, again with copies."""
        try:
            with Taps(self.denoiser, self._changes, copy_inputs=self._copies_inputs) as taps:
                return measure(taps)
        except InputChangedError as error:
            logger.info("%s; inputs are copied from now on", error)
            self._copies_inputs = True
        return self.tapped(measure)

    def refuse_hidden_use(self, call: DenoiserCall, unused: Iterable[str]) -> None:
        """Layers that were not called must have no influence: their weights must get no gradient.

        Raises:
            UnsupportedError: a weight that is used without calling its layer.
        """
        layers = [layer for d in unused for layer in self._changes[d].layers]
        hidden = hidden_uses(self.denoiser, call, layers) if layers else []
        if hidden:
            raise UnsupportedError(
                f"the weight of layer {hidden[0]!r} is used without calling the layer, so its first-order noise cannot "
                "be measured. Use method='ablation' or 'error', or leave the layer out of the space."
            )


def hidden_uses(denoiser: nn.Module, call: DenoiserCall, layers: Sequence[str]) -> list[str]:
    """The layers whose weights get a gradient when the first row of a call is made again."""
    weights = [denoiser.get_submodule(layer).get_parameter("weight") for layer in layers]
    first = rows_of(call, torch.arange(1, device=call.output.device))
    wanting = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            output = output_tensor(denoiser(**first))
            if not output.requires_grad:
                return []
            gradients = torch.autograd.grad(output.sum(), weights, allow_unused=True)
    finally:
        for weight, before in zip(weights, wanting, strict=True):
            weight.requires_grad_(before)
    return [layer for layer, gradient in zip(layers, gradients, strict=True) if gradient is not None]


def drawn(words: str, shape: Sequence[int]) -> torch.Tensor:
    """A random direction that its name determines, on the CPU."""
    generator = torch.Generator().manual_seed(int(content_key(words)[:12], 16))
    return torch.randn(tuple(shape), generator=generator)


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
    changes = deltas.flatten(1)
    rows = []
    for i in range(n):
        weight_gradient = _conv_weight_gradient(module, inputs[i::n], gradient[i::n], padding)
        rows.append((changes @ weight_gradient.reshape(-1).to(changes.dtype)).float())
    return torch.stack(rows)


def _conv_weight_gradient(
    module: _ConvNd, inputs: torch.Tensor, gradient: torch.Tensor, padding: Sequence[int]
) -> torch.Tensor:
    flags = [False, True, False]
    zeros = [0] * len(padding)
    _, found, _ = torch.ops.aten.convolution_backward(
        gradient,
        inputs,
        module.weight[:, : inputs.shape[1] // module.groups],  # of its shape and dtype alone the operator makes use
        None,
        module.stride,
        list(padding),
        module.dilation,
        False,
        zeros,
        module.groups,
        flags,
    )
    if not isinstance(found, torch.Tensor):
        raise UnsupportedError("the framework gave no weight gradient for a convolution")
    return found
