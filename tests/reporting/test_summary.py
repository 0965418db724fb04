"""The numbers of a report against sums made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from report_examples import dit_layers, dit_summary, make_table

from sedimo.allocation.solve import allocate
from sedimo.metrics.estimate import normal_estimate
from sedimo.metrics.signal import estimated_db
from sedimo.quant.formats import FP16, Format
from sedimo.reporting.summary import Summary, added, reference_format

TABLE = make_table(list(dit_layers()), 1)
ALLOCATION = allocate(TABLE, bits=3.5)


@pytest.fixture(scope="module")
def summary():
    return dit_summary()


def test_sizes(summary):
    assert (summary.n_layers, len(summary.chosen)) == (57, 47)
    assert summary.full_bytes == 2 * TABLE.total_params
    assert summary.stored_bytes == sum(TABLE.index[d, f].stored_bytes for d, f in ALLOCATION.choice.items())
    assert summary.paper_bits(summary.chosen) == pytest.approx(ALLOCATION.paper_bits)
    assert [c.decision for c in summary.chosen] == list(TABLE.layers)


def test_shares_add_up(summary):
    assert math.fsum(summary.share([c]) for c in summary.chosen) == pytest.approx(1)
    for groups in (summary.operations.values(), summary.blocks.values()):
        assert math.fsum(map(summary.share, groups)) == pytest.approx(1)
        assert math.fsum(map(summary.params_share, groups)) == pytest.approx(1)
        assert sum(map(summary.params, groups)) == TABLE.total_params
        assert sum(map(len, groups)) == 47
        bits = sum(summary.paper_bits(g) * summary.params(g) for g in groups)
        assert bits == pytest.approx(ALLOCATION.paper_bits * TABLE.total_params)
        assert math.fsum(added(g).value for g in groups) == pytest.approx(ALLOCATION.objective)


def test_the_reference_is_a_quantized_format_near_the_budget():
    assert reference_format(TABLE, ALLOCATION) == Format.parse("kmc3")
    assert reference_format(TABLE, allocate(TABLE, bits=4.4)) == Format.parse("kmc4")


def test_a_decision_tells_what_the_reference_format_would_do(summary):
    cost = next(c for c in summary.chosen if c.decision == "proj_out_2")
    reference = TABLE.index[cost.decision, summary.reference]
    changed = ALLOCATION.objective - cost.cost + reference.cost
    assert summary.at_reference(cost) == reference
    assert summary.noise_db(cost, reference) == pytest.approx(10 * math.log10(changed / ALLOCATION.objective))


def test_steps_go_to_the_most_useful_neighbour(summary):
    for cost in summary.chosen:
        larger, smaller = (summary.step(cost, larger=larger) for larger in (True, False))
        if larger is not None:
            assert larger.cost < cost.cost
            assert larger.stored_bytes > cost.stored_bytes
            gained = (cost.cost - larger.cost) / (larger.stored_bytes - cost.stored_bytes)
            others = TABLE.by_decision[cost.decision]
            others = [c for c in others if c.cost < cost.cost and c.stored_bytes > cost.stored_bytes]
            assert gained == pytest.approx(
                max((cost.cost - c.cost) / (c.stored_bytes - cost.stored_bytes) for c in others)
            )
            assert summary.noise_db(cost, larger) < 0
        if smaller is not None:
            assert smaller.stored_bytes < cost.stored_bytes
            assert smaller.cost > cost.cost
            assert summary.noise_db(cost, smaller) > 0
    assert any(summary.step(cost, larger=True) for cost in summary.chosen)


def test_without_noise_there_are_no_decibels():
    scores = replace(TABLE, unit="score", costs=tuple(replace(c, cost=c.cost - 1) for c in TABLE.costs))
    summary = Summary("m", scores, allocate(scores, bits=3.5))
    assert not summary.is_noise
    for cost in summary.chosen:
        assert summary.share([cost]) is None
        assert summary.noise_db(cost, summary.at_reference(cost) or cost) is None


def test_a_recipe_that_leaves_everything_alone():
    summary = Summary("m", TABLE, allocate(TABLE, bits=16))
    assert {cost.format for cost in summary.chosen} == {FP16}
    assert summary.cost.value == 0
    for cost in summary.chosen:
        assert summary.share([cost]) is None
        assert summary.noise_db(cost, summary.at_reference(cost) or cost) is None


def test_the_error_of_decibels_follows_from_that_of_the_noise():
    found = estimated_db(normal_estimate(0.1, 0.01))
    assert found.value == pytest.approx(10)
    assert found.standard_error == pytest.approx(10 / math.log(10) * 0.01 / 0.1)
    assert estimated_db(normal_estimate(0.0, 0.0)).value == math.inf
