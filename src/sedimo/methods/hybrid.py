"""Hybrid precision: which blocks noise enters through, and a recipe that leaves those at 16 bits.

Two curves of one format: with the first N blocks quantized, and with all but one. The blocks whose protection gains
most stay at 16 bits.

Source:
    Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431), progressive quantization of blocks
    and global hybrid precision; leaving out one block, and the rules by count and budget, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sedimo.allocation.solve import allocate_given
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.lab.lab import Lab, seconds_of_fits
from sedimo.lab.study import ObjectiveName
from sedimo.methods.error import describe
from sedimo.methods.method import Finding, Method, Price, Task, Words
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.metrics.signal import mean_sqnr, paired_difference
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import FP16, Format
from sedimo.settings import Checked, option, within
from sedimo.space import Decision, Recipe, SearchSpace

NAME = "hybrid"
_KEEP_FEWER = "Keep fewer: a smaller --keep or --bits, or a larger --keep-db"


@dataclass(frozen=True, slots=True)
class KeepSettings(Checked):
    """By which one rule blocks stay at 16 bits; without a rule none do. `bits` come from a budget."""

    keep_db: float | None = option(
        None,
        "--keep-db",
        check=within(hint="a gain in dB, such as 1"),
        help="Keep blocks at 16 bits whose protection gains so much [dB].",
    )
    keep: int | None = option(None, "--keep", least=0, help="Keep so many blocks at 16 bits, those that gain most.")
    bits: float | None = None

    def check_together(self) -> None:
        """Refuses several rules."""
        if sum(rule is not None for rule in (self.keep_db, self.keep, self.bits)) > 1:
            raise InputError("give one rule for the blocks that stay at 16 bits: --keep-db, --keep or --bits")

    def __str__(self) -> str:
        """By what blocks stay at 16 bits, in words; empty when none do."""
        if self.keep_db is not None:
            return f"a gain of at least {self.keep_db:g} dB"
        if self.keep is not None:
            return f"rank, the first {self.keep} by gain"
        return "" if self.bits is None else f"gain per byte within {self.bits:g} bits per weight"


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


@dataclass(frozen=True, slots=True)
class BlockCurves:
    """The curves of one format on `seeds`, `everything` at the format, and the hybrid recipe measured on fresh seeds.

    `kept` are the blocks that stay at 16 bits by the `rule`, whose threshold is `gain_db`, if it has one [dB];
    `hybrid_gain` is what that gains against all blocks at the format, paired [dB].
    """

    source: str
    number_format: Format
    objective: ObjectiveName
    seeds: str
    n_steps: int
    rule: str
    gain_db: float | None
    rows: tuple[BlockRow, ...]
    everything: Estimate
    kept: tuple[str, ...]
    paper_bits: float
    hybrid: Estimate | None
    hybrid_gain: Estimate | None

    def as_json(self) -> dict[str, object]:
        """Plain values; scripts may rely on the names (see docs/reference/json-keys.md)."""
        plain: dict[str, object] = to_plain(self)
        plain["keep_db"] = plain.pop("gain_db")
        return plain


def blocks_of(space: SearchSpace) -> Mapping[str, tuple[Decision, ...]]:
    """The decisions of each block in the order of the denoiser; a layer outside any block is a block of its own."""
    found: dict[str, tuple[Decision, ...]] = {}
    for decision in space.decisions:
        name = decision.block or decision.layers[0]
        found[name] = (*found.get(name, ()), decision)
    return found


def changeable_blocks(space: SearchSpace, number_format: Format) -> tuple[str, ...]:
    """The blocks of which at least one decision can take a format, in the order of the denoiser."""
    return tuple(name for name, members in blocks_of(space).items() if extra_bytes_of(members, number_format) > 0)


def refuse_keeping_all(space: SearchSpace, number_format: Format, n_kept: int, *, remedy: str) -> None:
    """Refuses so many blocks at 16 bits that nothing would be quantized."""
    n_blocks = len(changeable_blocks(space, number_format))
    if n_kept >= n_blocks > 0:
        raise InputError(
            f"{n_blocks} blocks can take {number_format}; with {n_kept} at 16 bits nothing would be quantized. {remedy}"
        )


def first_blocks(space: SearchSpace, number_format: Format) -> list[Recipe]:
    """Recipes with the first 1, 2, ... blocks at a format and the rest at 16 bits."""
    if not changeable_blocks(space, number_format):
        raise InputError(f"no layer of {space.denoiser} can take {number_format}; it is not in the space")
    names = list(blocks_of(space))
    return [hybrid_recipe(space, number_format, names[n:]) for n in range(1, len(names) + 1)]


def all_but_one(space: SearchSpace, number_format: Format) -> list[Recipe]:
    """Recipes with all blocks but one at a format, one per block."""
    return [hybrid_recipe(space, number_format, [kept]) for kept in blocks_of(space)]


def hybrid_recipe(space: SearchSpace, number_format: Format, kept: Sequence[str]) -> Recipe:
    """All blocks at a format, those of `kept` at 16 bits, or at the format that first and last layers were given."""
    blocks = blocks_of(space)
    unknown = sorted(set(kept) - blocks.keys())
    if unknown:
        raise InputError(f"no such block: {unknown[0]!r}; the blocks are {', '.join(blocks)}")
    chosen = {d.name: d.formats[0] for d in space.decisions if FP16 not in d.formats}
    for name in blocks.keys() - set(kept):
        chosen |= {d.name: number_format for d in blocks[name] if number_format in d.formats}
    return space.recipe(chosen)


def extra_bytes_of(members: Sequence[Decision], number_format: Format) -> int:
    """What leaving decisions at 16 bits costs against a format, in the papers' accounting [bytes]."""
    return sum(d.paper_bytes(FP16) - d.paper_bytes(number_format) for d in members if number_format in d.formats)


