"""Local noise as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.measurement.sqnr import SqnrProbe
from sedimo.quant.formats import Format
from sedimo.sensitivity.costs import CostEstimate, build_table
from sedimo.sensitivity.table import SensitivityTable
from sedimo.space import SearchSpace


def sqnr_table(space: SearchSpace, candidates: Iterable[Candidate], probe: SqnrProbe) -> SensitivityTable:
    """Cost = relative noise power at the decision's own outputs, averaged over samples and timesteps.

    A sum of such costs treats noise at all layers alike, wherever it goes from there.

    Raises:
        InputError: the probe was made for other decisions or formats.

    Source:
        Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431), time-averaged local SQNR.
    """
    known = {(d, text) for part in probe.parts for d, formats in part.noise.items() for text in formats}
    called = {d for d, _ in known}

    def estimate(candidate: Candidate) -> CostEstimate:
        missing = [name for name in candidate.format.changes if (candidate.decision, name) not in known]
        if candidate.decision in called and missing:
            raise InputError(f"the probe has no {candidate.decision} at {missing[0]}; measure it again for this space")
        found = probe.over_time(candidate.decision, candidate.format)
        return CostEstimate(found.mean, found.standard_error, probe.n_samples)

    unused = sorted({d.name for d in space.decisions} - called)
    settings = {
        "n_samples": str(probe.n_samples),
        "n_steps": str(len(probe.parts)),
        "unused_decisions": ", ".join(unused) or "none",
    }
    return build_table("sqnr", space, candidates, estimate, settings, sees_activations=True)


def noisiest_decisions(space: SearchSpace, probe: SqnrProbe, number_format: Format, share: float) -> tuple[str, ...]:
    """The share of the decisions, at least one, whose own outputs `number_format` disturbs most, averaged over time.

    Raises:
        InputError: a share outside 0..1 (0 excluded).

    Source:
        Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431): a tenth is corrected.
    """
    if not 0 < share <= 1:
        raise InputError(f"the share of layers must lie in 0..1 and not be 0, got {share}; 0.1 is usual")
    noise = {d.name: probe.over_time(d.name, number_format).mean for d in space.decisions}
    n = max(1, math.floor(share * len(noise) + 0.5))
    return tuple(sorted(noise, key=lambda name: -noise[name])[:n])
