"""Block curves of a bank, and the recipe of hybrid precision that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sedimo.api.keep_order import KeepOrder
from sedimo.api.opening import OpenedSource
from sedimo.api.searching import Measuring
from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.measurement.study import Study
from sedimo.measurement.trial import ObjectiveName, Trial
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.metrics.signal import paired_difference, sqnr_estimates, summarize
from sedimo.quant.formats import Format
from sedimo.reporting.maps import BlockCurves
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

    def as_curves(self) -> BlockCurves:
        """What a page tells."""
        return BlockCurves(
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


def measure_hybrid(
    opened: OpenedSource,
    bank: Bank,
    study: Study,
    number_format: Format,
    keeping: KeepOrder,
    *,
    objective: ObjectiveName = "final_latents",
    progress: Progress = SILENT,
) -> BlocksResult:
    """Both curves of a format on the searched seeds, and the hybrid recipe of a rule, measured on the fresh ones.

    Resumes in the study.

    Raises:
        InputError: no layer can take the format, a budget below all quantized, or a rule that keeps every block.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    space, sampling, pipe = bank.space, opened.order.sampling, opened.pipe
    searched, fresh = (
        Measuring.on(pipe, bank, study, plan, objective=objective, progress=progress)
        for plan in (sampling.searching(pipe), sampling.checking(pipe))
    )
    free = _free_bytes(keeping, number_format, space)  # refuses a small budget before anything is measured
    refuse_keeping_all(space, number_format, keeping.keep or 0, remedy=_KEEP_FEWER)
    rows, everything = _curves(space, number_format, searched)
    kept = _kept(keeping, rows, free)
    refuse_keeping_all(space, number_format, len(kept), remedy=_KEEP_FEWER)
    recipe = hybrid_recipe(space, number_format, kept)
    hybrid = gain = None
    if kept:
        mine, plain = fresh.trials([recipe, hybrid_recipe(space, number_format, [])])
        hybrid, gain = _sqnr(mine), paired_difference(mine.powers, plain.powers).estimate
    return BlocksResult(
        source=opened.name,
        objective=objective,
        seeds=f"{searched.setting.seeds[0]} to {searched.setting.seeds[-1]}",
        n_steps=searched.setting.n_steps,
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


def _kept(keeping: KeepOrder, rows: tuple[BlockRow, ...], free: int | None) -> tuple[str, ...]:
    if not keeping.is_given:
        return ()
    return sensitive_blocks(rows, gain_db=keeping.keep_db, count=keeping.keep, extra_bytes=free)


def _free_bytes(keeping: KeepOrder, number_format: Format, space: SearchSpace) -> int | None:
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


def _sqnr(trial: Trial) -> Estimate:
    return sqnr_estimates(summarize(trial.powers))["sqnr_db"]
