"""QuantizedTensor: a weight that stays packed and behaves like a tensor where that is right, and nowhere else.

The module tree of a denoiser stays as it is; only the parameter `weight` becomes a `QuantizedTensor`. Its shape
and dtype are logical: `.to(torch.bfloat16)` changes the label, the codes stay. Operators are a closed table, because a
subclass that lets unknown ones through loses writes silently: reading ones (linear, convolution, matrix products)
dequantize and run as usual; views of a matrix that these take on their way (transposed, expanded over a batch) stay
packed, so that a write into them is refused, too; moving, relabelling, copying and pinning work on the stored tensors.
Everything else raises `UnsupportedError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn, cast

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from sedimo.errors import InputError, UnsupportedError
from sedimo.quant.formats import Format, paper_bytes
from sedimo.quant.parts import Fitted, WeightPart, weight_part

_PREFIX = "part_"
_REMEDY = (
    "Packed weights can be used in linear and convolution layers, moved, relabelled, copied and saved; "
    "call model.dequantize() (or .dequantize() on the weight) for anything else."
)
_MERGE = (
    "Writing into it would change a temporary and lose the result. To merge an adapter: model.dequantize(), "
    "merge, and quantize again; to use one, leave it unmerged."
)
_COPY = (
    "It can only be overwritten by a packed weight of the same parts and formats. To load ordinary weights, "
    "call model.dequantize() first; to read it, copy from .dequantize()."
)
_aten = torch.ops.aten
_REMEDIES: dict[object, str] = {
    _aten.cat: "Fused projections need full-precision weights: call model.dequantize() before fuse_qkv_projections().",
    _aten.add_: _MERGE,
    _aten.sub_: _MERGE,
}
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
    def size(self) -> tuple[int, ...]:
        """Logical size of the view."""
        return (*self.batch, *(self.shape[::-1] if self.is_transposed else self.shape))

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the view on an ordinary tensor."""
        own = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return (*(0 for _ in self.batch), *(reversed(own) if self.is_transposed else own))


def _refused(operation: str, remedy: str = "") -> Callable[..., NoReturn]:
    def method(self: QuantizedTensor, *_arguments: object, **_options: object) -> NoReturn:
        self.refuse(operation, remedy)

    return method


