"""Hybrid precision from one command: with 8-bit activations, smoothing and single-step calibration, as published."""

from __future__ import annotations

import json

import pytest
from diffusers import DiTPipeline

from sedimo.api import job
from sedimo.api.blocks import BlocksOrder, measure_blocks
from sedimo.api.opening import open_source
from sedimo.api.order import ActivationOrder, BudgetOrder, Order, SamplingOrder
from sedimo.api.rereport import evidence_of
from sedimo.api.smooth_order import SmoothOrder
from sedimo.errors import InputError
from sedimo.measurement.calibration import CalibrationOptions
from sedimo.quant.formats import FP16, Format
from sedimo.runtime.activations import rounded_inputs
from sedimo.runtime.contents import packed_layers
from sedimo.runtime.smoothed import smoothed_layers
from sedimo.sensitivity.blocks import blocks_of

SAMPLING = SamplingOrder(n_seeds=2, n_steps=2, n_check_seeds=2)
PUBLISHED = ActivationOrder(symmetric=True, calibration=CalibrationOptions("min-max", 1, symmetric=True), n_samples=4)


def ordered(source, out=None, bits=None, **changes):
    parts = {"method": "hybrid:uaq4", "sampling": SAMPLING}
    return Order(source=str(source), out=out, budget=BudgetOrder(bits=bits), **{**parts, **changes})


def quantized(recipe):
    return {name: entry for name, entry in recipe.layers.items() if entry != FP16}


@pytest.fixture(scope="module")
def made(tiny_pipeline_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("hybrid") / "out"
    strategy = {"method": "hybrid:uaq8a8", "activations": PUBLISHED, "smooth": SmoothOrder(0.7, share=0.5), "keep": 1}
    return out, job.run(ordered(tiny_pipeline_folder, out, **strategy))


def test_the_whole_strategy_is_in_the_checkpoint(made):
    out, result = made
    kept = set(result.blocks.kept)
    (name,) = kept
    spared = next(set(row.decisions) for row in result.blocks.rows if row.block == name)
    loaded = DiTPipeline.from_pretrained(out).transformer
    formats = {str(f) for weight in packed_layers(loaded).values() for f in weight.formats}
    assert formats == {"uaq8"}
    assert spared.isdisjoint(packed_layers(loaded))
    rounded = rounded_inputs(loaded).layers
    assert set(rounded) == set(packed_layers(loaded))
    assert {(q.bits, q.symmetric, q.range is not None) for q in rounded.values()} == {(8, True, True)}
    assert smoothed_layers(loaded) == result.smoothing.ways != {}


def test_the_report_has_the_curves_and_can_be_had_again(made):
    out, result = made
    page = (out / "report.html").read_text()
    assert "Where noise enters" in page
    assert f"Chosen by rank, the first 1 by gain: <code>{result.blocks.kept[0]}</code>" in page
    curves = evidence_of(out.with_name("out.study"))["maps"]["blocks"]
    assert curves["kept"] == list(result.blocks.kept)
    assert [row["block"] for row in curves["rows"]] == [row.block for row in result.blocks.rows]
    plain = json.loads(json.dumps(result.as_json()))
    assert plain["hybrid"]["hybrid_gain"]["n"] == 2
    assert "recipe" not in plain["hybrid"]
    assert plain["method"] == "hybrid:uaq8a8"
    assert "hybrid:uaq8a8 (this report)" in page
    assert "none used for the search" not in page
    assert "method: hybrid:uaq8a8\n" in (out / "README.md").read_text()


def test_a_budget_is_kept_and_the_same_as_that_of_the_blocks_command(tiny_pipeline_folder, tmp_path):
    result = job.run(ordered(tiny_pipeline_folder, tmp_path / "out", bits=9.0, check=False))
    assert result.allocation.paper_bits <= 9.0
    assert result.allocation.rule == "hybrid:uaq4"
    alone = measure_blocks(
        BlocksOrder(str(tiny_pipeline_folder), tmp_path / "s", Format.parse("uaq4"), bits=9.0, sampling=SAMPLING)
    )
    assert alone.kept
    assert quantized(alone.recipe) == quantized(result.allocation.recipe) != {}


def test_given_ends_stay_what_they_are(tiny_pipeline_folder, tmp_path):
    result = job.run(ordered(tiny_pipeline_folder, tmp_path / "out", keep=1, ends="uaq8", check=False))
    formats = [str(f) for f in result.allocation.choice.values()]
    assert formats.count("uaq8") >= 2
    assert formats.count("uaq4") > 2


def test_the_plan_counts_what_it_measures(tiny_pipeline_folder):
    plan = job.plan(ordered(tiny_pipeline_folder, keep=1, check=False))
    n_blocks = len(blocks_of(open_source(ordered(tiny_pipeline_folder, keep=1)).space))
    assert plan.method == "hybrid"
    assert plan.denoiser_calls >= 2 * n_blocks * SAMPLING.n_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs a rule which blocks stay at 16 bits"),
        ({"keep": 1, "bits": 5.0}, "one rule"),
        ({"keep": 1, "keep_db": 1.0}, "one rule"),
        ({"keep": -1}, "number of blocks"),
        ({"keep_db": float("nan")}, "gain in dB"),
        ({"method": "hybrid:fp16", "keep": 1}, "format that changes weights"),
        ({"method": "hybrid:", "keep": 1}, "format"),
        ({"method": "hybrid:uaq99", "keep": 1}, "2..8"),
        ({"method": "jacobian", "bits": 4.0, "keep": 1}, "are for hybrid precision"),
        ({"method": "uniform:uaq4", "keep_db": 1.0}, "are for hybrid precision"),
    ],
)
def test_orders_that_say_nothing_are_refused(tiny_pipeline_folder, changes, message):
    with pytest.raises(InputError, match=message):
        ordered(tiny_pipeline_folder, **changes)


def test_other_accountings_are_refused(tiny_pipeline_folder):
    with pytest.raises(InputError, match="paper bits alone"):
        Order(str(tiny_pipeline_folder), None, BudgetOrder(stored_bits=5.0), method="hybrid:uaq4")


def test_too_small_a_budget_is_refused_before_anything_is_measured(tiny_pipeline_folder, tmp_path):
    with pytest.raises(InputError, match="cannot be kept"):
        job.run(ordered(tiny_pipeline_folder, tmp_path / "out", bits=1.0))
    assert not (tmp_path / "out").exists()
