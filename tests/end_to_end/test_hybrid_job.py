"""Hybrid precision from one command: with 8-bit activations, smoothing and single-step calibration, as published."""

from __future__ import annotations

import json

import pytest
from diffusers import DiTPipeline

from sedimo.allocation.budget import BudgetSettings
from sedimo.checkpoint.contents import packed_layers
from sedimo.checkpoint.inputs import rounded_inputs, smoothed_layers
from sedimo.errors import InputError
from sedimo.jobs import quantize as job
from sedimo.jobs import report
from sedimo.jobs.blocks import BlocksSettings, measure_blocks
from sedimo.jobs.quantize import QuantizeSettings
from sedimo.jobs.settings import FormatSettings
from sedimo.lab.bench import SourceSettings
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.methods.hybrid import HYBRID, BlockCurves, KeepSettings, blocks_of
from sedimo.quant.formats import FP16, Format
from sedimo.treatments.smoothing import SMOOTHING, SmoothingKnobs
from sedimo.treatments.static_ranges import ACTIVATIONS, ActivationSettings

SAMPLING = SamplingSettings(n_seeds=2, n_steps=2, n_check_seeds=2)
PUBLISHED = ActivationSettings("min-max", symmetric=True, n_steps=1, n_samples=4)


def settings_of(source, out=None, bits=None, method="hybrid:uaq4", *, ends=None, check=True, chosen=None, **keeping):
    return QuantizeSettings(
        SourceSettings(str(source)),
        BudgetSettings(bits=bits),
        out,
        method,
        FormatSettings(ends=ends),
        sampling=SAMPLING,
        check=check,
        chosen={**(chosen or {}), **({HYBRID.name: KeepSettings(**keeping)} if keeping else {})},
    )


def curves_of(result):
    return result.finding.need(BlockCurves)


def quantized(recipe):
    return {name: entry for name, entry in recipe.layers.items() if entry != FP16}


@pytest.fixture(scope="module")
def made(tiny_pipeline_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("hybrid") / "out"
    chosen = {ACTIVATIONS.name: PUBLISHED, SMOOTHING.name: SmoothingKnobs(0.7, share=0.5)}
    return out, job.run(settings_of(tiny_pipeline_folder, out, method="hybrid:uaq8a8", chosen=chosen, keep=1))


def test_the_whole_strategy_is_in_the_checkpoint(made):
    out, result = made
    kept = set(curves_of(result).kept)
    (name,) = kept
    spared = next(set(row.decisions) for row in curves_of(result).rows if row.block == name)
    loaded = DiTPipeline.from_pretrained(out).transformer
    formats = {str(f) for weight in packed_layers(loaded).values() for f in weight.formats}
    assert formats == {"uaq8"}
    assert spared.isdisjoint(packed_layers(loaded))
    rounded = rounded_inputs(loaded).layers
    assert set(rounded) == set(packed_layers(loaded))
    assert {(q.bits, q.symmetric, q.range is not None) for q in rounded.values()} == {(8, True, True)}
    assert smoothed_layers(loaded) == result.treatments["smoothing"]["layers"] != {}


def test_the_report_has_the_curves_and_can_be_had_again(made):
    out, result = made
    page = (out / "report.html").read_text()
    assert "Where noise enters" in page
    assert f"Chosen by rank, the first 1 by gain: <code>{curves_of(result).kept[0]}</code>" in page
    curves = report.run(out.with_name("out.study"))["maps"]["blocks"]
    assert curves["kept"] == list(curves_of(result).kept)
    assert [row["block"] for row in curves["rows"]] == [row.block for row in curves_of(result).rows]
    plain = json.loads(json.dumps(result.as_json()))
    assert plain["hybrid"]["hybrid_gain"]["n"] == 2
    assert "recipe" not in plain["hybrid"]
    assert plain["method"] == "hybrid:uaq8a8"
    assert "hybrid:uaq8a8 (this report)" in page
    assert "none used for the search" not in page
    assert "method: hybrid:uaq8a8\n" in (out / "README.md").read_text()


def test_a_budget_is_kept_and_the_same_as_that_of_the_blocks_command(tiny_pipeline_folder, tmp_path):
    result = job.run(settings_of(tiny_pipeline_folder, tmp_path / "out", bits=9.0, check=False))
    assert result.allocation.paper_bits <= 9.0
    assert result.allocation.rule == "hybrid:uaq4"
    source = SourceSettings(str(tiny_pipeline_folder))
    curves, alone = measure_blocks(
        BlocksSettings(source, Format.parse("uaq4"), tmp_path / "s", bits=9.0, sampling=SAMPLING)
    )
    assert curves.kept
    assert quantized(alone) == quantized(result.allocation.recipe) != {}


def test_given_ends_stay_what_they_are(tiny_pipeline_folder, tmp_path):
    result = job.run(settings_of(tiny_pipeline_folder, tmp_path / "out", keep=1, ends="uaq8", check=False))
    formats = [str(f) for f in result.allocation.choice.values()]
    assert formats.count("uaq8") >= 2
    assert formats.count("uaq4") > 2


def test_the_plan_counts_what_it_measures(tiny_pipeline_folder):
    plan = job.plan(settings_of(tiny_pipeline_folder, keep=1, check=False))
    n_blocks = len(blocks_of(Lab(SourceSettings(str(tiny_pipeline_folder)), formats="uaq4,fp16").space))
    assert plan["method"] == "hybrid"
    assert plan["denoiser_calls"] >= 2 * n_blocks * SAMPLING.n_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs a rule which blocks stay at 16 bits"),
        ({"keep": 1, "bits": 5.0}, "one rule"),
        ({"keep": 1, "keep_db": 1.0}, "one rule"),
        ({"keep": -1}, "keep must be at least 0, got -1"),
        ({"keep_db": float("nan")}, "gain in dB"),
        ({"method": "hybrid:fp16", "keep": 1}, "format that changes weights"),
        ({"method": "hybrid:", "keep": 1}, "hybrid:FORMAT, got 'hybrid:'"),
        ({"method": "hybrid:uaq99", "keep": 1}, "2..8"),
        ({"method": "jacobian", "bits": 4.0, "keep": 1}, "options of hybrid do nothing with --method"),
        ({"method": "uniform:uaq4", "keep_db": 1.0}, "options of hybrid do nothing with --method"),
    ],
)
def test_orders_that_say_nothing_are_refused(tiny_pipeline_folder, changes, message):
    with pytest.raises(InputError, match=message):
        settings_of(tiny_pipeline_folder, **changes)


def test_other_accountings_are_refused():
    with pytest.raises(InputError, match="paper bits alone"):
        QuantizeSettings(SourceSettings("x"), BudgetSettings(stored_bits=5.0), method="hybrid:uaq4")


def test_too_small_a_budget_is_refused_before_anything_is_measured(tiny_pipeline_folder, tmp_path):
    with pytest.raises(InputError, match="cannot be kept"):
        job.run(settings_of(tiny_pipeline_folder, tmp_path / "out", bits=1.0))
    assert not (tmp_path / "out").exists()
