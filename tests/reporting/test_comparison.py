"""The page of a comparison: what is not full, incomplete or left out is told, and no number that is none wins."""

from __future__ import annotations

import math
import re

from test_html import read

from sedimo.jobs.compare import ComparedRow, Comparison, comparison_page, methods_figure
from sedimo.lab.study import Spent
from sedimo.metrics.estimate import Estimate
from sedimo.reporting.html import render
from sedimo.space import Recipe

NAN = Estimate(math.nan, math.nan, -math.inf, math.inf, 4)
ANY = Recipe({})


def estimate(value):
    return Estimate(value, 0.1, value - 0.2, value + 0.2, 4)


def rendered(rows, *, reference, costs=(), notes=()):
    found = Comparison("toy", reference, "0 to 3", 2, tuple(rows), dict(costs), 1, {}, tuple(notes))
    page = render(comparison_page(found))
    read(page)
    return page


def test_the_page_tells_what_is_not_full_incomplete_or_left_out_and_no_nan_wins():
    rows = [
        ComparedRow("broken", 4.0, 3.9, 4.1, 10, False, NAN, None, ANY),
        ComparedRow("error", 4.0, 4.0, 4.2, 12, True, estimate(12.0), estimate(0.5), ANY),
        ComparedRow("modelopt", 4.0, 4.0, 4.0, 12, True, estimate(11.0), estimate(0.1), None),
    ]
    costs = {"error": Spent(5.0, 1234, False)}
    page = rendered(rows, reference="broken", costs=costs, notes=["uniform is left out"])
    assert "<td>* 3.900</td>" in page
    assert page.count("<td>* ") == 1
    assert "* leaves more than 0.5&nbsp;% of its budget unused" in page
    assert "at least 1,234" in page
    assert "<li>uniform is left out</li>" in page
    assert '<td class="left">modelopt (peer)</td>' in page
    assert "in formats of its own" in page
    headline = page[page.index("Highest quality") :][:100]
    assert "<code>error</code>" in headline
    assert "broken" not in headline


def test_the_table_has_a_body_for_each_budget_with_the_best_first():
    rows = [
        ComparedRow(method, budget, budget, budget, 10, True, estimate(value), ahead, ANY)
        for budget in (4.0, 3.0, 3.5)
        for method, value, ahead in (("error", 1.0, estimate(-9.0)), ("jacobian", 2.0, None))
    ]
    page = rendered(rows, reference="jacobian")
    assert re.findall(r'<th scope="rowgroup" colspan="7">([^<]*)</th>', page) == ["3 bits", "3.5 bits", "4 bits"]
    assert re.findall(r'<td class="left">(error|jacobian)</td>', page) == ["jacobian", "error"] * 3
    assert page.count('<td class="left"><span class="worse">worse</span></td>') == 3
    assert "<code>jacobian</code> at 3, 3.5 and 4 bits." in page


def test_the_chart_has_a_panel_for_each_budget_and_skips_what_diverged():
    def row(method, bits, value):
        return ComparedRow(method, bits, bits, bits, 10, True, value, None, ANY)

    nan = row("jacobian", 3.0, NAN)
    chart = methods_figure(
        [row("error", 3.0, estimate(3.0)), nan, row("jacobian", 4.0, estimate(9.0))], reference="jacobian"
    )
    assert chart.description == "3 bits: error 3.00 dB; 4 bits: jacobian 9.00 dB"
    assert [panel.title for panel in chart.panels] == ["3 bits", "4 bits"]
    assert methods_figure([nan], reference="jacobian") is None
