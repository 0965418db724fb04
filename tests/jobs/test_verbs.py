"""The verbs of the public door as a script uses them, and what they refuse."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

import sedimo
from sedimo.errors import InputError, StateError
from sedimo.jobs.check import whole_recipes
from sedimo.jobs.describe import read_recipe
from sedimo.lab.exploration import Exploration

LAYER = "transformer_blocks.0.attn1.to_q"
TWINS = [f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1" for i in range(2)]


@pytest.fixture
def pipe(tiny_pipeline_folder):
    return sedimo.load(tiny_pipeline_folder)


def quick(pipe, n=3):
    return pipe.default_sampling(range(n), 2)


def test_a_plain_mapping_quantizes_a_pipeline_a_bare_denoiser_and_a_module(tiny_pipeline_folder, pipe):
    bare = sedimo.load(tiny_pipeline_folder / "transformer")
    module = sedimo.load(tiny_pipeline_folder).pipeline.transformer
    wanted = {LAYER: "uaq4g16", "proj_out_1": "kmc3"}
    whole = pipe.denoiser.get_submodule(LAYER).weight.detach().clone()
    for target in (pipe, bare, module):
        before = sedimo.memory_bytes(target)
        assert sedimo.replace(target, wanted) is target
        assert sedimo.memory_bytes(target) < before
        denoiser = target if target is module else target.denoiser
        weight = denoiser.get_submodule(LAYER).weight
        assert str(weight.format) == "uaq4g16"
        assert torch.equal(weight.dequantize(), sedimo.quantize_weight(whole, "uaq4g16").dequantize())
        assert not isinstance(denoiser.proj_out_2.weight, sedimo.QuantizedTensor)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"nowhere": "kmc3"}, r"does not have: \['nowhere'\]"),
        ({LAYER: "kmc1"}, "bits must lie in"),
        ({LAYER: "x"}, "x"),
        ({LAYER: "kmc4a9"}, "activation bits must lie in 2..8, or be 16, got 9"),
        ({TWINS[0]: "uaq4"}, "must have one format, got fp16, uaq4"),
        ({TWINS[0]: "uaq4", TWINS[1]: "uaq5"}, "must have one format, got uaq4, uaq5"),
    ],
)
def test_recipes_that_do_not_fit_are_refused_and_change_nothing(pipe, recipe, message):
    with pytest.raises(InputError, match=message):
        sedimo.replace(pipe, recipe)
    assert not isinstance(pipe.denoiser.get_submodule(LAYER).weight, sedimo.QuantizedTensor)


def test_a_bank_of_other_weights_is_refused(pipe):
    space = sedimo.search_space(sedimo.trace(pipe), "uaq4,fp16")
    other = sedimo.load(copy.deepcopy(pipe.denoiser))
    with torch.no_grad():
        other.denoiser.get_submodule(LAYER).weight.mul_(1.01)
    with pytest.raises(InputError, match=f"layer '{LAYER}' is not the one of the bank"):
        sedimo.replace(pipe, {LAYER: "uaq4"}, bank=sedimo.fit(other, space))
    sedimo.replace(pipe, {LAYER: "uaq4"}, bank=sedimo.fit(pipe, space))


def test_what_is_quantized_is_not_quantized_again(pipe):
    sedimo.replace(pipe, {LAYER: "kmc3"})
    with pytest.raises(InputError, match="already quantized"):
        sedimo.replace(pipe, {"proj_out_1": "kmc3"})


def test_a_fused_adapter_is_not_lost_unseen(pipe):
    space = sedimo.search_space(sedimo.trace(pipe), "uaq4,fp16")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), pipe.denoiser)
    with pytest.raises(InputError, match="attached to layer"):
        sedimo.trace(pipe)
    for module in [m for m in pipe.denoiser.modules() if isinstance(m, BaseTunerLayer)]:
        module.merge()
    with pytest.raises(InputError, match="merged into layer"):
        sedimo.replace(pipe, {LAYER: "uaq4"})
    recurse_remove_peft_layers(pipe.denoiser)  # what unload_lora_weights() does
    with pytest.raises(InputError, match=r"layer '.*' is not the one in .*Save the pipeline"):
        sedimo.fit(pipe, space)
    again = sedimo.load(pipe.pipeline)  # an object is what it holds
    sedimo.replace(again, {LAYER: "uaq8"})
    assert isinstance(again.denoiser.get_submodule(LAYER).weight, sedimo.QuantizedTensor)


def test_a_folder_that_was_saved_with_an_adapter_is_named_as_such(pipe, tmp_path):
    shutil.copytree(pipe.folder, tmp_path / "adapted")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipe.denoiser)
    pipe.pipeline.transformer.save_pretrained(tmp_path / "adapted" / "transformer")
    for source in (tmp_path / "adapted", tmp_path / "adapted" / "transformer"):
        with pytest.raises(InputError, match="holds an adapter"):
            sedimo.load(source)


def test_a_damaged_component_is_named(tiny_pipeline_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_pipeline_folder, folder)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["decoder.conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(StateError, match=r"vae lack 1 tensors, such as 'decoder.conv_in.weight'"):
        sedimo.load(folder)


@pytest.mark.parametrize("value", ["sedimo", ["x"]])
def test_a_quantization_that_is_no_object_is_refused(tiny_pipeline_folder, tmp_path, value):
    folder = tmp_path / "strange"
    shutil.copytree(tiny_pipeline_folder, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": value}))
    for source in (folder, folder / "transformer"):
        with pytest.raises(StateError, match="quantization_config must be an object"):
            sedimo.load(source)


@pytest.mark.filterwarnings("ignore:sedimo.*ends with the next release")
def test_the_way_of_the_readme(pipe, tmp_path):
    space = sedimo.search_space(sedimo.trace(pipe), "paper")
    bank = sedimo.fit(pipe, space, cache=tmp_path / "run")
    probe = sedimo.probe(pipe, bank, "jacobian", store=tmp_path / "run", sampling=quick(pipe))
    table = sedimo.attribute(probe)
    choice = sedimo.allocate(table, bits=7.0)
    report = sedimo.report(None, table, choice, path=tmp_path / "report.html")
    assert "<svg" in report.read_text()
    sedimo.replace(pipe, choice.recipe, bank=bank)
    pipe.save_pretrained(tmp_path / "small")
    assert f"{pipe.name}, quantized by Sedimo" in (tmp_path / "small" / "README.md").read_text()
    assert read_recipe(str(tmp_path / "small" / "sedimo_recipe.json")) == read_recipe(str(tmp_path / "small"))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "small").transformer
    for name, entry in choice.recipe.layers.items():
        weight = loaded.get_submodule(name).weight
        assert isinstance(weight, sedimo.QuantizedTensor) == entry.is_quantized, name


@pytest.mark.filterwarnings("ignore:sedimo.*ends with the next release")
def test_a_study_is_explored_on_and_never_mixed(pipe, tmp_path):
    bank = sedimo.fit(pipe, sedimo.search_space(sedimo.trace(pipe), "uaq4,uaq8"))
    study = sedimo.explore(pipe, bank, store=tmp_path, trials=2, sampling=quick(pipe))
    first = {trial.key: trial for trial in study.trials()}
    study = sedimo.explore(pipe, bank, store=tmp_path, trials=4, sampling=quick(pipe))
    assert {key: trial for trial in study.trials() if (key := trial.key) in first} == first
    stratified = Exploration(0, bank.space, "stratified")
    assert {t.recipe.key for t in study.trials()} == {stratified.recipe(i).key for i in range(4)}
    with pytest.raises(StateError, match="another exploration"):
        sedimo.explore(pipe, bank, store=tmp_path, trials=1, seed=1, sampling=quick(pipe))


@pytest.mark.filterwarnings("ignore:sedimo.*ends with the next release")
def test_the_report_checks_additivity_on_whole_recipes_of_one_setting(pipe, tmp_path):
    bank = sedimo.fit(pipe, sedimo.search_space(sedimo.trace(pipe), "uaq4,uaq8,fp16"))
    table = sedimo.attribute(bank)
    study = sedimo.explore(pipe, bank, store=tmp_path, trials=4, sampling=quick(pipe))
    sedimo.explore(pipe, bank, store=tmp_path, trials=2, sampling=quick(pipe, 2))
    sedimo.probe(pipe, bank, "ablation", store=study, sampling=quick(pipe))
    found = whole_recipes(study, table)
    n_quantized = [sum(f.is_quantized for f in bank.space.choice(t.recipe).values()) for t in found]
    assert 0 < len(found) <= 4
    assert min(n_quantized) > len(bank.space.decisions) / 2
    assert len({t.setting.key for t in found}) == 1
    path = sedimo.report(study, table, sedimo.allocate(table, bits=8.5), path=tmp_path / "report.html")
    assert path.is_file()


def card_of(folder):
    return (folder / "README.md").read_text()


def test_the_card_says_how_other_components_came_and_from_what(pipe, tiny_pipeline_folder, tmp_path):
    sedimo.replace(pipe, {LAYER: "kmc3"})
    small = pipe.save_pretrained(tmp_path / "small")
    assert "- base model: pipeline\n" in card_of(small)
    assert "- files of other components: 3 copied from the source folder\n" in card_of(small)
    again = sedimo.load(small)
    again.pipeline.scheduler = copy.deepcopy(again.pipeline.scheduler)
    card = card_of(again.save_pretrained(tmp_path / "again"))
    assert "base_model: pipeline\n" in card, "that of the packed source's card, not the packed source"
    assert "2 copied from the source folder, those of scheduler written anew\n" in card
    (small / "README.md").unlink()
    assert "base_model:" not in card_of(sedimo.load(small).save_pretrained(tmp_path / "unknown"))
    module = sedimo.load(tiny_pipeline_folder).denoiser
    card = card_of(sedimo.load(sedimo.replace(module, {LAYER: "kmc3"})).save_pretrained(tmp_path / "bare"))
    assert "# DiTTransformer2DModel, quantized by Sedimo\n" in card
    assert "base" not in card
    assert "other components" not in card


def test_old_uses_warn_and_say_what_to_write(pipe, tmp_path):
    bank = sedimo.fit(pipe, sedimo.search_space(sedimo.trace(pipe), "uaq4"))
    with pytest.warns(DeprecationWarning, match=r"use sedimo\.Lab"):
        sedimo.attribute(bank)
    with pytest.warns(DeprecationWarning, match=r"use sedimo\.Lab"):
        sedimo.probe(pipe, bank, "ablation", store=tmp_path, sampling=quick(pipe))
    with pytest.warns(DeprecationWarning, match=r"use sedimo\.replace"):
        sedimo.quantize(pipe, {LAYER: "uaq4"})


def test_a_recipe_is_used_for_a_source_by_name_too(tiny_pipeline_folder, tmp_path):
    found = sedimo.quantize(tiny_pipeline_folder, {LAYER: "uaq4"}, out=tmp_path / "out", check=False)
    assert str(found.allocation.recipe.layers[LAYER]) == "uaq4"
    with pytest.raises(InputError, match="a recipe decides everything"):
        sedimo.quantize(tiny_pipeline_folder, {LAYER: "uaq4"}, bits=3.0, out=tmp_path / "other")
