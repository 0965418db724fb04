"""A pipeline of a few lines, for tests of measurements: a small network called `n_steps` times."""

from __future__ import annotations

import torch
from torch import nn

from sedimo.graph.model import DenoiserGraph, Node
from sedimo.pipelines.adapter import DenoiserCall
from sedimo.space import search_space

GUIDANCE = 3.0


class ToyDenoiser(nn.Module):
    """Linear layers and convolutions, a broadcast embedding, a tied pair, a layer called twice, one never called."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(2, 8, 3, padding=1, stride=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2, padding_mode="circular")
        self.time = nn.Linear(32, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.out = nn.Conv2d(8, 2, 1)
        self.second.weight = self.first.weight

    def forward(self, sample, timestep, label=None, return_dict=True):
        embedding = self.time(timestep.reshape(1, 1) * torch.linspace(-1, 1, 32))  # [1, 8], shared by the batch
        x = nn.functional.silu(self.grouped(self.conv_in(sample)))
        tokens = x.flatten(2).transpose(1, 2) + embedding[:, None]
        tokens = tokens + self.second(torch.tanh(self.first(tokens)))
        tokens = self.twice(torch.tanh(self.twice(tokens)))
        if label is not None:
            tokens = tokens * (1 + label.reshape(-1, 1, 1))
        output = self.out(tokens.transpose(1, 2).reshape(x.shape))
        return (output,) if not return_dict else {"sample": output}


class ToyAdapter:
    """x <- x - 0.3 denoiser(x), from one generator per sample; with guidance every call has two rows per sample."""

    name = identity = "toy"

    def __init__(self, denoiser=None, *, guided=False):
        torch.manual_seed(3)
        self.denoiser = (denoiser or ToyDenoiser()).eval()
        self.guided = guided
        self.n_calls = 0
        self.before_call = lambda: None

    @torch.no_grad()
    def sample(self, sampling, *, observer=None):
        seeds, found = sampling.seeds, []
        for first in range(0, len(seeds), sampling.batch_size):
            found.append(self._batch(seeds[first : first + sampling.batch_size], sampling.n_steps, observer))
        return torch.cat(found)

    def decode(self, latents):
        return latents

    def _batch(self, seeds, n_steps, observer):
        x = torch.stack([torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(s)) for s in seeds])
        for step in range(n_steps):
            timestep = torch.tensor(1 - step / n_steps)
            rows = torch.cat([x, x]) if self.guided else x
            inputs = {"sample": rows, "timestep": timestep}
            if self.guided:
                inputs["label"] = torch.cat([torch.ones(len(x)), torch.zeros(len(x))])
            self.before_call()
            self.n_calls += 1
            output = self.denoiser(**inputs)["sample"]
            if observer is not None:
                observer(DenoiserCall(step, float(timestep), inputs, output.clone()))
            prediction = GUIDANCE * output[: len(x)] + (1 - GUIDANCE) * output[len(x) :] if self.guided else output
            x = x - 0.3 * prediction
        return x


class ToyWeights:
    """The weights of a denoiser, read from the module."""

    def __init__(self, denoiser, digest="d" * 64):
        self.digest = digest
        self._layers = {n: m.weight.detach().clone() for n, m in denoiser.named_modules() if hasattr(m, "weight")}

    def read(self, layer_name):
        return self._layers[layer_name]


def toy_space(denoiser, formats="uaq3,uaq4,uaq8,fp16"):
    names = [n for n, m in denoiser.named_modules() if hasattr(m, "weight")]
    nodes = tuple(
        Node(n, "layer", n, "", 10 * m.weight.numel(), "Linear", tuple(m.weight.shape))
        for n in names
        for m in [denoiser.get_submodule(n)]
    )
    return search_space(DenoiserGraph("ToyDenoiser", nodes, (), (), (("first", "second"),)), formats)
