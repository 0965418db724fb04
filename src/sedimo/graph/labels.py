"""Names of things, from module paths alone: the operation type of a node and the block that holds it."""

from __future__ import annotations

from collections.abc import Iterable, Set

from torch import nn

_MIN_LAYERS_OF_A_BLOCK = 2


def operation_type(path: str) -> str:
    """The path with its indices removed: equal for all layers that do the same job.

    Example:
        >>> operation_type("transformer_blocks.3.attn1.to_out.0")
        'transformer_blocks.attn1.to_out'
    """
    return ".".join(part for part in path.split(".") if not part.isdigit())


def find_blocks(denoiser: nn.Module, layer_names: Iterable[str]) -> frozenset[str]:
    """Paths of all blocks: numbered elements of a container that hold at least two weight layers.

    `transformer_blocks.3` and `down_blocks.1.resnets.0` are blocks; `to_out.0` and `ff.net.0` are not.
    """
    n_layers: dict[str, int] = {}
    for name in layer_names:
        for path in _ancestors(name):
            n_layers[path] = n_layers.get(path, 0) + 1
    containers = {name for name, m in denoiser.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    return frozenset(
        path
        for path, n in n_layers.items()
        if n >= _MIN_LAYERS_OF_A_BLOCK and _last(path).isdigit() and _parent(path) in containers
    )


def block_of(path: str, blocks: Set[str]) -> str:
    """The innermost block that holds a node or module, or "" outside all blocks."""
    return next((p for p in (path, *_ancestors(path)) if p in blocks), "")


def unit_of(path: str, block: str) -> str:
    """The part of its block that a layer belongs to: its outermost module inside the block, else the block.

    Example:
        >>> unit_of("blocks.3.ff.net.0.proj", "blocks.3")
        'blocks.3.ff'
        >>> unit_of("blocks.3.conv1", "blocks.3")
        'blocks.3'
    """
    inside = path[len(block) + 1 :] if block else path
    parts = inside.split(".")
    if len(parts) == 1:
        return block
    return f"{block}.{parts[0]}" if block else parts[0]


def _ancestors(path: str) -> list[str]:
    """Paths of the modules around a path, innermost first.

    Example:
        >>> _ancestors("a.b.c")
        ['a.b', 'a']
    """
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
