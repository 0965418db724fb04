"""Block curves of a bank, and the recipe of hybrid precision that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sedimo.allocation.solve import allocate_given
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.lab.lab import Lab, seconds_of_fits
from sedimo.lab.study import ObjectiveName
from sedimo.methods.blocks import (
    BlockRow,
    all_but_one,
    blocks_of,
    changeable_blocks,
    extra_bytes_of,
    first_blocks,
    hybrid_recipe,
    refuse_keeping_all,
    sensitive_blocks,
)
from sedimo.methods.error import describe
from sedimo.methods.method import Finding, Method, Price, Task, Traits, Words
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.metrics.signal import mean_sqnr, paired_difference
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import Format
from sedimo.settings import option
from sedimo.space import Recipe, SearchSpace

NAME = "hybrid"
_KEEP_FEWER = "Keep fewer: a smaller --keep or --bits, or a larger --keep-db"


@dataclass(frozen=True, slots=True)
class KeepSettings:
    """By which one rule blocks stay at 16 bits; without a rule none do.

    `keep_db` keeps those whose protection gains so much [dB], `keep` so many that gain most, `bits`, which come from a
    budget, as many as the average paper bits allow.

    Raises:
        InputError: several rules, or numbers that say nothing.
    """

    keep_db: float | None = option(
        None, "--keep-db", help="Keep blocks at 16 bits whose protection gains so much [dB]."
    )
    keep: int | None = option(None, "--keep", least=0, help="Keep so many blocks at 16 bits, those that gain most.")
    bits: float | None = None

    def __post_init__(self) -> None:
        """Refuses several rules, and values that are no numbers."""
        if sum(rule is not None for rule in (self.keep_db, self.keep, self.bits)) > 1:
            raise InputError("give one rule for the blocks that stay at 16 bits: --keep-db, --keep or --bits")
        if self.keep_db is not None and not math.isfinite(self.keep_db):
            raise InputError(f"--keep-db takes a gain in dB, such as 1, got {self.keep_db}")
        if self.keep is not None and self.keep < 0:
            raise InputError(f"--keep takes a number of blocks, got {self.keep}")

    @property
    def is_given(self) -> bool:
        """Whether there is a rule."""
        return any(rule is not None for rule in (self.keep_db, self.keep, self.bits))

    def __str__(self) -> str:
        """By what blocks stay at 16 bits, in words; empty when none do."""
        if self.keep_db is not None:
            return f"a gain of at least {self.keep_db:g} dB"
        if self.keep is not None:
            return f"rank, the first {self.keep} by gain"
        return "" if self.bits is None else f"gain per byte within {self.bits:g} bits per weight"


@dataclass(frozen=True)
class BlocksResult:
    """The curves, all blocks at the format, and the hybrid recipe measured on fresh seeds, when a rule was given.

    `hybrid_gain` is what it gains against all blocks at the format there, paired [dB]. The curves were measured on
    `seeds`; `keep_db` is the threshold of the rule, if that is what it goes by.
    """

    source: str
    objective: ObjectiveName
    seeds: str
    n_steps: int
    rule: str
    keep_db: float | None
    number_format: Format
    rows: tuple[BlockRow, ...]
    everything: Estimate
    kept: tuple[str, ...]
    recipe: Recipe
    paper_bits: float
    hybrid: Estimate | None
    hybrid_gain: Estimate | None

    def as_json(self) -> Mapping[str, object]:
        """Plain values; scripts may rely on the names (see docs/reference/json-keys.md)."""
        plain: dict[str, object] = to_plain(self)
        plain["recipe"] = {name: str(entry) for name, entry in self.recipe.layers.items()}
        return plain


def measure_hybrid(
    lab: Lab, number_format: Format, keeping: KeepSettings, *, objective: ObjectiveName = "final_latents"
) -> BlocksResult:
    """Both curves of a format on the searched seeds, and the hybrid recipe of a rule, measured on the fresh ones.

    Resumes in the study.

    Raises:
        InputError: no layer can take the format, a budget below all quantized, or a rule that keeps every block.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    space, search = lab.bank.space, lab.seeds.search
    free = _free_bytes(keeping, number_format, space)  # refuses a small budget before anything is measured
    refuse_keeping_all(space, number_format, keeping.keep or 0, remedy=_KEEP_FEWER)
    rows, everything = _curves(lab, number_format, objective)
    kept = _kept(keeping, rows, free)
    refuse_keeping_all(space, number_format, len(kept), remedy=_KEEP_FEWER)
    recipe = hybrid_recipe(space, number_format, kept)
    hybrid = gain = None
    if kept:
        rivals = [recipe, hybrid_recipe(space, number_format, [])]
        mine, plain = lab.measure(rivals, lab.seeds.check, objective=objective)
        hybrid, gain = mean_sqnr(mine.powers), paired_difference(mine.powers, plain.powers).estimate
    return BlocksResult(
        source=lab.subject.name,
        objective=objective,
        seeds=f"{search.seeds[0]} to {search.seeds[-1]}",
        n_steps=search.n_steps,
        rule=str(keeping),
        keep_db=keeping.keep_db,
        number_format=number_format,
        rows=rows,
        everything=everything,
        kept=kept,
        recipe=recipe,
        paper_bits=space.paper_bits(recipe),
        hybrid=hybrid,
        hybrid_gain=gain,
    )


