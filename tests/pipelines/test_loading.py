import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

from sedimo.errors import InputError, StateError
from sedimo.lab.bench import weights_of
from sedimo.pipelines import loading
from sedimo.pipelines.diffusers import BareDenoiser, DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.weights import FileWeights, stored_dtype

pytest_plugins = ["tiny_pipelines"]


@pytest.fixture
def folder(tiny_pipeline_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "tiny"))


def sampled(adapter):
    return adapter.sample(adapter.default_sampling((1, 2), 2))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_becomes_a_pipeline(folder, capfd):
    adapter = load_pipeline(folder, device="cpu")
    assert (adapter.name, adapter.folder, adapter.denoiser_name) == ("tiny", folder, "transformer")
    assert (adapter.device.type, adapter.dtype, adapter.is_quantized) == ("cpu", torch.float32, False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_dtype_by_name_or_object(folder, dtype):
    assert load_pipeline(str(folder), device="cpu", dtype=dtype).dtype is torch.bfloat16


@pytest.mark.parametrize(("instructions", "n_warnings"), [((), 1), (("avx512_bf16",), 0), (("amx_tile",), 0)])
def test_bfloat16_on_a_processor_without_it_is_warned_of_once(folder, monkeypatch, caplog, instructions, n_warnings):
    monkeypatch.setattr(loading.platform, "machine", lambda: "x86_64")
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions)
    loading._warn_of_slow_bfloat16.cache_clear()
    assert load_pipeline(folder, device="cpu").dtype is torch.float32
    load_pipeline(folder / "transformer", device="cpu", dtype=torch.bfloat16)  # alone: traced, never sampled
    assert not caplog.records
    for _ in range(2):
        assert load_pipeline(folder, device="cpu", dtype="bf16").dtype is torch.bfloat16
    assert [r.levelname for r in caplog.records] == ["WARNING"] * n_warnings
    assert all("slower than fp32" in r.message for r in caplog.records)


