"""What do codes by error feedback gain, at how many steps, and what do their settings matter? Paired, on fresh seeds.

    python benchmarks/compensation.py [--source zoo:cifar-dit] [--formats uaq3,kmc3,uaq4] [--guidance G] [--fresh 32]

Uniform recipes with nearest codes and with feedback, SQNR of the final latents on fresh seeds; moments are of 32
samples of 10 steps. First at 10, 20 and 50 steps, then, for the first format at 10 steps, with moments of fewer and
more samples, other damping, and narrower blocks on the diagonal.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import sedimo
from sedimo.cli.console import ConsoleProgress
from sedimo.metrics.estimate import mean_estimate
from sedimo.metrics.signal import NoisePowers, paired_difference
from sedimo.quant.fitting import DAMPING
from sedimo.treatments.error_feedback import ErrorFeedback, measure_moments

FIRST_FRESH = 20_000
N_STEPS, STEPS = 10, (10, 20, 50)
SAMPLES, DAMPINGS, WIDTHS = (8, 16, 64), (0.001, 0.1), (256, 64)


@dataclass(frozen=True)
class Changed(ErrorFeedback):
    """From moments with more on their diagonal, or in narrower blocks."""

    added: float = 0.0  # a share of the mean power
    width: int | None = None

    def blocks(self, weight: str) -> Sequence[torch.Tensor]:
        """Blocks on the diagonal."""
        found = [b + self.added * b.diagonal().mean() * torch.eye(len(b)) for b in super().blocks(weight)]
        if self.width is None:
            return found
        starts = [(b, i) for b in found for i in range(0, len(b), self.width)]
        return [b[i : i + self.width, i : i + self.width] for b, i in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="zoo:cifar-dit")
    parser.add_argument("--formats", default="uaq3,kmc3,uaq4")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--fresh", type=int, default=32)
    parser.add_argument("--run", type=Path, default=Path("runs/compensation"))
    arguments = parser.parse_args()
    plain = sedimo.Lab(
        arguments.source,
        store=arguments.run,
        formats=arguments.formats,
        sampling=sedimo.SamplingSettings(guidance=arguments.guidance, n_steps=N_STEPS),
        progress=ConsoleProgress(),
    )
    space = plain.bank.space
    recipes = {str(f): space.uniform(f) for f in space.common_formats}

    def moments(n: int) -> ErrorFeedback:
        return measure_moments(plain, plain.seeds.plan(range(1_000_000, 1_000_000 + n)), arguments.run)

    def changed(added: float = 0.0, width: int | None = None) -> Changed:
        return Changed(standard.path, f"{standard.key} {added} {width}", added, width)

    def noise(lab: sedimo.Lab, name: str, n_steps: int = N_STEPS) -> NoisePowers:
        plan = replace(lab.seeds.plan(range(FIRST_FRESH, FIRST_FRESH + arguments.fresh)), n_steps=n_steps)
        (trial,) = lab.measure([recipes[name]], plan)
        return trial.powers

    begin = time.perf_counter()
    standard = moments(32)
    print(f"moments of 32 samples: {time.perf_counter() - begin:.1f} s")
    ours = plain.treated(standard)
    print("| format | steps | nearest codes | error feedback | gain [dB], paired |\n|---|---|---|---|---|")
    names = arguments.formats.split(",")
    for name in names:
        for n_steps in STEPS:
            near, fed = noise(plain, name, n_steps), noise(ours, name, n_steps)
            gain = paired_difference(fed, near)
            interval = f"{gain.mean_db:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"
            print(f"| `{name}` | {n_steps} | {shown(near)} | {shown(fed)} | {interval} |", flush=True)
    reference = noise(ours, names[0])
    print(f"\n| `{names[0]}` | SQNR [dB] | minus the standard, paired |\n|---|---|---|")
    variants = {f"{n} samples": moments(n) for n in SAMPLES}
    variants |= {f"damping {d:g}": changed(added=d - DAMPING) for d in DAMPINGS}
    variants |= {f"blocks of {w} columns": changed(width=w) for w in WIDTHS}
    for name, one in variants.items():
        found = noise(plain.treated(one), names[0])
        change = paired_difference(found, reference)
        print(
            f"| {name} | {shown(found)} | {change.mean_db:+.1f} [{change.low:+.1f}, {change.high:+.1f}] |", flush=True
        )


def shown(powers: NoisePowers) -> str:
    """Mean over seeds and its standard error."""
    found = mean_estimate(powers.sqnr_db)
    return f"{found.value:.1f} ± {found.standard_error:.1f}"


if __name__ == "__main__":
    main()
