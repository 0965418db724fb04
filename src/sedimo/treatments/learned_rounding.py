"""Block reconstruction: the rounding to uniform grids learned so that blocks give what they give at full precision.

Block after block, in the order of the graph: what the block gives on a recorded full-precision trajectory is the
target; its inputs are what it gets on the same denoiser calls when all blocks before it are quantized already. The
rounding of its layers on uniform grids is then learned (see `quant/rounding.py`) so that the squared error of its
output is least. Layers in other formats, and weights that several layers share, keep their codes but take part in the
error. A block whose error does not fall keeps nearest rounding.

A block is a repeated container of the graph that holds no other such container; every other layer is a unit of its own.

Source:
    Li et al. 2021, BRECQ (arXiv 2102.05426), block reconstruction with plain squared error in place of the Fisher
    weights; inputs from the quantized network, as in AdaRound (Nagel et al. 2020, arXiv 2004.10568), eq. 25.
"""

from __future__ import annotations

import base64
import functools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from sedimo.allocation.problem import Allocation
from sedimo.bank import Bank, Progress
from sedimo.codec import content_key, to_plain
from sedimo.errors import InputError, StateError
from sedimo.graph.model import DenoiserGraph
from sedimo.lab.exchange import probed
from sedimo.lab.lab import Lab
from sedimo.methods.method import Price, Words
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import record
from sedimo.quant import families
from sedimo.quant.formats import FP16, Format
from sedimo.quant.parts import WeightPart
from sedimo.quant.rounding import DEFAULT_SCHEDULE, RoundingSchedule, SoftWeight, learn_rounding
from sedimo.quant.tensor import QuantizedTensor
from sedimo.settings import option
from sedimo.space import Recipe
from sedimo.treatments.capturing import Captured, capture, capture_outputs, minibatches, slices
from sedimo.treatments.treatment import Treatment

RECONSTRUCTION_VERSION = 1
_EVALUATED_ROWS = 64  # at a time, without gradients
_BLOCK_KEYS = ("name", "nearest_error", "learned_error", "is_learned", "n_rows", "n_weights", "n_changed", "seconds")
N_SAMPLES = 32  # that rounding is learned from, unless more are searched on
_GRADIENT_FACTOR = 3.0  # a pass with gradients, in plain ones
_ROWS_PER_SAMPLE = 2  # with guidance


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


@dataclass(frozen=True, slots=True)
class LearnedRounding:
    """Block reconstruction: rounding learned from `n_samples` samples with `n_steps` steps a block.

    `n_learned` of `n_blocks` blocks use it, the others keep nearest rounding; `changed_share` of the weights changed.
    `error_ratio` is the geometric mean over blocks of the output's squared error over that of nearest rounding.
    """

    n_blocks: int
    n_learned: int
    n_samples: int
    n_steps: int
    changed_share: float
    error_ratio: float


