"""Sources with values, files or variants that spoil a job: refused early and by name, or worked around and said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sedimo
from running import run
from sedimo.errors import InputError, StateError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn1.to_k"
TABLE = torch.arange(9)
QUICK = ("--seeds", "2", "--steps", "2")


@pytest.fixture
def changed(tiny_pipeline_folder, tmp_path):
    """A copy of the pipeline in which one tensor was changed."""

    def make(name, change, target=WEIGHTS):
        folder = tmp_path / "changed"
        shutil.copytree(tiny_pipeline_folder, folder, dirs_exist_ok=True)
        weights = load_file(tiny_pipeline_folder / WEIGHTS)
        change(weights[name])
        save_file(weights, folder / target, metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("name", ["proj_out_2.bias", f"{LAYER}.weight"])
@pytest.mark.parametrize("method", ["error", "jacobian"])
def test_nan_anywhere_is_named_before_anything_is_measured(changed, tmp_path, name, method):
    source = changed(name, lambda t: t.view(-1)[:1].fill_(float("nan")))
    result = run("quantize", source, "--bits", "4.5", "--method", method, "-o", tmp_path / "out", "--json", code=3)
    assert f"'{name}' of the denoiser holds NaN" in result.stderr
    assert result.stdout == ""
    assert "fitting" not in result.stderr


def test_a_layer_with_nan_can_be_left_alone(changed):
    pipe = sedimo.load(changed(f"{LAYER}.weight", lambda t: t[:1].fill_(float("nan"))))
    sedimo.replace(pipe, {"proj_out_1": "kma4"})
    with pytest.raises(InputError, match=f"{LAYER}.*NaN"):
        sedimo.replace(sedimo.load(pipe.folder), {LAYER: "kma4"})


def test_a_format_that_cannot_hold_a_layer_is_dropped_for_it_alone(changed, tmp_path):
    source = changed("proj_out_2.weight", lambda t: t.mul_(1e9))
    arguments = ("quantize", source, "--bits", "5", "--formats", "uaq3g16,uaq4g16,kma4,fp16", "--no-check", *QUICK)
    for method in ("error", "jacobian"):
        recipe = json.loads(run(*arguments, "--method", method, "-o", tmp_path / method, "--json").stdout)["recipe"]
        assert recipe["proj_out_2"] in ("kma4", "fp16")
        assert any("g16" in entry for entry in recipe.values())
        assert "proj_out_2: uaq3g16, uaq4g16 cannot hold" in (tmp_path / method / "report.html").read_text()
    result = run("quantize", source, "--bits", "7", "--formats", "uaq4g16", "-o", tmp_path / "x", code=3)
    assert "can be held by none of uaq4g16" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "1.5"), "1.5 paper bits per weight cannot be kept: no choice of formats keeps the budget of"),
        (("--bytes", "10"), "10 bytes cannot be kept"),
        (("--bops", "1M"), "1M bit operations cannot be kept: no choice of formats keeps the budget of 1000000 bit"),
        (("--bits", "9", "--bops", "3%"), "9 paper bits per weight and 3% of the bit operations cannot be kept"),
        (("--bops", "3 percent"), "bit operations are written as a positive number"),
        (("--bits", "16", "--formats", "fp16"), "leave every layer as it is"),
    ],
)
def test_budgets_and_formats_that_cannot_work_are_refused_at_once(tiny_pipeline_folder, tmp_path, options, message):
    for last in (("--dry-run",), ("-o", tmp_path / "out")):
        result = run("quantize", tiny_pipeline_folder, "--method", "jacobian", *options, *last, code=3)
        assert message in result.stderr
        assert "fitting" not in result.stderr


def test_a_budget_that_changes_nothing_writes_nothing(tiny_pipeline_folder, tmp_path):
    options = ("--bits", "16", "--method", "error", "--no-check", "-o", tmp_path / "out")
    assert "nothing to write" in run("quantize", tiny_pipeline_folder, *options, code=3).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["", "."])
def test_the_working_folder_is_not_replaced(tiny_pipeline_folder, tmp_path, monkeypatch, out):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    result = run("quantize", tiny_pipeline_folder, "--method", "uniform:kma4", "--no-check", "-o", out, code=3)
    assert "cannot be the working folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_a_checkpoint_is_compared_with_its_own_source_only(changed, tiny_pipeline_folder, tmp_path):
    source = changed("proj_out_1.weight", lambda t: t.neg_(), target=WEIGHTS.replace(".safe", ".fp16.safe"))
    out = tmp_path / "out"
    run("quantize", source, "--variant", "fp16", "--method", "uniform:kma4", "--no-check", "-o", out)
    wrong = run("evaluate", out, "--against", source, *QUICK, code=3)
    assert "'proj_out_1' of the checkpoint differs from the source" in wrong.stderr
    right = json.loads(run("evaluate", out, "--against", source, "--variant", "fp16", *QUICK, "--json").stdout)
    assert right["sqnr_db"]["value"] > 0
    change = ("change", out, "proj_out_1=uaq6", "--source", source, "-o", tmp_path / "better")
    assert "differs from the source" in run(*change, code=3).stderr
    run(*change, "--variant", "fp16")


@pytest.mark.filterwarnings("ignore:sedimo.*ends with the next release")
def test_a_missing_config_and_a_bare_denoiser_are_named(tiny_pipeline_folder, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(tiny_pipeline_folder, folder)
    bare = sedimo.load(folder / "transformer")
    bank = sedimo.fit(bare, sedimo.search_space(sedimo.trace(bare), "kma4"))
    with pytest.raises(InputError, match="without its pipeline and cannot be sampled"):
        sedimo.probe(bare, bank, store=tmp_path / "run")
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(StateError, match=r"config.json is missing"):
        sedimo.load(folder)


def test_recipes_of_different_denoisers_have_no_difference_to_show(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(sedimo.Recipe.from_mapping({f"layer_{name}": "kmc4"}).to_json())
    assert "no layer in common" in run("diff", tmp_path / "a", tmp_path / "b", code=3).stderr


def test_an_open_slice_is_no_table():
    class Positional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(8, 8)

        def forward(self, hidden_states):
            return self.proj(hidden_states) + float(TABLE[1:].shape[0])  # a slice without an end, of a real tensor

    with torch.device("meta"):
        denoiser = Positional()
    assert len(sedimo.trace(denoiser).layers) == 1
