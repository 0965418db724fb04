"""Block reconstruction: the rounding of uaq codes learned so that blocks give what they give at full precision.

Block after block, in the order of the graph: what the block gives on a recorded full-precision trajectory is the
target; its inputs are what it gets on the same denoiser calls when all blocks before it are quantized already. The
rounding of its uaq layers is then learned (see `quant/rounding.py`) so that the squared error of its output is least.
Layers in other formats, and weights that several layers share, keep their codes but take part in the error. A block
whose error does not fall keeps nearest rounding.

A block is a repeated container of the graph that holds no other such container; every other layer is a unit of its own.

Source:
    Li et al. 2021, BRECQ (arXiv 2102.05426), block reconstruction with plain squared error in place of the Fisher
    weights; inputs from the quantized network, as in AdaRound (Nagel et al. 2020, arXiv 2004.10568), eq. 25.
"""

from __future__ import annotations

import base64
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import nn

from sedimo.bank import SILENT, Bank, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.graph.model import DenoiserGraph
from sedimo.measurement.capturing import Captured, capture, capture_outputs, minibatches, slices
from sedimo.measurement.interrupt import graceful_interrupt
from sedimo.measurement.parts import Parts
from sedimo.measurement.probe import probed
from sedimo.measurement.study import Study
from sedimo.measurement.worker import setting_of
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import record
from sedimo.quant.formats import FP16, Format
from sedimo.quant.parts import WeightPart
from sedimo.quant.rounding import DEFAULT_SCHEDULE, RoundingSchedule, SoftWeight, learn_rounding
from sedimo.quant.tensor import QuantizedTensor
from sedimo.space import Recipe

RECONSTRUCTION_VERSION = 1
_EVALUATED_ROWS = 64  # at a time, without gradients


