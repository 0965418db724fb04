"""QuantizedTensor: a weight that stays packed and behaves like a tensor where that is right, and nowhere else.

The module tree of a denoiser stays as it is; only the parameter `weight` becomes a `QuantizedTensor`. Its shape
and dtype are logical: `.to(torch.bfloat16)` changes the label, the codes stay. Linear layers and convolutions
work by dequantizing first; moving, relabelling, copying and pinning work on the packed tensors. Everything
else raises `UnsupportedError`, because a subclass that lets unknown operators through loses writes silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, cast

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from sedimo.errors import InputError, UnsupportedError
from sedimo.quant.formats import Format, paper_bytes
from sedimo.quant.operators import Layout, run
from sedimo.quant.parts import Fitted, WeightPart, check_cover, pack_fitted, unquantized_part

_PREFIX = "part_"
_REMEDY = (
    "Packed weights can be used in linear and convolution layers, moved, relabelled, copied and saved; "
    "call model.dequantize() (or .dequantize() on the weight) for anything else."
)


class QuantizedTensor(torch.Tensor):
    """A packed weight `[out, in, ...]` of one or more parts along its input channels.

    Make one with `from_parts`, `from_fitted`, or `quantize_weight`. `layer_name` is named in errors.
    """

    _packing: Layout
    layer_name: str

    @staticmethod
    def __new__(cls: type[QuantizedTensor], value: torch.Tensor, requires_grad: bool = False) -> QuantizedTensor:
        """Another handle on the same packed weight (the form in which accelerate rebuilds parameters).

        Raises:
            UnsupportedError: `value` is an ordinary tensor, or a gradient is asked for.
        """
        if not isinstance(value, QuantizedTensor):
            raise UnsupportedError("a QuantizedTensor is made by quantize_weight(weight, format), not from a tensor")
        return value.rewrapped(value.parts).requires_grad_(requires_grad)

    @classmethod
    def from_parts(cls, parts: Sequence[WeightPart], shape: Sequence[int], dtype: torch.dtype) -> QuantizedTensor:
        """A packed weight of the given logical shape and dtype.

        Raises:
            InputError: the parts do not fit together, or the dtype is not a float.
        """
        if not dtype.is_floating_point:
            raise InputError(f"the logical dtype of a packed weight must be a float, got {dtype}")
        check_cover(parts, shape)
        packing = Layout(tuple(shape), tuple((p.start, p.stop, p.format, tuple(p.tensors)) for p in parts))
        return _wrap(parts, packing, dtype)

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
            WeightPart(start, stop, fmt, {f: getattr(self, _attribute(i, f)) for f in fields})
            for i, (start, stop, fmt, fields) in enumerate(self._packing.parts)
        )

    @property
    def packing(self) -> Layout:
        """Shape, parts and view, without the stored tensors."""
        return self._packing

    @property
    def formats(self) -> tuple[Format, ...]:
        """Formats of the parts."""
        return tuple(fmt for _, _, fmt, _ in self._packing.parts)

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
        return sum(paper_bytes(p.format, p.shape_in(self._packing.shape)) for p in self.parts)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(p.stored_bytes for p in self.parts)

    def codes(self) -> torch.Tensor:
        """The codes, uint8, in the shape of the weight.

        Raises:
            InputError: a part is left at fp16.
        """
        shape = self._packing.shape
        return torch.cat([p.unpacked_codes(shape).reshape(p.shape_in(shape)) for p in self.parts], dim=1)

    def dequantize(self) -> torch.Tensor:
        """The weight as an ordinary tensor: computed in float32 from the stored values, then cast to `dtype`."""
        shape = self._packing.shape
        pieces = [p.dequantize(shape) for p in self.parts]
        weight = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).to(self.dtype)
        return self._packing.view_of(weight)

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
        self._adopt(value.parts, value._packing)

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
            copied = self.rewrapped([p.map(torch.clone) for p in self.parts])
            memo[id(self)] = nn.Parameter(copied, requires_grad=False) if isinstance(self, nn.Parameter) else copied
        return cast("QuantizedTensor", memo[id(self)])

    def __repr__(self) -> str:  # type: ignore[override]  # torch adds an argument for its own formatting
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, formats={'+'.join(map(str, self.formats))}, "
            f"dtype={self.dtype}, device={self.device}, layer={self.layer_name!r})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Layout, torch.dtype]]:
        names = [_attribute(i, f) for i, (*_, fields) in enumerate(self._packing.parts) for f in fields]
        return names, (self._packing, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor],
        context: tuple[Layout, torch.dtype],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> QuantizedTensor:
        packing, dtype = context
        parts = [
            WeightPart(start, stop, fmt, {f: inner[_attribute(i, f)] for f in fields})
            for i, (start, stop, fmt, fields) in enumerate(packing.parts)
        ]
        return _wrap(parts, packing, dtype)

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
        flat, _ = tree_flatten((args, kwargs))
        packed = next(value for value in flat if isinstance(value, QuantizedTensor))
        return run(packed, func, args, kwargs or {})

    def rewrapped(
        self, parts: Sequence[WeightPart], *, dtype: torch.dtype | None = None, packing: Layout | None = None
    ) -> QuantizedTensor:
        """A tensor around other parts, with another label or as another view; the layer's name stays."""
        return _wrap(parts, packing or self._packing, dtype or self.dtype, self.layer_name)

    def _adopt(self, parts: Sequence[WeightPart], packing: Layout) -> None:
        for name in [n for n in self.__dict__ if n.startswith(_PREFIX)]:
            delattr(self, name)
        for i, part in enumerate(parts):
            for field, tensor in part.tensors.items():
                setattr(self, _attribute(i, field), tensor)
        self._packing = packing


def memory_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they lie in memory, shared tensors once.

    Example:
        >>> memory_bytes(nn.Linear(4, 2, bias=False))
        32
    """
    found: dict[object, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        parts = tensor.parts if isinstance(tensor, QuantizedTensor) else ()
        for t in [t for p in parts for t in p.tensors.values()] or [tensor]:
            size = t.numel() * t.element_size()
            found[(t.device, t.data_ptr(), size) if t.data_ptr() else id(t)] = size
    return sum(found.values())


def _attribute(index: int, field: str) -> str:
    return f"{_PREFIX}{index}_{field}"


def _wrap(parts: Sequence[WeightPart], packing: Layout, dtype: torch.dtype, layer_name: str = "") -> QuantizedTensor:
    device = next(iter(parts[0].tensors.values())).device
    make: Callable[..., QuantizedTensor] = torch.Tensor._make_wrapper_subclass
    tensor = make(QuantizedTensor, packing.size, packing.strides, dtype=dtype, device=device)
    tensor.layer_name = layer_name
    tensor._adopt(parts, packing)
    return tensor
