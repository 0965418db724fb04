"""Error feedback in the main job: better codes at the same bytes, by default, and only where it can be had."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import sedimo
from running import run, run_json
from sedimo.metrics.signal import paired_difference, relative_noise

QUICK = ["--seeds", "2", "--steps", "2", "--no-check"]
UNIFORM = ["--method", "uniform:uaq3"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pair(tiny_pipeline_folder, tmp_path_factory):
    """Folder and JSON of the same recipe with nearest codes and with feedback."""
    folder = tmp_path_factory.mktemp("compensate")
    nearest = run_json("quantize", tiny_pipeline_folder, *UNIFORM, "-o", folder / "nearest", *QUICK)
    ours = run_json("quantize", tiny_pipeline_folder, *UNIFORM, "--compensate", "-o", folder / "ours", *QUICK)
    return folder, nearest, ours


def test_bytes_scales_and_recipe_stay_and_codes_change(pair):
    folder, nearest, ours = pair
    assert (nearest["compensated"], ours["compensated"]) == (False, True)
    for key in ("recipe", "paper_bits", "stored_bits", "stored_bytes"):
        assert ours[key] == nearest[key]
    one, other = (DiffusionPipeline.from_pretrained(folder / name).transformer for name in ("nearest", "ours"))
    pairs = [
        (first.weight, second.weight)
        for first, second in zip(one.modules(), other.modules(), strict=True)
        if isinstance(getattr(first, "weight", None), sedimo.QuantizedTensor)
    ]
    assert all(torch.equal(a.parts[0].tensors["scale"], b.parts[0].tensors["scale"]) for a, b in pairs)
    assert sum(not torch.equal(a.codes(), b.codes()) for a, b in pairs) == len(pairs)


def test_samples_come_nearer_to_full_precision(pair, tiny_pipeline_folder):
    folder, _, _ = pair
    full = sedimo.load(tiny_pipeline_folder)
    plan = full.default_sampling(range(500, 516), 4)
    wanted = full.sample(plan)
    near, ours = (relative_noise(wanted, sedimo.load(folder / name).sample(plan)) for name in ("nearest", "ours"))
    assert paired_difference(ours, near).low > 1


def test_the_card_and_the_page_tell(pair):
    folder, _, _ = pair
    assert "error feedback" in (folder / "ours" / "README.md").read_text()
    assert "error feedback" not in (folder / "nearest" / "README.md").read_text()
    assert "codes by error feedback" in (folder / "ours" / "report.html").read_text()


def test_it_is_the_default_of_the_default_method_alone(tiny_pipeline_folder, tmp_path):
    budget = ["--stored-bits", "5", "--formats", "uaq3,uaq4,uaq8"]
    default = run_json("quantize", tiny_pipeline_folder, *budget, "-o", tmp_path / "a", *QUICK)
    plain = run_json("quantize", tiny_pipeline_folder, *budget, "--no-compensate", "-o", tmp_path / "b", *QUICK)
    other = run_json("quantize", tiny_pipeline_folder, *budget, "--method", "error", "-o", tmp_path / "c", *QUICK)
    assert [found["compensated"] for found in (default, plain, other)] == [True, False, False]


def test_the_same_order_gives_the_same_tensors_again(tiny_pipeline_folder, tmp_path):
    order = ["quantize", tiny_pipeline_folder, "--stored-bits", "5", "--formats", "uaq3,kmc4,uaq8", *QUICK]
    found = []
    for again in ("at first", "from the study", "anew"):
        if again == "anew":
            shutil.rmtree(tmp_path / "out.study")
        run(*order, "-o", tmp_path / "out")
        found.append(load_file(tmp_path / "out" / WEIGHTS))
        shutil.rmtree(tmp_path / "out")
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())


def test_what_cannot_be_is_refused_with_the_remedy(tiny_pipeline_folder, tmp_path):
    both = run(
        "quantize", tiny_pipeline_folder, *UNIFORM, "--compensate", "--reconstruct", "-o", tmp_path / "a", code=3
    )
    assert "give one of them" in both.output
    bare = run("quantize", tiny_pipeline_folder / "transformer", *UNIFORM, "--compensate", "-o", tmp_path / "b", code=3)
    assert "without its pipeline" in bare.output
    assert "Leave it out" in bare.output
    alone = run_json(
        "quantize", tiny_pipeline_folder / "transformer", "--stored-bits", "5", "-o", tmp_path / "c", *QUICK
    )
    assert not alone["compensated"]


def test_all_methods_are_compared_with_it(tiny_pipeline_folder, tmp_path):
    order = ["compare", tiny_pipeline_folder, "--bits", "4", "--methods", "uniform,jacobian", "--formats", "uaq3,uaq4"]
    order += ["--fresh", "4", "--seeds", "2", "--steps", "2"]
    plain = run_json(*order, "--store", tmp_path / "store")
    ours = run_json(*order, "--store", tmp_path / "store", "--compensate")
    assert "codes by error feedback" in ours["notes"]
    assert "codes by error feedback" not in plain["notes"]
    for before, after in zip(plain["rows"], ours["rows"], strict=True):
        assert after["sqnr_db"]["value"] > before["sqnr_db"]["value"] + 1
