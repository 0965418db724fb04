"""A pipeline of a few lines behind the seam of diffusers' ones, for tests of gradients through a whole run."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from sedimo.pipelines.differentiable import run_differentiably
from sedimo.pipelines.sampling import sample_batch

GUIDANCE = 3.0


class SmallDenoiser(nn.Module):
    """Two convolutions with a curve between them, in float64; `label` `[B]` scales its rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)
        self.double()

    def forward(self, sample, timestep, label=None, return_dict=True):
        output = self.second(torch.tanh(self.first(sample) * (1 + timestep)))
        output = output if label is None else output * (1 + label.reshape(-1, 1, 1, 1))
        return {"sample": output} if return_dict else (output,)


class Control(nn.Module):
    """Reads latents between two calls, as a ControlNet does, and says two things of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).double()

    def forward(self, sample, strength):
        features = torch.tanh(self.conv(sample)) * strength
        return features.mean((1, 2, 3)), {"level": features.square().mean((1, 2, 3))}


class ToyScheduler:
    """x <- x - 0.3 prediction."""

    def __init__(self):
        self.timesteps = torch.empty(0)

    def set_timesteps(self, n_steps):
        self.timesteps = 1 - torch.arange(n_steps, dtype=torch.float64) / n_steps

    def step(self, model_output, timestep, sample):
        return SimpleNamespace(prev_sample=sample - 0.3 * model_output)


class ToyPipeline:
    """Draws `[B, 2, 4, 4]` from one generator per sample; asks `control` before each call, if there is one."""

    def __init__(self, unet, scheduler=None, *, control=None, guided=False):
        self.unet, self.scheduler, self.control, self.guided = unet, scheduler or ToyScheduler(), control, guided
        self.device = torch.device("cpu")

    @property
    def components(self):
        return {"unet": self.unet, "scheduler": self.scheduler, "control": self.control, "tokenizer": None}

    def set_progress_bar_config(self, **settings):
        self._progress_bar_config = settings

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2, output_type="pt", return_dict=True):
        dtype = next(self.unet.parameters()).dtype
        x = torch.stack([torch.randn(2, 4, 4, generator=g, dtype=dtype) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        strength = torch.full((), 0.7, dtype=dtype)
        for t in self.scheduler.timesteps:
            if self.control is not None:
                mean, more = self.control(x, strength=strength)
                output = self.unet(x, t.to(dtype), label=mean + more["level"], return_dict=False)[0]
            elif self.guided:
                label = torch.cat([torch.ones(len(x), dtype=dtype), torch.zeros(len(x), dtype=dtype)])
                output = self.unet(torch.cat([x, x]), t.to(dtype), label=label, return_dict=False)[0]
                output = GUIDANCE * output[: len(x)] + (1 - GUIDANCE) * output[len(x) :]
            else:
                output = self.unet(x, t.to(dtype), return_dict=False)[0]
            x = self.scheduler.step(output, t, x).prev_sample
        return (x,) if output_type == "latent" else (x.clamp(-1, 1),)


class PixelToyPipeline(ToyPipeline):
    """The same without an output type: it is watched, and rounds its pictures at the end."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2, return_dict=True):
        call = ToyPipeline.__call__.__wrapped__
        (x,) = call(self, batch_size, generator, num_inference_steps, "latent")
        return (torch.from_numpy(x.numpy()).round(),)  # numpy knows no gradients


class ToySampler:
    """What the seam asks of a pipeline."""

    name = identity = "toy sampler"

    def __init__(self, pipeline):
        self.pipeline, self.denoiser = pipeline, pipeline.unet
        self.n_runs = 0

    def sample(self, sampling, *, observer=None):
        batches = sampling.batches()
        return torch.cat([sample_batch(self.pipeline, self.denoiser, batch, observer) for batch in batches])

    def decode(self, latents):
        return latents

    def differentiable(self, sampling):
        self.n_runs += 1
        return run_differentiably(self.pipeline, self.denoiser, sampling)
