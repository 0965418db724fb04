"""Learned rounding in the main job, from the command line to a checkpoint that diffusers loads."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

import sedimo
from running import run, run_json
from sedimo.lab.exchange import probed
from sedimo.lab.lab import Lab
from sedimo.metrics.signal import paired_difference, relative_noise
from sedimo.treatments.learned_rounding import reconstruct

QUICK = ["--seeds", "2", "--steps", "2"]
UNIFORM = ["--method", "uniform:uaq3"]


@pytest.fixture(scope="module")
def pair(tiny_pipeline_folder, tmp_path_factory):
    """Folders and JSON of the same recipe rounded to nearest and learned."""
    folder = tmp_path_factory.mktemp("reconstruct")
    nearest = run_json("quantize", tiny_pipeline_folder, *UNIFORM, "-o", folder / "nearest", "--no-check", *QUICK)
    learning = ["--reconstruct", "--reconstruct-steps", "40"]
    learned = run_json("quantize", tiny_pipeline_folder, *UNIFORM, "-o", folder / "learned", *learning, *QUICK)
    return folder, nearest, learned


def test_bytes_and_recipe_stay_and_codes_change(pair):
    folder, nearest, learned = pair
    for key in ("recipe", "paper_bits", "stored_bits", "stored_bytes"):
        assert learned[key] == nearest[key]
    one, other = (DiffusionPipeline.from_pretrained(folder / name).transformer for name in ("nearest", "learned"))
    weights = [
        {
            n: m.weight
            for n, m in model.named_modules()
            if isinstance(getattr(m, "weight", None), sedimo.QuantizedTensor)
        }
        for model in (one, other)
    ]
    changed = [name for name, weight in weights[0].items() if not torch.equal(weight.codes(), weights[1][name].codes())]
    assert len(changed) > len(weights[0]) // 2
    assert not any("timestep_embedder" in name for name in changed)  # shared by the blocks
    for name in changed:
        (before,), (after,) = weights[0][name].parts, weights[1][name].parts
        assert torch.equal(before.tensors["scale"], after.tensors["scale"])


def test_the_job_tells_what_was_learned_and_what_it_gains(pair):
    folder, _, learned = pair
    blocks = learned["reconstruction"]["blocks"]
    assert {"transformer_blocks.0", "transformer_blocks.1", "proj_out_2"} <= {b["name"] for b in blocks}
    assert all(b["learned_error"] < b["nearest_error"] for b in blocks if b["is_learned"])
    gain = learned["check"]["differences_db"]["this recipe, rounded to nearest"]
    assert gain["n"] == 16
    assert gain["mean_db"] > 0
    page = (folder / "learned" / "report.html").read_text()
    assert "The rounding of uniform codes was learned" in page
    assert "learned rounding" in (folder / "learned" / "README.md").read_text()


def test_steps_alone_and_a_denoiser_alone_are_refused(tiny_pipeline_folder, tmp_path):
    wrong = run("quantize", tiny_pipeline_folder, *UNIFORM, "-o", tmp_path / "a", "--reconstruct-steps", "9", code=3)
    assert "give --reconstruct, too" in wrong.output
    alone = tiny_pipeline_folder / "transformer"
    wrong = run("quantize", alone, *UNIFORM, "-o", tmp_path / "b", "--reconstruct", code=3)
    assert "--reconstruct runs the pipeline" in wrong.output


def test_a_dry_run_counts_the_learning(tiny_pipeline_folder, tmp_path):
    plain, more = (
        run_json("quantize", tiny_pipeline_folder, *UNIFORM, "-o", tmp_path / "a", "--dry-run", *extra, *QUICK)
        for extra in ([], ["--reconstruct"])
    )
    assert more["denoiser_calls"] > plain["denoiser_calls"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["uaq3", "uaq4"])
def test_latents_of_fresh_seeds_gain_on_the_embedded_model(text):
    pipe = sedimo.load("zoo:cifar-dit")
    graph = sedimo.trace(pipe)
    bank = sedimo.fit(pipe, sedimo.search_space(graph, f"{text},fp16"), sample_channels=2)
    recipe = bank.space.uniform(sedimo.Format.parse(text))
    on, plan = (pipe.default_sampling(seeds, 10) for seeds in (range(8), range(1000, 1016)))
    found = reconstruct(Lab(pipe, bank, graph=graph), bank, recipe, on, n_steps=100)
    reference, powers = pipe.sample(plan).numpy(), []
    for weights in (found.weights, bank.quantize(recipe)):
        with probed(pipe.denoiser, weights):
            powers.append(relative_noise(reference, pipe.sample(plan).numpy()))
    assert paired_difference(*powers).estimate.low > 0
