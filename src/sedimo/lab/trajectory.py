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

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sedimo.bank import Bank
from sedimo.codec import content_key
from sedimo.lab.exchange import Prober, WeightSupply, hooked, probed
from sedimo.lab.lab import Lab
from sedimo.lab.study import Execution, Setting
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
Powers = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class TrajectoryPart:
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


@dataclass(frozen=True, slots=True)
class TrajectoryProbe:
    """The parts of all samples of a recipe; `blocks` in the order of the denoiser."""

    setting: Setting
    recipe: Recipe
    blocks: tuple[str, ...]
    parts: tuple[TrajectoryPart, ...]
    execution: Execution

    @property
    def n_samples(self) -> int:
        """Samples behind each number."""
        return len(self.setting.seeds)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the denoiser's calls, in the order of sampling."""
        return self.parts[0].timesteps

    @property
    def of_blocks(self) -> Mapping[str, tuple[Estimate, ...]]:
        """SQNR of each block's output at each call, on full-precision inputs [dB]."""
        called = [name for name in self.blocks if name in self.parts[0].blocks]
        return {name: _estimates([part.blocks[name] for part in self.parts]) for name in called}

    @property
    def of_steps(self) -> tuple[Estimate, ...]:
        """SQNR of the denoiser's output at each call, on full-precision inputs [dB]."""
        return _estimates([part.step for part in self.parts])

    @property
    def of_path(self) -> tuple[Estimate, ...]:
        """SQNR of the denoiser's output at each call of the recipe's own path [dB]."""
        return _estimates([part.path for part in self.parts])

    @property
    def of_latents(self) -> tuple[Estimate, ...]:
        """SQNR of the latents after each call of the recipe's own path [dB]."""
        return _estimates([part.latents for part in self.parts])


def probe_trajectory(lab: Lab, recipe: Recipe, on: Sampling, blocks: Sequence[str]) -> TrajectoryProbe:
    """Measures a recipe at the outputs of `blocks` (module paths) and along the trajectory.

    With a study, the part of a few samples is saved when it is finished and not measured again.

    Raises:
        InputError: a block that the denoiser does not have.
        Interrupted: the user stopped it (with a study, calling again goes on).
    """
    parts, parted = lab.parts(), replace(on, batch_size=_BATCH)
    pipe, bank = lab.pipe, lab.any_bank
    named = {"trajectory": TRAJECTORY_VERSION, "recipe": recipe.key, "blocks": tuple(blocks)}
    supply = functools.cache(lambda: _plain_weights(pipe.denoiser, bank, recipe))

    def measure(plan: Sampling) -> TrajectoryPart:
        with Prober(pipe.denoiser, supply(), bank.input_quantizers) as prober:
            return _Run(pipe, prober, recipe, plan).measure(blocks)

    def works() -> Iterator[tuple[str, Callable[[], TrajectoryPart]]]:
        for plan in parted.batches():
            yield content_key({**named, "setting": lab.setting(plan, "path")}), functools.partial(measure, plan)

    label = "noise block by block and step by step"
    found = tuple(parts.each(TrajectoryPart, label, parted.n_batches, works()))
    return TrajectoryProbe(lab.setting(on, "path"), recipe, tuple(blocks), found, parts.execution)


def _plain_weights(denoiser: nn.Module, bank: Bank, recipe: Recipe) -> WeightSupply:
    """The recipe's weights, dequantized once: they are exchanged at every step."""
    packed = bank.quantize(recipe.weights_alone)
    with probed(denoiser, packed):
        plain = {name: denoiser.get_parameter(f"{name}.weight") for name in packed}
    return lambda wanted: {name: plain[name] for name in wanted.layers}


@dataclass(frozen=True)
class _Seen:
    """Of one call of the denoiser: noise level, output, and its first input, which carries the latents."""

    timestep: float
    output: torch.Tensor
    latents: torch.Tensor

    @classmethod
    def of(cls, call: DenoiserCall) -> _Seen:
        latents = next(value for value in call.inputs.values() if isinstance(value, torch.Tensor))
        return cls(call.timestep, call.output, latents)


