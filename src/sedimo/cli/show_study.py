"""Tables of studies for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from sedimo.cli.console import duration, print_table
from sedimo.cli.show import count, size

if TYPE_CHECKING:
    from sedimo.api.attributing import Attribution
    from sedimo.api.comparing import Comparison
    from sedimo.api.exploring import ExplorationPlan, ExploreResult
    from sedimo.api.hybrid import BlocksResult
    from sedimo.api.listing import TrialRow
    from sedimo.metrics.estimate import Estimate
    from sedimo.reporting.sweep import Sweep


def exploration_plan(found: ExplorationPlan) -> None:
    """What an exploration would take."""
    click.echo(f"{found.source}: {found.n_decisions} decisions, {found.n_formats} formats")
    click.echo(f"trials    {found.trials}, of which {found.missing} are not measured yet")
    click.echo(f"time      about {duration(found.seconds)} in one process, {found.denoiser_calls} denoiser calls")
    click.echo(f"memory    about {size(found.memory_bytes)}, loaded pipelines included")
    click.echo(f"disk      about {size(found.disk_bytes)}")


def exploration(found: ExploreResult) -> None:
    """What an exploration did."""
    speed = found.trials_per_hour
    click.echo(f"{found.trials} trials, {found.measured} of them measured now: {found.study}")
    if speed is not None:
        click.echo(f"{speed:.3g} trials an hour; took {duration(found.seconds)}")


def trials(found: Sequence[TrialRow]) -> None:
    """One line per trial."""
    has_fid = any(row.fid is not None for row in found)
    columns = ("trial", "objective", "paper bits", "SQNR [dB] ± standard error", *(["FID"] if has_fid else []))
    rows = [
        (
            row.key[:12],
            row.objective,
            "" if row.paper_bits is None else f"{row.paper_bits:.3f}",
            _with_error(row.sqnr_db),
            *([""] if has_fid and row.fid is None else []),
            *([] if row.fid is None else [_with_error(row.fid)]),
        )
        for row in found
    ]
    print_table("", columns, rows)
    click.echo(f"{len(found)} trials")


def blocks(found: BlocksResult) -> None:
    """Both curves, block by block, and what staying at 16 bits gains."""
    columns = ("block", "weights", "this and all before [dB]", "gained by keeping it [dB, 95 % interval]", "kept")
    rows = [
        (
            row.block,
            f"{row.params:,}",
            _with_error(row.up_to),
            _signed(row.alone_kept),
            "16 bits" if row.block in found.kept else "",
        )
        for row in found.rows
    ]
    print_table(f"{found.number_format}, SQNR of blocks", columns, rows)
    click.echo(f"all blocks at {found.number_format}: {_with_error(found.everything, unit=' dB')}")
    if found.hybrid is not None and found.hybrid_gain is not None:
        click.echo(
            f"hybrid, {found.paper_bits:.3f} paper bits: {_with_error(found.hybrid, unit=' dB')} on fresh seeds, "
            f"{_signed(found.hybrid_gain)} against all blocks at {found.number_format}"
        )


def comparison(found: Comparison) -> None:
    """All recipes of all methods, best first at each budget, and what the methods took."""
    columns = (
        "method",
        "budget",
        "paper bits",
        "stored bits",
        "BOPs",
        "SQNR [dB]",
        f"ahead of {found.reference} [dB, 95 %]",
    )
    rows = [
        (
            f"{row.method} (peer)" if row.is_peer else row.method,
            f"{row.bits:g}",
            f"{row.paper_bits:.3f}" + ("" if row.is_full else " (not full)"),
            f"{row.stored_bits:.3f}",
            count(row.bops),
            _with_error(row.sqnr_db),
            "" if row.ahead is None else _signed(row.ahead),
        )
        for row in sorted(found.rows, key=lambda r: (r.bits, -r.sqnr_db.value))
    ]
    print_table(f"{found.source}, fresh seeds {found.seeds}, {found.n_steps} steps", columns, rows)
    click.echo("\n".join([f"{found.n_comparisons} paired comparisons, each with its own interval", *found.notes]))
    costs = [
        (
            method,
            ("" if spent.is_complete else "at least ") + duration(spent.seconds),
            ("" if spent.is_complete else "at least ") + f"{spent.denoiser_calls:,}",
            "" if tau is None else _signed(tau),
        )
        for method, spent in found.costs.items()
        for tau in [found.agreement.get(method)]
    ]
    print_table("", ("method", "time", "denoiser calls", "Kendall's tau with ablation, by operation"), costs)


def sweep(found: Sweep) -> None:
    """The values with what they gain, or how sensitivities rank alike, and what is missing."""
    title = f"{found.question} on {found.source}, {found.number_format}, seeds {found.seeds}, {found.n_steps} steps"
    if found.values:
        columns = ("value", "paper bits", "SQNR [dB]", "ahead of the baseline [dB, 95 %]", "")
        rows = [
            (
                v.value,
                f"{v.paper_bits:.3f}",
                _with_error(v.sqnr_db),
                "baseline" if v.ahead is None else _signed(v.ahead),
                v.note,
            )
            for v in found.values
        ]
        print_table(title, columns, rows)
    else:
        ranks = [(r.first, r.second, _with_interval(r.srcc), r.srcc.n) for r in found.ranks]
        print_table(title, ("", "against", "rank correlation [95 %]", "decisions"), ranks)
        errors = [(name, f"{error:.3g}") for name, error in found.errors.items()]
        print_table("", ("", "mean standard error [dB]"), errors)
    counted = "1 comparison" if found.n_comparisons == 1 else f"{found.n_comparisons} comparisons"
    click.echo("\n".join([f"{counted}, each with its own interval", *found.notes]))


def attribution(found: Attribution) -> None:
    """How good the predictor is, beside its rivals, and which operations cost most."""
    columns = ("predictor", "recipes", "n", "SRCC [95 % interval]", "Kendall's tau", "NDCG@10", "mean error")
    rows = [
        (
            name,
            subset,
            q.n,
            _with_interval(q.srcc),
            f"{q.kendall_tau.value:.2f}",
            f"{q.ndcg_at_10.value:.2f}",
            f"{q.mae.value:.2f}",
        )
        for name, subset, q in found.report.rows
    ]
    print_table(f"{found.target} of held-out recipes, {found.n_trials} trials", columns, rows)
    click.echo("The table is kept in the study: sedimo allocate RUN --bits 3.7 chooses a recipe by it.")


def _with_interval(value: Estimate) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _signed(value: Estimate) -> str:
    return f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"


def _with_error(value: Estimate, *, unit: str = "") -> str:
    if math.isinf(value.value):
        return "exact" if value.value > 0 else "diverged"
    return f"{value.value:.2f} ± {value.standard_error:.2f}{unit}"