def sensitive_blocks(rows: Sequence[BlockRow], keeping: KeepSettings, free_bytes: int = 0) -> tuple[str, ...]:
    """The blocks to leave at 16 bits by a rule, in the order of the denoiser.

    Blocks that are at 16 bits anyway, because none of their layers can take the format, are not among them. A gain must
    lie beyond its interval; of a budget, `free_bytes` go to those that gain most per byte while they fit (a greedy
    choice, because gains of blocks do not add).
    """
    rows = [r for r in rows if r.extra_bytes > 0]
    if keeping.keep_db is not None:
        chosen = {r.block for r in rows if r.alone_kept.value >= keeping.keep_db and r.alone_kept.low > 0}
    elif keeping.keep is not None:
        chosen = {r.block for r in sorted(rows, key=lambda r: -ranked(r.alone_kept.value))[: keeping.keep]}
    else:
        chosen = set()
        for row in sorted(rows, key=lambda r: -ranked(r.alone_kept.value) / r.extra_bytes):
            if row.alone_kept.value > 0 and row.extra_bytes <= free_bytes:
                chosen.add(row.block)
                free_bytes -= row.extra_bytes
    return tuple(r.block for r in rows if r.block in chosen)


def measure_hybrid(
    lab: Lab, number_format: Format, keeping: KeepSettings, *, objective: ObjectiveName = "final_latents"
) -> BlockCurves:
    """Both curves of a format on the searched seeds, and the hybrid recipe of a rule, measured on the fresh ones."""
    space, search, hybrid, gain = lab.bank.space, lab.seeds.search, None, None
    free = _free_bytes(keeping, number_format, space)  # refuses a small budget before anything is measured
    refuse_keeping_all(space, number_format, keeping.keep or 0, remedy=_KEEP_FEWER)
    rows, everything = _curves(lab, number_format, objective)
    kept = sensitive_blocks(rows, keeping, free)
    refuse_keeping_all(space, number_format, len(kept), remedy=_KEEP_FEWER)
    recipe, whole = (hybrid_recipe(space, number_format, names) for names in (kept, ()))
    if kept:
        mine, plain = lab.measure([recipe, whole], lab.seeds.check, objective=objective)
        hybrid, gain = mean_sqnr(mine.powers), paired_difference(mine.powers, plain.powers).estimate
    return BlockCurves(
        source=lab.bench.name,
        number_format=number_format,
        objective=objective,
        seeds=f"{search.seeds[0]} to {search.seeds[-1]}",
        n_steps=search.n_steps,
        rule=str(keeping),
        gain_db=keeping.keep_db,
        rows=rows,
        everything=everything,
        kept=kept,
        paper_bits=space.paper_bits(recipe),
        hybrid=hybrid,
        hybrid_gain=gain,
    )


def blocks_by_gain(lab: Lab, number_format: Format, on: Sampling) -> list[str]:
    """The blocks that can take a format, those first whose protection gains most on a plan."""
    space = lab.bank.space
    recipes = [*all_but_one(space, number_format), hybrid_recipe(space, number_format, [])]
    *protected, everything = lab.measure(recipes, on)
    gains = [ranked(paired_difference(trial.powers, everything.powers).mean_db) for trial in protected]
    by_block = dict(zip(blocks_of(space), gains, strict=True))
    return sorted(changeable_blocks(space, number_format), key=lambda name: -by_block[name])


