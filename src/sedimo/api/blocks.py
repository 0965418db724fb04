"""Block curves of a source, and the recipe of hybrid precision that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sedimo.api.measuring import make_bank
from sedimo.api.opening import open_pipeline
from sedimo.api.order import (
    DEFAULT_COMPUTE,
    DEFAULT_SAMPLING,
    DYNAMIC_ACTIVATIONS,
    ActivationOrder,
    BudgetOrder,
    Compute,
    SamplingOrder,
)
from sedimo.api.searching import Measuring
from sedimo.api.smooth_order import SmoothOrder
from sedimo.api.smoothing import smooth_source
from sedimo.bank import SILENT, Progress
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.measurement.study import Study
from sedimo.measurement.trial import ObjectiveName, Trial
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.metrics.signal import paired_difference, sqnr_estimates, summarize
from sedimo.quant.formats import Format
from sedimo.reporting.block_page import BlockPage
from sedimo.sensitivity.blocks import (
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
from sedimo.space import Recipe, SearchSpace

_KEEP_FEWER = "Keep fewer: a smaller --keep or --bits, or a larger --keep-db"


@dataclass(frozen=True, slots=True)
class BlocksOrder:
    """What to measure block by block, and by which one rule blocks stay at 16 bits; without a rule none do.

    `keep_db` keeps those whose protection gains so much [dB], `keep` so many, `bits` as many as the average paper bits
    allow. With `smooth`, all of it is about the smoothed weights; `activations` say how inputs are rounded.
    """

    source: str
    store: Path
    number_format: Format
    objective: ObjectiveName = "final_latents"
    keep_db: float | None = None
    keep: int | None = None
    bits: float | None = None
    variant: str | None = None
    sampling: SamplingOrder = DEFAULT_SAMPLING
    compute: Compute = DEFAULT_COMPUTE
    activations: ActivationOrder = DYNAMIC_ACTIVATIONS
    smooth: SmoothOrder | None = None

    def __post_init__(self) -> None:
        """Refuses a format that changes no weight, an objective without curves, several rules, and no numbers."""
        if not self.number_format.is_quantized:
            raise InputError(f"block curves need a format that changes weights, got {self.number_format}")
        if self.objective not in ("final_latents", "path", "step"):
            raise InputError(f"block curves are measured by final_latents, path or step, got {self.objective!r}")
        if sum(rule is not None for rule in (self.keep_db, self.keep, self.bits)) > 1:
            raise InputError("give one rule for the blocks that stay at 16 bits: --keep-db, --keep or --bits")
        BudgetOrder(bits=self.bits)
        if self.keep_db is not None and not math.isfinite(self.keep_db):
            raise InputError(f"--keep-db takes a gain in dB, such as 1, got {self.keep_db}")
        if self.keep is not None and self.keep < 0:
            raise InputError(f"--keep takes a number of blocks, got {self.keep}")

    @property
    def rule(self) -> str:
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
        """Plain values; scripts may rely on the names (see docs/cli.md)."""
        plain: dict[str, object] = to_plain(self)
        plain["recipe"] = {name: str(entry) for name, entry in self.recipe.layers.items()}
        return plain

    def as_page(self) -> BlockPage:
        """What the page tells."""
        return BlockPage(
            source=self.source,
            number_format=str(self.number_format),
            objective=self.objective,
            seeds=self.seeds,
            n_steps=self.n_steps,
            rule=self.rule,
            gain_db=self.keep_db,
            rows=self.rows,
            everything=self.everything,
            kept=self.kept,
            paper_bits=self.paper_bits,
            hybrid=self.hybrid,
            hybrid_gain=self.hybrid_gain,
        )


def measure_blocks(order: BlocksOrder, progress: Progress = SILENT) -> BlocksResult:
    """Both curves of a format, and the hybrid recipe of the order's rule. Resumes in the study.

    Raises:
        InputError: the source cannot be sampled, no layer can take the format, or a budget below all quantized.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    opened = open_pipeline(order, f"{order.number_format},fp16")
    with Study(order.store) as study:
        smooth_source(opened, study, progress)
        bank = make_bank(opened, study, is_exact=True, progress=progress)
        searched, fresh = (
            Measuring.on(opened.pipe, bank, study, plan, objective=order.objective, progress=progress)
            for plan in (order.sampling.searching(opened.pipe), order.sampling.checking(opened.pipe))
        )
        free = _free_bytes(order, bank.space)  # refuses a budget that is too small before anything is measured
        refuse_keeping_all(bank.space, order.number_format, order.keep or 0, remedy=_KEEP_FEWER)
        rows, everything = _curves(bank.space, order.number_format, searched)
        kept = _kept(order, rows, free)
        refuse_keeping_all(bank.space, order.number_format, len(kept), remedy=_KEEP_FEWER)
        recipe = hybrid_recipe(bank.space, order.number_format, kept)
        hybrid = gain = None
        if kept:
            uniform = hybrid_recipe(bank.space, order.number_format, [])
            mine, plain = fresh.trials([recipe, uniform])
            hybrid, gain = _sqnr(mine), paired_difference(mine.powers, plain.powers).estimate
    return BlocksResult(
        source=opened.name,
        objective=order.objective,
        seeds=f"{searched.setting.seeds[0]} to {searched.setting.seeds[-1]}",
        n_steps=searched.setting.n_steps,
        rule=order.rule,
        keep_db=order.keep_db,
        number_format=order.number_format,
        rows=rows,
        everything=everything,
        kept=kept,
        recipe=recipe,
        paper_bits=bank.space.paper_bits(recipe),
        hybrid=hybrid,
        hybrid_gain=gain,
    )


