"""Where a comparison keeps what methods computed, so that later versions find it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sedimo.api.comparing import CompareOrder, computing_name


def test_orders_of_whole_models_keep_their_names_when_orders_learn_new_options():
    order = CompareOrder("zoo:cifar-dit", Path("runs/compare"), (3.5, 4.0)).job("jacobian", 3.5)
    assert computing_name("jacobian", order) == "computing:eb120fa9b6dc97b9"  # of a study before streams and hybrids
    others = {computing_name("ablation", order), computing_name("jacobian", replace(order, streams=False))}
    assert len(others | {computing_name("jacobian", order)}) == 3