def _curves(lab: Lab, number_format: Format, objective: ObjectiveName) -> tuple[tuple[BlockRow, ...], Estimate]:
    space = lab.bank.space
    blocks, first = blocks_of(space), first_blocks(space, number_format)
    trials = lab.measure([*first, *all_but_one(space, number_format)], lab.seeds.search, objective=objective)
    everything = trials[len(first) - 1].powers
    rows = tuple(
        BlockRow(
            block=name,
            decisions=tuple(d.name for d in members),
            params=sum(d.params for d in members),
            extra_bytes=extra_bytes_of(members, number_format),
            up_to=mean_sqnr(up_to.powers),
            alone_kept=paired_difference(without.powers, everything).estimate,
        )
        for (name, members), up_to, without in zip(blocks.items(), trials, trials[len(first) :], strict=False)
    )
    return rows, mean_sqnr(everything)


def _free_bytes(keeping: KeepSettings, number_format: Format, space: SearchSpace) -> int:
    """What a budget in bits leaves for blocks at 16 bits."""
    if keeping.bits is None:
        return 0
    least = space.paper_bytes(hybrid_recipe(space, number_format, []))
    free = int(keeping.bits * space.params / 8) - least
    if free < 0:
        raise InputError(
            f"all blocks at {number_format} take {8 * least / space.params:.3f} bits per weight, more than the "
            f"budget of {keeping.bits:g}; raise it, or take a smaller format"
        )
    return free


def _format_of(task: Task[KeepSettings]) -> Format:
    if task.number_format is None:
        raise InputError(f"hybrid precision needs a format: {NAME}:uaq4")
    return task.number_format


def _refuse(task: Task[KeepSettings], _formats: Sequence[Format]) -> None:
    number_format, budget = _format_of(task), task.budget
    method = f"{NAME}:{number_format}"
    if (budget.is_given and budget.bits is None) or budget.bops is not None:
        raise InputError(f"{method!r} knows budgets in paper bits alone: --bits 5; got {budget}")
    if not number_format.is_quantized:
        raise InputError(f"hybrid precision needs a format that changes weights, got {number_format}")
    if replace(task.knobs, bits=budget.bits) == KeepSettings():
        raise InputError(f"{method!r} needs a rule which blocks stay at 16 bits: --keep-db, --keep or --bits")


def _price(lab: Lab, _task: Task[KeepSettings]) -> Price:
    """Two recipes per block and full precision; the result and its one format on the fresh seeds; fits."""
    timing, seeds = lab.time_calls(lab.seeds.search), lab.seeds.settings
    share = seeds.n_check_seeds / seeds.n_seeds
    n_calls = round((2 * len(blocks_of(lab.space)) + 1 + 3 * share) * timing.n_calls)
    return Price(n_calls * timing.seconds_per_call + seconds_of_fits(lab), n_calls)


def _measure(lab: Lab, task: Task[KeepSettings]) -> Finding:
    """Its table is that of weight error, which only describes the recipe."""
    keeping = replace(task.knobs, bits=task.budget.bits)
    return describe(lab.bank).with_evidence(measure_hybrid(lab, _format_of(task), keeping))


def _decide(_lab: Lab, task: Task[KeepSettings], finding: Finding) -> Finding:
    table, space, number_format = finding.table, finding.bank.space, _format_of(task)
    recipe = hybrid_recipe(space, number_format, finding.need(BlockCurves).kept)
    budget = task.budget.resolved(table.total_params, table.full_bops)
    allocation = allocate_given(table, space.choice(recipe), budget, rule=f"{NAME}:{number_format}")
    return replace(finding, allocation=allocation)


HYBRID = Method(
    name=NAME,
    words=Words(
        summary="one format for all blocks (hybrid:FORMAT) but those kept by --keep-db, --keep or --bits",
        source="Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431)",
        sees="what each block costs while all others are quantized",
        misses="that layers of a block differ",
        given="The recipe has {} for all but the blocks that gain most by staying at 16 bits (below).",
    ),
    knobs=KeepSettings,
    is_described=True,
    takes_format=True,
    needs_format=True,
    price=_price,
    measure=_measure,
    decide=_decide,
    refuse=_refuse,
)