def blocks_by_gain(lab: Lab, number_format: Format, on: Sampling) -> list[str]:
    """The blocks that can take a format, those first whose protection gains most on a plan."""
    space = lab.bank.space
    recipes = [*all_but_one(space, number_format), hybrid_recipe(space, number_format, [])]
    *protected, everything = lab.measure(recipes, on)
    trials = dict(zip(blocks_of(space), protected, strict=True))
    gains = {
        name: ranked(paired_difference(trials[name].powers, everything.powers).mean_db)
        for name in changeable_blocks(space, number_format)
    }
    return sorted(gains, key=lambda name: -gains[name])


def _curves(lab: Lab, number_format: Format, objective: ObjectiveName) -> tuple[tuple[BlockRow, ...], Estimate]:
    space = lab.bank.space
    blocks, first = blocks_of(space), first_blocks(space, number_format)
    trials = lab.measure([*first, *all_but_one(space, number_format)], lab.seeds.search, objective=objective)
    everything = trials[len(first) - 1]
    rows = tuple(
        BlockRow(
            block=name,
            decisions=tuple(d.name for d in members),
            params=sum(d.params for d in members),
            extra_bytes=extra_bytes_of(members, number_format),
            up_to=mean_sqnr(up_to.powers),
            alone_kept=paired_difference(without.powers, everything.powers).estimate,
        )
        for (name, members), up_to, without in zip(blocks.items(), trials, trials[len(first) :], strict=False)
    )
    return rows, mean_sqnr(everything.powers)


def _kept(keeping: KeepSettings, rows: tuple[BlockRow, ...], free: int | None) -> tuple[str, ...]:
    if not keeping.is_given:
        return ()
    return sensitive_blocks(rows, gain_db=keeping.keep_db, count=keeping.keep, extra_bytes=free)


def _free_bytes(keeping: KeepSettings, number_format: Format, space: SearchSpace) -> int | None:
    """What a budget in bits leaves for blocks at 16 bits; None without one."""
    if keeping.bits is None:
        return None
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


def _keeping(task: Task[KeepSettings]) -> KeepSettings:
    """The rule, which may be the budget."""
    return replace(task.knobs, bits=task.budget.bits)


def _refuse(task: Task[KeepSettings], _formats: Sequence[Format]) -> None:
    number_format, budget = _format_of(task), task.budget
    method = f"{NAME}:{number_format}"
    if (budget.is_given and budget.bits is None) or budget.bops is not None:
        raise InputError(f"{method!r} knows budgets in paper bits alone: --bits 5; got {budget}")
    if not number_format.is_quantized:
        raise InputError(f"hybrid precision needs a format that changes weights, got {number_format}")
    if not _keeping(task).is_given:
        raise InputError(f"{method!r} needs a rule which blocks stay at 16 bits: --keep-db, --keep or --bits")


def _price(lab: Lab, _task: Task[KeepSettings]) -> Price:
    """Two recipes per block and full precision; the result and its one format on the fresh seeds; fits."""
    timing, seeds = lab.time_calls(lab.seeds.search), lab.seeds.settings
    share = seeds.n_check_seeds / seeds.n_seeds
    n_calls = round((2 * len(blocks_of(lab.space)) + 1 + 3 * share) * timing.n_calls)
    return Price(n_calls * timing.seconds_per_call + seconds_of_fits(lab), n_calls)


def _measure(lab: Lab, task: Task[KeepSettings]) -> Finding:
    """Its table is that of weight error, which only describes the recipe."""
    return describe(lab.bank).with_evidence(measure_hybrid(lab, _format_of(task), _keeping(task)))


def _decide(_lab: Lab, task: Task[KeepSettings], finding: Finding) -> Finding:
    table, recipe = finding.table, finding.need(BlocksResult).recipe
    budget = task.budget.resolved(table.total_params, table.full_bops)
    choice, rule = finding.bank.space.choice(recipe), f"{NAME}:{task.number_format}"
    return replace(finding, allocation=allocate_given(table, choice, budget, rule=rule))


HYBRID = Method(
    name=NAME,
    words=Words(
        summary="one format for all blocks (hybrid:FORMAT) but those kept by --keep-db, --keep or --bits",
        source="Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431)",
        sees="what each block costs while all others are quantized",
        misses="that layers of a block differ",
    ),
    knobs=KeepSettings,
    traits=Traits(
        is_noise=False, n_random=0, is_described=True, is_compared=False, takes_format=True, needs_format=True
    ),
    price=_price,
    measure=_measure,
    decide=_decide,
    refuse=_refuse,
)
