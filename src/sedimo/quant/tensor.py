"""QuantizedTensor: a weight that stays packed and behaves like a tensor where that is right, and nowhere else.

The module tree of a denoiser stays as it is; only the parameter `weight` becomes a `QuantizedTensor`. Its shape
and dtype are logical: `.to(torch.bfloat16)` changes the label, the codes stay. Linear layers and convolutions
work by dequantizing first; moving, relabelling, copying and pinning work on the packed tensors. Everything
else raises `UnsupportedError`, because a subclass that lets unknown operators through loses writes silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn, cast

import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from sedimo.errors import InputError, UnsupportedError
from sedimo.quant.formats import Format, paper_bytes
from sedimo.quant.parts import Fitted, WeightPart, check_cover, pack_fitted, unquantized_part

_aten = torch.ops.aten
_aliased: Callable[..., object] = return_and_correct_aliasing  # torch leaves it untyped


class _Layout(NamedTuple):
    """What the stored tensors do not tell: the shape of the weight, and whether this is its transposed view."""

    shape: tuple[int, ...]
    is_transposed: bool
    parts: tuple[tuple[int, int, Format, tuple[str, ...]], ...]  # start, stop, format, fields


class QuantizedTensor(torch.Tensor):
    """A packed weight `[out, in, ...]` of one or more parts along its input channels.

    Make one with `from_parts`, `from_fitted`, or `quantize_weight`. `layer_name` is named in errors.
    """

    _layout: _Layout
    layer_name: str

    @staticmethod
    def __new__(cls: type[QuantizedTensor], value: torch.Tensor, requires_grad: bool = False) -> QuantizedTensor:
        """Another handle on the same packed weight (the form in which accelerate rebuilds parameters).

        Raises:
            UnsupportedError: `value` is an ordinary tensor, or a gradient is asked for.
        """
        if not isinstance(value, QuantizedTensor):
            raise UnsupportedError("a QuantizedTensor is made by quantize_weight(weight, format), not from a tensor")
        return value._handle(value.parts, value.dtype).requires_grad_(requires_grad)

    @classmethod
    def from_parts(cls, parts: Sequence[WeightPart], shape: Sequence[int], dtype: torch.dtype) -> QuantizedTensor:
        """A packed weight of the given logical shape and dtype.

        Raises:
            InputError: the parts do not fit together, or the dtype is not a float.
        """
        if not dtype.is_floating_point:
            raise InputError(f"the logical dtype of a packed weight must be a float, got {dtype}")
        check_cover(parts, shape)
        layout = _Layout(tuple(shape), False, tuple((p.start, p.stop, p.format, tuple(p.tensors)) for p in parts))
        return _wrap(parts, layout, dtype)

    @classmethod
    def from_fitted(cls, fitted: Fitted | Sequence[Fitted | torch.Tensor], dtype: torch.dtype) -> QuantizedTensor:
        """A packed weight from what a quantizer fitted, or from several such side by side along the inputs.

        A plain tensor in the sequence is kept as it is (a part left at fp16).

        Raises:
            InputError: nothing to pack, or shapes that do not stand side by side.
        """
        pieces = cast("Sequence[Fitted | torch.Tensor]", fitted if isinstance(fitted, Sequence) else [fitted])
        if not pieces or len({(p.shape[0], *p.shape[2:]) for p in pieces}) != 1:
            raise InputError(f"parts must differ in input channels only, got {[tuple(p.shape) for p in pieces]}")
        parts: list[WeightPart] = []
        for piece in pieces:
            make: Callable[..., WeightPart] = unquantized_part if isinstance(piece, torch.Tensor) else pack_fitted
            parts.append(make(piece, start=parts[-1].stop if parts else 0))
        return cls.from_parts(parts, (pieces[0].shape[0], parts[-1].stop, *pieces[0].shape[2:]), dtype)

    @property
    def parts(self) -> tuple[WeightPart, ...]:
        """The stored parts, in order of their input channels."""
        return tuple(
            WeightPart(start, stop, fmt, **{f: getattr(self, _attribute(i, f)) for f in fields})
            for i, (start, stop, fmt, fields) in enumerate(self._layout.parts)
        )

    @property
    def formats(self) -> tuple[Format, ...]:
        """Formats of the parts."""
        return tuple(fmt for _, _, fmt, _ in self._layout.parts)

    @property
    def format(self) -> Format:
        """The one format of the weight.

        Raises:
            InputError: the parts have different formats; see `formats`.
        """
        if len(set(self.formats)) != 1:
            raise InputError(f"the weight has parts of the formats {', '.join(map(str, self.formats))}; use .formats")
        return self.formats[0]

    @property
    def paper_bytes(self) -> int:
        """Bytes in the papers' accounting, parameters at 16 bits."""
        return sum(paper_bytes(p.format, p.shape_in(self._layout.shape)) for p in self.parts)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(p.stored_bytes for p in self.parts)

    def codes(self) -> torch.Tensor:
        """The codes, uint8, in the shape of the weight.

        Raises:
            InputError: a part is left at fp16.
        """
        shape = self._layout.shape
        return torch.cat([p.unpacked_codes(shape).reshape(p.shape_in(shape)) for p in self.parts], dim=1)

    def dequantize(self) -> torch.Tensor:
        """The weight as an ordinary tensor: computed in float32 from the stored values, then cast to `dtype`."""
        shape = self._layout.shape
        pieces = [p.dequantize(shape) for p in self.parts]
        weight = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).to(self.dtype)
        return weight.t() if self._layout.is_transposed else weight

    @property
    def data(self) -> torch.Tensor:
        """Another handle on the same packed weight, without history."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Takes over another packed weight of the same shape; torch's own setter would leave the codes behind."""
        if not isinstance(value, QuantizedTensor) or value.shape != self.shape:
            self.refuse("assignment of .data from an ordinary tensor", "assign a new parameter instead")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]  # C descriptor: device, dtype
        self._adopt(value.parts, value._layout)

    def refuse(self, operation: str, remedy: str = "") -> NoReturn:
        """Raises the error of an operation that packed weights do not support.

        Raises:
            UnsupportedError: always.
        """
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
        return next(iter(self.parts[0].tensors.values())).data_ptr()

    def share_memory_(self) -> NoReturn:
        """Refused: torch would write into storage that a wrapper does not have, and end the interpreter."""
        self.refuse("share_memory_()", "Load the checkpoint in each process instead.")

    def numpy(self, *, force: bool = False) -> NoReturn:
        """Refused: the packed tensors are not the numbers of the weight."""
        self.refuse("numpy()", "Call .dequantize().numpy() instead.")

    def tolist(self) -> NoReturn:
        """Refused like `numpy`."""
        self.refuse("tolist()", "Call .dequantize().tolist() instead.")

    def apply_(self, function: object) -> NoReturn:
        """Refused: torch would run over storage that a wrapper does not have, and end the interpreter."""
        self.refuse("apply_()")

    def __array__(self, dtype: object = None, copy: object = None) -> NoReturn:
        self.refuse("conversion to numpy", "Call .dequantize().numpy() instead.")

    def __dlpack__(self, **_: object) -> NoReturn:
        self.refuse("DLPack", "Call .dequantize() first.")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refused: no pickle."""
        self.refuse("pickle (torch.save, copy.copy)", "Save with save_pretrained; copy with copy.deepcopy or clone().")

    def __deepcopy__(self, memo: dict[int, object]) -> QuantizedTensor:
        if id(self) not in memo:
            copied = self._handle([p.map(torch.clone) for p in self.parts], self.dtype)
            memo[id(self)] = nn.Parameter(copied, requires_grad=False) if isinstance(self, nn.Parameter) else copied
        return cast("QuantizedTensor", memo[id(self)])

    def __repr__(self) -> str:  # type: ignore[override]  # torch adds an argument for its own formatting
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, formats={'+'.join(map(str, self.formats))}, "
            f"dtype={self.dtype}, device={self.device}, layer={self.layer_name!r})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[_Layout, torch.dtype]]:
        names = [_attribute(i, f) for i, (*_, fields) in enumerate(self._layout.parts) for f in fields]
        return names, (self._layout, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor],
        context: tuple[_Layout, torch.dtype],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> QuantizedTensor:
        layout, dtype = context
        parts = [
            WeightPart(start, stop, fmt, **{f: inner[_attribute(i, f)] for f in fields})
            for i, (start, stop, fmt, fields) in enumerate(layout.parts)
        ]
        return _wrap(parts, layout, dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch prescribes

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch leaves the arguments untyped
        cls,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Runs a listed operator, refuses every other."""
        operator = _OPERATORS.get(func)
        if operator is None:
            _first(args, kwargs or {}).refuse(str(func), _REMEDIES.get(func.overloadpacket, ""))
        return operator(func, args, dict(kwargs or {}))

    def _handle(self, parts: Sequence[WeightPart], dtype: torch.dtype, *, transpose: bool = False) -> QuantizedTensor:
        layout = self._layout._replace(is_transposed=self._layout.is_transposed != transpose)
        return _wrap(parts, layout, dtype, self.layer_name)

    def _adopt(self, parts: Sequence[WeightPart], layout: _Layout) -> None:
        for name in [n for n in self.__dict__ if n.startswith(_PREFIX)]:
            delattr(self, name)
        for i, part in enumerate(parts):
            for field, tensor in part.tensors.items():
                setattr(self, _attribute(i, field), tensor)
        self._layout = layout


