"""The operators that packed weights know. A closed table: what is not in it is refused by name.

Reading operators (linear, convolution, matrix products) dequantize and run as usual. Views of a matrix that these
take on their way (transposed, expanded over a batch) stay packed, so that a write into them is refused, too. Moving,
relabelling, copying and pinning work on the stored tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn, Protocol, cast

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import return_and_correct_aliasing

from sedimo.quant.formats import Format
from sedimo.quant.parts import WeightPart

_aten = torch.ops.aten
_aliased: Callable[..., object] = return_and_correct_aliasing  # torch leaves it untyped


class Layout(NamedTuple):
    """What the stored tensors do not tell: the shape of the weight, its parts, and which view of it this is.

    A view is the weight `[out, in, ...]`, or for a matrix its transpose, or either repeated over batch dimensions.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[int, int, Format, tuple[str, ...]], ...]  # start, stop, format, fields
    is_transposed: bool = False
    batch: tuple[int, ...] = ()

    @property
    def is_view(self) -> bool:
        """Whether this is not the weight itself."""
        return self.is_transposed or bool(self.batch)

    @property
    def size(self) -> tuple[int, ...]:
        """Logical size of the view."""
        return (*self.batch, *(self.shape[::-1] if self.is_transposed else self.shape))

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the view on an ordinary tensor."""
        own = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return (*(0 for _ in self.batch), *(reversed(own) if self.is_transposed else own))

    def view_of(self, weight: torch.Tensor) -> torch.Tensor:
        """The same view of an ordinary weight."""
        turned = weight.t() if self.is_transposed else weight
        return turned.expand(self.size) if self.batch else turned


class Packed(Protocol):
    """What the operators need of a packed weight."""

    dtype: torch.dtype

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        """Its stored parts."""

    @property
    def packing(self) -> Layout:
        """Its layout."""

    @property
    def formats(self) -> tuple[Format, ...]:
        """Formats of its parts."""

    def dequantize(self) -> torch.Tensor:
        """The ordinary tensor that it stands for."""

    def rewrapped(
        self, parts: Sequence[WeightPart], *, dtype: torch.dtype | None = None, packing: Layout | None = None
    ) -> Packed:
        """Another tensor around other parts, with another label or view."""

    def refuse(self, operation: str, remedy: str = "") -> NoReturn:
        """Raises UnsupportedError."""


Arguments = tuple[object, ...]
Options = dict[str, object]
Operator = Callable[[Packed, OpOverload, Arguments, Options], object]

_MERGE = (
    "Writing into it would change a temporary and lose the result. To merge an adapter: model.dequantize(), "
    "merge, and quantize again; to use one, leave it unmerged."
)
_COPY = (
    "It can only be overwritten by a packed weight of the same parts and formats. To load ordinary weights, "
    "call model.dequantize() first; to read it, copy from .dequantize()."
)
_REMEDIES: dict[object, str] = {
    _aten.cat: "Fused projections need full-precision weights: call model.dequantize() before fuse_qkv_projections().",
    _aten.add_: _MERGE,
    _aten.sub_: _MERGE,
}


def run(packed: Packed, func: OpOverload, args: Arguments, options: Mapping[str, object]) -> object:
    """Runs an operator on arguments among which `packed` is the first packed weight.

    Raises:
        UnsupportedError: it is not in the table, or not in this form.
    """
    operator = _OPERATORS.get(func)
    if operator is None:
        packed.refuse(str(func), _REMEDIES.get(func.overloadpacket, ""))
    return operator(packed, func, args, dict(options))


def _compute(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    def plain(value: object) -> object:
        return value.dequantize() if isinstance(value, type(packed)) else value

    return func(*(plain(a) for a in args), **{name: plain(value) for name, value in options.items()})


def _convolution_backward(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    wants_input, _, wants_bias = cast("Sequence[bool]", args[-1])
    return _compute(packed, func, (*args[:-1], [wants_input, False, wants_bias]), options)


def _detach(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    return _aliased(func, args, options, packed.rewrapped(packed.parts))


def _transpose(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    n, layout = len(packed.packing.size), packed.packing
    given = args[1] if func is _aten.permute.default else args[1:] or (1, 0)
    dims = [d % n for d in cast("Sequence[int]", given)]
    swapped = [*range(n - 2), n - 1, n - 2]
    is_swap = dims == swapped if func is _aten.permute.default else sorted(dims) == [n - 2, n - 1]
    if len(layout.shape) != 2 or not is_swap:
        packed.refuse(f"{func} over dimensions {dims}")
    turned = layout._replace(is_transposed=not layout.is_transposed)
    return _aliased(func, args, options, packed.rewrapped(packed.parts, packing=turned))


def _expand(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    """A matrix repeated over new leading dimensions: what matmul does for inputs that are not contiguous."""
    layout, sizes = packed.packing, tuple(cast("Sequence[int]", args[1]))
    if len(layout.shape) != 2 or layout.batch or len(sizes) < 3 or sizes[-2:] not in (layout.size, (-1, -1)):
        packed.refuse(f"{func} to {list(sizes)}")
    return _aliased(func, args, options, packed.rewrapped(packed.parts, packing=layout._replace(batch=sizes[:-2])))


def _reshape(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    """Batch dimensions of an expanded matrix joined, as matmul does."""
    layout, sizes = packed.packing, tuple(cast("Sequence[int]", args[1]))
    is_batch = bool(layout.batch) and len(sizes) > 2 and math.prod(sizes[:-2]) == math.prod(layout.batch)
    if not is_batch or sizes[-2:] != layout.size[-2:]:
        packed.refuse(f"{func} to {list(sizes)}")
    return _aliased(func, args, options, packed.rewrapped(packed.parts, packing=layout._replace(batch=sizes[:-2])))


def _clone(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    _require_usual_layout(packed, options)
    return packed.rewrapped([part.map(torch.clone) for part in packed.parts])


def _to_copy(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    _require_usual_layout(packed, options)
    dtype = cast("torch.dtype", options.get("dtype") or packed.dtype)
    if not dtype.is_floating_point:
        packed.refuse(f"the logical dtype {dtype}", "Its label must be a floating dtype.")
    device, non_blocking = cast("torch.device | None", options.get("device")), bool(options.get("non_blocking"))
    moved = [part.map(lambda t: t.to(device, non_blocking=non_blocking, copy=True)) for part in packed.parts]
    if options.get("pin_memory"):
        moved = [part.map(torch.Tensor.pin_memory) for part in moved]
    return packed.rewrapped(moved, dtype=dtype)


def _require_usual_layout(packed: Packed, options: Options) -> None:
    if options.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        packed.refuse(f"the memory format {options['memory_format']}", "Leave memory_format out.")
    if options.get("layout") not in (None, torch.strided):
        packed.refuse(f"the layout {options['layout']}")
    if packed.packing.is_view and options.get("memory_format") is torch.contiguous_format:
        packed.refuse("contiguous() of a view")


def _copy_in_place(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    if not all(isinstance(value, type(packed)) for value in args[:2]):
        packed.refuse("copying between packed and ordinary weights", _COPY)
    target, source = cast("tuple[Packed, Packed]", args[:2])
    pairs = list(zip(target.parts, source.parts, strict=False))
    if target.packing != source.packing or any(t.dtypes != s.dtypes for t, s in pairs):
        target.refuse(f"copying from a weight in {'+'.join(map(str, source.formats))}", _COPY)
    for mine, other in pairs:
        for field, tensor in mine.tensors.items():
            tensor.copy_(other.tensors[field])
    return target


def _is_pinned(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    return all(tensor.is_pinned() for part in packed.parts for tensor in part.tensors.values())


def _pin(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    return packed.rewrapped([part.map(torch.Tensor.pin_memory) for part in packed.parts])


def _record_stream(packed: Packed, func: OpOverload, args: Arguments, options: Options) -> object:
    for part in packed.parts:
        for tensor in part.tensors.values():
            tensor.record_stream(cast("torch.Stream", args[1]))
    return None


_READERS = (
    *(_aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.mv.default, _aten.addmm.default),
    *(_aten.bmm.default, _aten.convolution.default),
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
)
_OPERATORS: dict[OpOverload, Operator] = {
    **dict.fromkeys(_READERS, _compute),
    _aten.convolution_backward.default: _convolution_backward,
    **dict.fromkeys((_aten.detach.default, _aten.alias.default), _detach),
    **dict.fromkeys((_aten.t.default, _aten.transpose.int, _aten.permute.default), _transpose),
    _aten.expand.default: _expand,
    **dict.fromkeys((_aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default), _reshape),
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_in_place,
    _aten.is_pinned.default: _is_pinned,
    _aten._pin_memory.default: _pin,
    _aten.record_stream.default: _record_stream,
}
