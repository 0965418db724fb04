"""Where a recipe's noise comes from and how it grows: block by block, and step by step of the trajectory.

Three runs of the same samples. At full precision, each denoiser call is made a second time with the recipe's weights
on the same inputs, and the outputs of all blocks are compared: noise that this step's weights make on their way through
the denoiser. Then the recipe samples on its own path, and the denoiser's outputs and the latents are compared with
those of full precision: noise that has accumulated. A step's block outputs of a few samples are all that is kept.

Source:
    Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431), global SQNR along the trajectory;
    the map of blocks is ours.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sedimo.codec import content_key
from sedimo.lab.exchange import hooked, probed
from sedimo.lab.lab import Lab
from sedimo.metrics.estimate import Estimate, to_digits
from sedimo.metrics.signal import NoisePowers, mean_sqnr
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import output_tensor, rows_of
from sedimo.space import Recipe

TRAJECTORY_VERSION = 1
TRAJECTORY_SAMPLES = 8
TRAJECTORY_RUNS = 3
_BATCH = 4  # samples whose block outputs are in memory together
_DIGITS = 6

Ratios = tuple[tuple[float, ...], ...]  # [T, n]
_Seen = tuple[float, torch.Tensor, torch.Tensor]  # of a call: noise level, output, and latents
Powers = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class TrajectoryNoise:
    """Relative noise `[T, n]` of n samples at the T denoiser calls.

    `blocks` and `step` are those of block outputs and of the denoiser's output on full-precision inputs, `path` that of
    its output on the recipe's own path, `latents` that of the latents after each call. Blocks that were not called are
    absent. 0 is exact, infinite a sample that diverged.
    """

    timesteps: tuple[float, ...]
    blocks: Mapping[str, Ratios]
    step: Ratios
    path: Ratios
    latents: Ratios


def sqnr_by_call(ratios: Ratios) -> tuple[Estimate, ...]:
    """SQNR at each call, over the samples [dB]."""
    return tuple(mean_sqnr(NoisePowers(np.array(row), np.ones(len(row)))) for row in ratios)


def probe_trajectory(lab: Lab, recipe: Recipe, on: Sampling, blocks: Sequence[str]) -> TrajectoryNoise:
    """Measures a recipe at the outputs of `blocks` (module paths) and along the trajectory.

    With a study, what a few samples show is saved when it is finished and not measured again.
    """
    parted, pipe, bank = replace(on, batch_size=_BATCH), lab.pipe, lab.any_bank
    named = {"trajectory": TRAJECTORY_VERSION, "recipe": recipe.key, "blocks": tuple(blocks)}

    @functools.cache
    def weights() -> Mapping[str, torch.Tensor]:
        """The recipe's, dequantized once: they are exchanged at every step."""
        packed = bank.quantize(recipe)
        with probed(pipe.denoiser, packed):
            return {name: pipe.denoiser.get_parameter(f"{name}.weight") for name in packed}

    def measure(plan: Sampling) -> TrajectoryNoise:
        quantized = functools.partial(probed, pipe.denoiser, weights(), inputs=bank.input_quantizers(recipe))
        return _measured(pipe, quantized, plan, blocks)

    def works() -> Iterator[tuple[str, Callable[[], TrajectoryNoise]]]:
        for plan in parted.batches():
            yield content_key({**named, "setting": lab.setting(plan, "path")}), functools.partial(measure, plan)

    label = "noise block by block and step by step"
    parts = tuple(lab.parts().each(TrajectoryNoise, label, parted.n_batches, works()))

    def joined(ratios: Iterable[Ratios]) -> Ratios:
        """Of the samples of all parts."""
        return tuple(tuple(itertools.chain(*rows)) for rows in zip(*ratios, strict=True))

    return TrajectoryNoise(
        timesteps=parts[0].timesteps,
        blocks={name: joined(part.blocks[name] for part in parts) for name in blocks if name in parts[0].blocks},
        step=joined(part.step for part in parts),
        path=joined(part.path for part in parts),
        latents=joined(part.latents for part in parts),
    )


