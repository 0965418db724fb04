"""Names of operations and blocks that are short enough for a map, for any denoiser.

The block of a layer is a path such as `down_blocks.1.attentions.0.transformer_blocks.0`. Blocks with the same
last container are of one kind and share a panel; what a layer is inside its block is its row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

OUTSIDE = "outside blocks"


def kind_of(block: str) -> str:
    """The last container of a block's path: `resnets` of `down_blocks.1.resnets.0`."""
    return (without_numbers(block).split(".")[-1] or "blocks") if block else OUTSIDE


def label_of(block: str) -> str:
    """Of a block among those of its kind: `down 1.0` of `down_blocks.1.resnets.0`, `3` of `transformer_blocks.3`."""
    words, numbers = without_numbers(block).split("."), _numbers(block)
    return (f"{_without_block(words[0])} {numbers}".strip() if len(words) > 1 else numbers) or block


def inside(operation: str, block: str) -> str:
    """An operation without the path above its block: `attn1.to_q`."""
    return operation.removeprefix(f"{without_numbers(block)}.")


def operation_label(operation: str, block: str, *, has_one_kind: bool) -> str:
    """An operation inside its block, with the kind of that where there are several."""
    kind = kind_of(block)
    return inside(operation, block) if has_one_kind or kind == OUTSIDE else f"{kind}.{inside(operation, block)}"


def stage(block: str) -> str:
    """The outermost part of a denoiser that a block belongs to, so that a chart has a dozen points, not a hundred.

    Example:
        >>> stage("down_blocks.1.attentions.0.transformer_blocks.0"), stage("mid_block.resnets.1")
        ('down_blocks.1', 'mid_block')
    """
    parts = block.split(".")
    n_parts = next((i for i in range(1, len(parts)) if parts[i].isdigit()), len(parts) - 1)
    is_plain = n_parts > 1 and re.search(r"blocks?$", parts[0]) is not None
    return parts[0] if is_plain else ".".join(parts[: n_parts + 1])


def stage_labels(stages: Sequence[str]) -> tuple[list[str], str]:
    """Short labels of stages, and what is common to all of them.

    Example:
        >>> stage_labels(["transformer_blocks.0", "transformer_blocks.1"])
        (['0', '1'], 'transformer_blocks')
        >>> stage_labels(["down_blocks.0", "mid_block"])
        (['down 0', 'mid'], '')
    """
    containers = {without_numbers(s) for s in stages if s != OUTSIDE}
    if len(containers) != 1:
        return [_stage_label(found) for found in stages], ""
    return ["outside" if s == OUTSIDE else _numbers(s) for s in stages], containers.pop()


def block_labels(blocks: Sequence[str]) -> tuple[list[str], str]:
    """Short labels of blocks, nested ones too (equal ones name their kind), and what is common to all of them.

    Example:
        >>> block_labels(["transformer_blocks.0", "transformer_blocks.1"])
        (['0', '1'], 'transformer_blocks')
        >>> block_labels(["down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "down_blocks.1"])
        (['down 1.0 resnets', 'down 1.0 attentions', 'down 1'], '')
    """
    named = [block or OUTSIDE for block in blocks]
    if all("." not in without_numbers(block) for block in named):
        labels, common = stage_labels(named)
    else:
        labels, common = [label_of(b) if "." in without_numbers(b) else _stage_label(b) for b in named], ""
    labels = [label or block for label, block in zip(labels, named, strict=True)]
    pairs = zip(labels, named, strict=True)
    return [one if labels.count(one) == 1 else f"{one} {kind_of(block)}" for one, block in pairs], common


def natural_order(block: str) -> tuple[tuple[int, int, str], ...]:
    """The key that sorts blocks by their numbers, with the way of a U-Net (down, middle, up) as people read it."""
    way = {"down": 0, "mid": 1, "up": 2}
    return tuple(
        (1, int(part), "") if part.isdigit() else (0, way.get(part.split("_")[0], 0), part) for part in block.split(".")
    )


def _stage_label(block: str) -> str:
    """Of a block that is not nested in another: `down 1`, `mid`."""
    words = without_numbers(block)
    return "outside" if block == OUTSIDE else f"{_without_block(words) or words} {_numbers(block)}".strip()


def _without_block(word: str) -> str:
    return re.sub(r"_?blocks?$", "", word)


def _numbers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part.isdigit())


def without_numbers(path: str) -> str:
    """A path without the parts that count."""
    return ".".join(part for part in path.split(".") if not part.isdigit())