@dataclass(frozen=True)
class Reconstruction:
    """The weights of a recipe after reconstruction, packed, by layer; and what was learned, block by block."""

    weights: Mapping[str, QuantizedTensor]
    blocks: tuple[ReconstructedBlock, ...]
    n_samples: int
    options: ReconstructionOptions

    def __str__(self) -> str:
        """For people."""
        return "learned rounding"

    @property
    def summary(self) -> LearnedRounding:
        """What the report tells about it."""
        return LearnedRounding(
            n_blocks=len(self.blocks),
            n_learned=sum(block.is_learned for block in self.blocks),
            n_samples=self.n_samples,
            n_steps=self.options.schedule.n_steps,
            changed_share=sum(b.n_changed for b in self.blocks if b.is_learned) / sum(b.n_weights for b in self.blocks),
            error_ratio=statistics.geometric_mean(
                [b.error / b.nearest_error for b in self.blocks if b.error > 0] or [1.0]
            ),
        )

    def as_json(self) -> Mapping[str, object]:
        """Plain values by name, the codes left out."""
        blocks = [{key: getattr(block, key) for key in _BLOCK_KEYS} for block in self.blocks]
        return {"reconstruction": {"n_samples": self.n_samples, "options": to_plain(self.options), "blocks": blocks}}


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
    lab: Lab, bank: Bank, plan: ReconstructionPlan, on: Sampling, *, options: ReconstructionOptions = DEFAULT_OPTIONS
) -> Reconstruction:
    """Learns the rounding of a layers on uniform grids on the model's own trajectory under a sampling plan.

    With a study, each block is saved when it is finished and not learned again. What one block is called with and gives
    is in memory at a time, besides the recorded calls of the denoiser.

    Raises:
        InputError: the recipe has no layer on a uniform grid.
        StateError: a saved block does not belong to these weights.
        Interrupted: the user stopped it (with a study, calling again goes on).
    """
    facts = {
        "reconstruction": RECONSTRUCTION_VERSION,
        "setting": lab.setting(on, "step", weights_digest=bank.weights_digest),
        "recipe": plan.recipe.key,
        "options": options,
    }
    keys = {unit: content_key({**facts, "unit": unit}) for unit in plan.units if unit.learned}
    if not keys:
        uniform = ", ".join(f.name for f in families.FAMILIES if f.is_uniform)
        raise InputError(
            f"only {uniform} formats round to a grid, and no layer of the recipe has one: nothing to reconstruct"
        )
    learning = _Weights(lab, on, bank.quantize(plan.recipe), options)
    n_missing = len(set(keys.values()) - (lab.study.probe_keys() if lab.study else frozenset()))
    found, parts = [], lab.parts()
    with parts.stage("learning the rounding", n_missing * options.schedule.n_steps) as stop:
        for unit in plan.units:
            if unit.learned:
                found.append(parts.part(ReconstructedBlock, keys[unit], functools.partial(learning.learn, unit)))
                learning.take(unit, found[-1])
                parts.check(stop)
            learning.finish(unit)
    return Reconstruction(learning.weights, tuple(found), len(on.seeds), options)


class _Weights:
    """The weights as they are learned, and the recorded calls of the denoiser, made when they are first needed."""

    def __init__(
        self, lab: Lab, on: Sampling, weights: Mapping[str, QuantizedTensor], options: ReconstructionOptions
    ) -> None:
        self.weights = dict(weights)
        self._lab, self._on, self._options = lab, on, options
        self._finished: set[str] = set()

    @functools.cached_property
    def _calls(self) -> tuple[DenoiserCall, ...]:
        return record(self._lab.pipe, self._on, at_most=self._options.n_timesteps).calls

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
        begin, denoiser = time.perf_counter(), self._lab.pipe.denoiser
        targets = capture_outputs(denoiser, unit.name, self._calls)
        with probed(denoiser, {layer: self.weights[layer] for layer in self._finished}):
            data = capture(denoiser, unit.name, self._calls, targets)
        learner = _Learner(denoiser, unit, self.weights, data)
        learned, nearest_error, learned_error = learner.learn(self._options, self._lab.progress)
        return ReconstructedBlock(
            name=unit.name,
            nearest_error=nearest_error,
            learned_error=learned_error,
            n_rows=sum(part.n_rows for part in data),
            n_weights=sum(self.weights[layer].numel() for layer in unit.learned),
            n_changed=sum(_n_changed(learned[layer], self.weights[layer]) for layer in learned),
            seconds=time.perf_counter() - begin,
            codes={layer: _codes_of(weight) for layer, weight in learned.items()}
            if learned_error < nearest_error
            else {},
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
    ) -> tuple[dict[str, QuantizedTensor], float, float]:
        """Learned weights by layer, and relative squared errors of nearest and of learned rounding."""
        nearest = self._error(self._nearest)
        if nearest == 0:
            progress.advance(options.schedule.n_steps)
            return {layer: self._nearest[layer] for layer in self._unit.learned}, 0.0, 0.0
        soft = {layer: SoftWeight(self._originals[layer], self._nearest[layer]) for layer in self._unit.learned}
        stays = {layer: weight.dequantize() for layer, weight in self._nearest.items() if layer not in soft}
        draw = minibatches(self._data, options.batch_rows, _generator(options.seed, self._unit.name))

        def error() -> torch.Tensor:
            batch = draw()
            weights = stays | {layer: weight.soft() for layer, weight in soft.items()}
            return batch.squared_error(self._module, self._named(weights)) / (batch.n_rows * self._signal * nearest)

        learn_rounding(tuple(soft.values()), error, options.schedule, after_step=progress.advance)
        learned = {layer: weight.hard() for layer, weight in soft.items()}
        return learned, nearest, self._error(self._nearest | learned)

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
    return any(f.numerics.is_uniform for f in ([entry] if isinstance(entry, Format) else [p.format for p in entry]))


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
    return part.with_codes(codes.reshape(part.codes.shape).to(part.codes.device))