def _measured(
    adapter: PipelineAdapter,
    quantized: Callable[[], AbstractContextManager[object]],
    plan: Sampling,
    blocks: Sequence[str],
) -> TrajectoryNoise:
    """The three runs of the samples of one batch."""
    n, outputs = len(plan.seeds), _Outputs()
    found: dict[str, list[tuple[float, ...]]] = {}
    step: list[tuple[float, ...]] = []
    seen, own = list[_Seen](), list[_Seen]()

    def again(call: DenoiserCall) -> None:
        """Makes a call again with the recipe's weights. Whoever watches sees that call too, and asks again."""
        if outputs.n_rows:
            return
        outputs.n_rows = len(call.output)
        with quantized():
            output = output_tensor(adapter.denoiser(**rows_of(call, slice(None))))
        for name, powers in outputs.powers.items():
            found.setdefault(name, []).append(_ratios(powers, n))
        step.append(_ratios(_powers(call.output, output, outputs.n_rows), n))
        seen.append(_seen(call))
        outputs.n_rows, outputs.kept, outputs.powers = 0, {}, {}

    with torch.no_grad(), hooked(adapter.denoiser, {name: functools.partial(outputs.see, name) for name in blocks}):
        final = adapter.sample(plan, observer=again)
    with quantized():
        own_final = adapter.sample(plan, observer=lambda call: own.append(_seen(call)))
    pairs = list(zip(seen, own, strict=True))
    after = [*((latents, own_latents) for (_, _, latents), (_, _, own_latents) in pairs[1:]), (final, own_final)]
    return TrajectoryNoise(
        timesteps=tuple(timestep for timestep, _, _ in seen),
        blocks={name: tuple(rows) for name, rows in found.items()},
        step=tuple(step),
        path=tuple(_ratios(_powers(a, b, len(a)), n) for (_, a, _), (_, b, _) in pairs),
        latents=tuple(_ratios(_powers(a, b, len(a)), n) for a, b in after),
    )


def _seen(call: DenoiserCall) -> _Seen:
    """What is kept of a call: of its inputs the latents alone, the first tensor of any denoiser."""
    latents = next(value for value in call.inputs.values() if isinstance(value, torch.Tensor))
    return call.timestep, call.output, latents


class _Outputs:
    """Keeps what blocks give at full precision until they have been called again, and compares then."""

    def __init__(self) -> None:
        self.n_rows = 0  # of the call that is being made again, 0 where none is
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.powers: dict[str, Powers] = {}

    def see(self, name: str, _module: nn.Module, _args: object, output: object) -> None:
        """The hook of a block; several calls of it in one call of the denoiser count as one, all its tensors too."""
        kept = self.kept.setdefault(name, [])
        for tensor in pytree.tree_leaves(output):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            if not self.n_rows:
                kept.append(tensor.detach().clone())
                continue
            powers = _powers(kept.pop(0), tensor, self.n_rows)
            before = self.powers.get(name)
            self.powers[name] = powers if before is None else (before[0] + powers[0], before[1] + powers[1])


def _powers(reference: torch.Tensor, test: torch.Tensor, n_rows: int) -> Powers:
    """Noise and signal `[R]` of the rows of a call; what is not by row counts for each."""
    rows = n_rows if reference.ndim and len(reference) % n_rows == 0 else 1
    wanted, got = (t.detach().reshape(rows, -1).double() for t in (reference, test))
    noise, signal = ((x.square().sum(1).expand(n_rows)).cpu().numpy() for x in (got - wanted, wanted))
    return np.where(np.isfinite(noise), noise, np.inf), signal


def _ratios(powers: Powers, n_samples: int) -> tuple[float, ...]:
    """Relative noise `[n]`: the mean over a sample's rows; row r belongs to sample r mod n."""
    noise, signal = powers
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(noise > 0, noise / signal, 0.0)
    return tuple(to_digits(ratio, _DIGITS) for ratio in found.reshape(-1, n_samples).mean(axis=0))
