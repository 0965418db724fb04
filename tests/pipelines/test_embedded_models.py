"""The embedded pipelines as they are shipped: what their folders hold, and that they do what their names say."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from sedimo_zoo import MODELS, classifier_path, model_path
from torch import nn
from transformers import CLIPTokenizer

from sedimo.lab.bench import trace
from sedimo.lab.images import feature_extractor
from sedimo.pipelines.loading import load_pipeline
from sedimo.space import search_space
from tolerances import FLOAT32_NETWORK, FLOAT32_SAMPLING

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LIMITS = {"cifar-dit": 21e6, "cifar-ldm": 15e6}  # bytes of a folder
PLAIN_FILES = {".json", ".txt", ".safetensors"}


@pytest.fixture(scope="module")
def ldm():
    return load_pipeline("zoo:cifar-ldm", device="cpu")


@pytest.mark.parametrize("name", MODELS)
def test_folders_are_small_and_hold_float16_and_no_code(name):
    files = [f for f in model_path(name).rglob("*") if f.is_file()]
    assert {f.suffix for f in files} <= PLAIN_FILES
    assert sum(f.stat().st_size for f in files) <= LIMITS[name]
    for file in files:
        if file.suffix == ".json":
            assert "_name_or_path" not in json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize("name", MODELS)
def test_all_share_one_autoencoder(name):
    first, file = model_path(MODELS[0]) / "vae", model_path(name) / "vae" / "diffusion_pytorch_model.safetensors"
    assert file.read_bytes() == (first / file.name).read_bytes()
    assert (file.parent / "config.json").read_bytes() == (first / "config.json").read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_depends_on_its_seed_alone(name):
    pipe = load_pipeline(f"zoo:{name}", device="cpu")
    plan = pipe.default_sampling(range(3), 2)
    together = pipe.sample(plan)
    assert torch.equal(together, pipe.sample(plan))
    torch.testing.assert_close(
        pipe.sample(replace(plan, batch_size=1)), together, rtol=FLOAT32_SAMPLING, atol=FLOAT32_NETWORK
    )
    assert pipe.decode(together).shape == (3, 3, 32, 32)


def test_diffusers_alone_draws_from_captions_and_class_names():
    pipe = DiffusionPipeline.from_pretrained(model_path("cifar-ldm"))
    assert isinstance(pipe, StableDiffusionPipeline)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a photo of a cat", "truck"], num_inference_steps=2, guidance_scale=3.0).images
    assert [image.size for image in images] == [(32, 32), (32, 32)]


def test_every_word_of_a_caption_is_a_token_and_other_text_is_spelt():
    tokenizer = CLIPTokenizer.from_pretrained(model_path("cifar-ldm") / "tokenizer")
    assert len({tuple(tokenizer(f"a photo of a {name}").input_ids) for name in CLASSES}) == len(CLASSES)
    for name in CLASSES:
        caption = f"a small photo of an {name}"
        assert tokenizer.tokenize(caption.upper()) == [f"{word}</w>" for word in caption.split()]
    spelt = tokenizer("Zürich, 1914", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in spelt
    assert tokenizer.decode(spelt) == "zürich , 1 9 1 4"


def test_both_forms_of_the_vocabulary_agree():
    folder = model_path("cifar-ldm") / "tokenizer"  # transformers 4 reads the first form, 5 the second
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]]
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == whole["vocab"]
    assert merges == [tuple(pair) for pair in whole["merges"]]


def test_the_unet_is_asked_for_its_classes_with_its_guidance(ldm):
    plan = ldm.default_sampling(range(12), 10)
    assert [prompt.split()[-1] for prompt in plan.conditions] == list(CLASSES)
    assert plan.guidance == 3.0
    assert ldm.default_sampling(range(2), 10).conditions == plan.conditions[:2]


def test_every_layer_of_the_unet_is_found_and_the_skips_are_seen(ldm):
    graph = trace(ldm)
    layers = {name for name, m in ldm.denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert graph.layer_index.keys() == layers
    whole = search_space(graph, streams=False)
    assert len(layers) == len(whole.decisions) == 133  # no two layers are equal, and none is left out
    assert len(search_space(graph).decisions) == 133 + 12  # six residual blocks read a skip, by conv1 and conv_shortcut
    kinds = [node.kind for node in graph.nodes]
    readers = {graph.nodes[target].name for source, target in graph.edges if kinds[source] == "concat"}
    skips = {
        f"up_blocks.{i}.resnets.{j}.{conv}" for i in range(3) for j in range(2) for conv in ("conv1", "conv_shortcut")
    }
    assert kinds.count("concat") == 6
    assert readers == skips
    assert sorted(layer for group in graph.groups for layer in group.layers) == sorted(layers)


def test_images_of_the_unet_show_what_they_were_asked_for(ldm):
    plan = ldm.default_sampling(range(20), 6)
    _, extract = feature_extractor()
    weights = load_file(classifier_path() / "model.safetensors")
    logits = extract(ldm.decode(ldm.sample(plan))) @ weights["head.weight"].float().T + weights["head.bias"].float()
    hits = sum(CLASSES[c] in plan.condition(i) for i, c in enumerate(logits.argmax(1).tolist()))
    assert hits >= 10  # chance hits 2, ten with a probability of 7e-6
