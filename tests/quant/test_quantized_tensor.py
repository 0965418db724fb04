"""QuantizedTensor: exact in the layers it serves, a label for a dtype, and one handle among others."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from packed_weights import FORMATS, random_packed
from sedimo.errors import InputError
from sedimo.quant.fitting import fit, quantize_weight
from sedimo.quant.formats import Format, paper_bytes
from sedimo.quant.tensor import QuantizedTensor, memory_bytes

SPLIT = ((5, "kmc3"), (2, "fp16"), (9, "uaq4g4"))
LAYOUTS = (*FORMATS, "fp16", SPLIT)


def linear(formats, dtype=torch.float32, **options):
    layer = nn.Linear(16, 8, dtype=dtype)
    layer.weight = nn.Parameter(random_packed((8, 16), formats, dtype=dtype, **options), requires_grad=False)
    return layer


def stored(tensor):
    return [t for part in tensor.parts for t in part.tensors.values()]


def same(a, b):
    return a.formats == b.formats and all(torch.equal(x, y) for x, y in zip(stored(a), stored(b), strict=True))


@pytest.mark.parametrize("formats", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (2, 2, 3, 16)])
def test_linear_equals_the_ordinary_operator_bit_for_bit(formats, dtype, shape):
    layer = linear(formats, dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight.dequantize(), layer.bias))
    assert torch.equal(F.linear(x, layer.weight), F.linear(x, layer.weight.dequantize()))


@pytest.mark.parametrize("leading", [(3,), (1,), (2, 3)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_of_a_transposed_input_equals_the_ordinary_operator(leading, has_bias):
    layer = linear("kmc4")
    bias = layer.bias if has_bias else None
    x = torch.randn(*leading, 16, 2, generator=torch.Generator().manual_seed(0)).transpose(-1, -2).requires_grad_()
    y = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    packed, plain = F.linear(x, layer.weight, bias), F.linear(y, layer.weight.dequantize(), bias)
    assert torch.equal(packed, plain)
    packed.square().sum().backward()
    plain.square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("formats", ["uaq3", "kmc4", "uaq4g16", "kma5"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, "same"])
def test_convolutions_equal_the_ordinary_operator_bit_for_bit(formats, dimensions, padding):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](4, 6, 3, padding=padding, groups=2)
    weight = random_packed(tuple(conv.weight.shape), formats)
    x = torch.randn(2, 4, *[5] * dimensions)
    conv.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    expected = conv(x)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    assert torch.equal(conv(x), expected)


def test_matrix_products_and_transposed_views():
    q, x = random_packed((8, 16), SPLIT), torch.randn(5, 16)
    plain = q.dequantize()
    for view in (q.t(), q.T, q.transpose(0, 1), q.transpose(-1, 0), q.mT, q.permute(1, 0)):
        assert isinstance(view, QuantizedTensor)
        assert view.shape == (16, 8)
        assert torch.equal(view.dequantize(), plain.t())
        assert torch.equal(x @ view, x @ plain.t())
    assert torch.equal(q.t().t().dequantize(), plain)
    assert torch.equal(q @ x[0], plain @ x[0])
    assert torch.equal(torch.addmm(torch.ones(8), x, q.t()), torch.addmm(torch.ones(8), x, plain.t()))
    assert q.t().bfloat16().dtype == torch.bfloat16
    assert q.t().detach().clone().shape == (16, 8)
    batched = q.t().expand(3, 16, 8)
    assert isinstance(batched, QuantizedTensor)
    assert torch.equal(batched.dequantize(), plain.t().expand(3, 16, 8))
    assert torch.equal(x.expand(3, 5, 16).bmm(batched), x.expand(3, 5, 16).bmm(plain.t().expand(3, 16, 8)))
    assert batched.mT.shape == (3, 8, 16)


def test_autocast_relabels():
    layer, x = linear("kmc4"), torch.randn(3, 16)
    plain = copy.deepcopy(layer)
    plain.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))


def test_the_dtype_is_a_label():
    layer = linear("kmc4")
    before, wide = layer.weight.detach().clone(), layer.weight.dequantize()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        assert layer.weight.dtype == layer.weight.dequantize().dtype == dtype
        assert torch.equal(layer.weight.dequantize(), wide.to(dtype))
    assert layer.half().float().bfloat16().double().weight.dtype == torch.float64
    assert same(layer.weight, before)
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.weight, QuantizedTensor)
    assert layer.weight.type(torch.float16).dtype == torch.float16


def test_moving_moves_every_stored_tensor():
    q = random_packed((8, 16), SPLIT)
    moved = q.to("meta")
    assert moved.device.type == "meta"
    assert {t.device.type for t in stored(moved)} == {"meta"}
    assert q.to("cpu") is q
    layer = linear("uaq3").to("meta")
    assert layer.weight.device.type == "meta"
    assert {t.device.type for t in stored(layer.weight)} == {"meta"}


def test_pinning_and_streams_reach_every_stored_tensor(monkeypatch):
    """Without an accelerator nothing can be pinned, so the stored tensors' own methods are replaced."""
    q, pinned, recorded = random_packed((8, 16), SPLIT), [], []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((tensor, stream)))
    copied = torch.ops.aten._pin_memory(q)
    assert same(copied, q)
    assert [t.data_ptr() for t in pinned] == [t.data_ptr() for t in stored(q)]
    assert not q.is_pinned()
    QuantizedTensor.__torch_dispatch__(torch.ops.aten.record_stream.default, (), (q, "a stream"))
    assert [(t.data_ptr(), s) for t, s in recorded] == [(t.data_ptr(), "a stream") for t in stored(q)]


