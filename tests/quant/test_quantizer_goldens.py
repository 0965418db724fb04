"""Quantizers against values recorded from the released code of Qua2SeDiMo (tests/golden/quantizers.*).

`mse-b` is `uaq` with b bits, `kmeans-b` is `kmc`, `kmeans_all-b` is `kma`. The released code fails on constant
rows in `mse` ("'float' object has no attribute 'item'"): those two entries of `linear_constrow` hold an `error` only.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sedimo.quant.families.kmeans import fit_codebooks, read_values
from sedimo.quant.fitting import fit, fit_parameters
from sedimo.quant.formats import Format, paper_bytes
from tolerances import FLOAT32_FORMULA

GOLDEN = Path(__file__).parents[1] / "golden"
ENTRIES = json.loads((GOLDEN / "quantizers.json").read_text())
TENSORS = np.load(GOLDEN / "quantizers.npz", allow_pickle=False)
FAMILIES = {"mse": "uaq", "kmeans": "kmc", "kmeans_all": "kma"}
SCALE = 1e-6  # relative, promised
RECORDED_ZERO = 1e-12  # the released code records 2e-16 where every weight has a centroid of its own


def golden(entry):
    name, method = entry.split("/")
    family, bits = method.rsplit("-", 1)
    return torch.from_numpy(TENSORS[f"{name}/weight"]), Format(FAMILIES[family], int(bits))


VALID = [entry for entry, values in ENTRIES.items() if "error" not in values]
GRIDS = [entry for entry in VALID if "/mse" in entry]
CODEBOOKS = [entry for entry in VALID if "/kmeans" in entry]


def test_all_entries_are_checked():
    assert (len(GRIDS), len(CODEBOOKS)) == (12, 28)
    assert set(ENTRIES) - set(VALID) == {"linear_constrow/mse-3", "linear_constrow/mse-4"}


@pytest.mark.parametrize("entry", GRIDS)
def test_grids_are_those_of_the_released_code(entry):
    weight, number_format = golden(entry)
    fitted = fit(weight, number_format)
    np.testing.assert_allclose(fitted.parameters["scale"][:, 0].numpy(), TENSORS[f"{entry}/delta"], rtol=SCALE)
    np.testing.assert_array_equal(fitted.parameters["zero_point"][:, 0].numpy(), TENSORS[f"{entry}/zero_point"])
    np.testing.assert_allclose(
        fitted.dequantize().numpy(),
        TENSORS[f"{entry}/dequantized"],
        rtol=SCALE,
        atol=SCALE * float(fitted.parameters["scale"].max()),
    )


@pytest.mark.parametrize("entry", CODEBOOKS)
def test_codebooks_are_at_least_as_good_as_those_of_the_released_code(entry):
    weight, number_format = golden(entry)
    if number_format.family == "kmc":
        ((_, errors),) = fit_codebooks(weight.reshape(weight.shape[0], -1).numpy(), [number_format.n_levels])
    else:
        values, counts = read_values(weight)
        ((_, errors),) = fit_codebooks(values, [number_format.n_levels], counts)
    recorded = ENTRIES[entry]["sse"]
    assert float(errors.sum()) <= recorded * (1 + FLOAT32_FORMULA) + RECORDED_ZERO
    stored = fit_parameters(weight, [number_format])[number_format]
    assert stored.squared_error <= recorded * (1 + FLOAT32_FORMULA) + RECORDED_ZERO


@pytest.mark.parametrize("entry", VALID)
def test_paper_bytes_are_those_of_the_released_code(entry):
    weight, number_format = golden(entry)
    assert paper_bytes(number_format, tuple(weight.shape)) == ENTRIES[entry]["quantized_bytes"]


@pytest.mark.parametrize("bits", [3, 4])
def test_constant_rows_on_which_the_released_code_fails(bits):
    weight = torch.from_numpy(TENSORS["linear_constrow/weight"])
    is_constant = (weight == weight[:, :1]).all(dim=1)
    assert bool(is_constant.any())
    for family in ("uaq", "kmc"):
        assert torch.equal(fit(weight, Format(family, bits)).dequantize()[is_constant], weight[is_constant])
