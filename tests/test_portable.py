"""The arithmetic that tests ask for is in force: a plug-in that imported torch first would have made it void."""

import os

import pytest
import torch

from portable import KERNELS

pytestmark = pytest.mark.skipif(
    os.environ.get("SEDIMO_TEST_KERNELS") == "native", reason="the machine's own kernels were asked for"
)


def test_torch_takes_the_kernels_that_every_processor_has():
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"


def test_matrix_products_and_convolutions_read_their_variables():
    assert {name: os.environ.get(name) for name in KERNELS} == KERNELS
