"""Sweeps on a tiny pipeline, as a person types them, against the same measured by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from scipy import stats

from running import run, run_json
from sedimo.bank import fit_bank
from sedimo.lab import measuring
from sedimo.lab.bench import trace, weights_of
from sedimo.lab.exchange import probed
from sedimo.lab.lab import Lab
from sedimo.lab.objective import measure_reference
from sedimo.lab.study import Study
from sedimo.methods.hybrid import hybrid_recipe
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import NO_KNOBS, Task
from sedimo.methods.sqnr import SQNR
from sedimo.metrics.signal import relative_noise
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.schedulers import scheduler_named
from sedimo.quant.formats import Format
from sedimo.space import search_space
from sedimo.treatments.smoothing import SmoothingSettings, smooth
from sedimo.treatments.static_ranges import ActivationSettings, calibrate
from tolerances import FLOAT64_FORMULA

QUICK = ("--seeds", "2", "--steps", "2", "--fresh", "3")
FRESH = range(2, 5)
RANGES = (0, 1, *range(13, 13 + 62))  # 64 seeds: those that are searched on, and more past those of all other plans
UAQ8A8 = Format.parse("uaq8a8")
FLOAT_FUNCTION = 0.02  # decibels: smoothing changes how the float function itself is rounded


@pytest.fixture
def tiny(tiny_pipeline_folder):
    return load_pipeline(str(tiny_pipeline_folder))


@pytest.fixture(scope="module")
def sweep(tiny_pipeline_folder, tmp_path_factory):
    """Any sweep in one study for all tests, and the page of the last one."""
    folder = tmp_path_factory.mktemp("sweep")

    def answer(question, *options):
        arguments = ("sweep", question, tiny_pipeline_folder, "--store", folder / "study", *QUICK, *options)
        return run_json(*arguments, "-o", folder / "page.html"), arguments, (folder / "page.html").read_text()

    return answer


def by_hand(pipe, reference, rules=None, seeds=FRESH):
    """SQNR [dB] of each seed with uaq8a8 wherever it can be, against samples of full precision."""
    bank = fit_bank(weights_of(pipe), search_space(trace(pipe), "uaq8a8,fp16"))
    bank = bank if rules is None else bank.rounding(rules)
    recipe = hybrid_recipe(bank.space, UAQ8A8, [])
    with probed(pipe.denoiser, bank.quantize(recipe), inputs=bank.input_quantizers(recipe)):
        return relative_noise(reference, pipe.sample(pipe.default_sampling(seeds, 2))).sqnr_db


def test_alpha_is_swept_from_the_same_denoiser(sweep, tiny, tiny_pipeline_folder):
    found, _, page = sweep("alpha", "--values", "0,0.5,0.9", "--smooth-share", "1")
    baseline, *others = found["values"]
    assert [v["value"] for v in found["values"]] == ["none", "0.5", "0.9"]
    assert found["seeds"] == "2 to 4"
    assert found["n_comparisons"] == 2
    reference = tiny.sample(tiny.default_sampling(FRESH, 2))
    plain = by_hand(tiny, reference)
    assert baseline["sqnr_db"]["value"] == pytest.approx(plain.mean(), abs=FLOAT64_FORMULA)
    assert baseline["ahead"] is None
    for row, alpha in zip(others, (0.5, 0.9), strict=True):
        pipe = load_pipeline(str(tiny_pipeline_folder))
        smooth(pipe, SmoothingSettings(alpha, share=1), sampling=pipe.default_sampling(RANGES, 2))
        smoothed = by_hand(pipe, reference)
        assert row["sqnr_db"]["value"] == pytest.approx(smoothed.mean(), abs=FLOAT_FUNCTION)
        assert row["ahead"]["value"] == pytest.approx((smoothed - plain).mean(), abs=FLOAT_FUNCTION)
        assert row["ahead"]["n"] == 3
        assert row["note"].endswith("layers smoothed")
    assert "SmoothQuant&#39;s alpha" in page
    assert "2 paired differences" in page
    assert 'id="sweep-' in page


def test_static_ranges_are_compared_with_dynamic_ones(sweep, tiny):
    found, _, page = sweep("calibration", "--act-ranges", "percentile")
    assert [v["value"] for v in found["values"]] == ["dynamic", "1", "all 2"]
    reference = tiny.sample(tiny.default_sampling(FRESH, 2))
    assert found["values"][0]["sqnr_db"]["value"] == pytest.approx(by_hand(tiny, reference).mean(), abs=FLOAT64_FORMULA)
    space = search_space(trace(tiny), "uaq8a8,fp16")
    widths = {layer: [8] for d in space.decisions if UAQ8A8 in d.formats for layer in d.layers}
    plan, lab = tiny.default_sampling(RANGES, 2), Lab(tiny)
    for row, n_steps in zip(found["values"][1:], (1, 2), strict=True):
        options = ActivationSettings("percentile", n_steps=n_steps)
        rules = calibrate(lab, widths, plan, options)
        assert row["sqnr_db"]["value"] == pytest.approx(by_hand(tiny, reference, rules).mean(), abs=FLOAT64_FORMULA)
    assert "One-step against multi-step" in page
    again = found["confirmed"]
    assert again["seeds"] == "75 to 77"  # past those of RANGES
    seeds = range(75, 78)
    reference = tiny.sample(tiny.default_sampling(seeds, 2))
    options = ActivationSettings("percentile", n_steps=int(again["value"].removeprefix("all ")))
    rules = calibrate(lab, widths, plan, options)
    ahead = by_hand(tiny, reference, rules, seeds) - by_hand(tiny, reference, None, seeds)
    assert again["ahead"]["value"] == pytest.approx(ahead.mean(), abs=FLOAT64_FORMULA)
    assert again["ahead"]["n"] == 3
    highest = max(found["values"][1:], key=lambda row: row["ahead"]["value"])
    assert again["value"] == highest["value"] or any(row["ahead"]["low"] > 0 for row in found["values"][1:])
    assert "Measured again on seeds 75 to 77" in page


def test_blocks_stay_in_the_order_of_what_each_gains(sweep, tiny_pipeline_folder):
    found, arguments, page = sweep("threshold", "--format", "uaq3")
    names = [v["note"] for v in found["values"]]
    assert [v["value"] for v in found["values"]] == [str(n) for n in range(len(names))]
    store = arguments[arguments.index("--store") + 1]
    options = ("--format", "uaq3", "--store", store, "--seeds", "2", "--steps", "2", "--keep", "2")
    blocks = run_json("blocks", tiny_pipeline_folder, *options)
    gains = {r["block"]: r["alone_kept"]["value"] for r in blocks["rows"] if r["extra_bytes"]}
    assert names[1:] == sorted(gains, key=lambda name: -gains[name])[: len(names) - 1]
    assert len(names) == len(gains)  # all but one block at most
    assert set(blocks["kept"]) == set(names[1:3])
    assert found["values"][2]["paper_bits"] == pytest.approx(blocks["paper_bits"])
    bits = [v["paper_bits"] for v in found["values"]]
    assert bits == sorted(set(bits))
    assert all(name in page.replace("<wbr>", "") for name in names)


def test_numbers_of_samples_share_none(sweep, tiny, tmp_path):
    found, _, page = sweep("samples", "--values", "3,6,12")
    assert found["seeds"] == "3 to 23"
    bank = fit_bank(weights_of(tiny), search_space(trace(tiny), "uaq4,fp16"))
    costs = {}
    for n in (3, 6, 12):
        plan = tiny.default_sampling(range(n, 2 * n), 2)
        table = SQNR.measure(Lab(tiny, bank), Task(NO_KNOBS, on=plan)).table
        costs[n] = [c for c in table.costs if c.format == Format.parse("uaq4")]
    for row, n in zip(found["ranks"], (3, 6), strict=True):
        srcc = stats.spearmanr([c.cost for c in costs[n]], [c.cost for c in costs[12]]).statistic
        assert row["srcc"]["value"] == pytest.approx(srcc)
        assert (row["first"], row["second"]) == (str(n), "12")
        assert row["srcc"]["low"] <= srcc <= row["srcc"]["high"]
    relative = np.array([c.standard_error / c.cost for c in costs[12]])
    # the error of -10 log10 x, by a difference quotient
    assert found["errors"]["12"] == pytest.approx((10 * np.log10(1 + 1e-6 * relative) / 1e-6).mean())
    assert "sets of samples that share none" in page


def test_schedulers_are_compared_with_each_other_and_with_other_seeds(sweep, tiny, tmp_path):
    found, _, page = sweep("schedulers", "--values", "ddim,euler,dpm-solver++")
    pairs = {(r["first"], r["second"]): r["srcc"]["value"] for r in found["ranks"]}
    assert set(pairs) == {
        ("ddim", "dpm-solver++"),
        ("ddim", "ddim, other seeds"),
        ("dpm-solver++", "ddim, other seeds"),
    }
    assert found["notes"] == [
        "left out: euler starts from noise of 157.4 times unit size, and DiTPipeline always starts from unit size"
    ]
    bank = fit_bank(weights_of(tiny), search_space(trace(tiny), "uaq4,fp16"))
    with Study(tmp_path) as study:

        def costs(seeds):
            plan = tiny.default_sampling(seeds, 2)
            table = JACOBIAN.measure(Lab(tiny, bank, study=study), Task(NO_KNOBS, on=plan)).table
            return [c.cost for c in table.costs if c.format == Format.parse("uaq4")]

        first, again = costs(FRESH), costs(range(5, 8))
        tiny.pipeline.scheduler = scheduler_named(tiny.pipeline, "dpm-solver++", 2)
        other = costs(FRESH)
    assert first != other
    assert pairs["ddim", "dpm-solver++"] == pytest.approx(stats.spearmanr(first, other).statistic)
    assert pairs["ddim", "ddim, other seeds"] == pytest.approx(stats.spearmanr(first, again).statistic)
    assert "left out: euler" in page


def test_a_scheduler_whose_step_the_pipeline_cannot_call_is_left_out(tmp_path):
    """`DDPMPipeline` gives every step a generator, which UniPC does not take."""
    channels, downs, ups = (8, 16), ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    shape = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    unet = UNet2DModel(block_out_channels=channels, down_block_types=downs, up_block_types=ups, **shape)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    options = ("--signal", "sqnr", "--values", "ddim,unipc,dpm-solver++")
    found = run_json("sweep", "schedulers", tmp_path / "pipeline", "--store", tmp_path / "study", *QUICK, *options)
    assert [(r["first"], r["second"]) for r in found["ranks"]][:1] == [("ddim", "dpm-solver++")]
    (note,) = found["notes"]
    assert "left out: UniPCMultistepScheduler cannot be called as this pipeline calls it" in note


@pytest.mark.parametrize(
    ("question", "values", "plans"),
    [("alpha", "0.5,0.7", 2), ("calibration", "1,2", 2), ("threshold", "0,1", 3)],  # fresh, further, and searched seeds
)
def test_full_precision_is_sampled_once_for_all_values(
    tiny_pipeline_folder, tmp_path, monkeypatch, question, values, plans
):
    sampled = []

    def counted(objective, pipe, plan):
        sampled.append(plan.seeds)
        return measure_reference(objective, pipe, plan)

    monkeypatch.setattr(measuring, "measure_reference", counted)
    run("sweep", question, tiny_pipeline_folder, "--store", tmp_path, *QUICK, "--values", values)
    assert len(sampled) == len(set(sampled)) == plans


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("alpha", ("--values", "0.5,0.9", "--smooth-share", "1")),
        ("calibration", ()),
        ("threshold", ("--values", "1")),
        ("samples", ("--values", "2,4")),
        ("schedulers", ("--values", "ddim,unipc", "--signal", "sqnr")),
    ],
)
def test_a_second_run_measures_nothing_and_says_the_same(sweep, question, options, monkeypatch):
    found, arguments, _ = sweep(question, *options)
    for name in (
        "sedimo.lab.measuring.TrialWorker.measure",
        "sedimo.treatments.static_ranges.sample_until",
        "sedimo.methods.sqnr.measure_part",
        "sedimo.treatments.smoothing.measure_inputs",
    ):
        monkeypatch.setattr(name, lambda *_args, **_named: pytest.fail("measured again"))
    assert run_json(*arguments) == found
    assert re.search(rf"\b{found['n_comparisons']} (paired difference|rank correlation)s?", run(*arguments).stdout)


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("alpha", ("--values", "1.5"), "alpha must be at least 0 and at most 1"),
        ("alpha", ("--values", "x"), "numbers such as 0.7"),
        ("alpha", ("--values", "0"), "needs a value above 0"),
        ("alpha", ("--values", ","), "separated by commas"),
        ("alpha", ("--format", "uaq8"), "about rounded activations"),
        ("alpha", ("--format", "fp16a8"), "changes weights"),
        ("alpha", ("--smooth-share", "0"), "--smooth-share must be above 0 and at most 1, got 0"),
        ("calibration", ("--values", "3"), "at 1 to 2 steps"),
        ("calibration", ("--values", "1.5"), "whole numbers"),
        ("threshold", ("--values", "-1"), "the number of blocks at 16 bits must not be negative, got -1"),
        ("threshold", ("--values", "99"), "nothing would be quantized"),
        ("threshold", ("--values", "0"), "needs a number of blocks above 0"),
        ("threshold", ("--fresh", "1"), "--fresh must be at least 2"),
        ("samples", ("--values", "8"), "two or more numbers of samples"),
        ("samples", ("--values", "8,2048"), "from 2 to 1024"),
        ("samples", ("--values", "8,12"), "at least twice the one before"),
        ("schedulers", ("--values", "ddim"), "two or more of the schedulers"),
        ("schedulers", ("--values", "ddim,heun"), "two or more of the schedulers"),
        ("schedulers", ("--values", "ddim,euler"), "fewer than two schedulers can be compared"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(
    tiny_pipeline_folder, tmp_path, monkeypatch, question, options, message
):
    monkeypatch.setattr("sedimo.lab.lab.fit_bank", lambda *_args, **_named: pytest.fail("fitted"))
    done = run("sweep", question, tiny_pipeline_folder, "--store", tmp_path, *QUICK, *options, code=3)
    assert message in done.output


def test_a_denoiser_alone_is_refused(tiny_pipeline_folder, tmp_path):
    done = run("sweep", "alpha", tiny_pipeline_folder / "transformer", "--store", tmp_path, code=3)
    assert "a denoiser without its pipeline" in done.output
