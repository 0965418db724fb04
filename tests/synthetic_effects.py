"""Probes of final latents that nobody measured: normal products of planted powers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sedimo.allocation.table import EXACTLY_NOTHING, build_table
from sedimo.bank import Candidate
from sedimo.graph.model import DenoiserGraph, Node
from sedimo.lab.study import Setting
from sedimo.methods.taps import FirstOrder
from sedimo.quant.formats import Format
from sedimo.space import SearchSpace, search_space

Power = Callable[[str, str], float]  # of a decision's change, by their names


def space_of(n_decisions: int, formats: str) -> SearchSpace:
    """Linear layers of 64 x 64 named `d00`, `d01`, ..."""
    names = [f"d{i:02}" for i in range(n_decisions)]
    nodes = tuple(Node(n, "layer", "op", "block", 100, "Linear", (64, 64)) for n in names)
    return search_space(DenoiserGraph("Toy", nodes, (), ()), formats)


def error_of(number_format: Format) -> float:
    """A weight error that falls by 6 dB a bit, a little less for codebooks."""
    if not number_format.is_quantized:
        return 0.0
    return 4.0 ** -(number_format.bits - 2) * (0.7 if number_format.family == "kmc" else 1.0)


def candidates_of(space: SearchSpace) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(d.name, f, error_of(f), 0.0, 0, d.paper_bytes(f), d.stored_bytes(f))
        for d in space.decisions
        for f in d.formats
    )


def probe_of(products: dict[str, dict[str, Sequence[float]]], n_samples: int, unused: tuple[str, ...] = ()):
    setting = Setting("w", "Toy", "final_latents", tuple(range(n_samples)), 4, (), None, None, "float32", "cpu")
    plain = {d: {name: tuple(np.ravel(v).tolist()) for name, v in c.items()} for d, c in products.items()}
    n_directions = len(next(iter(next(iter(plain.values())).values()))) // n_samples
    return FirstOrder(setting, n_directions, plain, unused)


def drawn_products(space: SearchSpace, power: Power, shape: tuple[int, int], seed: int = 0):
    """Normal products `[n, directions]` of the powers given, by decision and change."""
    rng = np.random.default_rng(seed)
    found = {}
    for d in space.decisions:
        n = len(d.changes) + 1  # one more than is used: the seeds of tests were chosen so
        normal = rng.normal(size=(n, *shape))
        found[d.name] = {name: one * power(d.name, name) ** 0.5 for name, one in zip(d.changes, normal, strict=False)}
    return found


def table_of(space: SearchSpace, candidates, effects):
    """The table whose costs are those of the effects."""
    costs = effects.costs
    return build_table(
        "adjoint",
        space,
        candidates,
        lambda c: costs.get((c.decision, c.format), EXACTLY_NOTHING),
        {},
        sees_activations=True,
    )
