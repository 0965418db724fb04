"""What a node of an exported program is: its operation, its arguments, the module that it stands in."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx


def operation_name(node: fx.Node) -> str:
    """`linear` of `aten.linear.default`, `getitem` of `operator.getitem`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    if target is operator.getitem:
        return "getitem"
    return str(getattr(target, "__name__", target))


def arguments_of(node: fx.Node) -> Iterator[fx.Node]:
    """All nodes among the arguments, in order, repeated ones repeatedly."""
    stack: list[object] = [*reversed(node.kwargs.values()), *reversed(node.args)]
    while stack:
        argument = stack.pop()
        if isinstance(argument, fx.Node):
            yield argument
        elif isinstance(argument, list | tuple):
            stack.extend(reversed(argument))


def shape_of(node: object) -> tuple[int, ...]:
    """The shape of a node's value, of the first of several; empty for what is no node or has none."""
    if not isinstance(node, fx.Node):
        return ()
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = value[0]
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()


def owner_of(node: fx.Node) -> str:
    """The path of the module whose forward makes the call."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def is_mutation(node: fx.Node) -> bool:
    """Whether the operation writes into one of its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
