"""A packed denoiser in memory: every known way in which tools lose packed weights silently, and what works."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch import nn

from packed_weights import OWNER, TIED, denoise, dequantize_weights, random_packed, random_weights
from sedimo.checkpoint.contents import describe, packed_layers, refuse_unfit_source
from sedimo.checkpoint.weights import replace_weights, save_denoiser
from sedimo.errors import InputError, StateError, UnsupportedError
from sedimo.pipelines.weights import refuse_adapter_names
from sedimo.quant.tensor import QuantizedTensor, memory_bytes
from tolerances import FLOAT32_FORMULA, FLOAT32_NETWORK

CPU = torch.device("cpu")


def reference(denoiser: nn.Module) -> nn.Module:
    """The same denoiser with ordinary weights."""
    plain = copy.deepcopy(denoiser)
    dequantize_weights(plain)
    assert not packed_layers(plain)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_equals_that_of_dequantized_weights_bit_for_bit(packed_dit, dtype):
    plain = reference(packed_dit).to(dtype)
    packed = packed_dit.to(dtype)
    assert torch.equal(denoise(packed, dtype), denoise(plain, dtype))
    assert {w.dtype for w in packed_layers(packed).values()} == {dtype}


def test_labels_and_casts_of_diffusers_models(packed_dit):
    expected, size = denoise(packed_dit), memory_bytes(packed_dit)
    assert packed_dit.dtype == torch.float32
    packed_dit.to(torch.bfloat16)
    assert packed_dit.dtype == torch.bfloat16
    packed_dit.to(dtype=torch.float32)
    packed_dit.double().float()
    packed_dit.to("cpu")
    assert torch.equal(packed_layers(packed_dit)[OWNER].dequantize(), packed_layers(packed_dit)[TIED].dequantize())
    assert packed_dit.get_submodule(OWNER).weight is packed_dit.get_submodule(TIED).weight
    assert memory_bytes(packed_dit) == size
    assert denoise(packed_dit).shape == expected.shape
    assert packed_dit.half().dtype == torch.float16


def test_deepcopy_and_state_dict(packed_dit):
    other = copy.deepcopy(packed_dit)
    assert torch.equal(denoise(other), denoise(packed_dit))
    assert other.get_submodule(OWNER).weight is other.get_submodule(TIED).weight
    assert describe(other) == describe(packed_dit)
    replace_weights(other, random_weights(other, ties={TIED: OWNER}))
    other.load_state_dict(packed_dit.state_dict())
    assert torch.equal(denoise(other), denoise(packed_dit))


def test_loading_ordinary_weights_fails(packed_dit, tiny_dit):
    expected = denoise(packed_dit)
    with pytest.raises(RuntimeError, match=r"pos_embed\.proj.*copying between packed and ordinary"):
        packed_dit.load_state_dict(tiny_dit.state_dict())
    assert torch.equal(denoise(packed_dit), expected)


def test_share_memory_fails(packed_dit):
    with pytest.raises(UnsupportedError, match="share_memory_"):
        packed_dit.share_memory()


def test_compiles_without_a_graph_break(packed_dit):
    torch._dynamo.reset()
    compiled = torch.compile(packed_dit, fullgraph=True, backend="aot_eager")
    assert torch.equal(denoise(compiled), denoise(packed_dit))


@pytest.mark.slow
def test_compiles_with_the_default_compiler(packed_dit):
    torch._dynamo.reset()
    compiled = torch.compile(packed_dit, fullgraph=True)
    fused, plain = denoise(compiled), denoise(packed_dit)
    torch.testing.assert_close(fused, plain, rtol=FLOAT32_NETWORK, atol=FLOAT32_FORMULA)


def test_accelerate_offload_rebuilds_packed_parameters(packed_dit, tmp_path):
    expected = denoise(packed_dit)
    offloaded = copy.deepcopy(packed_dit)
    accelerate.cpu_offload(offloaded, execution_device=CPU)
    assert offloaded.get_submodule(OWNER).weight.device.type == "meta"
    assert torch.equal(denoise(offloaded), expected)
    with pytest.raises(StateError, match="offloaded"):
        save_denoiser(offloaded, tmp_path)
    accelerate.dispatch_model(packed_dit, {"": "cpu"}, force_hooks=True)
    assert torch.equal(denoise(packed_dit), expected)


def test_accelerate_does_not_take_packed_weights_for_tied(packed_dit):
    """accelerate compares data pointers: were they all 0, one packed weight would take the place of another."""
    pointers = {weight.data_ptr() for weight in packed_layers(packed_dit).values()}
    assert len(pointers) == len(packed_layers(packed_dit)) - 1
    assert 0 not in pointers


@pytest.mark.parametrize(
    "kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading(packed_dit, kind):
    expected = denoise(packed_dit)
    apply_group_offloading(packed_dit, onload_device=CPU, offload_device=CPU, **kind)
    assert torch.equal(denoise(packed_dit), expected)


def test_layerwise_casting_relabels(packed_dit):
    expected = {name: weight.dequantize() for name, weight in packed_layers(packed_dit).items()}
    packed_dit.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    denoise(packed_dit)
    for name, weight in packed_layers(packed_dit.float()).items():
        assert torch.equal(weight.dequantize(), expected[name]), "only the label was cast"


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    model.eval().requires_grad_(False)
    replace_weights(model, random_weights(model))
    return model


def denoise_text(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return unet(latents, torch.tensor([3, 700]), states).sample


ADAPTER = LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)


def test_adapters_add_scale_disable_delete(unet):
    bare = denoise_text(unet)
    unet.add_adapter(ADAPTER, adapter_name="a")
    full = denoise_text(unet)
    assert not torch.equal(full, bare)
    unet.set_adapters("a", 0.5)
    assert not torch.equal(denoise_text(unet), full)
    unet.set_adapters("a", 1.0)
    assert torch.equal(denoise_text(unet), full)
    unet.disable_adapters()
    assert torch.equal(denoise_text(unet), bare)
    unet.enable_adapters()
    assert torch.equal(denoise_text(unet), full)
    unet.delete_adapters("a")
    assert torch.equal(denoise_text(unet), bare)


def test_adapters_save_load_and_train(unet, tmp_path):
    unet.add_adapter(ADAPTER, adapter_name="a")
    with torch.no_grad():
        before = denoise_text(unet)
    unet.save_lora_adapter(tmp_path, adapter_name="a")
    denoise_text(unet).square().sum().backward()
    trained = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    unet.unload_lora()
    unet.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None, adapter_name="b")
    assert torch.equal(denoise_text(unet), before)
    unet.unload_lora()
    save_denoiser(unet, tmp_path / "saved")


@pytest.mark.parametrize("options", [{}, {"safe_fusing": True}])
def test_fusing_an_adapter_fails_and_changes_nothing(unet, options):
    unet.add_adapter(ADAPTER, adapter_name="a")
    before = denoise_text(unet)
    with pytest.raises(UnsupportedError, match=r"down_blocks.*lose the result.*model\.dequantize\(\)"):
        unet.fuse_lora(**options)
    assert torch.equal(denoise_text(unet), before)


def test_fusing_projections_fails_and_changes_nothing(unet):
    before = denoise_text(unet)
    with pytest.raises(UnsupportedError, match=r"aten\.cat.*before fuse_qkv_projections"):
        unet.fuse_qkv_projections()
    assert torch.equal(denoise_text(unet), before)


def test_packing_or_saving_beside_an_adapter_is_refused(unet, tmp_path):
    unet.add_adapter(ADAPTER, adapter_name="a")
    with pytest.raises(InputError, match=r"an adapter \(LoRA\) is attached to layer 'down_blocks"):
        replace_weights(unet, {})
    with pytest.raises(InputError, match="attached"):
        save_denoiser(unet, tmp_path)
    with pytest.raises(StateError, match="unload adapters"):
        unet.save_pretrained(tmp_path)


def test_an_automatic_device_map(unet, tmp_path):
    save_denoiser(unet, tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(denoise_text(loaded), denoise_text(unet))


def test_unfit_sources_are_refused(unet, packed_dit, tiny_dit):
    refuse_unfit_source(tiny_dit)
    with pytest.raises(InputError, match=r"already quantized \(sedimo\)"):
        refuse_unfit_source(packed_dit)
    bare = nn.Sequential(nn.Linear(16, 8))
    refuse_unfit_source(bare)
    bare[0].weight = nn.Parameter(random_packed((8, 16)), requires_grad=False)
    with pytest.raises(InputError, match=r"already quantized \(packed weights\)"):
        refuse_unfit_source(bare)
    bare[0].weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"Parameter of torch.int8"):
        refuse_unfit_source(bare)
    dequantize_weights(unet)
    unet.add_adapter(ADAPTER, adapter_name="a")
    with pytest.raises(InputError, match="attached"):
        refuse_unfit_source(unet)
    unet.fuse_lora()
    with pytest.raises(InputError, match="merged into layer"):
        refuse_unfit_source(unet)
    with pytest.raises(InputError, match="holds an adapter"):
        refuse_adapter_names(["a.weight", "a.lora_A.weight"], "here")
    with pytest.raises(InputError, match="holds an adapter"):
        refuse_adapter_names(unet.state_dict(), "here")
    refuse_adapter_names(tiny_dit.state_dict(), "here")


def test_replacing_single_layers(packed_dit):
    name, before = "proj_out_2", packed_layers(packed_dit)
    shape = tuple(before[name].shape)
    replace_weights(packed_dit, {name: random_packed(shape, "kma3", seed=9)})
    after = packed_layers(packed_dit)
    assert str(after[name].format) == "kma3"
    assert after[name].layer_name == name
    assert all(after[n] is before[n] for n in before if n != name)
    told = packed_dit.config.quantization_config.configuration
    assert packed_dit.hf_quantizer.config.configuration == told
    assert (told.layers, told.owners) == (describe(packed_dit).layers, describe(packed_dit).owners)


def test_shared_weights_follow_each_other(packed_dit):
    shape = tuple(packed_layers(packed_dit)[OWNER].shape)
    replace_weights(packed_dit, {TIED: random_packed(shape, "kma3")})
    assert packed_dit.get_submodule(OWNER).weight is packed_dit.get_submodule(TIED).weight
    assert str(packed_layers(packed_dit)[OWNER].format) == "kma3"
    with pytest.raises(InputError, match="share one weight"):
        replace_weights(packed_dit, {OWNER: random_packed(shape), TIED: random_packed(shape)})


def test_wrong_weights_are_refused(packed_dit, tmp_path):
    with pytest.raises(InputError, match="no Linear or Conv1d or Conv2d or Conv3d layer 'nowhere'"):
        replace_weights(packed_dit, {"nowhere": random_packed((4, 4))})
    with pytest.raises(InputError, match=r"'proj_out_1' has a weight of shape \(64, 32\), the packed"):
        replace_weights(packed_dit, {"proj_out_1": random_packed((4, 4))})
    with pytest.raises(InputError, match="takes a QuantizedTensor"):
        replace_weights(packed_dit, {"proj_out_1": torch.zeros(64, 32)})
    with pytest.raises(InputError, match="no weight of the denoiser is packed"):
        save_denoiser(reference(packed_dit), tmp_path)


def test_dequantizing(packed_dit, tmp_path):
    expected = denoise(packed_dit)
    assert packed_dit.dequantize() is packed_dit
    assert torch.equal(denoise(packed_dit), expected)
    assert not packed_layers(packed_dit)
    assert "quantization_config" not in packed_dit.config
    assert not hasattr(packed_dit, "hf_quantizer")
    packed_dit.save_pretrained(tmp_path)
    loaded = type(packed_dit).from_pretrained(tmp_path)
    assert torch.equal(denoise(loaded), expected)
    with pytest.raises(ValueError, match="first quantize"):
        packed_dit.dequantize()


def test_a_bare_module_is_packed_too():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    replace_weights(model, {"0": random_packed((8, 4, 3, 3), "uaq4g16"), "2": random_packed((4, 32), "kmc2")})
    x = torch.randn(2, 4, 4, 4)
    expected = model(x)
    assert isinstance(model[2].weight, QuantizedTensor)
    dequantize_weights(model)
    assert torch.equal(model(x), expected)
    assert type(model[2].weight) is nn.Parameter