def blocks_by_gain(space: SearchSpace, number_format: Format, measuring: Measuring) -> list[str]:
    """The blocks that can take a format, those first whose protection gains most."""
    recipes = [*all_but_one(space, number_format), hybrid_recipe(space, number_format, [])]
    *protected, everything = measuring.trials(recipes)
    trials = dict(zip(blocks_of(space), protected, strict=True))
    gains = {
        name: ranked(paired_difference(trials[name].powers, everything.powers).mean_db)
        for name in changeable_blocks(space, number_format)
    }
    return sorted(gains, key=lambda name: -gains[name])


def _curves(space: SearchSpace, number_format: Format, measuring: Measuring) -> tuple[tuple[BlockRow, ...], Estimate]:
    blocks, first = blocks_of(space), first_blocks(space, number_format)
    trials = measuring.trials([*first, *all_but_one(space, number_format)])
    everything = trials[len(first) - 1]
    rows = tuple(
        BlockRow(
            block=name,
            decisions=tuple(d.name for d in members),
            params=sum(d.params for d in members),
            extra_bytes=extra_bytes_of(members, number_format),
            up_to=_sqnr(up_to),
            alone_kept=paired_difference(without.powers, everything.powers).estimate,
        )
        for (name, members), up_to, without in zip(blocks.items(), trials, trials[len(first) :], strict=False)
    )
    return rows, _sqnr(everything)


def _kept(order: BlocksOrder, rows: tuple[BlockRow, ...], free: int | None) -> tuple[str, ...]:
    if order.keep_db is None and order.keep is None and free is None:
        return ()
    return sensitive_blocks(rows, gain_db=order.keep_db, count=order.keep, extra_bytes=free)


def _free_bytes(order: BlocksOrder, space: SearchSpace) -> int | None:
    """What a budget in bits leaves for blocks at 16 bits; None without one."""
    if order.bits is None:
        return None
    least = space.paper_bytes(hybrid_recipe(space, order.number_format, []))
    free = int(order.bits * space.params / 8) - least
    if free < 0:
        raise InputError(
            f"all blocks at {order.number_format} take {8 * least / space.params:.3f} bits per weight, more than the "
            f"budget of {order.bits:g}; raise it, or take a smaller format"
        )
    return free


def _sqnr(trial: Trial) -> Estimate:
    return sqnr_estimates(summarize(trial.powers))["sqnr_db"]