@dataclass(frozen=True, slots=True)
class ReconstructionOptions:
    """What is learned from, and how.

    Every row of `n_timesteps` steps of the sampling plan, evenly spread, is learned from, in minibatches of
    `batch_rows` rows that `seed` draws.
    """

    schedule: RoundingSchedule = DEFAULT_SCHEDULE
    n_timesteps: int = 10
    batch_rows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses empty minibatches."""
        if self.n_timesteps < 1 or self.batch_rows < 1:
            raise InputError(f"timesteps and rows of a minibatch must be positive, got {self}")


DEFAULT_OPTIONS = ReconstructionOptions()


@dataclass(frozen=True, slots=True)
class ReconstructionUnit:
    """A module whose output is reconstructed: a block, or a layer alone.

    `layers` are all that it holds, `learned` those with codes to learn.
    """

    name: str
    layers: tuple[str, ...]
    learned: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReconstructedBlock:
    """What was learned about one block.

    Errors are the squared error of the block's output over its squared norm, with nearest and with learned rounding,
    on the rows that were learned from. `n_changed` of `n_weights` codes differ from nearest rounding. `codes` holds the
    learned codes of each layer by part, packed, in base64; it is empty when nearest rounding stays.
    """

    name: str
    nearest_error: float
    learned_error: float
    n_rows: int
    n_weights: int
    n_changed: int
    seconds: float
    codes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_learned(self) -> bool:
        """Whether the learned rounding is used."""
        return bool(self.codes)

    @property
    def error(self) -> float:
        """The relative squared error that the block has now."""
        return self.learned_error if self.is_learned else self.nearest_error


@dataclass(frozen=True)
class Reconstruction:
    """The weights of a recipe after reconstruction, packed, by layer; and what was learned, block by block."""

    weights: Mapping[str, QuantizedTensor]
    blocks: tuple[ReconstructedBlock, ...]
    n_samples: int
    options: ReconstructionOptions


@dataclass(frozen=True, slots=True)
class ReconstructionPlan:
    """A recipe, and the blocks and single layers of its denoiser in the order in which they are reconstructed."""

    recipe: Recipe
    units: tuple[ReconstructionUnit, ...]


def plan_reconstruction(graph: DenoiserGraph, recipe: Recipe) -> ReconstructionPlan:
    """The units of a graph in its order, with the layers whose codes can be learned under a recipe."""
    blocks = {node.block for node in graph.layers}
    innermost = {b for b in blocks if b and not any(other.startswith(f"{b}.") for other in blocks)}
    members: dict[str, list[str]] = {}
    for node in graph.layers:
        members.setdefault(node.block if node.block in innermost else node.name, []).append(node.name)
    shared = {layer for tie in graph.ties for layer in tie}
    learned = {node.name for node in graph.layers if node.name not in shared and _has_grid(recipe, node.name)}
    units = (
        ReconstructionUnit(name, tuple(layers), tuple(layer for layer in layers if layer in learned))
        for name, layers in members.items()
    )
    return ReconstructionPlan(recipe, tuple(units))


def reconstruct(
    adapter: PipelineAdapter,
    bank: Bank,
    plan: ReconstructionPlan,
    sampling: Sampling,
    *,
    study: Study | None = None,
    options: ReconstructionOptions = DEFAULT_OPTIONS,
    progress: Progress = SILENT,
) -> Reconstruction:
    """Learns the rounding of a recipe's uaq layers on the model's own trajectory under a sampling plan.

    With a study, each block is saved when it is finished and not learned again. What one block is called with and gives
    is in memory at a time, besides the recorded calls of the denoiser.

    Raises:
        InputError: the recipe has no uaq layer of its own.
        StateError: a saved block does not belong to these weights.
        Interrupted: the user stopped it (with a study, calling again goes on).
    """
    facts = {
        "reconstruction": RECONSTRUCTION_VERSION,
        "setting": setting_of(adapter, sampling, weights_digest=bank.weights_digest, objective="step"),
        "recipe": plan.recipe.key,
        "options": options,
    }
    keys = {unit: content_key({**facts, "unit": unit}) for unit in plan.units if unit.learned}
    if not keys:
        raise InputError("only uaq formats round to a grid, and no layer of the recipe has one: nothing to reconstruct")
    work = _Work(adapter, sampling, bank.quantize(plan.recipe), (options, progress))
    n_missing = len(set(keys.values()) - (study.probe_keys() if study else frozenset()))
    progress.start(n_missing * options.schedule.n_steps, "learning the rounding")
    found, kept = [], Parts(adapter, study)
    with graceful_interrupt() as stop:
        for unit in plan.units:
            if unit.learned:
                learn = functools.partial(work.learn, unit)
                found.append(kept.part(ReconstructedBlock, keys[unit], learn))
                work.take(unit, found[-1])
                kept.check(stop)
            work.finish(unit)
    progress.done()
    return Reconstruction(work.weights, tuple(found), len(sampling.seeds), options)


class _Work:
    """The weights as they are learned, and the recorded calls of the denoiser, made when they are first needed."""

    def __init__(
        self,
        adapter: PipelineAdapter,
        sampling: Sampling,
        weights: Mapping[str, QuantizedTensor],
        how: tuple[ReconstructionOptions, Progress],
    ) -> None:
        self.weights = dict(weights)
        self._adapter, self._sampling = adapter, sampling
        self._options, self._progress = how
        self._finished: set[str] = set()

    @functools.cached_property
    def _calls(self) -> tuple[DenoiserCall, ...]:
        return record(self._adapter, self._sampling, at_most=self._options.n_timesteps).calls

    def take(self, unit: ReconstructionUnit, block: ReconstructedBlock) -> None:
        """Gives the layers of a unit their learned codes.

        Raises:
            StateError: codes of other layers or another size.
        """
        if block.codes and set(block.codes) != set(unit.learned):
            raise StateError(f"the saved rounding of {unit.name!r} is of layers {sorted(block.codes)}")
        for layer, texts in block.codes.items():
            self.weights[layer] = _with_codes(self.weights[layer], texts, layer)

    def finish(self, unit: ReconstructionUnit) -> None:
        """From now on the unit is quantized for what follows it."""
        self._finished |= self.weights.keys() & set(unit.layers)

    def learn(self, unit: ReconstructionUnit) -> ReconstructedBlock:
        """What one unit learns when all units before it are quantized."""
        begin, denoiser = time.perf_counter(), self._adapter.denoiser
        targets = capture_outputs(denoiser, unit.name, self._calls)
        with probed(denoiser, {layer: self.weights[layer] for layer in self._finished}):
            data = capture(denoiser, unit.name, self._calls, targets)
        learner = _Learner(denoiser, unit, self.weights, data)
        learned, errors = learner.learn(self._options, self._progress)
        is_better = errors[1] < errors[0]
        return ReconstructedBlock(
            name=unit.name,
            nearest_error=errors[0],
            learned_error=errors[1],
            n_rows=sum(part.n_rows for part in data),
            n_weights=sum(self.weights[layer].numel() for layer in unit.learned),
            n_changed=sum(_n_changed(learned[layer], self.weights[layer]) for layer in learned),
            seconds=time.perf_counter() - begin,
            codes={layer: _codes_of(weight) for layer, weight in learned.items()} if is_better else {},
        )


class _Learner:
    """One unit, called with other weights: those that are learned, and those that are quantized and stay."""

    def __init__(
        self,
        denoiser: nn.Module,
        unit: ReconstructionUnit,
        weights: Mapping[str, QuantizedTensor],
        data: Sequence[Captured],
    ) -> None:
        self._unit, self._data = unit, data
        self._module = denoiser.get_submodule(unit.name)
        self._originals = {layer: denoiser.get_submodule(layer).get_parameter("weight") for layer in unit.layers}
        packed = {layer: weights[layer] for layer in unit.layers if layer in weights}
        self._nearest = {layer: self._moved(layer, weight) for layer, weight in packed.items()}
        self._n_rows = max(1, sum(part.n_rows for part in data))  # none where the pipeline never calls the unit
        self._signal = sum(float(t.double().square().sum()) for part in data for t in part.targets) / self._n_rows

    def learn(
        self, options: ReconstructionOptions, progress: Progress
    ) -> tuple[dict[str, QuantizedTensor], tuple[float, float]]:
        """Learned weights by layer, and relative squared errors of nearest and of learned rounding."""
        nearest = self._error(self._nearest)
        if nearest == 0:
            progress.advance(options.schedule.n_steps)
            return {layer: self._nearest[layer] for layer in self._unit.learned}, (0.0, 0.0)
        soft = {layer: SoftWeight(self._originals[layer], self._nearest[layer]) for layer in self._unit.learned}
        stays = {layer: weight.dequantize() for layer, weight in self._nearest.items() if layer not in soft}
        draw = minibatches(self._data, options.batch_rows, _generator(options.seed, self._unit.name))

        def error() -> torch.Tensor:
            batch = draw()
            weights = stays | {layer: weight.soft() for layer, weight in soft.items()}
            return batch.squared_error(self._module, self._named(weights)) / (batch.n_rows * self._signal * nearest)

        learn_rounding(tuple(soft.values()), error, options.schedule, after_step=progress.advance)
        learned = {layer: weight.hard() for layer, weight in soft.items()}
        return learned, (nearest, self._error(self._nearest | learned))

    def _error(self, weights: Mapping[str, QuantizedTensor]) -> float:
        """Squared error of the unit's output over its squared norm, on all rows."""
        named = self._named({layer: weight.dequantize() for layer, weight in weights.items()})
        with torch.no_grad():
            errors = [float(part.squared_error(self._module, named)) for part in slices(self._data, _EVALUATED_ROWS)]
        return math.fsum(errors) / (self._n_rows * self._signal) if self._signal else 0.0

    def _named(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights by their parameters' names in the unit's module, in the dtype of those."""
        prefix = f"{self._unit.name}."
        names = {layer: f"{layer.removeprefix(prefix)}.weight" for layer in weights}
        if self._unit.name in weights:
            names[self._unit.name] = "weight"
        return {names[layer]: weight.to(self._originals[layer].dtype) for layer, weight in weights.items()}

    def _moved(self, layer: str, weight: QuantizedTensor) -> QuantizedTensor:
        return cast("QuantizedTensor", weight.to(self._originals[layer].device))


def _has_grid(recipe: Recipe, layer: str) -> bool:
    entry = recipe.layers.get(layer, FP16)
    return any(f.family == "uaq" for f in ([entry] if isinstance(entry, Format) else [p.format for p in entry]))


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(content_key(f"sedimo reconstruction {seed} {name}")[:12], 16))


def _n_changed(weight: QuantizedTensor, other: QuantizedTensor) -> int:
    """Codes that differ between two weights of the same format."""
    shape = weight.packing.shape
    pairs = [(a, b) for a, b in zip(weight.parts, other.parts, strict=True) if a.codes is not None]
    return sum(int((a.unpacked_codes(shape).cpu() != b.unpacked_codes(shape).cpu()).sum()) for a, b in pairs)


def _codes_of(weight: QuantizedTensor) -> tuple[str, ...]:
    return tuple(
        "" if part.codes is None else base64.b64encode(part.codes.cpu().numpy().tobytes()).decode("ascii")
        for part in weight.parts
    )


def _with_codes(weight: QuantizedTensor, texts: Sequence[str], layer: str) -> QuantizedTensor:
    try:
        return weight.rewrapped([_part(*pair) for pair in zip(weight.parts, texts, strict=True)])
    except (ValueError, RuntimeError) as error:
        raise StateError(f"the saved codes of layer {layer!r} are damaged: {error}. Use another study") from error


def _part(part: WeightPart, text: str) -> WeightPart:
    if part.codes is None:
        return part
    codes = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
    return replace(part, codes=codes.reshape(part.codes.shape).to(part.codes.device))