def test_copies_own_their_codes():
    layer = linear(SPLIT)
    layer.weight.layer_name = "proj"
    for other in (copy.deepcopy(layer).weight, layer.weight.clone(), layer.weight.bfloat16()):
        assert same(other, layer.weight)
        assert not {t.data_ptr() for t in stored(other)} & {t.data_ptr() for t in stored(layer.weight)}
        assert other.layer_name == "proj"
    assert isinstance(copy.deepcopy(layer).weight, nn.Parameter)
    tied = nn.ModuleList([layer, nn.Linear(16, 8)])
    tied[1].weight = layer.weight
    copied = copy.deepcopy(tied)
    assert copied[0].weight is copied[1].weight
    assert tied.bfloat16()[0].weight is tied[1].weight


def test_handles_share_their_codes():
    layer = linear("kmc4")
    for handle in (layer.weight.detach(), layer.weight.data, layer.state_dict()["weight"]):
        assert isinstance(handle, QuantizedTensor)
        assert handle.data_ptr() == layer.weight.data_ptr() != 0
    rebuilt = type(layer.weight)(layer.weight, requires_grad=layer.weight.requires_grad)
    assert rebuilt.data_ptr() == layer.weight.data_ptr()
    assert type(rebuilt) is QuantizedTensor


def test_assigning_data_takes_everything_over():
    layer, other = linear("kmc4"), random_packed((8, 16), "uaq3", dtype=torch.float16)
    parameter = layer.weight
    layer.weight.data = other
    assert layer.weight is parameter
    assert (parameter.dtype, parameter.format) == (torch.float16, Format.parse("uaq3"))
    assert same(parameter, other)
    assert layer.bfloat16().weight is parameter


def test_an_equal_format_can_be_loaded():
    layer, other = linear("kmc4", seed=1), linear("kmc4", seed=2)
    handle = layer.weight.detach()
    layer.load_state_dict(other.state_dict())
    assert same(layer.weight, other.weight)
    assert same(handle, other.weight)  # a handle sees what was written, as ordinary tensors do
    assert layer.weight.data_ptr() != other.weight.data_ptr()


def test_gradients_flow_through_to_the_input():
    for layer, x in ((linear("kmc4"), torch.randn(3, 16)), (nn.Conv2d(4, 8, 2), torch.randn(2, 4, 5, 5))):
        if isinstance(layer, nn.Conv2d):
            layer.weight = nn.Parameter(random_packed((8, 4, 2, 2), "kmc4"), requires_grad=False)
        packed_x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(packed_x).square().sum().backward()
        packed_bias, layer.bias.grad = layer.bias.grad, None
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
        layer(plain_x).square().sum().backward()
        assert torch.equal(packed_x.grad, plain_x.grad)
        assert torch.equal(packed_bias, layer.bias.grad)


