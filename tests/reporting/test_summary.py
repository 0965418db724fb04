"""The numbers of a report against sums made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from report_examples import dit_layers, dit_summary, estimate, make_table

from sedimo.allocation.solve import allocate
from sedimo.quant.formats import FP16, Format
from sedimo.reporting.summary import DifferenceRow, reference_format, summarize

TABLE = make_table(list(dit_layers()), 1)
ALLOCATION = allocate(TABLE, bits=3.5)


@pytest.fixture(scope="module")
def summary():
    return dit_summary()


def test_sizes(summary):
    sizes = summary.sizes
    assert (sizes.n_layers, sizes.n_decisions) == (57, 47)
    assert sizes.fp16_bytes == 2 * TABLE.total_params
    assert sizes.stored_bytes == sum(TABLE.index[d, f].stored_bytes for d, f in ALLOCATION.choice.items())
    assert sizes.ratio == sizes.fp16_bytes / sizes.stored_bytes
    assert sizes.paper_bits == ALLOCATION.paper_bits <= 3.5


def test_shares_add_up(summary):
    assert math.fsum(row.share for row in summary.decisions) == pytest.approx(1)
    for groups in (summary.operations, summary.blocks):
        assert math.fsum(g.cost_share for g in groups) == pytest.approx(1)
        assert sum(g.params for g in groups) == TABLE.total_params
        assert sum(g.n_decisions for g in groups) == 47
        assert sum(g.paper_bits * g.params for g in groups) == pytest.approx(ALLOCATION.paper_bits * TABLE.total_params)
        assert math.fsum(g.cost for g in groups) == pytest.approx(ALLOCATION.objective)


def test_the_reference_is_a_quantized_format_near_the_budget():
    assert reference_format(TABLE, ALLOCATION) == Format.parse("kmc3")
    assert reference_format(TABLE, allocate(TABLE, bits=4.4)) == Format.parse("kmc4")


def test_a_decision_tells_what_the_reference_format_would_do(summary):
    row = next(r for r in summary.decisions if r.name == "proj_out_2")
    reference = TABLE.index[row.name, summary.reference_format]
    changed = ALLOCATION.objective - row.cost + reference.cost
    assert row.reference_cost == reference.cost
    assert row.reference_db == pytest.approx(10 * math.log10(changed / ALLOCATION.objective))


def test_steps_go_to_the_most_useful_neighbour(summary):
    for row in summary.decisions:
        costs = TABLE.by_decision[row.name]
        if row.larger is not None:
            gained = -row.larger.cost_change / row.larger.stored_bytes_change
            assert row.larger.cost_change < 0 < row.larger.stored_bytes_change
            others = [c for c in costs if c.cost < row.cost and c.stored_bytes > row.stored_bytes]
            assert gained == pytest.approx(
                max((row.cost - c.cost) / (c.stored_bytes - row.stored_bytes) for c in others)
            )
            assert row.larger.noise_db < 0
        if row.smaller is not None:
            assert row.smaller.stored_bytes_change < 0 < row.smaller.cost_change
            assert row.smaller.noise_db > 0
    assert any(row.larger for row in summary.decisions)


def test_without_noise_there_are_no_decibels():
    scores = replace(TABLE, unit="score", costs=tuple(replace(c, cost=c.cost - 1) for c in TABLE.costs))
    summary = summarize(scores, allocate(scores, bits=3.5), model="m")
    assert not summary.choice.is_noise
    assert all(row.reference_db is None and row.share is None for row in summary.decisions)
    assert all(row.larger is None or row.larger.noise_db is None for row in summary.decisions)


def test_a_recipe_that_leaves_everything_alone():
    summary = summarize(TABLE, allocate(TABLE, bits=16), model="m")
    assert {row.format for row in summary.decisions} == {FP16}
    assert summary.choice.cost.value == 0
    assert all(row.share is None and row.reference_db is None for row in summary.decisions)


@pytest.mark.parametrize(
    ("measure", "value", "error", "verdict"),
    [
        ("sqnr_db", 3.0, 0.2, "better"),
        ("sqnr_db", -3.0, 0.2, "worse"),
        ("sqnr_db", 0.2, 0.2, "no difference shown"),
        ("fid", 3.0, 0.2, "worse"),
        ("fid", -3.0, 0.2, "better"),
        ("kid", 0.001, 0.002, "no difference shown"),
    ],
)
def test_verdicts_need_the_interval(measure, value, error, verdict):
    assert DifferenceRow("x", measure, estimate(value, error, 64)).verdict == verdict
