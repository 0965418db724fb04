"""What packed weights refuse: everything not listed, by name, with the layer and a remedy, and without a crash."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from packed_weights import random_packed
from sedimo.errors import UnsupportedError
from sedimo.quant.tensor import QuantizedTensor

TESTS = Path(__file__).parents[1]


@pytest.fixture
def q() -> QuantizedTensor:
    packed = random_packed((8, 32), "kmc4")
    packed.layer_name = "block.to_q"
    return packed


REFUSED = {
    "add in place": lambda q: q.add_(1),
    "augmented addition": lambda q: q.__iadd__(1),
    "add into a transposed view": lambda q: q.t().add_(1),
    "add into data": lambda q: q.data.add_(1),
    "fill": lambda q: q.fill_(0),
    "initialisation": lambda q: nn.init.normal_(q),
    "copy from an ordinary tensor": lambda q: q.copy_(torch.zeros(8, 32)),
    "copy into an ordinary tensor": lambda q: torch.zeros(8, 32).copy_(q),
    "copy from another format": lambda q: q.copy_(random_packed((8, 32), "kmc3")),
    "copy from another codebook dtype": lambda q: q.copy_(random_packed((8, 32), "kmc4", wide=torch.float32)),
    "set_": lambda q: q.set_(torch.zeros(8, 32)),
    "resize_": lambda q: q.resize_(4, 4),
    "write through out=": lambda q: torch.mm(torch.zeros(8, 8), torch.zeros(8, 32), out=q),
    "foreach": lambda q: torch._foreach_add_([q], [torch.zeros(8, 32)]),
    "data from an ordinary tensor": lambda q: setattr(q, "data", torch.zeros(8, 32)),
    "data of another shape": lambda q: setattr(q, "data", random_packed((8, 16))),
    "cat": lambda q: torch.cat([q, q]),
    "stack": lambda q: torch.stack([q, q]),
    "index": lambda q: q[0],
    "assignment to an index": lambda q: q.__setitem__(0, 1.0),
    "iteration": lambda q: list(q),
    "view": lambda q: q.view(-1),
    "as_strided": lambda q: q.as_strided((2, 2), (1, 1)),
    "permute in place": lambda q: q.permute(0, 1),
    "multiplication": lambda q: q * 2,
    "sum": lambda q: q.sum(),
    "norm": lambda q: torch.linalg.vector_norm(q),
    "isnan": lambda q: q.isnan(),
    "comparison": lambda q: torch.equal(q, q),
    "einsum": lambda q: torch.einsum("bi,oi->bo", torch.zeros(2, 32), q),
    "embedding": lambda q: nn.functional.embedding(torch.tensor([1]), q),
    "empty_like": lambda q: torch.empty_like(q),
    "zeros_like": lambda q: torch.zeros_like(q),
    "item": lambda q: q[0, 0].item(),
    "tolist": lambda q: q.tolist(),
    "numpy": lambda q: q.numpy(),
    "np.asarray": lambda q: np.asarray(q),
    "dlpack": lambda q: torch.from_dlpack(q),
    "apply_": lambda q: q.apply_(lambda v: v),
    "torch.save": lambda q: torch.save(q, io.BytesIO()),
    "copy.copy": lambda q: copy.copy(q),
    "share_memory_": lambda q: q.share_memory_(),
    "integer label": lambda q: q.to(torch.int8),
    "memory format": lambda q: random_packed((4, 4, 3, 3)).to(memory_format=torch.channels_last),
    "contiguous transposed view": lambda q: q.t().contiguous(),
    "training": lambda q: q.requires_grad_(),
    "trainable parameter": lambda q: nn.Parameter(q),
    "made from an ordinary tensor": lambda q: QuantizedTensor(torch.zeros(8, 32)),
    "write into a batched view": lambda q: q.t().expand(1, 32, 8).add_(1),
    "expansion of a kernel": lambda q: random_packed((4, 4, 3, 3)).expand(2, 4, 4, 3, 3),
    "expansion of a dimension": lambda q: random_packed((1, 4)).expand(3, 4),
    "reshaped batch and matrix": lambda q: q.t().expand(2, 32, 8).reshape(64, 8),
    "transposed kernel": lambda q: random_packed((4, 4, 3, 3)).transpose(0, 1),
    "sparse": lambda q: q.to_sparse(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_and_changes_nothing(name, q):
    before = q.dequantize()
    with pytest.raises(UnsupportedError) as caught:
        REFUSED[name](q)
    assert torch.equal(q.dequantize(), before)
    assert str(caught.value).rstrip().endswith((".", "tensor")), "a remedy ends the message"


def test_the_message_names_layer_operation_and_remedy(q):
    with pytest.raises(UnsupportedError, match=r"'block.to_q' has a packed weight \(kmc4\).*aten\.cat.*dequantize"):
        torch.cat([q, q])
    with pytest.raises(UnsupportedError, match=r"block.to_q.*aten.add_.*lose the result"):
        q.add_(1)
    with pytest.raises(UnsupportedError, match=r"call model\.dequantize"):
        q * 2


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_plain_safetensors_files_are_refused(q, tmp_path):
    with pytest.raises(RuntimeError):
        safetensors.torch.save_file({"weight": q}, tmp_path / "x.safetensors")


def test_load_state_dict_of_ordinary_weights_fails_and_names_the_layer(q):
    layer = nn.Linear(32, 8)
    layer.weight = nn.Parameter(q, requires_grad=False)
    before = layer.weight.dequantize()
    with pytest.raises(RuntimeError, match=r"block.to_q.*copying between packed and ordinary"):
        layer.load_state_dict(nn.Linear(32, 8).state_dict())
    assert torch.equal(layer.weight.dequantize(), before)
    layer.load_state_dict(nn.Linear(32, 8).state_dict(), assign=True)  # said explicitly: the parameter is exchanged
    assert not isinstance(layer.weight, QuantizedTensor)


def test_share_memory_of_a_module_does_not_end_the_interpreter():
    code = (
        "import torch; from torch import nn; from packed_weights import random_packed\n"
        "layer = nn.Linear(32, 8); layer.weight = nn.Parameter(random_packed((8, 32)), requires_grad=False)\n"
        "for crash in (layer.share_memory, lambda: layer.weight.apply_(abs)):\n"
        "    try: crash()\n"
        "    except NotImplementedError: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "refused\nrefused\n"), done.stderr
