"""What learned rounding gains over nearest rounding at equal bytes.

    python benchmarks/reconstruction.py [--source SRC] [--formats uaq3,uaq4,mixed,jacobian] [--steps 500] [--samples 32]

Each recipe is rounded to nearest, and reconstructed block by block on seeds from 0 on; both are then sampled from the
same fresh seeds. `mixed` is an allocation by weight error among uaq3, uaq4g64, kmc4 and uaq6 at 4.0 paper bits, so that
some layers keep their codes; `jacobian` is one by first-order noise among uaq of 2 to 6 bits and uaq4g64. Printed:
SQNR of both, and learned minus nearest with its 95 % interval, paired by seed.
"""

from __future__ import annotations

import argparse
import time

import sedimo
from _suite.signal import summarize
from sedimo.cli.console import ConsoleProgress
from sedimo.lab.exchange import probed
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings, Seeds
from sedimo.methods.error import ERROR
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import Task
from sedimo.metrics.signal import paired_difference, relative_noise
from sedimo.treatments.learned_rounding import reconstruct

MIXED_BITS = 4.0
# allocations by weight error and by first-order noise
MIXED = {"mixed": "uaq3,uaq4g64,kmc4,uaq6", "jacobian": "uaq2,uaq3,uaq4,uaq4g64,uaq5,uaq6"}


def recipe_of(pipe, graph, name: str):
    """The bank and the recipe of a format, or of an allocation."""
    if name not in MIXED:
        bank = sedimo.fit(pipe, sedimo.search_space(graph, f"{name},fp16"), sample_channels=2)
        return bank, bank.space.uniform(sedimo.Format.parse(name))
    space = sedimo.search_space(graph, f"{MIXED[name]},fp16")
    bank = sedimo.fit(pipe, space, sample_channels=16 if name == "mixed" else None)
    method = ERROR if name == "mixed" else JACOBIAN
    table = method.measure(Lab(pipe, bank, graph=graph), Task(method.knobs())).table
    return bank, sedimo.allocate(table, bits=MIXED_BITS).recipe


def measure(pipe, plan, reference, weights):
    """Noise of the final latents with some weights."""
    with probed(pipe.denoiser, weights):
        return relative_noise(reference, pipe.sample(plan).numpy())


def main() -> None:
    """Prints a line per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="zoo:cifar-dit")
    parser.add_argument("--formats", default="uaq3,uaq4,mixed,jacobian")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--fresh", type=int, default=32)
    parser.add_argument("--fresh-seed", type=int, default=1000)
    options = parser.parse_args()
    pipe = sedimo.load(options.source)
    graph = sedimo.trace(pipe)
    learning = Seeds(SamplingSettings(options.samples), pipe.default_sampling).search
    fresh = Seeds(SamplingSettings(options.fresh, options.fresh_seed), pipe.default_sampling).search
    reference = pipe.sample(fresh).numpy()
    for name in options.formats.split(","):
        bank, recipe = recipe_of(pipe, graph, name)
        begin = time.perf_counter()
        lab = Lab(pipe, bank, graph=graph, progress=ConsoleProgress())
        found = reconstruct(lab, bank, recipe, learning, n_steps=options.steps)
        seconds = time.perf_counter() - begin
        powers = [measure(pipe, fresh, reference, w) for w in (bank.quantize(recipe), found.weights)]
        nearest, learned = (summarize(p) for p in powers)
        gain = paired_difference(powers[1], powers[0]).estimate
        print(
            f"{name}: {bank.space.paper_bits(recipe):.2f} paper bits, nearest {nearest.sqnr_db:.2f} "
            f"± {nearest.standard_error:.2f} dB, learned {learned.sqnr_db:.2f} ± {learned.standard_error:.2f} dB, gain "
            f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] dB, n = {gain.n}, {seconds:.0f} s, "
            f"{sum(b.is_learned for b in found.blocks)} of {len(found.blocks)} blocks",
            flush=True,
        )


if __name__ == "__main__":
    main()
