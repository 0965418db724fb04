"""The commands on a tiny pipeline, as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from diffusers import DiffusionPipeline

import sedimo
from running import run, run_json
from sedimo.errors import InputError
from sedimo.methods.predictor.training import FAST

QUICK = ["--seeds", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def quantized(tiny_pipeline_folder, tmp_path_factory):
    """A checkpoint by the combined method at 4.5 bits, and what the command printed."""
    out = tmp_path_factory.mktemp("job") / "small"
    arguments = ("quantize", tiny_pipeline_folder, "--bits", "4.5", "-o", out, "--method", "combined", *QUICK)
    return out, run_json(*arguments)


def test_inspect_prints_what_the_design_promises(tiny_pipeline_folder):
    found = run_json("inspect", tiny_pipeline_folder)
    assert found.keys() >= {"denoiser", "n_layers", "n_decisions", "n_nodes", "n_edges", "n_groups", "params", "macs"}
    assert found["n_layers"] == len(found["layers"]) == 21
    assert found["n_decisions"] == 19  # the two blocks hold equal timestep embedders
    assert found["layers"][0].keys() >= {"name", "operation", "block", "shape", "params", "macs"}
    assert "proj_out_2" in run("inspect", tiny_pipeline_folder).stdout


def test_quantize_keeps_its_budget_and_its_promises(quantized):
    out, found = quantized
    assert found["paper_bits"] <= 4.5
    assert found["method"] == "ablation+jacobian"
    assert found["status"] in ("optimal", "feasible")
    assert (
        found["stored_bytes"]
        < found["file_bytes"]
        == sum(f.stat().st_size for f in out.rglob("*.safetensors"))
        - ((out / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size)
    )
    assert found["peak_rss_bytes"] > 1e6
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "sedimo" in (out / "README.md").read_text().lower()


def test_the_check_uses_fresh_seeds_and_gives_errors(quantized):
    check = quantized[1]["check"]
    assert min(check["seeds"]) >= 2
    sqnr = check["recipes"]["this recipe"]["sqnr_db"]
    assert sqnr["n"] == len(check["seeds"])
    assert sqnr["low"] < sqnr["value"] < sqnr["high"]


def test_what_was_written_loads_with_plain_diffusers_and_is_what_was_checked(quantized, tiny_pipeline_folder):
    out, _ = quantized
    code = (
        "import sys, torch, sedimo\n"
        "from diffusers import DiffusionPipeline\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1]); pipe.set_progress_bar_config(disable=True)\n"
        "image = pipe([1, 2], num_inference_steps=2, generator=torch.manual_seed(0), output_type='pt').images\n"
        "print(float(image.double().sum()).hex())\n"
    )
    command = [sys.executable, "-c", code, str(out), str(torch.get_num_threads())]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plain = DiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    packed = DiffusionPipeline.from_pretrained(out)
    with torch.no_grad():
        for name, module in packed.transformer.named_modules():
            if isinstance(getattr(module, "weight", None), sedimo.QuantizedTensor):
                plain.transformer.get_submodule(name).weight.copy_(module.weight.dequantize())
    images = []
    for pipe in (plain, packed):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.manual_seed(0)
        images.append(pipe([1, 2], num_inference_steps=2, generator=generator, output_type="pt").images)
    assert torch.equal(*images)
    assert float(images[0].double().sum()).hex() == printed.strip().splitlines()[-1]


def test_evaluate_compares_with_the_source(quantized, tiny_pipeline_folder):
    found = run_json("evaluate", quantized[0], "--against", tiny_pipeline_folder, *QUICK)
    assert found["sqnr_db"].keys() >= {"value", "standard_error", "n"}
    assert found["size"]["file_bytes"] == quantized[1]["file_bytes"]
    assert found["size"]["memory_bytes"] < found["size"]["source_memory_bytes"]
    assert 0 < found["bops"]["bops"] <= found["bops"]["source_bops"]
    assert (found["sqnr_pooled_db"]["n"], found["n_exact"]) == (2, 0)
    same = run_json("evaluate", tiny_pipeline_folder, "--against", tiny_pipeline_folder, *QUICK)
    assert same["sqnr_db"]["value"] == {"float": "inf"}
    assert same["n_exact"] == 2
    assert same["bops"]["bops"] == same["bops"]["source_bops"]


def test_evaluate_corrects_the_noise_in_the_sampler(quantized, tiny_pipeline_folder):
    plain = run_json("evaluate", quantized[0], "--against", tiny_pipeline_folder, *QUICK)
    found = run_json("evaluate", quantized[0], "--against", tiny_pipeline_folder, *QUICK, "--correct")
    fixed = found.pop("corrected")
    assert found == plain
    assert fixed["gain"].keys() == {"sqnr_db"}
    gain = fixed["measures"]["sqnr_db"]["value"] - found["sqnr_db"]["value"]
    assert fixed["gain"]["sqnr_db"]["value"] == pytest.approx(gain)
    assert fixed["seeds"] == list(range(2, 18))
    assert all(fit["slope"]["n"] == 16 and len(fit["bias"]) == 4 for fit in fixed["fits"])
    assert "DDIMScheduler added no noise" in fixed["done"]
    people = run("evaluate", quantized[0], "--against", tiny_pipeline_folder, *QUICK, "--correct=output").output
    assert "gain of sqnr_db" in people
    assert "left alone as asked; estimated from 16 other seeds" in people


def test_too_few_images_for_a_distribution_are_refused_at_once(quantized, tiny_pipeline_folder):
    out = quantized[0]
    result = run("evaluate", out, "--against", tiny_pipeline_folder, "--images", "19", *QUICK, code=3)
    assert "at least 20 images, got 19" in result.output


def test_inspect_shows_the_formats_of_a_packed_checkpoint(quantized, tiny_pipeline_folder):
    out, job = quantized
    found, source = run_json("inspect", out), run_json("inspect", tiny_pipeline_folder)
    assert {layer["name"]: layer["format"] for layer in found["layers"]} == job["recipe"]
    assert [layer["macs"] for layer in found["layers"]] == [layer["macs"] for layer in source["layers"]]
    assert all(found[key] == source[key] for key in ("n_decisions", "params", "macs", "n_groups"))
    assert (found["file_bytes"], found["stored_bytes"]) == (job["file_bytes"], job["stored_bytes"])
    assert "packed: " in run("inspect", out).stdout


def test_diff_of_a_checkpoint_and_its_recipe_file_is_empty(quantized):
    out, _ = quantized
    assert run_json("diff", out, out / "sedimo_recipe.json") == {"differences": []}
    changed = json.loads((out / "sedimo_recipe.json").read_text())
    changed["layers"]["proj_out_1"] = "uaq2"
    other = out.parent / "other.json"
    other.write_text(json.dumps(changed))
    assert [d["layer"] for d in run_json("diff", out, other)["differences"]] == ["proj_out_1"]


def test_a_recipe_file_is_followed_to_the_letter(quantized, tiny_pipeline_folder, tmp_path):
    recipe = quantized[0] / "sedimo_recipe.json"
    found = run_json(
        "quantize", tiny_pipeline_folder, "--recipe", recipe, "-o", tmp_path / "again", "--no-check", *QUICK
    )
    assert found["recipe"] == quantized[1]["recipe"]
    assert run_json("diff", quantized[0], tmp_path / "again") == {"differences": []}


def test_another_budget_and_the_report_need_no_second_measurement(quantized, tmp_path):
    study = quantized[0].with_name("small.study")
    found = run_json("allocate", study, "--bits", "3.5", "-o", tmp_path / "recipe.json")
    assert json.loads((tmp_path / "recipe.json").read_text())["layers"] == found["recipe"]
    assert found["bits"] <= 3.5
    assert found.keys() >= {"recipe", "bits", "objective", "bound", "gap", "status"}
    again = run_json("report", study)["report"]
    assert Path(again).read_text() == (quantized[0] / "report.html").read_text()


def test_a_second_run_measures_nothing_again(quantized, tiny_pipeline_folder, monkeypatch):
    from sedimo.lab import measuring

    monkeypatch.setattr(measuring, "measure", lambda *_: pytest.fail("a trial was measured again"))
    out = quantized[0].with_name("second")
    study = copytree(quantized[0].with_name("small.study"), out.with_name("second.study"))
    again = run_json(
        "quantize", tiny_pipeline_folder, "--bits", "4.5", "-o", out, "--method", "combined", "--store", study, *QUICK
    )
    assert again["recipe"] == quantized[1]["recipe"]


@pytest.mark.parametrize("method", ["error", "jacobian", "ablation", "uniform:kma4", "auto"])
def test_every_method_does_the_whole_job(tiny_pipeline_folder, tmp_path, method):
    budget = [] if method.startswith("uniform") else ["--bits", "4.5"]
    formats = ["--formats", "kma3,kma4,uaq4,fp16"]
    found = run_json(
        "quantize", tiny_pipeline_folder, *budget, "-o", tmp_path / "out", "--method", method, *formats, *QUICK
    )
    assert found["out"] == str(tmp_path / "out")
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").transformer is not None


def test_a_denoiser_alone_is_quantized_by_weight_error(tiny_pipeline_folder, tmp_path):
    found = run_json("quantize", tiny_pipeline_folder / "transformer", "--bits", "4.5", "-o", tmp_path / "out")
    assert found["method"] == "error"
    assert "without its pipeline" in found["reason"]
    assert "check" not in found


def test_a_dry_run_tells_what_it_would_take_and_writes_nothing(tiny_pipeline_folder, tmp_path):
    found = run_json(
        "quantize",
        tiny_pipeline_folder,
        "--bits",
        "4.5",
        "-o",
        tmp_path / "out",
        "--method",
        "ablation",
        "--dry-run",
        *QUICK,
    )
    assert found["denoiser_calls"] > 0
    assert found["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--bits", "1"], 3, "least possible"),
        (["--bits", "nan"], 3, "must be positive"),
        (["--bits", "3", "--bytes", "9"], 3, "give one size"),
        ([], 3, "a budget is needed"),
        (["--bits", "3", "--method", "magic"], 3, "method must be one of"),
        (["--bits", "3", "--formats", "kmc1"], 3, "bits must lie in 2..8"),
        (["--method", "uniform:kmc9"], 3, "bits must lie in 2..8"),
        (["--bits", "three"], 2, "not a valid float"),
        (["--bits", "3", "--device", "abacus"], 3, "device"),
    ],
)
def test_bad_orders_are_refused_and_nothing_is_written(tiny_pipeline_folder, tmp_path, arguments, code, complaint):
    result = run("quantize", tiny_pipeline_folder, "-o", tmp_path / "out", *arguments, *QUICK, code=code)
    assert complaint in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_and_a_quantized_source_are_refused(quantized, tiny_pipeline_folder, tmp_path):
    result = run("quantize", tiny_pipeline_folder, "--bits", "4", "-o", quantized[0], code=3)
    assert "exists already" in result.stderr
    result = run("quantize", quantized[0], "--bits", "4", "-o", tmp_path / "out", code=3)
    assert "quantized already" in result.stderr
    result = run("quantize", tmp_path / "nowhere", "--bits", "4", "-o", tmp_path / "out", code=3)
    assert "no folder" in result.stderr


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_measured(tiny_pipeline_folder, tmp_path):
    job = ("quantize", tiny_pipeline_folder, "--bits", "4", *QUICK)
    (tmp_path / "file").write_text("x")
    for options, complaint in (
        (("-o", tiny_pipeline_folder / "small"), "must not lie in the source"),
        (("-o", tmp_path / "out", "--store", tmp_path / "out" / "study"), "must not lie in the output"),
        (("-o", tmp_path / "file"), "exists already"),
        (("-o", tmp_path / "file" / "out"), "file"),
        ((), "an output folder is needed"),
    ):
        assert complaint in run(*job, *options, code=3).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_no_text_is_a_clear_error(tiny_pipeline_folder, tmp_path):
    (tmp_path / "prompts").write_bytes(bytes([255, 254, 0]))
    options = ("--bits", "4", "-o", tmp_path / "out", "--prompts", tmp_path / "prompts")
    assert "is not UTF-8 text" in run("quantize", tiny_pipeline_folder, *options, code=3).stderr


def test_what_cannot_be_done_yet_or_means_nothing_is_refused_at_once(tiny_pipeline_folder, tmp_path):
    out = ("-o", tmp_path / "out")
    for options in (("--method", "uniform:kma4a9"), ("--bits", "4", "--formats", "kma4a9,kma6")):
        result = run("quantize", tiny_pipeline_folder, *options, *out, code=3)
        assert "activation bits must lie in 2..8" in result.stderr
    result = run("quantize", tiny_pipeline_folder, "--bits", "4", "--guidance", "nan", *out, code=3)
    assert "--guidance must be a finite number" in result.stderr


def test_a_denoiser_with_arguments_of_unknown_names_is_traced_through_its_pipeline(tiny_pipeline_folder, monkeypatch):
    from sedimo.lab import bench

    real, asked = bench.trace, []

    def trace(pipe, **options):
        asked.append(type(pipe).__name__)
        if len(asked) == 1:
            raise InputError("it requires the arguments x, for which no example is known")
        return real(pipe, **options)

    monkeypatch.setattr(bench, "trace", trace)
    run("quantize", tiny_pipeline_folder, "--bits", "4.5", "--method", "error", "--dry-run", "-o", "out")
    assert asked == ["BareDenoiser", "DiffusersPipeline"]


def test_a_resumed_job_keeps_the_method_that_it_began_with(tiny_pipeline_folder, tmp_path, monkeypatch):
    from sedimo.jobs import quantize as job
    from sedimo.methods import auto

    options = ("quantize", tiny_pipeline_folder, "--bits", "4.5", "--no-check", "--store", tmp_path / "study", *QUICK)
    first = run_json(*options, "-o", tmp_path / "a")
    monkeypatch.setattr(auto, "PATIENCE_SECONDS", 0.0)  # as if the machine had become slow
    monkeypatch.setattr(job, "_plan", lambda *_: pytest.fail("planned again"))
    assert run_json(*options, "-o", tmp_path / "b")["method"] == first["method"]


def test_the_demo_replaces_only_what_a_demo_wrote(tmp_path, tiny_pipeline_folder, monkeypatch):
    from sedimo.jobs import demo

    monkeypatch.setattr(demo, "SOURCE", str(tiny_pipeline_folder))
    monkeypatch.setattr(demo, "SAMPLING", demo.SamplingSettings(n_seeds=2, n_steps=2, n_check_seeds=2))
    quick = replace(FAST, n_folds=2, n_epochs=2, patience=1)
    monkeypatch.setattr(demo, "SEARCHED", replace(demo.SEARCHED, n_trials=24, n_rounds=0, training=quick))
    run("demo", "-o", tmp_path / "demo", "--bits", "4.5")
    found = run_json("demo", "-o", tmp_path / "demo", "--bits", "5")
    assert found["paper_bits"] <= 5
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    assert "no demo wrote" in run("demo", "-o", foreign, code=3).stderr
    assert (foreign / "thesis.txt").read_text() == "x"


def test_help_answers_without_loading_anything_heavy():
    code = "import sys; from sedimo.cli.main import main; main(['--help'], standalone_mode=False); " + (
        "print([m for m in ('torch', 'diffusers', 'numba', 'scipy', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


def test_run_learns_from_measured_recipes_and_explains(tmp_path, tiny_pipeline_folder):
    common = (
        "--bits",
        "5",
        "--formats",
        "uaq3,uaq4,uaq6",
        "--trials",
        "40",
        "--refine",
        "1",
        "--seeds",
        "2",
        "--steps",
        "2",
    )
    out = tmp_path / "small"
    planned = run_json("run", tiny_pipeline_folder, *common, "-o", out, "--dry-run")
    assert planned["method"] == "gnn"
    assert planned["denoiser_calls"] > 40 * 2
    assert not out.exists()
    found = run_json("run", tiny_pipeline_folder, *common, "-o", out, "--level", "groups")
    assert found["method"] == "gnn"
    assert found["paper_bits"] <= 5
    page = (out / "report.html").read_text()
    assert "What matters here" in page
    assert "ridge on one-hot choices" in page
    assert found["explanation"]["insights"][0]["verdict"] in ("confirmed", "refuted", "open")
    assert run_json("report", tmp_path / "small.study")["explanation"] == found["explanation"]
    loaded = DiffusionPipeline.from_pretrained(out)
    assert any(isinstance(p, sedimo.QuantizedTensor) for p in loaded.transformer.parameters())
    trials = run_json("trials", tmp_path / "small.study")["trials"]
    again = run_json(
        "run",
        tiny_pipeline_folder,
        *common,
        "-o",
        tmp_path / "again",
        "--store",
        tmp_path / "small.study",
        "--level",
        "groups",
    )
    assert again["recipe"] == found["recipe"]
    assert len(run_json("trials", tmp_path / "small.study")["trials"]) == len(trials)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trials", "5"), "at least 20 trials"),
        (("--trials", "30", "--refine", "3"), "too few for 3 rounds"),
        (("--target", "__import__('os')"), "target"),
        (("--target", "beauty"), "can predict sqnr_db"),
        (("--prior", "guess"), "prior must be one of"),
    ],
)
def test_run_refuses_nonsense_before_it_measures(tmp_path, tiny_pipeline_folder, arguments, message):
    result = run("run", tiny_pipeline_folder, "--bits", "5", *arguments, "-o", tmp_path / "small", code=3)
    assert message in result.stderr
    assert not (tmp_path / "small").exists()
