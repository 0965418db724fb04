"""What one module of the denoiser is called with, and what it gives: captured over recorded denoiser calls.

Rows of several calls are put together where that is possible, so that any rows can be drawn as one minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only
from torch.utils.hooks import RemovableHandle

from sedimo.errors import InputError, StateError
from sedimo.pipelines.adapter import DenoiserCall
from sedimo.pipelines.trajectory import rows_of

Tensors = tuple[torch.Tensor, ...]
Arguments = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True)
class Captured:
    """Arguments of a module for some rows, (positional, keyword), and the outputs that it should give for them.

    Tensors whose first axis has a place for each row hold a row each; all other arguments belong to every row.
    """

    inputs: Arguments
    targets: Tensors

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.targets[0])

    def has_rows(self, leaf: object) -> bool:
        """Whether an argument, or a value inside one, holds a row each."""
        return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.n_rows

    def rows(self, index: torch.Tensor | slice) -> Captured:
        """Some rows, copied: a module may overwrite its inputs."""
        taken = tree_map_only(torch.Tensor, lambda t: (t[index] if self.has_rows(t) else t).clone(), self.inputs)
        return Captured(taken, tuple(t[index] for t in self.targets))

    def squared_error(self, module: nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum of squared errors of what the module gives with other weights by name, which gradients reach; float32."""
        found = _tensors_in(torch.func.functional_call(module, dict(weights), *self.inputs))
        pairs = zip(found, self.targets, strict=True)
        return torch.stack([(one.float() - target.float()).square().sum() for one, target in pairs]).sum()


def capture_outputs(denoiser: nn.Module, name: str, calls: Sequence[DenoiserCall]) -> list[Tensors]:
    """The outputs of a module, one entry per use, when the denoiser repeats recorded calls."""
    found: list[Tensors] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        found.append(tuple(t.detach().clone() for t in _tensors_in(output)))

    _repeat(denoiser, calls, denoiser.get_submodule(name).register_forward_hook(keep))
    return found


def capture(
    denoiser: nn.Module, name: str, calls: Sequence[DenoiserCall], targets: Sequence[Tensors]
) -> tuple[Captured, ...]:
    """The arguments of a module when the denoiser repeats recorded calls, joined to what it should give for them."""
    inputs: list[Arguments] = []

    def keep(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        inputs.append(tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs)))

    # before the hooks of others, which may change the inputs: they will do so again when the module is called
    module = denoiser.get_submodule(name)
    _repeat(denoiser, calls, module.register_forward_pre_hook(keep, with_kwargs=True, prepend=True))
    if len(inputs) != len(targets):
        raise StateError(f"module {name!r} was called {len(inputs)} times, {len(targets)} times at full precision")
    if not all(targets):
        raise InputError(f"module {name!r} gives no tensor, so its rounding cannot be reconstructed")
    groups: list[list[Captured]] = []  # calls that differ in rows only
    for one in map(Captured, inputs, targets):
        group = next((g for g in groups if _agree(g[0], one)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return tuple(map(_joined, groups))


def minibatches(parts: Sequence[Captured], n_rows: int, generator: torch.Generator) -> Callable[[], Captured]:
    """A function that draws `n_rows` rows of one of the parts at a time, each row as likely as any other."""
    sizes = torch.tensor([float(part.n_rows) for part in parts])

    def draw() -> Captured:
        part = parts[int(torch.multinomial(sizes, 1, generator=generator))]
        index = torch.randperm(part.n_rows, generator=generator)[:n_rows]
        return part.rows(index.to(part.targets[0].device))

    return draw


def slices(parts: Sequence[Captured], n_rows: int) -> Iterator[Captured]:
    """All rows, at most `n_rows` at a time."""
    return (part.rows(slice(i, i + n_rows)) for part in parts for i in range(0, part.n_rows, n_rows))


def _tensors_in(output: object) -> Tensors:
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))


def _repeat(denoiser: nn.Module, calls: Sequence[DenoiserCall], hook: RemovableHandle) -> None:
    try:
        with torch.no_grad():
            for call in calls:
                denoiser(**rows_of(call, slice(None)))
    finally:
        hook.remove()


def _agree(first: Captured, other: Captured) -> bool:
    def agree(one: object, another: object) -> bool:
        if not isinstance(one, torch.Tensor) or not isinstance(another, torch.Tensor):
            return type(one) is type(another) and one == another
        if first.has_rows(one) and other.has_rows(another):
            return one.shape[1:] == another.shape[1:] and one.dtype == another.dtype
        return torch.equal(one, another)

    (leaves, spec), (others, other_spec) = tree_flatten(first.inputs), tree_flatten(other.inputs)
    return spec == other_spec and all(map(agree, leaves, others))


def _joined(calls: Sequence[Captured]) -> Captured:
    def joined(*alike: Any) -> Any:
        return torch.cat(alike) if calls[0].has_rows(alike[0]) else alike[0]

    targets = tuple(map(torch.cat, zip(*(call.targets for call in calls), strict=True)))
    return Captured(tree_map(joined, *(call.inputs for call in calls)), targets)
