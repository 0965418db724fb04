"""What every pipeline behind the seam must do: the same seed gives the same sample, and every call is seen."""

import inspect
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, EulerAncestralDiscreteScheduler, FluxPipeline

from sedimo.errors import InputError, StateError
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.conditions import PROMPTS
from sedimo.pipelines.diffusers import BareDenoiser, DiffusersPipeline
from sedimo.pipelines.sampling import observed_calls
from sedimo.pipelines.trajectory import output_tensor, record, replay
from tolerances import DIFFERENT, FLOAT32_FORMULA, FLOAT32_NETWORK

pytest_plugins = ["tiny_pipelines"]

PIPELINES = ("dit", "text_to_image", "flux", "latent_diffusion", "ddim", "ddpm", "consistency")
SEEDS = (11, 5, 7)


@pytest.fixture(params=PIPELINES)
def adapter(request) -> DiffusersPipeline:
    return request.getfixturevalue(request.param)


def plan(adapter, seeds=SEEDS, **changes):
    return replace(adapter.default_sampling(seeds, 3), **changes)


def test_samples_do_not_depend_on_their_batch(adapter):
    whole = adapter.sample(plan(adapter))
    torch.testing.assert_close(adapter.sample(plan(adapter, batch_size=2)), whole, rtol=0, atol=FLOAT32_NETWORK)
    assert not torch.allclose(whole[0], whole[1], atol=DIFFERENT)


def test_each_sample_starts_from_the_noise_of_its_own_seed(adapter):
    noises = {}

    def keep(call):
        if call.step == 0:
            noises.setdefault("first", next(iter(call.inputs.values())))

    adapter.sample(plan(adapter), observer=keep)
    shape = noises["first"].shape[1:]
    expected = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    if type(adapter.pipeline).__name__.startswith("Flux"):
        noise = torch.cat([torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(s)) for s in SEEDS])
        expected = [FluxPipeline._pack_latents(noise, 3, 4, 8, 8)]
    correlation = torch.corrcoef(torch.stack([noises["first"][:3].flatten(), torch.cat(expected).flatten()]))[0, 1]
    assert correlation > 0.999999  # schedulers scale the noise


def test_sampling_repeats_bit_for_bit_and_leaves_the_global_noise_alone(adapter):
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    first = adapter.sample(plan(adapter))
    assert torch.equal(torch.randn(4), expected)
    assert torch.equal(adapter.sample(plan(adapter)), first)


def test_latents_are_float32_on_the_cpu_and_carry_no_gradient(adapter):
    latents = adapter.sample(plan(adapter))
    assert (latents.dtype, latents.device.type, latents.requires_grad) == (torch.float32, "cpu", False)
    assert latents.shape[0] == 3


def test_every_call_is_seen_by_argument_name_and_can_be_replayed(adapter):
    trajectory = record(adapter, plan(adapter, batch_size=2))
    assert [c.step for c in trajectory.calls] == [0, 1, 2, 0, 1, 2]
    assert len(trajectory.calls) == 6
    first = trajectory.calls[0]
    assert first.inputs["timestep"] is not None
    assert first.timestep > trajectory.calls[1].timestep
    assert "return_dict" not in first.inputs
    for call in trajectory.calls:
        assert torch.equal(replay(adapter.denoiser, call), call.output)


def test_recorded_inputs_can_carry_gradients(adapter):
    call = record(adapter, plan(adapter)).calls[1]
    adapter.denoiser.requires_grad_(True)
    replay(adapter.denoiser, call).sum().backward()
    assert any(p.grad is not None for p in adapter.denoiser.parameters())
    adapter.denoiser.requires_grad_(False)
    adapter.denoiser.zero_grad()


def test_no_gradients_are_kept_while_sampling(dit, monkeypatch):
    monkeypatch.setattr(DiTPipeline, "__call__", inspect.unwrap(DiTPipeline.__call__))  # without its own no_grad
    dit.denoiser.requires_grad_(True)
    modes = []
    dit.sample(plan(dit), observer=lambda call: modes.append(torch.is_grad_enabled()))
    assert modes == [False] * 3


def test_only_wanted_steps_are_recorded(adapter):
    assert [c.step for c in record(adapter, plan(adapter), at_most=1).calls] == [0]


def test_images_are_in_the_unit_range(adapter):
    images = adapter.decode(adapter.sample(plan(adapter)))
    assert images.shape[:2] == (3, 3)
    assert images.dtype is torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01


def test_decoded_images_are_those_of_the_pipeline_itself(adapter):
    ours = plan(adapter)
    arguments = {"batch_size": 3} if not ours.conditions else {}
    if type(adapter.pipeline) is DiTPipeline:
        arguments = {"class_labels": [int(c) for c in ours.conditions]}
    elif ours.conditions:
        arguments = {"prompt": list(ours.conditions)}
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    images = adapter.pipeline(**arguments, generator=generators, num_inference_steps=3, output_type="np").images
    decoded = adapter.decode(adapter.sample(ours)).permute(0, 2, 3, 1)
    # they take 1 / f * x, not x / f
    torch.testing.assert_close(decoded, torch.from_numpy(images).float(), rtol=0, atol=FLOAT32_FORMULA)


