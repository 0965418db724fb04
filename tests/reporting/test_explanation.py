"""The records of the explanation: checked when made, the same after saving."""

from __future__ import annotations

import doctest
import json
import math

import numpy as np
import pytest
from explanation_examples import dit_explanation, large_explanation

from sedimo.codec import from_json, from_plain, to_json, to_plain
from sedimo.errors import InputError, StateError
from sedimo.methods.predictor.quality import Insight
from sedimo.metrics.estimate import Estimate
from sedimo.reporting import explanation as records
from sedimo.reporting.explanation import Explanation, FormatShare, score_boxes, verdict_of
from sedimo.reporting.figures import ScoreBox

INF, NAN = math.inf, math.nan


def test_the_examples_in_the_documentation_hold():
    found = doctest.testmod(records)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
def test_boxes_hold_the_quantiles_that_numpy_finds(n):
    values = np.random.default_rng(n).normal(-1, 2, n)
    (box,) = score_boxes({"x": values.tolist()})
    found = (box.low, box.q25, box.median, box.q75, box.high)
    assert found == pytest.approx(np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist())
    assert (box.name, box.n) == ("x", n)


def test_boxes_keep_their_order_and_endless_scores():
    boxes = score_boxes({"b": (1.0, 1.0), "a": (-INF, 2.0, 3.0, 4.0), "c": (-INF, -INF)})
    assert [box.name for box in boxes] == ["b", "a", "c"]
    assert (boxes[0].low, boxes[0].high) == (1.0, 1.0)
    assert (boxes[1].low, boxes[1].q25, boxes[1].median) == (-INF, 2.0, 2.5)
    assert boxes[2].median == -INF


@pytest.mark.parametrize("values", [(), (1.0, NAN)])
def test_what_is_no_distribution_is_refused(values):
    with pytest.raises(InputError, match="the scores of 'x' must be numbers, at least one"):
        score_boxes({"x": values})


@pytest.mark.parametrize("numbers", [(0.0, 1.0, 0.5, 2.0, 3.0), (0.0, 1.0, NAN, 2.0, 3.0)])
def test_quantiles_out_of_order_are_refused(numbers):
    with pytest.raises(InputError, match="the quantiles of 'x' must not fall"):
        ScoreBox("x", 5, *numbers)
    with pytest.raises(InputError, match="at least one score, got n = 0"):
        ScoreBox("x", 0, 0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("counts", [{}, {"kmc4": 0}, {"kmc4": 3, "kmc3": -1}])
def test_an_operation_has_layers(counts):
    with pytest.raises(InputError, match="the operation 'to_q' must have layers"):
        FormatShare("to_q", counts, 100, 4.0)


def test_formats_are_formats():
    with pytest.raises(InputError, match="'int4' is not a format"):
        FormatShare("to_q", {"int4": 1}, 100, 4.0)


@pytest.mark.parametrize(
    ("predicted", "low", "high", "verdict"),
    [
        (1.0, 0.1, 2.0, "confirmed"),
        (-1.0, -2.0, -0.1, "confirmed"),
        (1.0, -2.0, -0.1, "refuted"),
        (-1.0, 0.1, 2.0, "refuted"),
        (1.0, -0.1, 2.0, "open"),
        (1.0, -INF, INF, "open"),
        (1.0, NAN, NAN, "open"),
        (0.0, 0.1, 2.0, "open"),
        (NAN, 0.1, 2.0, "open"),
    ],
)
def test_verdicts_need_the_interval_and_a_direction(predicted, low, high, verdict):
    assert verdict_of(predicted, Estimate((low + high) / 2, 0.2, low, high, 8)) == verdict


def test_without_a_measurement_there_is_no_verdict():
    assert verdict_of(1.0, None) == "not measured"
    with pytest.raises(InputError, match="exactly when there is no measurement, got 'confirmed' with None"):
        Insight("x", (), "kmc3", "kmc4", 1.0, verdict="confirmed")
    with pytest.raises(InputError, match="got 'not measured' with Estimate"):
        Insight("x", (), "kmc3", "kmc4", 1.0, measured=Estimate(1.0, 0.1, 0.8, 1.2, 8))


@pytest.mark.parametrize("explanation", [dit_explanation, large_explanation])
def test_an_explanation_survives_saving(explanation):
    made = explanation()
    text = to_json(made)
    assert from_json(Explanation, text) == made
    assert json.loads(text) == to_plain(made)


def test_numbers_that_are_not_finite_survive_saving():
    odd = Explanation("p", "SQNR [dB]", 3, "path", score_boxes({"x": (-INF, INF)}), insights=(odd_insight(),))
    assert to_json(from_json(Explanation, to_json(odd))) == to_json(odd)


def odd_insight() -> Insight:
    return Insight("x", ("a",), "kmc3", "kmc4", NAN, measured=Estimate(INF, NAN, -INF, INF, 1), verdict="open")


def test_parts_may_be_absent_but_not_strange():
    plain = to_plain(Explanation("p", "SQNR [dB]", 3, "path"))
    few = {key: plain[key] for key in ("predictor", "target", "n_trials", "objective")}
    assert from_plain(Explanation, few) == Explanation("p", "SQNR [dB]", 3, "path")
    with pytest.raises(StateError, match="unknown fields"):
        from_plain(Explanation, few | {"extra": 1})
    curve = [{"name": "a", "kind": "peer", "bits": 3.0, "measured": to_plain(Estimate(1.0, 0.1, 0.8, 1.2, 8))}]
    with pytest.raises(StateError, match="one of"):
        from_plain(Explanation, few | {"curve": curve})
