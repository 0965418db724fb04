"""Reports of recipes and tables with odd numbers: nothing quantized, scores of any sign, unknown errors."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from report_examples import dit_evidence, dit_layers, make_table

from sedimo.allocation.solve import allocate
from sedimo.allocation.table import SensitivityTable
from sedimo.jobs.public import report
from sedimo.jobs.sweep import ranks_matrix
from sedimo.quant.formats import parse_formats
from sedimo.reporting.drawing import draw
from sedimo.reporting.html import render
from sedimo.reporting.report_page import report_page
from sedimo.reporting.summary import Evidence, Summary
from sedimo.reporting.words import count

TABLE = make_table(list(dit_layers(n_blocks=2)), 3)


def changed(**values: float) -> SensitivityTable:
    return replace(TABLE, costs=tuple(replace(c, **values) for c in TABLE.costs))


@pytest.mark.parametrize(
    ("table", "arguments"),
    [
        (TABLE, {"bits": 16.0}),
        (TABLE, {"rule": "uniform:kmc4"}),
        (TABLE, {"stored_bits": 3.6}),
        (changed(standard_error=math.nan), {"bits": 3.5}),
        (changed(standard_error=math.inf), {"bits": 3.5}),
        (changed(standard_error=0.0, n=0), {"bits": 3.5}),
        (changed(cost=0.0), {"bits": 3.5}),
        (replace(changed(cost=-1.5), unit="score", method="gnn"), {"bits": 3.5}),
        (make_table(list(dit_layers(2)), 3, formats=parse_formats("kmc4")), {"bits": 6.0}),
        (make_table([next(iter(dit_layers()))], 3), {"bits": 6.0}),
    ],
    ids=["all-fp16", "uniform", "stored", "nan", "inf", "exact", "zero", "score", "one-format", "one-layer"],
)
def test_a_page_is_made_all_the_same(table, arguments):
    allocation = allocate(table, **arguments)
    evidence = Evidence(frontier=((3.0, 0.1), (4.0, 0.0)))
    page = render(report_page(Summary("m", table, allocation, evidence=evidence)))
    assert "nan" not in page.lower().replace("nano", "")
    assert "</html>" in page


def test_measures_without_an_interval_are_shown_as_they_are():
    evidence = dit_evidence(TABLE, 3.5)
    only = replace(evidence.recipes[0].measures["sqnr_db"], standard_error=math.nan, low=-math.inf, high=math.inf, n=1)
    odd = {"standard_error": math.nan, "low": -math.inf, "high": math.inf, "n": 1}
    rows = tuple(
        replace(one, measures={"sqnr_db": only}, ahead=one.ahead and replace(one.ahead, **odd))
        for one in evidence.recipes
    )
    found = replace(evidence, recipes=rows)
    page = render(report_page(Summary("m", TABLE, allocate(TABLE, bits=3.5), evidence=found)))
    assert "no difference shown" in page
    assert "∞" not in page


def test_a_rank_correlation_that_is_no_number_is_an_empty_cell():
    ranks = {("ddim", "unipc"): math.nan, ("ddim", "euler"): -0.25}
    chart = draw(ranks_matrix(["ddim", "unipc", "euler"], ranks, ""))
    assert "<svg" in chart
    assert chart.count("-0.250") == 2
    assert "nan" not in chart.lower()


def test_more_bits_buy_little_under_a_limit_of_bit_operations(tmp_path):
    """The curve keeps the limit, so that this recipe is on it and not above."""
    table = replace(TABLE, costs=tuple(replace(c, bops=TABLE.params[c.decision] * c.format.bits) for c in TABLE.costs))
    limit = allocate(table, bits=4.0).bops
    choice = allocate(table, bits=12.0, budget_bops=limit)
    page = report(None, table, choice, path=tmp_path / "report.html").read_text()
    assert f"within {count(limit)} bit operations" in page
    assert re.search(
        r"under the same limit of bit operations, more bits would not lower the noise and [\d.]+ bits would raise it",
        page,
    )
    free = report(None, table, allocate(table, bits=6.0), path=tmp_path / "free.html").read_text()
    assert "within" not in free.split("The best recipe at each budget")[1][:40]
    assert re.search(r"By prediction, [\d.]+ bits would lower the noise by [\d.]+ dB and", free)
