"""Options that make formats, as a person types them."""

from __future__ import annotations

import pytest

from sedimo.api.comparing import CompareOrder
from sedimo.api.smooth_order import SmoothOrder
from sedimo.cli.orders import activations_of, formats_text_of, smooth_order_of
from sedimo.errors import InputError


@pytest.mark.parametrize(
    ("formats", "act", "expected"),
    [
        ("wide", None, "wide"),
        ("uaq3,kmc4", "a8", "uaq3a8,kmc4a8"),
        ("uaq3", "a4, a6,a16", "uaq3a4,uaq3a6,uaq3"),
        ("uaq3,fp16", "8", "uaq3a8,fp16a8"),
    ],
)
def test_widths_of_activations_widen_the_formats(formats, act, expected):
    assert formats_text_of({"formats": formats, "act": act}) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act": "w8"}, "are written such as a8"),
        ({"act": ","}, "are written such as a8"),
        ({"act": "a8", "method": "uniform:kmc4"}, "write uniform:uaq4a8"),
        ({"act": "a8", "recipe": "r.json"}, "a recipe or a single format has its own"),
        ({"act": "a8", "formats": "uaq4a8"}, "has activation bits already"),
    ],
)
def test_widths_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        formats_text_of({"formats": "uaq4", **options})


DYNAMIC = {"act_ranges": "dynamic", "act_symmetric": False, "act_steps": 0, "act_by_timestep": False}


@pytest.mark.parametrize("more", [{"act_steps": 3}, {"act_by_timestep": True}])
def test_options_of_calibration_need_calibrated_ranges(more):
    with pytest.raises(InputError, match="give --act-ranges min-max, too"):
        activations_of({**DYNAMIC, **more})
    found = activations_of({**DYNAMIC, **more, "act_ranges": "mse"}).calibration
    assert (found.n_steps, found.by_timestep) == (more.get("act_steps", 0), "act_by_timestep" in more)


def test_a_share_of_smoothed_layers_needs_smoothing():
    with pytest.raises(InputError, match="give --smooth"):
        smooth_order_of({"smooth": None, "smooth_share": 0.5})
    assert smooth_order_of({"smooth": None, "smooth_share": None}) is None
    assert smooth_order_of({"smooth": 0.5, "smooth_share": None}) == SmoothOrder(0.5, 0.1)
    assert smooth_order_of({"smooth": 0.5, "smooth_share": 1.0}) == SmoothOrder(0.5, 1.0)


def test_a_comparison_refuses_methods_that_cannot_choose_among_widths(tmp_path):
    order = {"source": "x", "store": tmp_path, "bits": (4.0,), "formats": "uaq4a4,uaq4a8"}
    with pytest.raises(InputError, match="method 'error' sees weights alone"):
        CompareOrder(**order, methods=("uniform", "orthogonality", "error"))
    with pytest.raises(InputError, match="method 'orthogonality' sees weights alone"):
        CompareOrder(**order, methods=("orthogonality-noise",))
    CompareOrder(
        **order, methods=("uniform", "orthogonality", "orthogonality-lp", "jacobian", "ablation", "sqnr", "gnn")
    )
