"""How methods agree with the measured ablation about which operations matter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sedimo.metrics.estimate import Estimate
from sedimo.sensitivity.quality import LEAST_RECIPES, prediction_quality
from sedimo.sensitivity.table import SensitivityTable

HOLD_ABLATION = ("ablation", "combined", "rank-average")  # whose agreement with the ablation would say little


def agreement(tables: Mapping[str, SensitivityTable], bits: float) -> dict[str, Estimate]:
    """Kendall's tau between operations' costs by each method and by the ablation, with bootstrap intervals.

    An operation's cost is the mean over its decisions, at each one's format nearest to `bits`. Fewer than three
    operations have no order worth a number. Methods that contain the ablation are left out.
    """
    if "ablation" not in tables:
        return {}
    truth, found = _of_operations(tables["ablation"], bits), {}
    for method, table in tables.items():
        costs = _of_operations(table, bits)
        if method not in HOLD_ABLATION and len(truth) >= LEAST_RECIPES:
            found[method] = prediction_quality([costs[name] for name in truth], list(truth.values())).kendall_tau
    return found


def _of_operations(table: SensitivityTable, bits: float) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for decision, costs in table.by_decision.items():
        quantized = [c for c in costs if c.format.is_quantized]
        if not quantized:
            continue
        nearest = min(quantized, key=lambda c: (abs(8 * c.paper_bytes / table.params[decision] - bits), c.cost))
        sums.setdefault(table.operations[decision], []).append(nearest.cost)
    return {name: float(np.mean(values)) for name, values in sums.items()}
