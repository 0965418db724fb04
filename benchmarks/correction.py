"""What correcting quantization noise in the sampler gains, for uniform recipes.

    python benchmarks/correction.py [--source SRC] [--formats uaq3,uaq4] [--samples 16] [--fresh 16] [--etas 0,1]

At every eta of DDIM the correction is estimated on seeds from 0 on, and the recipe is sampled from fresh seeds with and
without it; 0 adds no noise, 1 as much as DDPM does. Printed: SQNR of the final latents, and corrected minus plain with
its 95 % interval, paired by seed. Both runs of a pair draw the same noise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time

import numpy as np

import sedimo
from _suite.signal import summarize
from sedimo.cli.console import ConsoleProgress
from sedimo.lab.exchange import probed
from sedimo.lab.seeds import SamplingSettings, Seeds
from sedimo.metrics.signal import paired_difference, relative_noise
from sedimo.pipelines.correction import corrected
from sedimo.pipelines.schedulers import handled_steps
from sedimo.treatments.noise_correction import CORRECTION_PATHS, correction_of, estimate_correction

FRESH_SEED = 1000
say = functools.partial(print, flush=True)


@contextlib.contextmanager
def noisy(pipe, eta: float):
    """DDIM with noise at every step."""
    with handled_steps(pipe.pipeline.scheduler, lambda call: call.run(eta=eta) if eta else call.run()):
        yield


def sampled(pipe, plan, eta: float):
    """Final latents of a plan."""
    with noisy(pipe, eta):
        return pipe.sample(plan).numpy()


def line(name: str, powers, plain=None) -> str:
    """SQNR, and the gain over `plain`."""
    found = summarize(powers)
    text = f"{name}: {found.sqnr_db:.2f} ± {found.standard_error:.2f} dB (n = {found.n})"
    if plain is None:
        return text
    gain = paired_difference(powers, plain)
    return f"{text}, gain {gain.mean_db:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] dB"


def measure(pipe, small, bank, recipe, plans, eta: float) -> None:
    """Prints what the correction gains at an eta; on the recipe's own path only where there is no noise."""
    learning, fresh = plans
    reference, weights = sampled(pipe, fresh, eta), bank.quantize(recipe)
    with probed(pipe.denoiser, weights):
        plain = relative_noise(reference, sampled(pipe, fresh, eta))
    say(line(f"eta {eta:g}, plain", plain))
    for path in CORRECTION_PATHS[: 1 if eta else None]:
        with noisy(pipe, eta), noisy(small, eta), probed(small.denoiser, weights):
            fits = estimate_correction(pipe, small, learning, path=path, progress=ConsoleProgress())
        for fit in fits:
            bias = np.abs([b.value for b in fit.bias]).max()
            say(
                f"  t {fit.timestep:4.0f}: k {fit.slope.value:+.4f} ± {fit.slope.standard_error:.4f}, largest bias "
                f"{bias:.4f}, deviation of the rest {np.sqrt(np.mean(fit.variance)):.4f}, explained {fit.explained:.1%}"
            )
        for with_variance in (False, True) if eta else (False,):
            with (
                probed(pipe.denoiser, weights),
                corrected(pipe, correction_of(fits), with_variance=with_variance) as log,
            ):
                powers = relative_noise(reference, sampled(pipe, fresh, eta))
            say(line(f"eta {eta:g}, path {path}{', with variance' if with_variance else ''}", powers, plain))
        say(f"  {log}")


def main() -> None:
    """Prints a few lines per recipe and eta."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="zoo:cifar-dit")
    parser.add_argument("--formats", default="uaq3,uaq4")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--fresh", type=int, default=16)
    parser.add_argument("--etas", default="0,1")
    options = parser.parse_args()
    (pipe, small), begin = (sedimo.load(options.source) for _ in range(2)), time.perf_counter()
    graph = sedimo.trace(pipe)
    learning = Seeds(SamplingSettings(options.samples), pipe.default_sampling).search
    fresh = Seeds(SamplingSettings(options.fresh, FRESH_SEED), pipe.default_sampling).search
    for name in options.formats.split(","):
        bank = sedimo.fit(pipe, sedimo.search_space(graph, f"{name},fp16"), sample_channels=2)
        say(name)
        for eta in map(float, options.etas.split(",")):
            measure(pipe, small, bank, bank.space.uniform(sedimo.Format.parse(name)), (learning, fresh), eta)
    say(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
