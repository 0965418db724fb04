"""Sentences say what the numbers say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from report_examples import ahead, dit_summary, estimate, make_table, unet_layers, unet_summary

from sedimo.allocation.solve import allocate
from sedimo.methods.error import UNIT
from sedimo.metrics.estimate import Estimate
from sedimo.quant.formats import Format
from sedimo.reporting import phrasing
from sedimo.reporting.summary import Evidence, MeasuredRecipe, Summary
from sedimo.reporting.words import family, name

THIN = "\N{NARROW NO-BREAK SPACE}"


@pytest.fixture(scope="module")
def summary():
    return dit_summary()


@pytest.fixture(scope="module")
def bare():
    return unet_summary()


def changed(summary, formats):
    """Some decisions at other formats, at the same costs."""
    found = {name: Format.parse(text) for name, text in formats.items()}
    moved = (replace(c, format=found[c.decision]) for c in summary.chosen if c.decision in found)
    others = (c for c in summary.table.costs if (c.decision, c.format) not in found.items())
    costs = sorted((*others, *moved), key=lambda c: list(summary.table.layers).index(c.decision))
    allocation = replace(summary.allocation, choice={**summary.allocation.choice, **found})
    return replace(summary, table=replace(summary.table, costs=tuple(costs)), allocation=allocation)


def db_at_reference(summary, name):
    cost = next(c for c in summary.chosen if c.decision == name)
    return summary.noise_db(cost, summary.at_reference(cost))


def test_the_headline_has_model_size_quality_and_gain(summary):
    text = phrasing.headline(summary).replace(THIN, " ")
    assert text.startswith("`cifar-dit` keeps 3.50 of 16 bits per weight: its 57 weight layers shrink from 14.7 MB")
    assert text.endswith("the noise in its output is 9.5 % of the signal, 5.57 dB better than uniform kmc3.")


def test_the_headline_of_an_unmeasured_recipe_promises_nothing(bare):
    assert phrasing.headline(bare).endswith("MB.")
    assert "noise" not in phrasing.headline(bare)


def test_an_exact_result_is_said_to_be_exact(summary):
    exact = Estimate(math.inf, 0.0, math.inf, math.inf, 4)
    row = MeasuredRecipe("all fp16", 16.0, 16.0, {"sqnr_db": exact})
    found = replace(summary, evidence=Evidence(recipes=(row,)))
    assert phrasing.headline(found).endswith("its output does not change at all.")
    assert phrasing.tiles(found)[2].value == "∞"


def test_rounded_inputs_are_told_by_layers_and_bits(summary):
    assert not any("Inputs are rounded" in s for s in phrasing.decision_sentences(summary))
    first, second, *rest = (cost.decision for cost in summary.chosen)
    found = phrasing.decision_sentences(changed(summary, {first: "uaq4a8", second: "fp16a4"}))
    n, m, *others = (len(summary.table.layers[name]) for name in (first, second, *rest))
    left = sum(others)
    one, two = (f"{k} layer{'s' if k > 1 else ''}" for k in (m, n))
    assert f"Inputs are rounded, too: those of {one} to 4 bits and {two} to 8 bits; {left} are not." in found


def test_there_are_four_tiles_measured_or_not(summary, bare):
    assert [t.unit for t in phrasing.tiles(summary)] == ["bits", "smaller", "dB SQNR", "dB"]
    assert [t.unit for t in phrasing.tiles(bare)] == ["bits", "smaller", "dB, predicted", "decisions"]
    assert "not measured" in phrasing.tiles(bare)[2].note


def test_costs_that_are_no_noise_are_not_told_in_decibels():
    table = replace(make_table(list(unet_layers()), 2), method="error", unit=UNIT)
    found = Summary("unet", table, allocate(table, bits=3.7))
    assert [t.unit for t in phrasing.tiles(found)] == ["bits", "smaller", "decisions"]
    texts = [*phrasing.decision_sentences(found), *phrasing.reason_sentences(found), phrasing.method_sentence(found)]
    assert any(" of the cost" in text for text in texts)
    assert not any("noise" in text or "dB" in text for text in texts)


def test_what_stays_at_sixteen_bits_is_said_last(summary):
    found = changed(summary, {summary.chosen[0].decision: "fp16"})
    assert phrasing.decision_sentences(found)[0].endswith(" stay at 16 bits.")


def test_the_gain_over_uniform_is_the_last_tile(summary):
    assert phrasing.tiles(summary)[3].value == "+5.57"


def test_the_claim_is_against_the_strongest_uniform_recipe(summary):
    this = summary.evidence.recipes[0]
    rivals = (MeasuredRecipe(f"uniform {f}", 3, 3, {}, ahead(v, 0.2, 64)) for f, v in (("a", 6.0), ("b", 2.0)))
    found = replace(summary, evidence=replace(summary.evidence, recipes=(this, *rivals)))
    assert phrasing.headline(found).endswith("2.00 dB better than uniform b.")


def test_spared_layers_come_with_their_reason(summary):
    text = phrasing.reason_sentences(summary)[0].replace(THIN, " ")
    assert text.startswith("`proj_out_2` keeps 8 bits (`uaq8`), which takes 4.19 kB for 0.056 % of the weights")
    assert f"at 3 bits (`kmc3`) it alone would add {db_at_reference(summary, 'proj_out_2'):.2f} dB of noise" in text


def test_additions_have_the_digits_of_their_error(summary):
    db, table = db_at_reference(summary, "proj_out_2"), summary.table
    texts = []
    for error in (0.01, 0.2):
        costs = (replace(c, standard_error=error * summary.cost.value) for c in table.costs)
        texts.append(phrasing.reason_sentences(replace(summary, table=replace(table, costs=tuple(costs))))[0])
    assert f"add {db:.2f} dB" in texts[0]  # 0.04 dB
    assert f"add {db:.1f} dB" in texts[1]  # 0.7 dB


def test_tiny_additions_are_said_in_percent(bare):
    text = " ".join(phrasing.reason_sentences(bare))
    assert "to the noise." in text
    assert "0.0 dB" not in text


def test_half_of_the_noise_is_counted(summary):
    text = next(s for s in phrasing.reason_sentences(summary) if s.startswith("Half"))
    count = int(text.split("comes from ")[1].split()[0])
    shares = sorted((summary.share([cost]) for cost in summary.chosen), reverse=True)
    assert sum(shares[:count]) >= 0.5 > sum(shares[: count - 1])


def test_differences_say_what_their_interval_allows():
    worse = phrasing.difference_sentence("error", estimate(-2.0, 0.2, 64))
    assert worse.startswith("SQNR is 2.00 ± 0.40 dB worse than that of error on the same 64 samples")
    assert worse.endswith(f"(95 % interval \N{MINUS SIGN}2.40 to \N{MINUS SIGN}1.60{THIN}dB).")
    open_ = phrasing.difference_sentence("uniform", estimate(0.9, 0.6, 5000))
    assert open_.startswith("SQNR is 0.9 ± 1.2 dB better")
    assert open_.endswith("holds zero, so no difference is shown.")


def test_methods_are_explained_also_when_combined(summary):
    assert "when it alone is quantized" in phrasing.method_sentence(summary)
    mixed = replace(summary, table=replace(summary.table, method="jacobian+ablation"))
    assert "geometric mean of the noise that its rounding" in phrasing.method_sentence(mixed)
    odd = replace(summary, table=replace(summary.table, method="own"))
    assert "the figure of the method `own`" in phrasing.method_sentence(odd)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("uniform:uaq4", "The recipe was ordered: `uaq4` for all layers"),
        ("hybrid:uaq8a8", "The recipe has `uaq8a8` for all but the blocks that gain most"),
        ("given", "The recipe was given."),
    ],
)
def test_weight_errors_that_decided_nothing_are_not_told_as_the_reason(summary, rule, words):
    by_error = replace(summary, table=replace(summary.table, method="error"))
    found = replace(by_error, allocation=replace(summary.allocation, rule=rule))
    assert phrasing.method_sentence(found).startswith(words)
    assert "decided nothing" in phrasing.method_sentence(found)
    assert found.decided_by == rule
    assert not any("can do with the fewest bits" in text for text in phrasing.reason_sentences(found))
    decided = replace(by_error, allocation=replace(summary.allocation, rule="milp"))
    assert phrasing.method_sentence(decided).startswith("A layer's sensitivity (`error`)")
    assert any("can do with the fewest bits" in text for text in phrasing.reason_sentences(decided))


def test_heuristics_claim_no_proof(summary):
    rule = replace(summary, allocation=replace(summary.allocation, status="heuristic"))
    assert not any("proven" in s or "No other" in s for s in phrasing.decision_sentences(rule))


def test_backticks_in_names_do_no_harm():
    assert name("a`b") == "`a'b`"


@pytest.mark.parametrize(("text", "kind"), [("uaq4", "uaq"), ("uaq4g64", "uaq in groups"), ("fp16", "fp")])
def test_families(text, kind):
    assert family(Format.parse(text)) == kind
