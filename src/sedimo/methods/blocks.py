"""Block by block: which blocks noise enters through, and a recipe that leaves those at 16 bits.

Two curves of one format: with the first N blocks quantized, and with all but one. The blocks whose protection gains
most stay at 16 bits: hybrid precision.

Source:
    Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431), progressive quantization of blocks
    and global hybrid precision; leaving out one block, and the rules by count and budget, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.quant.formats import FP16, Format
from sedimo.space import Decision, Recipe, SearchSpace


@dataclass(frozen=True, slots=True)
class BlockRow:
    """A block with its measurements [dB].

    `up_to` is the SQNR with this block and all before it quantized and the rest at 16 bits; `alone_kept` what is gained
    by leaving this block alone at 16 bits, paired, against all quantized. `params` weights would take `extra_bytes`
    more in the papers' accounting.
    """

    block: str
    decisions: tuple[str, ...]
    params: int
    extra_bytes: int
    up_to: Estimate
    alone_kept: Estimate


def blocks_of(space: SearchSpace) -> Mapping[str, tuple[Decision, ...]]:
    """The decisions of each block in the order of the denoiser; a layer outside any block is a block of its own."""
    found: dict[str, list[Decision]] = {}
    for decision in space.decisions:
        found.setdefault(decision.block or decision.layers[0], []).append(decision)
    return {name: tuple(members) for name, members in found.items()}


def changeable_blocks(space: SearchSpace, number_format: Format) -> tuple[str, ...]:
    """The blocks of which at least one decision can take a format, in the order of the denoiser."""
    return tuple(n for n, members in blocks_of(space).items() if extra_bytes_of(members, number_format) > 0)


def refuse_keeping_all(space: SearchSpace, number_format: Format, n_kept: int, *, remedy: str) -> None:
    """Refuses so many blocks at 16 bits that nothing would be quantized.

    Raises:
        InputError: with the number of blocks that can take the format.
    """
    n_blocks = len(changeable_blocks(space, number_format))
    if n_kept >= n_blocks > 0:
        raise InputError(
            f"{n_blocks} blocks can take {number_format}; with {n_kept} at 16 bits nothing would be quantized. {remedy}"
        )


def first_blocks(space: SearchSpace, number_format: Format) -> tuple[Recipe, ...]:
    """Recipes with the first 1, 2, ... blocks at a format and the rest at 16 bits.

    Raises:
        InputError: a format that no decision can take.
    """
    if not changeable_blocks(space, number_format):
        raise InputError(f"no layer of {space.denoiser} can take {number_format}; it is not in the space")
    chosen, found = _without_choice(space), []
    for members in blocks_of(space).values():
        chosen |= _quantized(members, number_format)
        found.append(space.recipe(chosen))
    return tuple(found)


def all_but_one(space: SearchSpace, number_format: Format) -> tuple[Recipe, ...]:
    """Recipes with all blocks but one at a format, one per block."""
    blocks = blocks_of(space)
    return tuple(hybrid_recipe(space, number_format, [kept]) for kept in blocks)


def hybrid_recipe(space: SearchSpace, number_format: Format, kept: Sequence[str]) -> Recipe:
    """All blocks at a format, those of `kept` at 16 bits.

    Raises:
        InputError: a block that the space does not have.
    """
    blocks = blocks_of(space)
    unknown = sorted(set(kept) - blocks.keys())
    if unknown:
        raise InputError(f"no such block: {unknown[0]!r}; the blocks are {', '.join(blocks)}")
    chosen = _without_choice(space)
    for name, members in blocks.items():
        if name not in kept:
            chosen |= _quantized(members, number_format)
    return space.recipe(chosen)


def sensitive_blocks(
    rows: Sequence[BlockRow],
    *,
    gain_db: float | None = None,
    count: int | None = None,
    extra_bytes: int | None = None,
) -> tuple[str, ...]:
    """The blocks to leave at 16 bits, by exactly one rule, in the order of the denoiser.

    Blocks that are at 16 bits anyway, because none of their layers can take the format, are not among them.
    `gain_db`: those whose protection gains at least so much, beyond its interval; `count`: so many that gain most;
    `extra_bytes`: those that gain most per byte while they fit (a greedy choice, because gains of blocks do not add).

    Raises:
        InputError: no rule, or several.
    """
    given = [rule for rule in (gain_db, count, extra_bytes) if rule is not None]
    if len(given) != 1:
        raise InputError("hybrid precision needs one rule: a gain in dB, a number of blocks, or a budget")
    rows = [r for r in rows if r.extra_bytes > 0]
    if gain_db is not None:
        chosen = {r.block for r in rows if r.alone_kept.value >= gain_db and r.alone_kept.low > 0}
    elif count is not None:
        by_gain = sorted(rows, key=lambda r: -ranked(r.alone_kept.value))
        chosen = {r.block for r in by_gain[: max(count, 0)]}
    else:
        chosen = _within(rows, extra_bytes or 0)
    return tuple(r.block for r in rows if r.block in chosen)


def _within(rows: Sequence[BlockRow], extra_bytes: int) -> set[str]:
    found, free = set(), extra_bytes
    for row in sorted(rows, key=lambda r: -ranked(r.alone_kept.value) / r.extra_bytes):
        if row.alone_kept.value > 0 and row.extra_bytes <= free:
            found.add(row.block)
            free -= row.extra_bytes
    return found


def extra_bytes_of(members: Sequence[Decision], number_format: Format) -> int:
    """What leaving decisions at 16 bits costs against a format, in the papers' accounting [bytes]."""
    quantized = [d for d in members if number_format in d.formats]
    return sum(d.paper_bytes(FP16) - d.paper_bytes(number_format) for d in quantized)


def _without_choice(space: SearchSpace) -> dict[str, Format]:
    """The formats of decisions that cannot stay at 16 bits, such as first and last layers that were given one."""
    return {d.name: d.formats[0] for d in space.decisions if FP16 not in d.formats}


def _quantized(members: Sequence[Decision], number_format: Format) -> dict[str, Format]:
    return {d.name: number_format for d in members if number_format in d.formats}
