"""Time and quality of allocation at the size of SDXL: 803 decisions, 12 formats, or 36 pairs of widths.

    python benchmarks/allocation.py [--decisions 803] [--seeds 3] [--most-seconds 5]

Three sets of options: 12 formats of weights, 12 and 36 pairs of weight and activation widths. Two kinds of costs:
relative noise, and the linear costs of orthogonality, whose many equal slopes are hard for a solver. Each instance is
solved under a size alone, bit operations alone, and both, by the exact rule and by the linear relaxation with rounding
(the published way). Printed: seconds, the largest gap proven, the objective of the relaxation relative to the exact
one, and how much of each budget is used. Layer sizes, calls per weight and the spread of sensitivities over four
decades are those of SDXL-like models; costs are random, and scaled by 1e-9 and 1e9 in turn, which must not matter.

Fails if an instance took longer than the goal, exceeded a budget, or the relaxation was better. Seconds are CPU time of
this process, so that other work on the machine does not count; the wall clock's are printed beside them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sedimo.allocation.solve import Allocation, allocate
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.quant.formats import Format, count_bops, paper_bytes, parse_formats, stored_bytes, with_activations

GOAL_SECONDS = 5.0
BITS, BOPS_SHARES = (3.3, 3.7, 4.5), (0.15, 0.4)  # of the way from the fewest to the most operations
SCALES = (1.0, 1e-9, 1e9)
RELATIVE_NOISE = {"uaq": 1.6, "kmc": 1.0, "kma": 1.3}
PAIRS = (2, 3, 4, 5, 6, 8)
SETS = {
    "12 formats": parse_formats("uaq2,uaq3,uaq4,uaq5,uaq6,uaq4g64,kmc2,kmc3,kmc4,kma3,kma4,fp16"),
    "12 pairs": with_activations(parse_formats("uaq2,uaq3,uaq4,uaq6"), (4, 6, 8)),
    "36 pairs": with_activations([Format("uaq", bits) for bits in PAIRS], PAIRS),
}


@dataclass(frozen=True)
class Run:
    """One instance solved by both rules; seconds are those of the exact one."""

    seconds: float
    wall_seconds: float
    exact: Allocation
    rounded: Allocation

    @property
    def is_sound(self) -> bool:
        """Whether both keep the budgets in integers, and the relaxation is not better."""
        kept = all(
            used <= limit
            for a in (self.exact, self.rounded)
            for used, limit in ((a.used_bytes, a.budget_bytes), (a.bops, a.budget_bops))
            if limit is not None
        )
        return kept and self.exact.objective <= self.rounded.objective


def make_table(n_decisions: int, formats: Sequence[Format], kind: str, scale: float, seed: int) -> SensitivityTable:
    rng = np.random.default_rng(seed)
    params, costs = {}, []
    for i in range(n_decisions):
        name = f"layer{i:03d}"
        shape = int(rng.choice([320, 640, 1280, 2560])), int(rng.choice([320, 640, 1280, 2048, 5120]))
        params[name] = shape[0] * shape[1]
        macs = params[name] * int(rng.choice([1, 77, 1024, 4096], p=[0.1, 0.2, 0.5, 0.2]))
        levels, theta = 10 ** rng.normal(-5, 1, 2), rng.random()
        for f in formats:
            cost = scale * (noise_of(f, levels, rng) if kind == "noise" else theta * (32 - f.bits - f.activation_bits))
            sizes = paper_bytes(f, shape), stored_bytes(f, shape), count_bops(macs, f)
            costs.append(Cost(name, f, float(cost), 0.0, 8, *sizes))
    same, layers = dict.fromkeys(params, ""), {name: (name,) for name in params}
    return SensitivityTable("random", kind, "random", tuple(costs), layers, same, same, params, {})


def noise_of(number_format: Format, levels: np.ndarray, rng: np.random.Generator) -> float:
    spread = np.exp(rng.normal(0, 0.3, 2))
    weight = levels[0] * 4.0**-number_format.bits * RELATIVE_NOISE.get(number_format.family, 0.0)
    weight *= 0.5 if number_format.group_size else 1.0
    inputs = levels[1] * 4.0**-number_format.activation_bits if number_format.activation_bits < 16 else 0.0
    return float(spread @ (weight, inputs))


def budgets_of(table: SensitivityTable) -> list[dict[str, float | int]]:
    """Sizes alone, operations alone, and all pairs of them."""
    low, high = (sum(pick(c.bops for c in costs) for costs in table.by_decision.values()) for pick in (min, max))
    sizes = [{"bits": bits} for bits in BITS]
    operations = [{"budget_bops": int(low + share * (high - low))} for share in BOPS_SHARES]
    return [*sizes, *operations, *(size | bops for size, bops in itertools.product(sizes, operations))]


def run(table: SensitivityTable, budget: dict[str, float | int]) -> Run:
    wall, begin = time.perf_counter(), time.process_time()
    exact = allocate(table, **budget)
    seconds, wall_seconds = time.process_time() - begin, time.perf_counter() - wall
    return Run(seconds, wall_seconds, exact, allocate(table, **budget, rule="lp"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decisions", type=int, default=803)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most-seconds", type=float, default=GOAL_SECONDS)
    options = parser.parse_args()
    print(f"{options.decisions} decisions, {options.seeds} random instances each; seconds of CPU, median (most)")
    print(
        f"{'options':>10} {'costs':>6} {'budget':>7} {'n':>3} {'seconds':>12} {'wall':>6} {'gap':>8} {'lp - exact':>10}"
    )
    everything: list[Run] = []
    for (label, formats), kind in itertools.product(SETS.items(), ("noise", "bits")):
        found: dict[str, list[Run]] = {}
        for seed in range(options.seeds):
            table = make_table(options.decisions, formats, kind, SCALES[seed % len(SCALES)], seed)
            for budget in budgets_of(table):
                name = "both" if len(budget) == 2 else "size" if "bits" in budget else "bops"
                found.setdefault(name, []).append(run(table, budget))
        for name, runs in found.items():
            show(label, kind, name, runs)
            everything += runs
    slowest, n_unsound = max(r.seconds for r in everything), sum(not r.is_sound for r in everything)
    print(f"{len(everything)} instances: slowest {slowest:.2f} s, goal {options.most_seconds:g} s; {n_unsound} unsound")
    return 0 if slowest <= options.most_seconds and not n_unsound else 1


def show(label: str, kind: str, name: str, runs: Sequence[Run]) -> None:
    seconds = [r.seconds for r in runs]
    times = f"{statistics.median(seconds):.2f} ({max(seconds):.2f})"
    gap, excess = (
        max(values)
        for values in zip(*((r.exact.gap, r.rounded.objective / r.exact.objective - 1) for r in runs), strict=True)
    )
    wall = max(r.wall_seconds for r in runs)
    print(
        f"{label:>10} {kind:>6} {name:>7} {len(runs):3d} {times:>12} {wall:6.1f} {gap:8.1e} {excess:10.1e}", flush=True
    )


if __name__ == "__main__":
    raise SystemExit(main())
