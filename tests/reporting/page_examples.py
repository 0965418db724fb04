"""Every kind of page with all its parts, small: what `test_numbers` holds against what was shown before."""

from __future__ import annotations

from dataclasses import replace

from explanation_examples import dit_explanation, explained
from map_examples import channel_ranges, noise_map, repetition, trajectory_lines
from report_examples import estimate

from sedimo.jobs.compare import ComparedRow, Comparison, comparison_page
from sedimo.jobs.sweep import OTHER_SEEDS, Confirmation, Sweep, SweptValue, sweep_page
from sedimo.lab.study import Spent
from sedimo.methods.hybrid import BlockCurves, BlockRow
from sedimo.methods.portfolio import Entrant
from sedimo.quant.formats import Format
from sedimo.reporting.measured_maps import Maps, blocks_page
from sedimo.reporting.page import Page
from sedimo.reporting.report_page import report_page
from sedimo.reporting.summary import Blamed, Prediction, Summary
from sedimo.space import Recipe
from sedimo.treatments.learned_rounding import LearnedRounding


def block_curves() -> BlockCurves:
    names = ("conv_in", *(f"transformer_blocks.{i}" for i in range(4)), "proj_out")
    gains = (0.3, 0.37, 0.44, 2.8, 0.58, 0.65)
    rows = tuple(
        BlockRow(
            *(name, (name,), 100_000 + 317 * i, 50_000 + 99 * i),
            *(estimate(22.0 - i, 0.5, 16), estimate(gain, 0.1, 16)),
        )
        for i, (name, gain) in enumerate(zip(names, gains, strict=True))
    )
    kept, hybrid, gain = ("transformer_blocks.2",), estimate(14.1, 0.4, 16), estimate(3.0, 0.2, 16)
    facts = ("zoo:cifar-dit", Format.parse("uaq4"), "final_latents", "0 to 15", 10, "gain of at least 0.5 dB", 0.5)
    return BlockCurves(*facts, rows, rows[-1].up_to, kept, 5.013, hybrid, gain)


def whole_summary() -> Summary:
    """With all evidence that there is."""
    local = noise_map(4, 5), noise_map(4, 5, "kmc4")
    maps = Maps(noise_map(6, 5), trajectory_lines(5), local, repetition(1, 3), (channel_ranges(40),), block_curves())
    summary = explained(dit_explanation())
    entrants = (
        Entrant("effects", "effects", 3.52, estimate(10.1, 0.3, 8), estimate(10.2, 0.28, 16), 10.4, is_winner=True),
        Entrant("uniform kmc3", "uniform", 3.54, estimate(4.6, 0.3, 8)),
        Entrant("exchanges", "exchanges", 3.5, estimate(9.9, 0.3, 8), estimate(9.8, 0.3, 16), 9.93),
    )
    blamed = (Blamed("proj_out_2", "uaq8", 0.3, 1.2),)
    evidence = replace(
        summary.evidence,
        maps=maps,
        entrants=entrants,
        prediction=Prediction(estimate(13.2, 0.4, 8), estimate(10.21, 0.29, 64), blamed),
        rounding=LearnedRounding(8, 6, 64, 500, 0.12, 0.81),
        scaling=summary.evidence.agreement,
        pictures=(),
    )
    table = replace(summary.table, full_bops=987_654_321, attention_bops=3_456_789)
    allocation = replace(summary.allocation, bops=123_456_789)
    return replace(summary, table=table, allocation=allocation, evidence=evidence)


def comparison() -> Comparison:
    rows = tuple(
        ComparedRow(
            *(method, bits, bits - 0.01 * i, bits + 0.1, 10**9 * (i + 3), i != 3),
            estimate(3 * bits - i + (0.5 if method == "ablation" else 0), 0.3, 64),
            None if method == "jacobian" else estimate(0.5 - i / 3, 0.1, 64),
            None if method == "modelopt" else Recipe({}),
        )
        for bits in (3.0, 3.5)
        for i, method in enumerate(("uniform", "jacobian", "ablation", "sqnr", "modelopt"))
    )
    costs = {"uniform": Spent(12.0, 96, True), "jacobian": Spent(150.3, 1234, True), "sqnr": Spent(5000.0, 4321, False)}
    agreement = {"jacobian": estimate(0.7, 0.1, 12)}
    notes = ("modelopt is not installed", "sqnr at 3 bits: left out")
    return Comparison("zoo:cifar-dit", "jacobian", "8 to 71", 20, rows, costs, 8, agreement, notes)


def sweeps() -> dict[str, Sweep]:
    values = tuple(
        SweptValue(
            *(value, 4.1, estimate(9 + i * 0.2, 0.3, 16)),
            *(None if not i else estimate(i * 0.2 - 0.3, 0.1, 16), f"{i} layers" if i else ""),
        )
        for i, value in enumerate(("none", "0.25", "0.5", "0.9"))
    )
    again = Confirmation("0.9", estimate(0.45, 0.1, 16), "75 to 90")
    pairs = (("ddim", f"ddim{OTHER_SEEDS}", 0.97), ("ddim", "euler", 0.93))
    ranks = {(a, b): estimate(r, 0.01, 47) for a, b, r in pairs}
    samples = {(a, "64"): estimate(r, 0.04, 47) for a, r in (("8", 0.83), ("16", 0.93))}
    of_samples = {"8": 0.41, "16": 0.28, "64": 0.14}
    of_schedulers = {"ddim": 0.41, f"ddim{OTHER_SEEDS}": 0.28, "euler": 0.14}
    where = ("zoo:cifar-dit", "uaq4a8", "0 to 15", 10)
    return {
        "alpha": Sweep("alpha", *where, 3, values, {}, {}, ("left out: x",), again),
        "samples": Sweep("samples", *where, 2, (), samples, of_samples, ()),
        "schedulers": Sweep("schedulers", *where, 2, (), ranks, of_schedulers, ("left out: y",)),
    }


def pages() -> dict[str, Page]:
    found = {"report": report_page(whole_summary()), "comparison": comparison_page(comparison())}
    found |= {f"sweep {name}": sweep_page(sweep) for name, sweep in sweeps().items()}
    return found | {"blocks": blocks_page(block_curves())}
