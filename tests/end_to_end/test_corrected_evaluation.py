"""Sets of images with the correction in the sampler, and the seeds that it is estimated from."""

from __future__ import annotations

from itertools import product

import pytest

import sedimo
from running import run, run_json
from sedimo.lab.seeds import SamplingSettings, Seeds
from sedimo.treatments.noise_correction import correction_plan

QUICK = ["--seeds", "2", "--steps", "2"]


def test_sets_of_images_are_corrected_too(tiny_pipeline_folder, tmp_path):
    out = tmp_path / "small"
    run("quantize", tiny_pipeline_folder, "--method", "uniform:uaq3", "-o", out, "--no-check", *QUICK)
    command = ("evaluate", out, "--against", tiny_pipeline_folder, *QUICK, "--images", "20", "--seed", "3")
    found = run_json(*command, "--correct")
    fixed = found.pop("corrected")
    assert found == run_json(*command)
    assert fixed["gain"].keys() == {"sqnr_db", "fid"}
    assert fixed["measures"].keys() == found.keys() - {"n_exact", "n_decorrelated", "size", "bops", "extractor"}
    for name in ("fid", "sqnr_db"):
        assert fixed["gain"][name]["value"] != 0
        gain = fixed["measures"][name]["value"] - found[name]["value"]
        assert fixed["gain"][name]["value"] == pytest.approx(gain)
    assert fixed["measures"]["reference_fid"] == found["reference_fid"]
    assert fixed["seeds"] == list(range(23, 39))  # 3 to 22 made the images
    assert "gain of fid" in run(*command, "--correct").output


def test_corrections_are_estimated_from_seeds_that_nothing_is_evaluated_on(tiny_pipeline_folder):
    pipe = sedimo.load(tiny_pipeline_folder)
    for n_seeds, n_images in product((2, 30), (0, 20)):
        seeds = Seeds(SamplingSettings(first_seed=5, n_seeds=n_seeds), pipe.default_sampling)
        evaluated = {*seeds.search.seeds, *range(5, 5 + n_images)}
        estimating = correction_plan(seeds, n_images).seeds
        assert len(estimating) == 16
        assert not evaluated & {*estimating}