@pytest.mark.parametrize("where", ["denoiser", "observer"])
def test_everything_is_restored_after_an_exception(adapter, where):
    def fail(*_, **__):
        raise KeyError(where)

    hook = adapter.denoiser.register_forward_hook(fail) if where == "denoiser" else None
    with pytest.raises(KeyError):
        adapter.sample(plan(adapter), observer=fail if where == "observer" else None)
    if hook is not None:
        hook.remove()
    assert "step" not in vars(adapter.pipeline.scheduler)
    assert not adapter.denoiser._forward_hooks
    assert not adapter.denoiser._forward_pre_hooks
    if hasattr(adapter.pipeline, "vae"):
        assert "decode" not in vars(adapter.pipeline.vae)
    assert torch.equal(adapter.sample(plan(adapter)), adapter.sample(plan(adapter)))


def test_a_step_that_was_replaced_before_is_put_back(dit):
    original = dit.pipeline.scheduler.step
    dit.pipeline.scheduler.step = original
    dit.sample(plan(dit))
    assert vars(dit.pipeline.scheduler)["step"] is original


def test_progress_bar_settings_are_kept(dit, capfd):
    dit.pipeline.set_progress_bar_config(desc="mine")
    dit.sample(plan(dit))
    assert dit.pipeline._progress_bar_config == {"desc": "mine"}
    assert capfd.readouterr().err == ""


def test_scheduler_noise_of_a_guided_dit_belongs_to_the_sample(dit):
    adapter, pipeline = dit, dit.pipeline
    pipeline.scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    whole, other = adapter.sample(plan(adapter)), adapter.sample(plan(adapter, batch_size=1))
    torch.testing.assert_close(whole, other, rtol=0, atol=FLOAT32_NETWORK)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert not torch.allclose(adapter.sample(plan(adapter)), whole, atol=DIFFERENT)


def test_scheduler_noise_of_text_to_image_belongs_to_the_sample(text_to_image):
    config = text_to_image.pipeline.scheduler.config
    text_to_image.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(config)
    whole = text_to_image.sample(plan(text_to_image))
    split = text_to_image.sample(plan(text_to_image, batch_size=1))
    torch.testing.assert_close(whole, split, rtol=0, atol=10 * FLOAT32_NETWORK)  # latents are 10 times larger


def test_noise_from_the_global_state_is_reported(dit, caplog):
    original = dit.pipeline.scheduler.step

    def noisy(model_output, timestep, sample):
        result = original(model_output, timestep, sample)
        result.prev_sample = result.prev_sample + torch.randn(result.prev_sample.shape)
        return result

    dit.pipeline.scheduler.step = noisy
    first = dit.sample(plan(dit))
    assert "global random state" in caplog.text
    torch.manual_seed(99)
    assert torch.equal(dit.sample(plan(dit)), first)


def test_guidance_doubles_the_batch_of_the_denoiser(dit):
    calls = record(dit, plan(dit)).calls
    assert calls[0].output.shape[0] == 6
    assert calls[0].inputs["class_labels"].tolist() == [0, 1, 2, 1000, 1000, 1000]
    unguided = record(dit, plan(dit, guidance=1.0))
    assert unguided.calls[0].output.shape[0] == 3
    assert not torch.allclose(unguided.latents, dit.sample(plan(dit)), atol=DIFFERENT)


def test_default_guidance_is_that_of_the_pipeline(dit):
    assert torch.equal(dit.sample(plan(dit)), dit.sample(plan(dit, guidance=4.0)))


def test_conditions_go_with_the_sample_not_with_the_batch(dit):
    sampling = Sampling((1, 2, 3, 4, 5), 2, ("3", "8"), batch_size=3)
    labels = [c.inputs["class_labels"] for c in record(dit, sampling).calls if c.step == 0]
    assert [x[: len(x) // 2].tolist() for x in labels] == [[3, 8, 3], [8, 3]]


def test_classes_by_number_and_by_label_agree(dit):
    by_number = dit.sample(plan(dit, conditions=("7",)))
    assert torch.equal(by_number, dit.sample(plan(dit, conditions=("class7",))))
    assert not torch.allclose(by_number, dit.sample(plan(dit, conditions=("6",))), atol=DIFFERENT)


def test_prompts_matter(text_to_image):
    one, other = (text_to_image.sample(plan(text_to_image, conditions=(c,))) for c in ("a b", "x y z"))
    assert not torch.equal(one, other)


def test_resolution_is_passed_on(text_to_image):
    assert text_to_image.sample(plan(text_to_image, resolution=32)).shape == (3, 4, 16, 16)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dit", {"conditions": ()}, "class number or label"),
        ("dit", {"conditions": ("tiger",)}, "no class 'tiger'.*class0"),
        ("dit", {"conditions": ("1000",)}, r"classes 0..999, got 1000"),
        ("dit", {"conditions": ("-1",)}, "no class '-1'"),
        ("dit", {"resolution": 64}, "cannot be told its resolution"),
        ("text_to_image", {"conditions": ()}, "a prompt"),
        ("ddim", {"conditions": ("a cat",)}, "unconditional.*'a cat'"),
        ("ddim", {"guidance": 2.0}, "cannot be told its guidance"),
    ],
)
def test_plans_that_do_not_suit_are_refused(request, name, changes, message):
    adapter = request.getfixturevalue(name)
    with pytest.raises(InputError, match=message):
        adapter.sample(plan(adapter, **changes))


