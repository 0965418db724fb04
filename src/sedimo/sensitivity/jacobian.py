"""First-order noise on the denoiser's output, ||J dW||^2, as a table."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.measurement.jacobian import JacobianProbe
from sedimo.sensitivity.costs import CostEstimate, build_table, mean_cost
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import SearchSpace


def jacobian_table(space: SearchSpace, candidates: Iterable[Candidate], probe: JacobianProbe) -> SensitivityTable:
    """Cost = mean over samples of the noise relative to the output's power, averaged over steps and directions.

    Rounded activations add their own noise to that of the weight: the two errors are independent to first order.

    The standard error comes from the variation between samples.

    Raises:
        InputError: the probe was made for other decisions or formats.
    """

    def estimate(candidate: Candidate) -> CostEstimate:
        noise, names = probe.noise.get(candidate.decision, {}), candidate.format.changes
        if not noise.keys() >= set(names):
            raise InputError(
                f"the probe has no {candidate.decision} at {candidate.format}; measure it again for this space"
            )
        return mean_cost(np.sum([noise[name] for name in names], axis=0))

    setting = probe.setting
    settings = {
        "n_samples": str(len(setting.seeds)),
        "n_steps": str(setting.n_steps),
        "n_directions": str(probe.n_directions),
        "row_weights": ", ".join(f"{w:.2f}" for w in probe.row_weights),
        "unused_decisions": ", ".join(probe.unused) or "none",
    }
    return build_table("jacobian", space, candidates, estimate, settings, sees_activations=True)
