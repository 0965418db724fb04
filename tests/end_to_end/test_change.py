"""Other formats for single layers of a checkpoint, as a person types it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import sedimo
from running import run

TIED = [f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1" for i in range(2)]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def packed(tiny_pipeline_folder, tmp_path_factory):
    """Everything at uaq4, but for the layers that are too small for it."""
    out = tmp_path_factory.mktemp("packed") / "small"
    run("quantize", tiny_pipeline_folder, "--method", "uniform:uaq4", "-o", out, "--no-check")
    return out


def test_named_layers_and_their_twins_change_and_nothing_else(packed, tiny_pipeline_folder, tmp_path):
    out = tmp_path / "better"
    changes = ("proj_out_1=kmc3", f"{TIED[1]}=uaq6")
    found = json.loads(run("change", packed, *changes, "--source", tiny_pipeline_folder, "-o", out, "--json").stdout)
    assert found["changed"] == {
        "proj_out_1": {"before": "uaq4", "after": "kmc3"},
        TIED[0]: {"before": "uaq4", "after": "uaq6"},
        TIED[1]: {"before": "uaq4", "after": "uaq6"},
    }
    differences = json.loads(run("diff", packed, out, "--json").stdout)["differences"]
    assert {d["layer"] for d in differences} == set(found["changed"])
    assert json.loads(run("diff", out, out / "sedimo_recipe.json", "--json").stdout) == {"differences": []}
    assert "| `proj_out_1` | 1 | 2,048 | kmc3 |" in (out / "README.md").read_text()
    before, after = load_file(packed / WEIGHTS), load_file(out / WEIGHTS)
    same = [n for n in before if not n.startswith(("proj_out_1.weight", TIED[0], TIED[1]))]
    assert len(same) > 20
    assert all(torch.equal(before[name], after[name]) for name in same)
    weight = DiffusionPipeline.from_pretrained(out).transformer.proj_out_1.weight
    source = sedimo.load(tiny_pipeline_folder).denoiser.proj_out_1.weight
    assert torch.equal(weight.dequantize(), sedimo.quantize_weight(source, "kmc3").dequantize())
    table = run("change", packed, *changes, "--source", tiny_pipeline_folder, "-o", tmp_path / "again").stdout
    assert "kmc3" in table


def test_another_source_is_refused(packed, tiny_pipeline_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline_folder, other)
    weights = load_file(other / WEIGHTS)
    weights["proj_out_1.weight"] = -weights["proj_out_1.weight"]
    weights["proj_out_2.weight"] = weights["proj_out_2.weight"][:8].contiguous()
    save_file(weights, other / WEIGHTS, metadata={"format": "pt"})
    for layer, message in (("proj_out_1", "differs from the source by"), ("proj_out_2", "in the source; give")):
        arguments = ("change", packed, f"{layer}=uaq5", "--source", other, "-o", tmp_path / "out")
        assert message in run(*arguments, code=3).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("proj_out_1", "LAYER=FORMAT"),
        ("proj_out_1=kmc9", "bits must lie in"),
        ("proj_out_1=fp16", "cannot be left alone again"),
        ("proj_out_1=kmc4a8", "keeps how activations are rounded, got kmc4a8; use kmc4"),
        ("nowhere=kmc3", "no weight of a layer 'nowhere'"),
        (f"{TIED[0]}=uaq5 {TIED[1]}=uaq6", "must get the same format"),
        ("proj_out_1=uaq5 proj_out_1=uaq6", "two formats"),
    ],
)
def test_changes_that_make_no_sense_are_refused(packed, tiny_pipeline_folder, tmp_path, change, message):
    arguments = ("change", packed, *change.split(), "--source", tiny_pipeline_folder, "-o", tmp_path / "out")
    assert message in run(*arguments, code=3).stderr


def test_only_packed_checkpoints_change(tiny_pipeline_folder, tmp_path):
    source = tiny_pipeline_folder
    result = run("change", source, "proj_out_1=kmc3", "--source", source, "-o", tmp_path / "out", code=4)
    assert "is not packed" in result.stderr
