"""What the page shows of an explanation: sentences, charts and tables, ready for the template."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from sedimo.codec import to_json
from sedimo.quant.formats import Format
from sedimo.reporting.curve_charts import curve_chart, predictors_chart
from sedimo.reporting.explanation import Explanation
from sedimo.reporting.explanation_charts import (
    MAX_OPERATIONS,
    block_scores_chart,
    formats_chart,
    formats_in,
    operation_scores_chart,
)
from sedimo.reporting.explanation_phrasing import statement, tally
from sedimo.reporting.explanation_tables import (
    FinalistLine,
    FoldLine,
    InsightLine,
    PredictorLine,
    RoundLine,
    finalist_lines,
    fold_lines,
    has_times,
    insight_lines,
    predictor_lines,
    round_lines,
)
from sedimo.reporting.map_chart import mark_svg
from sedimo.reporting.theme import bit_level


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A format with the level of its colour and the mark of its method."""

    format: str
    level: int
    mark: Markup


@dataclass(frozen=True, slots=True)
class ExplanationView:
    """The explanation as the template takes it; parts without evidence are empty.

    `json_uri` is the whole record as a data URI; `n_operations_left_out` counts those that the chart has no room for.
    """

    statement: tuple[str, ...]
    tally: str
    insights: tuple[InsightLine, ...]
    charts: Mapping[str, Markup]
    legend: tuple[LegendEntry, ...]
    target: str
    n_operations_left_out: int
    predictors: tuple[PredictorLine, ...]
    has_times: bool
    folds: tuple[FoldLine, ...]
    rounds: tuple[RoundLine, ...]
    finalists: tuple[FinalistLine, ...]
    notes: tuple[str, ...]
    json_uri: str


def explanation_view(explanation: Explanation, *, here: float) -> ExplanationView:
    """All of the explanation as text; `here` are the bits per weight of the report's recipe."""
    e = explanation
    return ExplanationView(
        statement=statement(e),
        tally=tally(e.insights) if e.insights else "",
        insights=insight_lines(e.insights),
        charts=_charts(e, here),
        legend=tuple(_legend_entry(f) for f in formats_in(e.format_shares)),
        target=e.target,
        n_operations_left_out=max(len(e.operation_boxes) - MAX_OPERATIONS, 0),
        predictors=predictor_lines(e.predictors),
        has_times=has_times(e),
        folds=fold_lines(e.folds),
        rounds=round_lines(e.rounds),
        finalists=finalist_lines(e.finalists),
        notes=e.notes,
        json_uri=f"data:application/json;base64,{base64.b64encode(to_json(e).encode()).decode()}",
    )


def _legend_entry(f: Format) -> LegendEntry:
    return LegendEntry(str(f), bit_level(f.bits), Markup(mark_svg(f)) if f.is_quantized else Markup())


def _charts(e: Explanation, here: float) -> Mapping[str, Markup]:
    drawn = {
        "operations": operation_scores_chart(e.operation_boxes) if e.operation_boxes else "",
        "blocks": block_scores_chart(e.block_boxes) if e.block_boxes else "",
        "formats": formats_chart(e.format_shares) if e.format_shares else "",
        "curve": curve_chart(e.curve, here=here) if e.curve else "",
        "predictors": predictors_chart(e.predictors) if e.predictors else "",
    }
    return {name: Markup(svg) for name, svg in drawn.items()}  # texts in them are escaped
