"""First-order noise on each step's output against plain autograd of the recorded calls, cost by cost."""

from __future__ import annotations

import pytest
import torch
from product_oracles import step_products

from sedimo.bank import fit_bank
from sedimo.lab.lab import Lab
from sedimo.methods.jacobian import probe_jacobian
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.trajectory import batches_of, record
from tolerances import FLOAT32_NETWORK
from toy_pipeline import ToyAdapter, ToyDenoiser, ToyWeights, toy_space

SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=4, batch_size=2)
SHARED = "time"  # one embedding for all samples of a call
N_DIRECTIONS = 3


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("combine_rows", [False, True])
def test_noise_is_that_of_plain_autograd(guided, combine_rows):
    torch.manual_seed(3)
    denoiser = ToyDenoiser()
    adapter = ToyAdapter(denoiser, guided=guided)
    bank = fit_bank(ToyWeights(denoiser), toy_space(denoiser, "uaq3,uaq4,fp16"))
    probe = probe_jacobian(Lab(adapter, bank), SAMPLING, n_directions=N_DIRECTIONS, combine_rows=combine_rows)
    assert len(probe.row_weights) == (2 if guided and combine_rows else 1)
    totals = {}
    for index, (call, samples) in enumerate(batches_of(SAMPLING, record(adapter, SAMPLING).calls)):
        found = step_products(denoiser, bank, call, index, probe.row_weights, N_DIRECTIONS)
        for key, products in found.items():
            if key[0] == SHARED:  # samples are not told apart: each is given an equal share of all
                products = products.sum(1, keepdim=True).expand_as(products) / products.shape[1] ** 0.5
            noise = products.square().mean(0).reshape(-1, len(samples)).mean(0)
            total = totals.setdefault(key, torch.zeros(3, dtype=torch.float64))
            total[samples.start : samples.stop] += noise / SAMPLING.n_steps
    for decision, formats in probe.numbers.items():
        for name, values in formats.items():
            assert values == pytest.approx(totals[decision, name].tolist(), rel=FLOAT32_NETWORK), (decision, name)
    assert len(probe.numbers) == 7
    assert set(probe.numbers["unused"]["uaq3"]) == {0.0}