_PREFIX = "part_"
_REMEDY = (
    "Packed weights can be used in linear and convolution layers, moved, relabelled, copied and saved; "
    "call model.dequantize() (or .dequantize() on the weight) for anything else."
)
_MERGE = (
    "Writing into it would change a temporary and lose the result. To merge an adapter: model.dequantize(), "
    "merge, and quantize again; to use one, leave it unmerged."
)
_REMEDIES: dict[object, str] = {
    _aten.cat: "Fused projections need full-precision weights: call model.dequantize() before fuse_qkv_projections().",
    _aten.add_: _MERGE,
    _aten.sub_: _MERGE,
    _aten.copy_: (
        "It can only be overwritten by a packed weight of the same parts and formats. To load ordinary weights, "
        "call model.dequantize() first; to read it, copy from .dequantize()."
    ),
}


def _attribute(index: int, field: str) -> str:
    return f"{_PREFIX}{index}_{field}"


def _wrap(parts: Sequence[WeightPart], layout: _Layout, dtype: torch.dtype, layer_name: str = "") -> QuantizedTensor:
    size = layout.shape[::-1] if layout.is_transposed else layout.shape
    device = next(iter(parts[0].tensors.values())).device
    strides = (1, layout.shape[1]) if layout.is_transposed else None
    make: Callable[..., QuantizedTensor] = torch.Tensor._make_wrapper_subclass
    tensor = make(QuantizedTensor, size, strides, dtype=dtype, device=device)
    tensor.layer_name = layer_name
    tensor._adopt(parts, layout)
    return tensor


