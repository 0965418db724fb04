"""Planted graphs are too small for threads, and bits are the same only for the same number of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread_for_what_a_module_shares() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread(_few_threads: None) -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