def test_what_arm_processors_have_is_asked_of_the_library_that_computes(monkeypatch):
    monkeypatch.setattr(loading.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert not loading._cpu_multiplies_bfloat16()


def test_half_weights_are_widened_on_the_cpu(folder):
    DiffusionPipeline.from_pretrained(folder).to(torch.float16).save_pretrained(folder)
    assert load_pipeline(folder, device="cpu").dtype is torch.float32
    assert stored_dtype(FileWeights(folder).files) is torch.float16


def test_objects_stay_as_they_are(tiny_pipeline_folder):
    pipeline = DiffusionPipeline.from_pretrained(tiny_pipeline_folder).to(torch.float64)
    adapter = load_pipeline(pipeline)
    assert adapter.pipeline is pipeline
    assert (adapter.dtype, adapter.name, adapter.folder) == (torch.float64, "DiTPipeline", None)
    assert load_pipeline(pipeline, device="cpu", dtype="fp32").dtype is torch.float32


def test_a_bare_denoiser_object(tiny_dit):
    bare = load_pipeline(tiny_dit)
    assert isinstance(bare, BareDenoiser)
    assert bare.denoiser is tiny_dit


def test_a_denoiser_folder_becomes_a_bare_denoiser(folder, tiny_dit):
    bare = load_pipeline(folder / "transformer", device="cpu")
    assert isinstance(bare, BareDenoiser)
    assert bare.name == "transformer"
    assert torch.equal(bare.denoiser.proj_out_2.weight, tiny_dit.proj_out_2.weight)
    assert not bare.denoiser.training


@pytest.mark.parametrize("size", ["1GB", "100KB"])
def test_a_variant_is_found_and_saved_under_the_plain_name(folder, tmp_path, size):
    plain = load_pipeline(folder, device="cpu", dtype="fp16")
    plain.pipeline.save_pretrained(tmp_path / "v", variant="fp16", max_shard_size=size)
    loaded = [load_pipeline(tmp_path / "v", device="cpu", variant=v) for v in (None, "fp16")]
    for adapter in loaded:
        assert adapter.variant == "fp16"
        assert torch.equal(adapter.denoiser.proj_out_2.weight, plain.denoiser.proj_out_2.weight.float())
    out = loaded[0].save_pretrained(tmp_path / "out")
    assert not [p for p in out.rglob("*fp16*") if "-of-" not in p.name]
    assert torch.equal(sampled(load_pipeline(out, device="cpu")), sampled(loaded[0]))
    saved = load_file(next((out / "vae").glob("*.safetensors")))
    assert {t.dtype for t in saved.values()} == {torch.float16}


def test_the_variant_that_was_loaded_is_the_one_copied(folder, tmp_path):
    load_pipeline(folder, device="cpu", dtype="fp16").pipeline.save_pretrained(tmp_path / "v", variant="fp16")
    for component in ("transformer", "vae"):
        name = f"{component}/diffusion_pytorch_model"
        shutil.copy(tmp_path / "v" / f"{name}.fp16.safetensors", folder / f"{name}.fp16.safetensors")
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        assert load_pipeline(folder / "transformer", device="cpu", variant=variant).variant == variant
        out = load_pipeline(folder, device="cpu", variant=variant).save_pretrained(tmp_path / f"out {variant}")
        saved = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
        assert {t.dtype for t in saved.values()} == {dtype}


def test_a_component_that_has_a_variant_alone_leaves_the_denoiser_plain(folder, tmp_path):
    load_pipeline(folder, device="cpu", dtype="fp16").pipeline.save_pretrained(tmp_path / "v", variant="fp16")
    shutil.rmtree(folder / "vae")
    shutil.copytree(tmp_path / "v" / "vae", folder / "vae")
    adapter = load_pipeline(folder, device="cpu")
    assert adapter.variant is None
    assert weights_of(adapter).digest == FileWeights(folder).digest
    out = adapter.save_pretrained(tmp_path / "out")
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert torch.equal(sampled(load_pipeline(out, device="cpu")), sampled(adapter))
    with pytest.raises(InputError, match=r"variants \(plain\), not fp16; choose one of them"):
        load_pipeline(folder, device="cpu", variant="fp16")


def test_save_and_load_gives_the_same_samples(folder, tmp_path):
    adapter = load_pipeline(folder, device="cpu")
    out = adapter.save_pretrained(tmp_path / "deep" / "out")
    assert torch.equal(sampled(load_pipeline(out, device="cpu")), sampled(adapter))
    assert torch.equal(sampled(DiffusersPipeline(DiffusionPipeline.from_pretrained(out))), sampled(adapter))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_components_are_copied_byte_for_byte_and_exchanged_ones_written(folder, tmp_path):
    (folder / "vae" / "notes.txt").write_text("keep me")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"leave me")
    adapter = load_pipeline(folder, device="cpu", dtype="bf16")
    adapter.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(adapter.pipeline.scheduler.config)
    out = adapter.save_pretrained(tmp_path / "out")
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert (out / "vae" / "notes.txt").read_text() == "keep me"
    assert not (out / "vae" / "diffusion_pytorch_model.bin").exists()
    assert stored_dtype(FileWeights(out).files) is torch.bfloat16
    assert type(load_pipeline(out, device="cpu").pipeline.scheduler) is DPMSolverMultistepScheduler
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DPMSolverMultistepScheduler"


def test_a_pipeline_made_in_memory_is_saved(text_to_image, tmp_path):
    out = text_to_image.save_pretrained(tmp_path / "out")
    assert torch.equal(sampled(load_pipeline(out, device="cpu")), sampled(text_to_image))


@pytest.mark.parametrize("labels", [["cat"], {"x": "cat"}, {"0": 7}])
def test_strange_class_names_are_refused(folder, labels):
    edit_json(folder / "model_index.json", id2label=labels)
    with pytest.raises(StateError, match="id2label must map"):
        load_pipeline(folder, device="cpu")


def test_class_names_survive_saving(dit, tmp_path, caplog):
    dit.pipeline.labels = {"tench": 0, "Tinca tinca": 0, "cock": 7}
    out = dit.save_pretrained(tmp_path / "out")
    assert json.loads((out / "model_index.json").read_text())["id2label"] == {"0": "tench, Tinca tinca", "7": "cock"}
    loaded = load_pipeline(out, device="cpu")
    assert caplog.text == ""
    assert loaded.pipeline.labels == dit.pipeline.labels
    assert loaded.default_sampling(range(9), 2).conditions == ("0", "7")
    assert load_pipeline(loaded.save_pretrained(tmp_path / "again")).pipeline.labels == dit.pipeline.labels


def test_a_bare_denoiser_is_saved(tiny_dit, tmp_path):
    out = BareDenoiser(tiny_dit).save_pretrained(tmp_path / "out")
    assert torch.equal(load_pipeline(out).denoiser.proj_out_2.weight, tiny_dit.proj_out_2.weight)
    with pytest.raises(InputError, match="Linear has no save_pretrained"):
        BareDenoiser(torch.nn.Linear(2, 2)).save_pretrained(tmp_path / "other")


