"""A denoiser as an exported program, and what a node of a program is: its operation, arguments, shape and module."""

from __future__ import annotations

import gc
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sedimo.errors import InputError
from sedimo.graph.example_inputs import find_inputs, first_line, signature_names
from sedimo.graph.layers import meta_tensor, meta_twin

Capture = Callable[[], Mapping[str, object]]

READS_NOTHING = re.compile(r"(zeros|ones|empty|full|rand|randn)_like|new_\w+|_assert\w*|sym_\w+")  # names of operations
_NOISY_LOGGERS = ("torch", "diffusers")


def export_denoiser(
    denoiser: nn.Module, *, example_inputs: Mapping[str, object] | None = None, capture: Capture | None = None
) -> tuple[ExportedProgram, dict[str, object]]:
    """The denoiser as a program on the meta device, and the inputs (see `trace_denoiser`) it was exported with."""
    twin = meta_twin(denoiser)
    with _quiet():
        inputs = _inputs_for(twin, example_inputs or {}, capture)
        try:
            with torch.no_grad():
                return torch.export.export(twin, (), inputs, strict=False), inputs
        except Exception as error:  # foreign code fails in any way, and export adds its own
            raise InputError(
                f"{type(twin).__name__} cannot be exported: {first_line(error)}. "
                "Its forward must not depend on the values of tensors"
            ) from error


def _inputs_for(twin: nn.Module, examples: Mapping[str, object], capture: Capture | None) -> dict[str, object]:
    """Example inputs on the meta device: given, found by name, or captured."""
    names, is_open = signature_names(twin)
    unknown = sorted(examples.keys() - names) if not is_open else []
    if unknown:
        raise InputError(
            f"example_inputs names {', '.join(unknown)}, but the forward of {type(twin).__name__} "
            f"takes {', '.join(names)}"
        )
    try:
        return find_inputs(twin, _on_meta(examples))
    except InputError as error:
        if capture is not None:
            captured = {name: value for name, value in capture().items() if is_open or name in names}
            fixed = {"return_dict": False} if "return_dict" in names else {}
            return {**_on_meta(captured), **fixed}
        required = [name for name, is_required in names.items() if is_required] or list(names)[:1]
        usage = ", ".join(f'"{name}": torch.empty(...)' for name in required)
        raise InputError(
            f"{type(twin).__name__} cannot be traced with example inputs found by name: {error}. "
            f"Pass them, for example example_inputs={{{usage}}}; only shape and dtype matter"
        ) from error


def _on_meta(inputs: Mapping[str, object]) -> dict[str, object]:
    """Inputs with tensors on the meta device, and mappings of any kind (a `BatchEncoding`) as plain ones for export."""

    def moved(leaf: object) -> object:
        if isinstance(leaf, Mapping):
            return _on_meta(leaf)
        return meta_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return {name: pytree.tree_map(moved, one, is_leaf=lambda v: isinstance(v, Mapping)) for name, one in inputs.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps warnings and log lines about tracing from the user, who cannot act on them."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, _NOISY_LOGGERS):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if gc.isenabled():  # it took a third of an export's time by visiting the many long-lived objects
            stack.callback(gc.enable)
            gc.disable()
        yield


def operation_name(node: fx.Node) -> str:
    """`linear` of `aten.linear.default`, `getitem` of `operator.getitem`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return "getitem" if target is operator.getitem else str(getattr(target, "__name__", target))


def arguments_of(node: fx.Node) -> list[fx.Node]:
    """All nodes among the arguments, in order, repeated ones repeatedly."""
    return [leaf for leaf in pytree.arg_tree_leaves(*node.args, **node.kwargs) if isinstance(leaf, fx.Node)]


def shape_of(node: object) -> tuple[int, ...]:
    """The shape of a node's value, of the first of several; empty for what is no node or has none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    value = value[0] if isinstance(value, list | tuple) else value
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()


def owner_of(node: fx.Node) -> str:
    """The path of the module whose forward makes the call."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""
