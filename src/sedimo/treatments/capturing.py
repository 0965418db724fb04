"""What one module of the denoiser is called with, and what it gives: captured over recorded denoiser calls.

Rows of several calls are put together where that is possible, so that any rows can be drawn as one minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from sedimo.errors import InputError, StateError
from sedimo.pipelines.adapter import DenoiserCall
from sedimo.pipelines.trajectory import rows_of


@dataclass(frozen=True)
class Captured:
    """Arguments of a module for `n_rows` rows, and the outputs that it should give for them.

    `leaves` are the values in (positional, keyword) arguments in the order of `spec`. Tensors whose first axis has the
    length `n_rows` hold a row each; all others belong to every row.
    """

    leaves: tuple[object, ...]
    spec: TreeSpec
    targets: tuple[torch.Tensor, ...]
    n_rows: int

    def rows(self, index: torch.Tensor | slice) -> Captured:
        """Some rows, copied: a module may overwrite its inputs."""
        leaves = tuple(_cut(leaf, index, self.n_rows) for leaf in self.leaves)
        targets = tuple(t[index] for t in self.targets)
        return Captured(leaves, self.spec, targets, len(targets[0]))

    def call(self, module: nn.Module, weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the module gives with other weights, by parameter name; gradients reach them."""
        args, kwargs = tree_unflatten(list(self.leaves), self.spec)
        return tensors_in(torch.func.functional_call(module, dict(weights), args, kwargs))

    def squared_error(self, module: nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum of squared differences between what the module gives and what it should, float32."""
        pairs = zip(self.call(module, weights), self.targets, strict=True)
        return torch.stack([(found.float() - target.float()).square().sum() for found, target in pairs]).sum()


def capture_outputs(denoiser: nn.Module, name: str, calls: Sequence[DenoiserCall]) -> list[tuple[torch.Tensor, ...]]:
    """The outputs of a module, one entry per use, when the denoiser repeats recorded calls."""
    found: list[tuple[torch.Tensor, ...]] = []
    module = denoiser.get_submodule(name)
    hook = module.register_forward_hook(lambda _module, _args, out: found.append(_copied(tensors_in(out))))
    try:
        _repeat(denoiser, calls)
    finally:
        hook.remove()
    return found


def capture(
    denoiser: nn.Module, name: str, calls: Sequence[DenoiserCall], targets: Sequence[tuple[torch.Tensor, ...]]
) -> tuple[Captured, ...]:
    """The arguments of a module when the denoiser repeats recorded calls, joined to what it should give for them.

    Raises:
        StateError: it is not called as often as there are targets.
        InputError: it gives no tensor.
    """
    inputs: list[tuple[list[object], TreeSpec]] = []

    def keep(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        inputs.append(([_copied([leaf])[0] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec))

    # before the hooks of others, which may change the inputs: they will do so again when the module is called
    hook = denoiser.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    try:
        _repeat(denoiser, calls)
    finally:
        hook.remove()
    if len(inputs) != len(targets):
        raise StateError(f"module {name!r} was called {len(inputs)} times, {len(targets)} times at full precision")
    if any(not target for target in targets):
        raise InputError(f"module {name!r} gives no tensor, so its rounding cannot be reconstructed")
    pairs = zip(inputs, targets, strict=True)
    return _joined([Captured(tuple(leaves), spec, target, len(target[0])) for (leaves, spec), target in pairs])


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
    for part in parts:
        for first in range(0, part.n_rows, n_rows):
            yield part.rows(slice(first, first + n_rows))


def tensors_in(output: object) -> tuple[torch.Tensor, ...]:
    """The tensors that a module gives, in order."""
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))


def _repeat(denoiser: nn.Module, calls: Sequence[DenoiserCall]) -> None:
    with torch.no_grad():
        for call in calls:
            denoiser(**rows_of(call, slice(None)))


def _copied(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().clone() for t in tensors)


def _cut(leaf: object, index: torch.Tensor | slice, n_rows: int) -> object:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return (leaf[index] if _has_rows(leaf, n_rows) else leaf).clone()


def _has_rows(tensor: torch.Tensor, n_rows: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == n_rows


def _joined(calls: Sequence[Captured]) -> tuple[Captured, ...]:
    """Calls that differ in rows only, put together."""
    groups: list[list[Captured]] = []
    for call in calls:
        group = next((g for g in groups if _agree(g[0], call)), None)
        if group is None:
            groups.append([call])
        else:
            group.append(call)
    return tuple(_concatenated(group) for group in groups)


def _agree(first: Captured, other: Captured) -> bool:
    if first.spec != other.spec or len(first.leaves) != len(other.leaves):
        return False

    def agree(one: object, another: object) -> bool:
        if not isinstance(one, torch.Tensor) or not isinstance(another, torch.Tensor):
            return type(one) is type(another) and one == another
        if _has_rows(one, first.n_rows) and _has_rows(another, other.n_rows):
            return one.shape[1:] == another.shape[1:] and one.dtype == another.dtype
        return torch.equal(one, another)

    return all(agree(*pair) for pair in zip(first.leaves, other.leaves, strict=True))


def _concatenated(calls: Sequence[Captured]) -> Captured:
    first = calls[0]
    leaves = tuple(
        torch.cat([call.leaves[i] for call in calls])  # type: ignore[misc]  # tensors with rows, as in the first call
        if isinstance(leaf, torch.Tensor) and _has_rows(leaf, first.n_rows)
        else leaf
        for i, leaf in enumerate(first.leaves)
    )
    targets = tuple(torch.cat(parts) for parts in zip(*(call.targets for call in calls), strict=True))
    return Captured(leaves, first.spec, targets, sum(call.n_rows for call in calls))