def test_default_conditions_suit_the_pipeline(dit, text_to_image, ddim):
    assert dit.default_sampling(range(12), 5).conditions == tuple(str(i) for i in range(10))
    assert dit.default_sampling(range(3), 5).conditions == ("0", "1", "2")
    assert text_to_image.default_sampling(range(100), 5).conditions == PROMPTS
    assert ddim.default_sampling(range(3), 5).conditions == ()
    assert dit.default_sampling((4, 2), 7).seeds == (4, 2)


def test_default_conditions_of_many_classes_are_spread(dit):
    dit.pipeline.labels = {f"label {i}": i for i in range(1000)}
    conditions = [int(c) for c in dit.default_sampling(range(1000), 5).conditions]
    assert sorted(conditions) == list(range(1000))
    assert min(abs(a - b) for a, b in itertools.pairwise(conditions)) > 300


def test_default_batch_shrinks_with_the_latents(dit, flux):
    flux.pipeline.default_sample_size = 128
    assert flux.default_sampling(range(3), 5).batch_size == 4
    assert dit.default_sampling(range(3), 5).batch_size == 64
    dit.denoiser.register_to_config(sample_size=128)
    assert dit.default_sampling(range(3), 5).batch_size == 4


def test_a_pipeline_without_a_denoiser_is_refused(dit):
    with pytest.raises(InputError, match="no component transformer or unet: vae"):
        DiffusersPipeline(SimpleNamespace(components={"vae": dit.pipeline.vae}))
    with pytest.raises(InputError, match="no scheduler"):
        DiffusersPipeline(SimpleNamespace(components={"unet": dit.denoiser}))


def test_a_pipeline_that_makes_no_step_is_noticed(dit, monkeypatch):
    monkeypatch.setattr(
        DiTPipeline,
        "__call__",
        lambda self, class_labels, generator, num_inference_steps, return_dict, output_type="pt": (None,),
    )
    with pytest.raises(StateError, match="no step"):
        dit.sample(plan(dit))


def test_a_bare_denoiser_is_not_sampled(tiny_dit):
    bare = BareDenoiser(tiny_dit)
    assert (bare.name, bare.device.type, bare.dtype, bare.is_quantized) == (
        "DiTTransformer2DModel",
        "cpu",
        torch.float32,
        False,
    )
    with pytest.raises(InputError, match="without its pipeline and cannot be sampled"):
        bare.sample(Sampling((1,), 2))
    with pytest.raises(InputError, match="cannot be decoded"):
        bare.decode(torch.zeros(1, 4, 8, 8))


class Echo(torch.nn.Module):
    """Changes its input in place and takes arguments of all kinds."""

    def forward(self, x, *, extra=None, **more):
        x += 1
        return (x,)


def test_inputs_are_copied_before_the_call_changes_them_and_once_if_unchanged():
    calls, module = [], Echo()
    x, shared = torch.zeros(2), torch.ones(3)
    nested = {"list": [shared, "text"], "pair": (shared,)}
    with observed_calls(module, calls.append):
        module(x, extra=shared, nested=nested)
        module(x, extra=shared, nested=nested)
        shared.add_(1)
        module(x, extra=shared)
    assert [c.inputs["x"][0].item() for c in calls] == [0, 1, 2]
    assert [c.inputs["extra"][0].item() for c in calls] == [1, 1, 2]
    assert calls[0].inputs["extra"] is calls[1].inputs["extra"]
    assert calls[0].inputs["nested"]["list"][0] is calls[1].inputs["nested"]["list"][0]
    assert calls[0].inputs["nested"]["list"][1] == "text"
    assert isinstance(calls[0].inputs["nested"]["pair"], tuple)
    assert math.isnan(calls[0].timestep)
    assert calls[0].output[0] == 1
    module(x)
    assert len(calls) == 3


def test_outputs_of_every_form_are_read(tiny_dit):
    tensor = torch.ones(1)
    assert output_tensor(tensor) is tensor
    assert output_tensor((tensor, None)) is tensor
    assert output_tensor({"sample": tensor}) is tensor
    with pytest.raises(InputError, match="NoneType"):
        output_tensor(())
    with pytest.raises(InputError, match="str"):
        output_tensor("x")