def test_nothing_is_overwritten_and_nothing_half_remains(dit, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        dit.save_pretrained(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert (dit.save_pretrained(tmp_path / "empty") / "model_index.json").is_file()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(DDIMScheduler, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        dit.save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "/a/b/c", "a/b/c"])
def test_missing_folders(source):
    with pytest.raises(InputError, match=r"there is no folder.*zoo:NAME"):
        load_pipeline(source)


def test_single_files_are_refused(folder):
    with pytest.raises(InputError, match="single file"):
        load_pipeline(folder / "vae" / "diffusion_pytorch_model.safetensors")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)


def test_hub_ids_that_cannot_be_had_are_explained(monkeypatch):
    def fail(*_, **__):
        raise OSError("Cannot load model owner/name: not cached\nlong story")

    monkeypatch.setattr(loading.DiffusionPipeline, "download", fail)
    with pytest.raises(InputError, match=r"'owner/name' is no folder.*not cached\. Check the name and the network"):
        load_pipeline("owner/name")


def test_hub_ids_are_taken_from_the_cache(folder, monkeypatch):
    asked = []

    def download(hub_id, **settings):
        asked.append((hub_id, settings))
        return str(folder)

    monkeypatch.setattr(loading.DiffusionPipeline, "download", download)
    assert load_pipeline("owner/name", device="cpu").name == "owner/name"
    assert asked == [("owner/name", {"use_safetensors": True, "variant": None})]


def test_a_pipeline_without_a_denoiser(folder):
    index = json.loads((folder / "model_index.json").read_text())
    del index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"no denoiser.*scheduler, vae"):
        load_pipeline(folder)


@pytest.mark.parametrize("class_name", [["pipeline", "Mine"], "NoSuchPipeline", None])
def test_pipelines_with_code_of_their_own_are_not_run(folder, class_name):
    edit_json(folder / "model_index.json", _class_name=class_name)
    with pytest.raises(InputError, match="is not run"):
        load_pipeline(folder)


def test_components_with_code_of_their_own_are_not_run(folder):
    for library in ("evil", "os"):
        edit_json(folder / "model_index.json", vae=[library, "system"])
        with pytest.raises(InputError, match=rf"component vae.*'{library}\.system'.*is not run"):
            load_pipeline(folder)
    (folder / "transformer" / "dit.py").write_text("raise SystemExit('executed')")
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"], transformer=["dit", "Mine"])
    with pytest.raises(InputError, match="is not run"):
        load_pipeline(folder)


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "os", None, "Popen"])
def test_denoisers_that_are_no_models_are_refused(folder, class_name):
    edit_json(folder / "transformer" / "config.json", _class_name=class_name)
    with pytest.raises(InputError, match="is not run"):
        load_pipeline(folder / "transformer")


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_pickles_are_refused(folder, component):
    path = folder / component / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(InputError, match=rf"{component} holds its weights only as .*\.bin"):
        load_pipeline(folder)


def test_damage_is_a_state_error(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateError, match="not a complete safetensors file"):
        load_pipeline(folder, device="cpu")
    del tensors["proj_out_2.weight"]
    save_file(tensors, path)
    with pytest.raises(StateError, match=r"lack 1 tensors, such as 'proj_out_2\.weight'"):
        load_pipeline(folder, device="cpu")
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(StateError, match="must hold an object"):
        load_pipeline(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(StateError, match="not valid JSON"):
        load_pipeline(folder)


def test_a_missing_component_folder_is_a_state_error(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(StateError, match="lacks the folder vae"):
        load_pipeline(folder)


def test_unknown_devices_and_dtypes(folder):
    with pytest.raises(InputError, match="device 'quantum' cannot be used"):
        load_pipeline(folder, device="quantum")
    for dtype in ("int8", torch.int8, "float"):
        with pytest.raises(InputError, match="dtype must be one of"):
            load_pipeline(folder, dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(folder):
    with pytest.raises(InputError, match="device 'cuda' cannot be used here"):
        load_pipeline(folder, device="cuda")


def test_quantized_denoisers_are_known_and_not_cast(tiny_dit, folder):
    model = deepcopy(tiny_dit)
    model.register_to_config(quantization_config={"quant_method": "sedimo"})
    assert load_pipeline(model).is_quantized
    with pytest.raises(InputError, match="quantized and cannot be cast"):
        load_pipeline(model, dtype="bf16")
    assert not load_pipeline(tiny_dit).is_quantized
