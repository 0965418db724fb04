"""Every version of the checkpoint format that was released stays readable, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from packed_weights import check_checkpoint
from sedimo.checkpoint.contents import packed_layers
from sedimo.checkpoint.reading import read_packed

RELEASED = Path(__file__).parent / "released"
sys.path.insert(0, str(RELEASED))

from small_model import FORMATS, SmallModel  # noqa: E402  # lies beside the data

VERSIONS = sorted(path for path in RELEASED.glob("v*") if path.is_dir())


def test_there_is_a_folder_of_each_version():
    assert [path.name for path in VERSIONS] == ["v1"]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_reads_to_the_bit(folder):
    expected = load_file(folder / "expected_values.safetensors")
    bias = expected.pop("bias")
    read = read_packed(check_checkpoint(folder))
    model = SmallModel.from_pretrained(folder)
    assert read.keys() == packed_layers(model).keys() == expected.keys() == FORMATS.keys() | {"twin"}
    for name, weight in packed_layers(model).items():
        assert torch.equal(weight.dequantize(), expected[name])
        assert torch.equal(read[name].dequantize(), expected[name])
    assert torch.equal(model.linear.bias, bias)
    assert model.twin.weight is model.linear.weight
    assert model.steps.tolist() == [0, 1, 2]
