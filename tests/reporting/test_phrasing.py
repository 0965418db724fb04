"""Sentences say what the numbers say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from report_examples import dit_summary, estimate, make_table, unet_layers, unet_summary

from sedimo.allocation.solve import allocate
from sedimo.methods.error import UNIT
from sedimo.metrics.estimate import Estimate
from sedimo.quant.formats import Format
from sedimo.reporting import phrasing
from sedimo.reporting.summary import DifferenceRow, Evidence, RecipeRow, summarize
from sedimo.reporting.words import family, name

THIN = "\N{NARROW NO-BREAK SPACE}"


@pytest.fixture(scope="module")
def summary():
    return dit_summary()


@pytest.fixture(scope="module")
def bare():
    return unet_summary()


def test_the_headline_has_model_size_quality_and_gain(summary):
    text = phrasing.headline(summary).replace(THIN, " ")
    assert text.startswith("`cifar-dit` keeps 3.50 of 16 bits per weight: its 57 weight layers shrink from 14.7 MB")
    assert text.endswith(
        "the noise in its output is 9.5 % of the signal, 5.57 dB better than the best uniform recipe (kmc3)."
    )


def test_the_headline_of_an_unmeasured_recipe_promises_nothing(bare):
    assert phrasing.headline(bare).endswith("MB.")
    assert "noise" not in phrasing.headline(bare)


def test_an_exact_result_is_said_to_be_exact(summary):
    exact = Estimate(math.inf, 0.0, math.inf, math.inf, 4)
    row = RecipeRow("all fp16", "this", 16.0, 16.0, {"sqnr_db": exact})
    found = replace(summary, evidence=Evidence(recipes=(row,)))
    assert phrasing.headline(found).endswith("its output does not change at all.")
    assert phrasing.tiles(found)[2].value == "∞"


def test_rounded_inputs_are_told_by_layers_and_bits(summary):
    assert not any("Inputs are rounded" in s for s in phrasing.decision_sentences(summary))
    first, second, *rest = summary.decisions
    rounded = [replace(first, format=Format.parse("uaq4a8")), replace(second, format=Format.parse("fp16a4"))]
    found = phrasing.decision_sentences(replace(summary, decisions=(*rounded, *rest)))
    n, m = len(first.layers), len(second.layers)
    left = sum(len(row.layers) for row in rest)
    one, two = (f"{k} layer{'s' if k > 1 else ''}" for k in (m, n))
    assert f"Inputs are rounded, too: those of {one} to 4 bits and {two} to 8 bits; {left} are not." in found


def test_there_are_four_tiles_measured_or_not(summary, bare):
    assert [t.unit for t in phrasing.tiles(summary)] == ["bits", "smaller", "dB SQNR", "dB"]
    assert [t.unit for t in phrasing.tiles(bare)] == ["bits", "smaller", "dB, predicted", "decisions"]
    assert "not measured" in phrasing.tiles(bare)[2].note


def test_costs_that_are_no_noise_are_not_told_in_decibels():
    table = replace(make_table(list(unet_layers()), 2), method="error", unit=UNIT)
    found = summarize(table, allocate(table, bits=3.7), model="unet")
    assert [t.unit for t in phrasing.tiles(found)] == ["bits", "smaller", "decisions"]
    texts = [*phrasing.decision_sentences(found), *phrasing.reason_sentences(found), phrasing.method_sentence(found)]
    assert any(" of the cost" in text for text in texts)
    assert not any("noise" in text or "dB" in text for text in texts)


def test_what_stays_at_sixteen_bits_is_said_last(summary):
    first, *rest = summary.decisions
    found = replace(summary, decisions=(replace(first, format=Format.parse("fp16")), *rest))
    assert phrasing.decision_sentences(found)[0].endswith(" stay at 16 bits.")


def test_the_gain_over_uniform_is_the_last_tile(summary):
    assert phrasing.tiles(summary)[3].value == "+5.57"


def test_the_claim_is_against_the_strongest_uniform_recipe(summary):
    rows = tuple(DifferenceRow(f"uniform {f}", "sqnr_db", estimate(v, 0.2, 64)) for f, v in (("a", 6.0), ("b", 2.0)))
    found = replace(summary, evidence=replace(summary.evidence, differences=rows))
    assert phrasing.headline(found).endswith("2.00 dB better than uniform b.")


def test_spared_layers_come_with_their_reason(summary):
    text = phrasing.reason_sentences(summary)[0].replace(THIN, " ")
    row = next(r for r in summary.decisions if r.name == "proj_out_2")
    assert text.startswith("`proj_out_2` keeps 8 bits (`uaq8`), which takes 4.19 kB for 0.056 % of the weights")
    assert f"at 3 bits (`kmc3`) it alone would add {row.reference_db:.2f} dB of noise" in text


def test_additions_have_the_digits_of_their_error(summary):
    row = next(r for r in summary.decisions if r.name == "proj_out_2")
    sure, unsure = (replace(row, reference_standard_error=e * summary.choice.cost.value) for e in (0.01, 0.2))
    texts = [phrasing.reason_sentences(replace(summary, decisions=(r,)))[0] for r in (sure, unsure)]
    assert f"add {row.reference_db:.2f} dB" in texts[0]  # 0.04 dB
    assert f"add {row.reference_db:.1f} dB" in texts[1]  # 0.7 dB


def test_tiny_additions_are_said_in_percent(bare):
    text = " ".join(phrasing.reason_sentences(bare))
    assert "to the noise." in text
    assert "0.0 dB" not in text


def test_half_of_the_noise_is_counted(summary):
    text = next(s for s in phrasing.reason_sentences(summary) if s.startswith("Half"))
    count = int(text.split("comes from ")[1].split()[0])
    shares = sorted((row.share for row in summary.decisions), reverse=True)
    assert sum(shares[:count]) >= 0.5 > sum(shares[: count - 1])


def test_differences_say_what_their_interval_allows():
    worse = phrasing.difference_sentence(DifferenceRow("error", "sqnr_db", estimate(-2.0, 0.2, 64)))
    assert worse.startswith("SQNR is 2.00 ± 0.40 dB worse than that of error on the same 64 samples")
    assert worse.endswith(f"(95 % interval \N{MINUS SIGN}2.40 to \N{MINUS SIGN}1.60{THIN}dB).")
    open_ = phrasing.difference_sentence(DifferenceRow("full precision", "fid", estimate(0.9, 0.6, 5000)))
    assert open_.startswith("FID is 0.9 ± 1.2 worse")
    assert open_.endswith("holds zero, so no difference is shown.")


def test_methods_are_explained_also_when_combined(summary):
    assert "when it alone is quantized" in phrasing.method_sentence(summary)
    mixed = replace(summary, choice=replace(summary.choice, method="jacobian+ablation"))
    assert "geometric mean of the noise that its rounding" in phrasing.method_sentence(mixed)
    odd = replace(summary, choice=replace(summary.choice, method="own"))
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
    found = replace(summary, choice=replace(summary.choice, method="error", rule=rule))
    assert phrasing.method_sentence(found).startswith(words)
    assert "decided nothing" in phrasing.method_sentence(found)
    assert found.choice.decided_by == rule
    assert not any("can do with the fewest bits" in text for text in phrasing.reason_sentences(found))
    decided = replace(summary, choice=replace(summary.choice, method="error", rule="milp"))
    assert phrasing.method_sentence(decided).startswith("A layer's sensitivity (`error`)")
    assert any("can do with the fewest bits" in text for text in phrasing.reason_sentences(decided))


def test_heuristics_claim_no_proof(summary):
    rule = replace(summary, choice=replace(summary.choice, status="heuristic"))
    assert not any("proven" in s or "No other" in s for s in phrasing.decision_sentences(rule))


def test_the_error_of_decibels_follows_from_that_of_the_noise():
    found = phrasing.noise_estimate_db(Estimate(0.1, 0.01, 0.08, 0.12, 8))
    assert found.value == pytest.approx(10)
    assert found.standard_error == pytest.approx(0.434, abs=1e-3)
    assert found.high - found.value == pytest.approx(2 * found.standard_error)


def test_backticks_in_names_do_no_harm():
    assert name("a`b") == "`a'b`"


@pytest.mark.parametrize(("text", "kind"), [("uaq4", "uaq"), ("uaq4g64", "uaq in groups"), ("fp16", "fp")])
def test_families(text, kind):
    assert family(Format.parse(text)) == kind