@dataclass(frozen=True, slots=True)
class RoundingSettings:
    """Whether rounding is learned, and for how many steps of each block; None: as many as usual.

    Raises:
        InputError: steps of what is not done.
    """

    is_wanted: bool = option(
        False,
        "--reconstruct",
        help="Learn the rounding of uaq formats, block by block, on the model's own trajectory.",
    )
    n_steps: int | None = option(
        None, "--reconstruct-steps", least=1, help="Steps of learning per block; more take longer and help more."
    )

    def __post_init__(self) -> None:
        """Checks them together."""
        if self.n_steps is not None and not self.is_wanted:
            raise InputError("--reconstruct-steps says how long to learn the rounding: give --reconstruct, too")

    @property
    def options(self) -> ReconstructionOptions:
        """What is learned from, and how."""
        if self.n_steps is None:
            return DEFAULT_OPTIONS
        return ReconstructionOptions(RoundingSchedule(n_steps=self.n_steps))


def learn(lab: Lab, settings: RoundingSettings, bank: Bank, allocation: Allocation) -> Reconstruction:
    """The weights of an allocation with learned rounding.

    Raises:
        InputError: the recipe has no uaq layer.
        Interrupted: Ctrl-C; finished blocks are kept in the study.
    """
    plan = plan_reconstruction(lab.graph, allocation.recipe)
    return reconstruct(lab, bank, plan, lab.seeds.more(N_SAMPLES), options=settings.options)


def _price(lab: Lab, settings: RoundingSettings) -> Price:
    """The trajectory, its calls again twice per block, and in all blocks together as many passes as there are steps."""
    lab.refuse_unsampled("--reconstruct runs the pipeline", "Leave it out")
    on, options = lab.seeds.more(N_SAMPLES), settings.options
    timing = lab.time_calls(on)
    share = min(1.0, options.n_timesteps / on.n_steps)
    n_units = len(plan_reconstruction(lab.graph, Recipe({})).units)
    n_calls = round(timing.n_calls * (1 + 2 * share * n_units))
    rows_of_a_call = _ROWS_PER_SAMPLE * min(on.batch_size, len(on.seeds))
    learning = options.schedule.n_steps * _GRADIENT_FACTOR * options.batch_rows / rows_of_a_call
    codes = lab.space.params  # a byte each, packed and written as text
    return Price((n_calls + learning) * timing.seconds_per_call, n_calls, disk_bytes=codes)


LEARNED_ROUNDING = Treatment(
    name="learned_rounding",
    words=Words(
        "learns the rounding of uaq codes, block by block, from what the blocks give at full precision",
        source="Li et al. 2021, BRECQ (arXiv 2102.05426)",
    ),
    knobs=RoundingSettings,
    finish=learn,
    price=_price,
    is_wanted=lambda settings: settings.is_wanted,
    excludes=("error_feedback",),
)