def _first(args: Sequence[object], kwargs: Mapping[str, object]) -> QuantizedTensor:
    flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
    return next(value for value in flat if isinstance(value, QuantizedTensor))


def _compute(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    return func(*(_plain(a) for a in args), **{k: _plain(v) for k, v in kwargs.items()})


def _plain(value: object) -> object:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def _convolution_backward(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    wants_input, _, wants_bias = cast("Sequence[bool]", args[-1])
    return _compute(func, (*args[:-1], [wants_input, False, wants_bias]), kwargs)


def _detach(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    source = _first(args, kwargs)
    return _aliased(func, args, kwargs, source._handle(source.parts, source.dtype))


def _transpose(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    source = _first(args, kwargs)
    dims = (
        cast("Sequence[int]", args[1]) if func is _aten.permute.default else cast("Sequence[int]", args[1:] or (1, 0))
    )
    is_swap = [d % 2 for d in dims] == [1, 0] or (func is _aten.transpose.int and [d % 2 for d in dims] == [0, 1])
    if source.dim() != 2 or not is_swap:
        source.refuse(f"{func} over dimensions {tuple(dims)}")
    return _aliased(func, args, kwargs, source._handle(source.parts, source.dtype, transpose=True))


def _clone(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    source = _first(args, kwargs)
    _require_plain_layout(source, kwargs)
    return source._handle([p.map(torch.clone) for p in source.parts], source.dtype)


def _to_copy(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    source = _first(args, kwargs)
    _require_plain_layout(source, kwargs)
    dtype = cast("torch.dtype", kwargs.get("dtype") or source.dtype)
    if not dtype.is_floating_point:
        source.refuse(f"the logical dtype {dtype}", "Its label must be a floating dtype.")
    device, non_blocking = cast("torch.device | None", kwargs.get("device")), bool(kwargs.get("non_blocking"))
    moved = [p.map(lambda t: t.to(device, non_blocking=non_blocking, copy=True)) for p in source.parts]
    copied = source._handle(moved, dtype)
    return copied.pin_memory() if kwargs.get("pin_memory") else copied


def _require_plain_layout(source: QuantizedTensor, kwargs: Mapping[str, object]) -> None:
    if kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        source.refuse(f"the memory format {kwargs['memory_format']}", "Leave memory_format out.")
    if kwargs.get("layout") not in (None, torch.strided):
        source.refuse(f"the layout {kwargs['layout']}")
    if source._layout.is_transposed and kwargs.get("memory_format") is torch.contiguous_format:
        source.refuse("contiguous() of its transposed view")


def _copy_in_place(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    target, source = args[0], args[1]
    if not isinstance(target, QuantizedTensor) or not isinstance(source, QuantizedTensor):
        _first(args, kwargs).refuse("copying between packed and ordinary weights", _REMEDIES[_aten.copy_])
    pairs = list(zip(target.parts, source.parts, strict=False))
    if target._layout != source._layout or any(t.wide_dtype != s.wide_dtype for t, s in pairs):
        target.refuse(f"copying from a weight in {'+'.join(map(str, source.formats))}", _REMEDIES[_aten.copy_])
    for mine, other in pairs:
        for field, tensor in mine.tensors.items():
            tensor.copy_(other.tensors[field])
    return target


def _pinned(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    return all(t.is_pinned() for p in _first(args, kwargs).parts for t in p.tensors.values())


def _pin(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    source = _first(args, kwargs)
    return source._handle([p.map(torch.Tensor.pin_memory) for p in source.parts], source.dtype)


def _record_stream(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    for part in _first(args, kwargs).parts:
        for tensor in part.tensors.values():
            tensor.record_stream(cast("torch.Stream", args[1]))
    return None


_Operator = Callable[[torch._ops.OpOverload, tuple[object, ...], dict[str, object]], object]
_OPERATORS: dict[torch._ops.OpOverload, _Operator] = {
    **dict.fromkeys(
        (
            *(_aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.mv.default, _aten.addmm.default),
            *(_aten.convolution.default, _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
            *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
        ),
        _compute,
    ),
    _aten.convolution_backward.default: _convolution_backward,
    **dict.fromkeys((_aten.detach.default, _aten.alias.default), _detach),
    **dict.fromkeys((_aten.t.default, _aten.transpose.int, _aten.permute.default), _transpose),
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_in_place,
    _aten.is_pinned.default: _pinned,
    _aten._pin_memory.default: _pin,
    _aten.record_stream.default: _record_stream,
}
