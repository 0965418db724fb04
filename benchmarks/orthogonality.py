"""How much memory the matrix of orthogonality needs beyond the model, on layers of the size of PixArt's.

    python benchmarks/orthogonality.py [--samples 32 --timesteps 10 --batch 16 --tokens 1024 --width 1152] [--json FILE]

The denoiser is synthetic: 287 linear layers whose outputs have the shapes of PixArt's at 512 pixels (28 blocks of self-
and cross-attention and feed-forward, and seven around them), but which read eight channels each, so that it runs on a
CPU. What counts is the peak of the process's memory above what it held with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from sedimo.jobs.quantize import peak_rss_bytes
from sedimo.lab.lab import Lab
from sedimo.lab.objective import counted_calls
from sedimo.methods.orthogonality import probe_orthogonality
from sedimo.pipelines.adapter import DenoiserCall, Sampling

N_BLOCKS, N_AROUND, N_CAPTION_TOKENS, CHANNELS = 28, 7, 120, 8


class Denoiser(nn.Module):
    """Linear layers one after the other, each on the first channels of what the last one gave."""

    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        block = [(n_tokens, width)] * 6 + [(N_CAPTION_TOKENS, width)] * 2 + [(n_tokens, 4 * width), (n_tokens, width)]
        self.shapes = block * N_BLOCKS + [(n_tokens, width)] * N_AROUND
        self.layers = nn.ModuleList(nn.Linear(CHANNELS, out) for _, out in self.shapes)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        """What all layers together do to `sample` `[n, tokens, channels]`."""
        x = sample * (1 + timestep)
        for (n_tokens, _), layer in zip(self.shapes, self.layers, strict=True):
            x = x.clone()
            x[:, :n_tokens] += torch.tanh(layer(x[:, :n_tokens])[..., :CHANNELS])
        return (x,)


class Adapter:
    """x <- x - 0.1 denoiser(x), batch by batch."""

    name = identity = "synthetic"

    def __init__(self, n_tokens: int, width: int) -> None:
        torch.manual_seed(0)
        self.denoiser, self._n_tokens = Denoiser(n_tokens, width).eval(), n_tokens

    @torch.no_grad()
    def sample(self, sampling: Sampling, *, observer=None) -> torch.Tensor:
        """Final latents `[n, tokens, channels]`."""
        found = []
        for first in range(0, len(sampling.seeds), sampling.batch_size):
            generators = [torch.Generator().manual_seed(s) for s in sampling.seeds[first : first + sampling.batch_size]]
            x = torch.stack([torch.randn(self._n_tokens, CHANNELS, generator=g) for g in generators])
            for step in range(sampling.n_steps):
                inputs = {"sample": x, "timestep": torch.tensor(1 - step / sampling.n_steps)}
                (output,) = self.denoiser(**inputs)
                if observer is not None:
                    observer(DenoiserCall(step, float(inputs["timestep"]), inputs, output))
                x = x - 0.1 * output
            found.append(x)
        return torch.cat(found)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """There are no images."""
        return latents


def main() -> None:
    """Measures once and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("samples", 32), ("timesteps", 10), ("batch", 16), ("tokens", 1024), ("width", 1152)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    adapter = Adapter(arguments.tokens, arguments.width)
    names = [f"layers.{i}" for i in range(len(adapter.denoiser.layers))]
    plan = Sampling(tuple(range(arguments.samples)), arguments.timesteps, batch_size=arguments.batch)
    loaded, begin = psutil.Process().memory_info().rss, time.perf_counter()
    with counted_calls(adapter) as calls:
        probe = probe_orthogonality(Lab(adapter), names, plan, n_timesteps=arguments.timesteps)
    found = {
        **{name: value for name, value in vars(arguments).items() if name != "json"},
        "layers": len(names),
        "timesteps": len(probe.parts),
        "denoiser_calls": len(calls),
        "seconds": time.perf_counter() - begin,
        "loaded_mib": loaded / 2**20,
        "beyond_the_model_mib": (peak_rss_bytes() - loaded) / 2**20,
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