class QuantizedTensor(torch.Tensor):
    """A packed weight `[out, in, ...]` of one or more parts along its input channels.

    Make one with `from_parts`, `from_fitted`, or `quantize_weight`. `layer_name` is named in errors; `packing` is all
    but the stored tensors.
    """

    packing: Layout
    layer_name: str

    @staticmethod
    def __new__(cls: type[QuantizedTensor], value: torch.Tensor, requires_grad: bool = False) -> QuantizedTensor:
        """Another handle on the same packed weight (the form in which accelerate rebuilds parameters)."""
        if not isinstance(value, QuantizedTensor):
            raise UnsupportedError("a QuantizedTensor is made by quantize_weight(weight, format), not from a tensor")
        return value.rewrapped(value.parts).requires_grad_(requires_grad)

    @classmethod
    def from_parts(cls, parts: Sequence[WeightPart], shape: Sequence[int], dtype: torch.dtype) -> QuantizedTensor:
        """A packed weight of the given logical shape and dtype, whose input channels the parts cover in order."""
        if not dtype.is_floating_point:
            raise InputError(f"the logical dtype of a packed weight must be a float, got {dtype}")
        if len(shape) < 2 or min(shape) < 1:
            raise InputError(f"a packed weight is [out, in, ...] with at least one of each, got {tuple(shape)}")
        position, rule = 0, f"parts must cover the {shape[1]} input channels in order"
        for part in parts:
            if part.start != position or part.stop <= part.start:
                raise InputError(f"{rule}, got {part.start}..{part.stop} at {position}")
            part.check(shape)
            position = part.stop
        if position != shape[1]:
            raise InputError(f"{rule}, got only {position}")
        packing = Layout(tuple(shape), tuple((p.start, p.stop, p.format, tuple(p.tensors)) for p in parts))
        return _wrap(parts, packing, dtype)

    @classmethod
    def from_fitted(cls, fitted: Fitted | Sequence[Fitted | torch.Tensor], dtype: torch.dtype) -> QuantizedTensor:
        """A packed weight from what a quantizer fitted, or from several such side by side along the inputs.

        A plain tensor in the sequence is kept as it is (a part left at fp16).
        """
        pieces = cast("Sequence[Fitted | torch.Tensor]", fitted if isinstance(fitted, Sequence) else [fitted])
        if not pieces or len({(p.shape[0], *p.shape[2:]) for p in pieces}) != 1:
            raise InputError(f"parts must differ in input channels only, got {[tuple(p.shape) for p in pieces]}")
        parts: list[WeightPart] = []
        for piece in pieces:
            parts.append(weight_part(piece, start=parts[-1].stop if parts else 0))
        return cls.from_parts(parts, (pieces[0].shape[0], parts[-1].stop, *pieces[0].shape[2:]), dtype)

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        """The stored parts, in order of their input channels."""
        return _parts(self.packing, self.__dict__)

    @property
    def formats(self) -> tuple[Format, ...]:
        """Formats of the parts."""
        return tuple(fmt for _, _, fmt, _ in self.packing.parts)

    @property
    def format(self) -> Format:
        """The one format of the weight; parts of several are an InputError, see `formats`."""
        if len(set(self.formats)) != 1:
            raise InputError(f"the weight has parts of the formats {', '.join(map(str, self.formats))}; use .formats")
        return self.formats[0]

    @property
    def paper_bytes(self) -> int:
        """Bytes in the papers' accounting, parameters at 16 bits."""
        return sum(paper_bytes(p.format, p.shape_in(self.packing.shape)) for p in self.parts)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.nbytes for t in self.stored)

    @property
    def stored(self) -> list[torch.Tensor]:
        """The stored tensors of all parts."""
        return [tensor for part in self.parts for tensor in part.tensors.values()]

    def codes(self) -> torch.Tensor:
        """The codes, uint8, in the shape of the weight; a part left at fp16 has none and is an InputError."""
        shape = self.packing.shape
        return torch.cat([p.unpacked_codes(shape).reshape(p.shape_in(shape)) for p in self.parts], dim=1)

    def dequantize(self) -> torch.Tensor:
        """The weight as an ordinary tensor: computed in float32 from the stored values, then cast to `dtype`."""
        layout = self.packing
        pieces = [p.dequantize(layout.shape) for p in self.parts]
        weight = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).to(self.dtype)
        turned = weight.t() if layout.is_transposed else weight
        return turned.expand(layout.size) if layout.batch else turned

    @property
    def data(self) -> torch.Tensor:
        """Another handle on the same packed weight, without history."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Takes over another packed weight of the same shape; torch's own setter would leave the codes behind."""
        if not isinstance(value, QuantizedTensor) or value.shape != self.shape:
            self.refuse("assignment of .data from an ordinary tensor", "Assign a new parameter instead.")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]  # C descriptor: device, dtype
        self._adopt(value.parts, value.packing)

    def refuse(self, operation: str, remedy: str = "") -> NoReturn:
        """Raises the error of an operation that packed weights do not support."""
        raise UnsupportedError(
            f"layer {self.layer_name or '(not named)'!r} has a packed weight ({'+'.join(map(str, self.formats))}), "
            f"which does not support {operation}. {remedy or _REMEDY}"
        )

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedTensor:
        """Refuses to train the codes; `requires_grad_(False)` is allowed."""
        if requires_grad:
            self.refuse("gradients", "Train an adapter (LoRA) beside it, or call model.dequantize() first.")
        return self

    def data_ptr(self) -> int:
        """Address of the first stored tensor: wrappers have none, and tie detection compares addresses."""
        return self.stored[0].data_ptr()

    # torch would write into storage that a wrapper does not have, and end the interpreter
    share_memory_ = _refused("share_memory_()", "Load the checkpoint in each process instead.")
    apply_ = _refused("apply_()")
    numpy = _refused("numpy()", "Call .dequantize().numpy() instead.")
    tolist = _refused("tolist()", "Call .dequantize().tolist() instead.")
    __array__ = _refused("conversion to numpy", "Call .dequantize().numpy() instead.")
    __dlpack__ = _refused("DLPack", "Call .dequantize() first.")
    __reduce_ex__ = _refused(
        "pickle (torch.save, copy.copy)", "Save with save_pretrained; copy with copy.deepcopy or clone()."
    )

    def __deepcopy__(self, memo: dict[int, object]) -> QuantizedTensor:
        if id(self) not in memo:
            copied = self.mapped(torch.clone)
            memo[id(self)] = nn.Parameter(copied, requires_grad=False) if isinstance(self, nn.Parameter) else copied
        return cast("QuantizedTensor", memo[id(self)])

    def __repr__(self) -> str:  # type: ignore[override]  # torch adds an argument for its own formatting
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, formats={'+'.join(map(str, self.formats))}, "
            f"dtype={self.dtype}, device={self.device}, layer={self.layer_name!r})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Layout, torch.dtype]]:
        names = [_attribute(i, f) for i, (*_, fields) in enumerate(self.packing.parts) for f in fields]
        return names, (self.packing, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor],
        context: tuple[Layout, torch.dtype],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> QuantizedTensor:
        packing, dtype = context
        return _wrap(_parts(packing, inner), packing, dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch prescribes

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch leaves the arguments untyped
        cls,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        flat, _ = tree_flatten((args, kwargs))
        packed = next(value for value in flat if isinstance(value, QuantizedTensor))
        if func not in _OPERATORS:
            packed.refuse(str(func), _REMEDIES.get(func.overloadpacket, ""))
        return _OPERATORS[func](packed, func, args, dict(kwargs or {}))

    def rewrapped(
        self, parts: Sequence[WeightPart], *, dtype: torch.dtype | None = None, packing: Layout | None = None
    ) -> QuantizedTensor:
        """A tensor around other parts, with another label or as another view; the layer's name stays."""
        return _wrap(parts, packing or self.packing, dtype or self.dtype, self.layer_name)

    def mapped(
        self, function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
    ) -> QuantizedTensor:
        """A tensor with `function` applied to each stored tensor."""
        parts = (replace(p, tensors={name: function(t) for name, t in p.tensors.items()}) for p in self.parts)
        return self.rewrapped(tuple(parts), dtype=dtype)

    def _adopt(self, parts: Sequence[WeightPart], packing: Layout) -> None:
        for name in [n for n in self.__dict__ if n.startswith(_PREFIX)]:
            delattr(self, name)
        for i, part in enumerate(parts):
            for field, tensor in part.tensors.items():
                setattr(self, _attribute(i, field), tensor)
        self.packing = packing


def memory_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they lie in memory, shared tensors once."""
    found: dict[object, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for t in tensor.stored if isinstance(tensor, QuantizedTensor) else [tensor]:
            found[(t.device, t.data_ptr(), t.nbytes) if t.data_ptr() else id(t)] = t.nbytes
    return sum(found.values())


def _attribute(index: int, field: str) -> str:
    return f"{_PREFIX}{index}_{field}"


def _parts(packing: Layout, tensors: Mapping[str, torch.Tensor]) -> tuple[WeightPart, ...]:
    return tuple(
        WeightPart(start, stop, fmt, {f: tensors[_attribute(i, f)] for f in fields})
        for i, (start, stop, fmt, fields) in enumerate(packing.parts)
    )


def _wrap(parts: Sequence[WeightPart], packing: Layout, dtype: torch.dtype, layer_name: str = "") -> QuantizedTensor:
    device = next(iter(parts[0].tensors.values())).device
    make: Callable[..., QuantizedTensor] = torch.Tensor._make_wrapper_subclass
    tensor = make(QuantizedTensor, packing.size, packing.strides, dtype=dtype, device=device)
    tensor.layer_name = layer_name
    tensor._adopt(parts, packing)
    return tensor


Arguments = tuple[object, ...]
Options = dict[str, object]
Operator = Callable[[QuantizedTensor, OpOverload, Arguments, Options], object]


def _compute(packed: QuantizedTensor, func: OpOverload, args: Arguments, options: Options) -> object:
    args, options = tree_map_only(QuantizedTensor, QuantizedTensor.dequantize, (args, options))
    return func(*args, **options)


def _convolution_backward(packed: QuantizedTensor, func: OpOverload, args: Arguments, options: Options) -> object:
    wants_input, _, wants_bias = cast("Sequence[bool]", args[-1])
    return _compute(packed, func, (*args[:-1], [wants_input, False, wants_bias]), options)


def _detach(packed: QuantizedTensor, func: OpOverload, args: Arguments, options: Options) -> object:
    return _aliased(func, args, options, packed.rewrapped(packed.parts))


def _transpose(packed: QuantizedTensor, func: OpOverload, args: Arguments, options: Options) -> object:
    n, layout = packed.ndim, packed.packing
    given = args[1] if func is _aten.permute.default else args[1:] or (1, 0)
    dims = [d % n for d in cast("Sequence[int]", given)]
    swapped = [*range(n - 2), n - 1, n - 2]
    is_swap = dims == swapped if func is _aten.permute.default else sorted(dims) == [n - 2, n - 1]
    if len(layout.shape) != 2 or not is_swap:
        packed.refuse(f"{func} over dimensions {dims}")
    turned = layout._replace(is_transposed=not layout.is_transposed)
    return _aliased(func, args, options, packed.rewrapped(packed.parts, packing=turned))


def _expand(packed: QuantizedTensor, func: OpOverload, args: Arguments, options: Options) -> object:
    """A matrix repeated over new leading dimensions, or those of such a one joined: what matmul does on its way."""
    layout, sizes = packed.packing, tuple(cast("Sequence[int]", args[1]))
    matrix, batch = layout.size[-2:], sizes[:-2]
    if func is _aten.expand.default:
        is_allowed = len(layout.shape) == 2 and not layout.batch and sizes[-2:] in (matrix, (-1, -1))
    else:
        is_allowed = bool(layout.batch) and math.prod(batch) == math.prod(layout.batch) and sizes[-2:] == matrix
    if not batch or not is_allowed:
        packed.refuse(f"{func} to {list(sizes)}")
    return _aliased(func, args, options, packed.rewrapped(packed.parts, packing=layout._replace(batch=batch)))


def _to_copy(packed: QuantizedTensor, func: OpOverload, args: Arguments, options: Options) -> object:
    if options.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        packed.refuse(f"the memory format {options['memory_format']}", "Leave memory_format out.")
    if options.get("layout") not in (None, torch.strided):
        packed.refuse(f"the layout {options['layout']}")
    is_view = packed.packing.is_transposed or packed.packing.batch
    if is_view and options.get("memory_format") is torch.contiguous_format:
        packed.refuse("contiguous() of a view")
    dtype = cast("torch.dtype", options.get("dtype") or packed.dtype)
    if not dtype.is_floating_point:
        packed.refuse(f"the logical dtype {dtype}", "Its label must be a floating dtype.")
    device, non_blocking = cast("torch.device | None", options.get("device")), bool(options.get("non_blocking"))
    moved = packed.mapped(lambda t: t.to(device, non_blocking=non_blocking, copy=True), dtype)
    return moved.mapped(torch.Tensor.pin_memory) if options.get("pin_memory") else moved


def _copy_in_place(packed: QuantizedTensor, func: OpOverload, args: Arguments, options: Options) -> object:
    target, source = args[:2]
    if not isinstance(target, QuantizedTensor) or not isinstance(source, QuantizedTensor):
        packed.refuse("copying between packed and ordinary weights", _COPY)
    pairs = list(zip(target.stored, source.stored, strict=False))
    if target.packing != source.packing or any(mine.dtype != other.dtype for mine, other in pairs):
        target.refuse(f"copying from a weight in {'+'.join(map(str, source.formats))}", _COPY)
    for mine, other in pairs:
        mine.copy_(other)
    return target


def _record_stream(packed: QuantizedTensor, func: OpOverload, args: Arguments, options: Options) -> object:
    for tensor in packed.stored:
        tensor.record_stream(cast("torch.Stream", args[1]))
    return None


_READERS = (
    *(_aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.mv.default, _aten.addmm.default),
    *(_aten.bmm.default, _aten.convolution.default),
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
)
_BATCHES = (_aten.expand.default, _aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default)
_OPERATORS: dict[OpOverload, Operator] = {
    **dict.fromkeys(_READERS, _compute),
    _aten.convolution_backward.default: _convolution_backward,
    **dict.fromkeys((_aten.detach.default, _aten.alias.default), _detach),
    **dict.fromkeys((_aten.t.default, _aten.transpose.int, _aten.permute.default), _transpose),
    **dict.fromkeys(_BATCHES, _expand),
    **dict.fromkeys((_aten.clone.default, _aten._to_copy.default), _to_copy),
    _aten.copy_.default: _copy_in_place,
    _aten.is_pinned.default: lambda packed, *_: all(tensor.is_pinned() for tensor in packed.stored),
    _aten._pin_memory.default: lambda packed, *_: packed.mapped(torch.Tensor.pin_memory),
    _aten.record_stream.default: _record_stream,
}
