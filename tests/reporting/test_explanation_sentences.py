"""The explanation's sentences say what the numbers say, also when they are bad news."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from explanation_examples import BAND, dit_explanation, insights, interval, predictor_rows, quality

from sedimo.methods.predictor.quality import Insight
from sedimo.metrics.estimate import Estimate
from sedimo.reporting.explanation import Explanation, change, predicted, statement, tally
from sedimo.reporting.words import with_interval

THIN = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
NAN = math.nan


def said(*rows) -> tuple[str, ...]:
    return statement(replace(dit_explanation(), predictors=rows))


def rival(name, subset, srcc, half, *, advantage=None):
    return replace(quality(name, subset, srcc, 96), srcc=interval(srcc, half, 96), advantage=advantage)


USED = replace(quality("gnn", BAND, 0.72, 96, is_used=True), srcc=interval(0.72, 0.1, 96))


def test_the_statement_has_predictor_trials_quality_and_comparison():
    text = " ".join(statement(dit_explanation()))
    assert text.startswith(
        "All scores and predictions come from `graph network`, which learned to predict SQNR [dB] at the final latents "
        "from 480 measured recipes. On recipes that it had not seen, its rank correlation is 0.950 (0.938 to 0.962) "
        "over all recipes (n = 480) and 0.74 (0.65 to 0.83) within 3.4 to 3.6 bits (n = 96);"
    )
    assert "Within 3.4 to 3.6 bits, its 0.74 is above that of `additive model`, 0.61 (0.48 to 0.74)" in text
    assert text.endswith("the strongest of 5 baselines (difference +0.13, 0.03 to 0.23).")


def test_intervals_that_keep_apart_make_a_claim():
    text = said(USED, rival("average bits", BAND, 0.1, 0.2), rival("ridge", BAND, 0.5, 0.1))[-1]
    assert text == (
        "Within 3.4 to 3.6 bits, its 0.72 is above that of `ridge`, 0.50 (0.40 to 0.60), the strongest of 2 baselines."
    )


def test_a_better_baseline_is_admitted():
    text = said(USED, rival("ridge", BAND, 0.9, 0.06))[-1]
    assert "its 0.72 is below that of `ridge`, 0.90 (0.84 to 0.96): the simpler rule ranks better there." in text


@pytest.mark.parametrize(("srcc", "words"), [(0.65, "is higher than"), (0.72, "not higher than"), (0.8, "not higher")])
def test_overlapping_intervals_show_no_advantage(srcc, words):
    text = said(USED, rival("ridge", BAND, srcc, 0.1))[-1]
    assert words in text
    assert text.endswith("; the intervals overlap, so no advantage is shown there.")


def test_the_paired_difference_decides_when_it_is_known():
    overlapping = rival("ridge", BAND, 0.65, 0.1, advantage=interval(0.07, 0.03, 96))
    assert "is above that of `ridge`" in said(USED, overlapping)[-1]
    apart = rival("ridge", BAND, 0.2, 0.1, advantage=interval(0.52, 0.6, 96))
    text = said(USED, apart)[-1]
    assert "(difference +0.5, −0.1 to 1.1); the interval of the difference holds zero" in text  # noqa: RUF001
    behind = rival("r", BAND, 0.2, 0.1, advantage=interval(-0.2, 0.1, 96))
    assert "is below that of `r`" in said(USED, behind)[-1]


def test_baselines_of_other_recipes_or_without_a_number_do_not_count():
    other = rival("ridge", "all", 0.99, 0.001)
    unknown = replace(rival("average bits", BAND, 0.1, 0.1), srcc=Estimate(NAN, NAN, NAN, NAN, 96))
    assert said(USED, other, unknown)[-1] == "No baseline was measured within 3.4 to 3.6 bits."


@pytest.mark.parametrize("rows", [(), (rival("ridge", "all", 0.9, 0.1),)])
def test_an_unmeasured_predictor_promises_nothing(rows):
    assert said(*rows)[-1] == "How well it ranks recipes that it has not seen was not measured."


def test_objectives_are_explained_as_far_as_they_are_known():
    assert "along the whole path of denoising from 3" in statement(Explanation("p", "SQNR [dB]", 3, "path"))[0]
    assert "by the objective `own` from 3" in statement(Explanation("p", "SQNR [dB]", 3, "own"))[0]


def test_the_tally_counts_what_was_tested():
    found = insights()
    assert tally(found) == (
        "Of these 5 predictions, 4 were put to the test by measuring that very change: 2 confirmed, 1 refuted (it went "
        "the other way), 1 open (the measurement shows no change)."
    )
    assert tally(found[:2]).startswith("All 2 predictions were put to the test")
    assert tally(found[:1]).startswith("This prediction was put to the test")
    assert tally(found[3:]).startswith("Of these 2 predictions, 1 was put")
    assert tally(found[4:]).startswith("None of these predictions was put to the test")


def test_decisions_that_differ_in_numbers_stand_together():
    assert change(insights()[0]) == "`transformer_blocks.*.norm1.linear` (6): `kmc3` → `kmc5`"
    many = Insight("", ("a", "b.0", "b.1", "c", "d", "e.0", "e.1"), "kmc3", "kmc4", 1.0)
    assert change(many) == "`a`, `b.*` (2), `c` and 3 more: `kmc3` → `kmc4`"
    assert change(replace(many, decisions=("conv1", "conv2"))).startswith("`conv1`, `conv2`:")
    assert change(replace(many, decisions=())) == "`kmc3` → `kmc4`"


def test_decibels_have_sign_and_interval():
    assert with_interval(Estimate(2.9, 0.21, 2.48, 3.32, 64), "dB", signed=True) == f"+2.90{THIN}dB (2.48 to 3.32)"
    assert predicted(insights()[1]) == f"{MINUS}4.1{THIN}dB ({MINUS}5.2 to {MINUS}3.0)"
    assert predicted(Insight("", (), "kmc3", "kmc4", 1.5)) == f"+1.50{THIN}dB"
    assert predicted(Insight("", (), "kmc3", "kmc4", NAN)) == f"not a number{THIN}dB"


def test_a_subset_only_the_band_is_enough():
    rows = tuple(row for row in predictor_rows() if row.subset == BAND)
    assert "is 0.74 (0.65 to 0.83) within 3.4 to 3.6 bits (n = 96); 1 would" in said(*rows)[1]