@pytest.mark.parametrize("formats", ["uaq3", "kmc4", "uaq4g4", "kma5", SPLIT], ids=str)
def test_compiles_without_a_graph_break(formats):
    torch._dynamo.reset()
    layer, x = linear(formats), torch.randn(3, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_formats_codes_and_sizes():
    q = random_packed((8, 16), SPLIT)
    assert [str(f) for f in q.formats] == ["kmc3", "fp16", "uaq4g4"]
    with pytest.raises(InputError, match="kmc3, fp16, uaq4g4"):
        _ = q.format
    with pytest.raises(InputError, match="has no codes"):
        q.codes()
    pieces = zip(q.formats, (5, 2, 9), strict=True)
    assert q.paper_bytes == sum(paper_bytes(f, (8, n)) for f, n in pieces)
    assert q.stored_bytes == sum(t.numel() * t.element_size() for t in stored(q))
    assert random_packed((8, 3, 2, 2), "uaq5").codes().shape == (8, 3, 2, 2)
    assert repr(q).startswith("QuantizedTensor(shape=(8, 16), formats=kmc3+fp16+uaq4g4, dtype=torch.float32")


def test_from_fitted_parts_side_by_side():
    weight = torch.randn(8, 16)
    fitted = [fit(weight[:, :5], Format.parse("kmc3")), weight[:, 5:7], fit(weight[:, 7:], Format.parse("uaq4g4a8"))]
    q = QuantizedTensor.from_fitted(fitted, torch.bfloat16)
    assert [(p.start, p.stop, str(p.format)) for p in q.parts] == [(0, 5, "kmc3"), (5, 7, "fp16"), (7, 16, "uaq4g4")]
    expected = torch.cat([fitted[0].dequantize(), weight[:, 5:7], fitted[2].dequantize()], dim=1)
    assert torch.equal(q.dequantize(), expected.bfloat16())
    with pytest.raises(InputError, match="differ in input channels only"):
        QuantizedTensor.from_fitted([weight, weight[:4]], torch.float32)
    with pytest.raises(InputError, match="differ in input channels only"):
        QuantizedTensor.from_fitted([], torch.float32)
    with pytest.raises(InputError, match="must be a float"):
        QuantizedTensor.from_fitted(fitted, torch.int8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantize_weight_keeps_values_on_the_grid(dtype):
    grid = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=dtype)[torch.arange(64).reshape(8, 8) * 7 % 4]
    for text in ("kmc2", "kma2", "uaq2"):
        q = quantize_weight(grid, text, layer_name="here")
        assert torch.equal(q.dequantize(), grid), text
        assert (q.dtype, q.layer_name, str(q.format)) == (dtype, "here", text)


def test_quantize_weight_refuses_what_it_cannot_pack():
    with pytest.raises(InputError, match="nothing to fit"):
        quantize_weight(torch.randn(4, 4), "fp16")
    with pytest.raises(InputError, match="NaN"):
        quantize_weight(torch.full((4, 4), math.nan), "kmc4")
    with pytest.raises(InputError, match="not a format"):
        quantize_weight(torch.randn(4, 4), "int4")


def test_memory_counts_packed_and_shared_weights_once():
    first, second = linear("kmc4"), nn.Linear(16, 8)
    second.weight = first.weight
    model = nn.ModuleList([first, second, nn.BatchNorm1d(3)])
    biases, norm = 2 * 8 * 4, 4 * 3 * 4 + 8
    assert memory_bytes(model) == first.weight.stored_bytes + biases + norm
    second.weight = nn.Parameter(first.weight.detach(), requires_grad=False)
    second.bias = nn.Parameter(first.bias.data)
    assert memory_bytes(model) == first.weight.stored_bytes + biases // 2 + norm, "other handles on the same memory"
    second.weight, second.bias = first.weight, nn.Parameter(first.bias.detach().clone())
    assert memory_bytes(model.to("meta")) == first.weight.stored_bytes + biases + norm