class _Run:
    """The three runs of the samples of one batch."""

    def __init__(self, adapter: PipelineAdapter, prober: Prober, recipe: Recipe, sampling: Sampling) -> None:
        self._adapter, self._prober, self._recipe, self._sampling = adapter, prober, recipe, sampling
        self._n = len(sampling.seeds)
        self._outputs = _Outputs(self._n)
        self._seen: list[_Seen] = []
        self._step: list[tuple[float, ...]] = []

    def measure(self, blocks: Sequence[str]) -> TrajectoryPart:
        hooks = {name: functools.partial(self._outputs.see, name) for name in blocks}
        with torch.no_grad(), hooked(self._adapter.denoiser, hooks):
            final = self._adapter.sample(self._sampling, observer=self._again)
        self._prober.switch(self._recipe)
        own: list[_Seen] = []
        own_final = self._adapter.sample(self._sampling, observer=lambda call: own.append(_Seen.of(call)))
        pairs = list(zip(self._seen, own, strict=True))
        after = [*((a.latents, b.latents) for a, b in pairs[1:]), (final, own_final)]
        return TrajectoryPart(
            timesteps=tuple(seen.timestep for seen in self._seen),
            blocks={name: tuple(rows) for name, rows in self._outputs.found.items()},
            step=tuple(self._step),
            path=tuple(_ratios(_powers(a.output, b.output, len(a.output)), self._n) for a, b in pairs),
            latents=tuple(_ratios(_powers(a, b, len(a)), self._n) for a, b in after),
        )

    def _again(self, call: DenoiserCall) -> None:
        """Makes a call again with the recipe's weights. Whoever watches the run sees that call too, and asks again."""
        if self._outputs.is_comparing:
            return
        n_rows = len(call.output)
        self._prober.switch(self._recipe)
        with self._outputs.compared(n_rows):
            output = output_tensor(self._adapter.denoiser(**rows_of(call, slice(None))))
        self._prober.restore()
        self._step.append(_ratios(_powers(call.output, output, n_rows), self._n))
        self._seen.append(_Seen.of(call))


class _Outputs:
    """Keeps what blocks give at full precision until they have been called again, and compares then."""

    def __init__(self, n_samples: int) -> None:
        self.found: dict[str, list[tuple[float, ...]]] = {}
        self._n_samples, self._n_rows = n_samples, 0
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._powers: dict[str, Powers] = {}

    @property
    def is_comparing(self) -> bool:
        """Whether the recipe's call is running."""
        return self._n_rows > 0

    @contextlib.contextmanager
    def compared(self, n_rows: int) -> Iterator[None]:
        """What blocks give meanwhile is compared with what was kept, and what was kept is dropped."""
        self._n_rows = n_rows
        yield
        for name, powers in self._powers.items():
            self.found.setdefault(name, []).append(_ratios(powers, self._n_samples))
        self._n_rows = 0
        self._kept, self._powers = {}, {}

    def see(self, name: str, _module: nn.Module, _args: object, output: object) -> None:
        """The hook of a block; several calls of it in one call of the denoiser count as one, all its tensors too."""
        kept = self._kept.setdefault(name, [])
        for tensor in _tensors(output):
            if not self.is_comparing:
                kept.append(tensor.detach().clone())
                continue
            powers = _powers(kept.pop(0), tensor, self._n_rows)
            before = self._powers.get(name)
            self._powers[name] = powers if before is None else (before[0] + powers[0], before[1] + powers[1])


def _tensors(output: object) -> Iterator[torch.Tensor]:
    """The tensors of numbers in what a module returns."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for one in output:
            yield from _tensors(one)


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


def _estimates(parts: Sequence[Ratios]) -> tuple[Estimate, ...]:
    """SQNR at each call [dB], over the samples of all parts."""
    together = np.concatenate([np.array(part) for part in parts], axis=1)
    powers = (NoisePowers(ratios, np.ones(len(ratios))) for ratios in together)
    return tuple(mean_sqnr(one) for one in powers)
