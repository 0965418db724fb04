"""Block reconstruction: the rounding to uniform grids learned so that blocks give what they give at full precision.

Block after block, in the order of the graph: what the block gives on a recorded full-precision trajectory is the
target; its inputs are what it gets on the same denoiser calls when all blocks before it are quantized already. The
rounding of its layers on uniform grids is then learned so that the squared error of its output is least. Layers in
other formats, and weights that several layers share, keep their codes but take part in the error. A block whose error
does not fall keeps nearest rounding. A block is a repeated container of the graph that holds no other such container;
every other layer is a unit of its own.

A weight between two codes may take either: code = clamp(floor(weight / scale) + zero_point + h, 0, 2^b - 1), h 0 or 1.
While learning, h is a number in between, h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1), which starts where the weight is
exact; a regulariser, sum of 1 - |2 h - 1|^beta, then drives every h to 0 or 1. Scale, zero point, format and bytes
stay.

Source:
    Li et al. 2021, BRECQ (arXiv 2102.05426), block reconstruction with plain squared error in place of the Fisher
    weights. Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv 2004.10568), eq. 21
    to 25: the rectified sigmoid (zeta 1.1, gamma -0.1), the regulariser and its annealed exponent, and inputs from the
    quantized network.
"""

from __future__ import annotations

import base64
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only
from torch.utils.hooks import RemovableHandle

from sedimo.bank import Bank
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.graph.model import DenoiserGraph
from sedimo.lab.exchange import probed
from sedimo.lab.lab import Lab
from sedimo.methods.method import Price, Words
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import record, rows_of
from sedimo.quant import families
from sedimo.quant.formats import FP16
from sedimo.quant.packing import pack
from sedimo.quant.parts import WeightPart, parts_of
from sedimo.quant.tensor import QuantizedTensor
from sedimo.settings import Checked, option
from sedimo.space import Recipe
from sedimo.treatments.treatment import Treatment

RECONSTRUCTION_VERSION = 1
ZETA, GAMMA = 1.1, -0.1  # where the sigmoid is stretched to, so that 0 and 1 are reached
N_STEPS, LEARNING_RATE = 500, 1e-2  # of Adam, for each block
STRENGTH = 1.0  # lambda, of the regulariser beside the error
WARM_UP = 0.2  # the share of the steps without it; then its exponent falls linearly
FIRST_BETA, LAST_BETA = 20.0, 2.0
N_TIMESTEPS = 10  # of the sampling plan, evenly spread, whose rows are learned from
BATCH_ROWS, SEED = 16, 0  # of minibatches, and what draws them
N_SAMPLES = 32  # that rounding is learned from, unless more are searched on
_EVALUATED_ROWS = 64  # at a time, without gradients
_BLOCK_KEYS = ("name", "nearest_error", "learned_error", "is_learned", "n_rows", "n_weights", "n_changed", "seconds")
_GRADIENT_FACTOR = 3.0  # a pass with gradients, in plain ones
_ROWS_PER_SAMPLE = 2  # with guidance
Tensors = tuple[Tensor, ...]
Arguments = tuple[tuple[object, ...], dict[str, object]]


class SoftWeight:
    """A packed weight whose codes on uniform grids are being learned; parts in other formats stay as they are."""

    def __init__(self, weight: Tensor, packed: QuantizedTensor) -> None:
        """Starts where `soft()` is the full-precision `weight` `[out, in, ...]`, as far as the grid's ends allow."""
        if weight.shape != packed.shape:
            raise InputError(f"a packed weight of shape {tuple(packed.shape)} is not of one of {tuple(weight.shape)}")
        self._packed = packed
        self._pieces = [
            _SoftPart(weight[:, p.start : p.stop], p)
            if p.format.numerics.is_uniform
            else p.dequantize(packed.packing.shape)
            for p in packed.parts
        ]

    @property
    def logits(self) -> list[Tensor]:
        """V of every learned part: what an optimiser changes."""
        return [piece.logits for piece in self._pieces if isinstance(piece, _SoftPart)]

    def soft(self) -> Tensor:
        """The weight with codes in between, float32 `[out, in, ...]`; gradients reach the logits."""
        return torch.cat([p.soft() if isinstance(p, _SoftPart) else p for p in self._pieces], dim=1)

    def penalty(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^beta over the learned weights: 0 when every h is 0 or 1."""
        return torch.stack([(1 - (2 * _h(v) - 1).abs().pow(beta)).sum() for v in self.logits]).sum()

    def hard(self) -> QuantizedTensor:
        """The packed weight with every h at the nearer of 0 and 1."""
        pairs = zip(self._packed.parts, self._pieces, strict=True)
        return self._packed.rewrapped([p.hard(part) if isinstance(p, _SoftPart) else part for part, p in pairs])


class _SoftPart:
    """A part on a uniform grid: codes below every weight, and V."""

    def __init__(self, weight: Tensor, part: WeightPart) -> None:
        self._shape, self._qmax = weight.shape, part.format.qmax
        rows = weight.detach().float().reshape(weight.shape[0], -1)
        self._scale, self._zero_point = part.format.numerics.grid(part.format, part.tensors, rows.shape[1])
        steps = rows / self._scale
        below = steps.floor()
        self._below = below + self._zero_point
        self.logits = torch.logit((steps - below - GAMMA) / (ZETA - GAMMA)).requires_grad_(True)

    def soft(self) -> Tensor:
        codes = (self._below + _h(self.logits)).clamp(0, self._qmax)
        return ((codes - self._zero_point) * self._scale).reshape(self._shape)

    def hard(self, part: WeightPart) -> WeightPart:
        codes = (self._below + (self.logits.detach() >= 0)).clamp(0, self._qmax).to(torch.uint8)
        return part.with_codes(pack(codes, part.format.bits))


def _h(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def beta_at(step: int, n_steps: int) -> float | None:
    """The exponent at a step, counted from 0; None while warming up."""
    begin = WARM_UP * n_steps
    if step < begin:
        return None
    progress = (step - begin) / max(1.0, n_steps - 1 - begin)
    return FIRST_BETA + (LAST_BETA - FIRST_BETA) * min(1.0, progress)


def learn_rounding(
    weights: Sequence[SoftWeight],
    error: Callable[[], Tensor],
    n_steps: int,
    *,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimises error plus regulariser over the logits of `weights`, in place.

    `error` is the squared error of the present soft weights (of another minibatch at each call), as a multiple of what
    nearest rounding leaves; times the number of weights, so that lambda means the same everywhere.
    """
    logits = [v for weight in weights for v in weight.logits]
    n_weights = sum(v.numel() for v in logits)
    optimizer = torch.optim.Adam(logits, lr=LEARNING_RATE)
    for step in range(n_steps):
        beta = beta_at(step, n_steps)
        with torch.enable_grad():
            loss = n_weights * error()
            if beta is not None:
                loss = loss + STRENGTH * torch.stack([w.penalty(beta) for w in weights if w.logits]).sum()
            optimizer.zero_grad()
            loss.backward(inputs=logits)  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
        after_step()


@dataclass(frozen=True)
class Captured:
    """Arguments of a module for some rows, (positional, keyword), and the outputs that it should give for them.

    Tensors whose first axis has a place for each row hold a row each; all other arguments belong to every row.
    """

    inputs: Arguments
    targets: Tensors

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.targets[0])

    def has_rows(self, leaf: object) -> bool:
        """Whether an argument, or a value inside one, holds a row each."""
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.n_rows

    def rows(self, index: Tensor | slice) -> Captured:
        """Some rows, copied: a module may overwrite its inputs."""
        taken = tree_map_only(Tensor, lambda t: (t[index] if self.has_rows(t) else t).clone(), self.inputs)
        return Captured(taken, tuple(t[index] for t in self.targets))

    def squared_error(self, module: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """Sum of squared errors of what the module gives with other weights by name, which gradients reach; float32."""
        found = _tensors_in(torch.func.functional_call(module, dict(weights), *self.inputs))
        pairs = zip(found, self.targets, strict=True)
        return torch.stack([(one.float() - target.float()).square().sum() for one, target in pairs]).sum()


def capture_outputs(denoiser: nn.Module, name: str, calls: Sequence[DenoiserCall]) -> list[Tensors]:
    """The outputs of a module, one entry per use, when the denoiser repeats recorded calls."""
    found: list[Tensors] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        found.append(tuple(t.detach().clone() for t in _tensors_in(output)))

    _repeat(denoiser, calls, denoiser.get_submodule(name).register_forward_hook(keep))
    return found


def capture(
    denoiser: nn.Module, name: str, calls: Sequence[DenoiserCall], targets: Sequence[Tensors]
) -> tuple[Captured, ...]:
    """The arguments of a module when the denoiser repeats recorded calls, joined to what it should give for them."""
    inputs: list[Arguments] = []

    def keep(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        inputs.append(tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs)))

    # before the hooks of others, which may change the inputs: they will do so again when the module is called
    module = denoiser.get_submodule(name)
    _repeat(denoiser, calls, module.register_forward_pre_hook(keep, with_kwargs=True, prepend=True))
    if len(inputs) != len(targets):
        raise StateError(f"module {name!r} was called {len(inputs)} times, {len(targets)} times at full precision")
    if not all(targets):
        raise InputError(f"module {name!r} gives no tensor, so its rounding cannot be reconstructed")
    groups: list[list[Captured]] = []  # calls that differ in rows only
    for one in map(Captured, inputs, targets):
        group = next((g for g in groups if _agree(g[0], one)), [])
        if not group:
            groups.append(group)
        group.append(one)
    return tuple(map(_joined, groups))


def slices(parts: Sequence[Captured], n_rows: int) -> Iterator[Captured]:
    """All rows, at most `n_rows` at a time."""
    return (part.rows(slice(i, i + n_rows)) for part in parts for i in range(0, part.n_rows, n_rows))


def _tensors_in(output: object) -> Tensors:
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _repeat(denoiser: nn.Module, calls: Sequence[DenoiserCall], hook: RemovableHandle) -> None:
    with hook, torch.no_grad():  # on leaving, the hook is gone
        for call in calls:
            denoiser(**rows_of(call, slice(None)))


def _agree(first: Captured, other: Captured) -> bool:
    def agree(one: object, another: object) -> bool:
        if not isinstance(one, Tensor) or not isinstance(another, Tensor):
            return type(one) is type(another) and one == another
        if first.has_rows(one) and other.has_rows(another):
            return one.shape[1:] == another.shape[1:] and one.dtype == another.dtype
        return torch.equal(one, another)

    (leaves, spec), (others, other_spec) = tree_flatten(first.inputs), tree_flatten(other.inputs)
    return spec == other_spec and all(map(agree, leaves, others))


def _joined(calls: Sequence[Captured]) -> Captured:
    def joined(*alike: Any) -> Any:
        return torch.cat(alike) if calls[0].has_rows(alike[0]) else alike[0]

    targets = tuple(map(torch.cat, zip(*(call.targets for call in calls), strict=True)))
    return Captured(tree_map(joined, *(call.inputs for call in calls)), targets)


@dataclass(frozen=True, slots=True)
class ReconstructionUnit:
    """A module whose output is reconstructed, a block or a layer alone: all its layers, those with codes to learn."""

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
    n_steps: int

    def __str__(self) -> str:
        return "learned rounding"

    @property
    def summary(self) -> LearnedRounding:
        """What the report tells about it."""
        ratios = [b.error / b.nearest_error for b in self.blocks if b.error > 0]
        return LearnedRounding(
            n_blocks=len(self.blocks),
            n_learned=sum(block.is_learned for block in self.blocks),
            n_samples=self.n_samples,
            n_steps=self.n_steps,
            changed_share=sum(b.n_changed for b in self.blocks if b.is_learned) / sum(b.n_weights for b in self.blocks),
            error_ratio=statistics.geometric_mean(ratios or [1.0]),
        )

    def as_json(self) -> Mapping[str, object]:
        """Plain values by name, the codes left out."""
        blocks = [{key: getattr(block, key) for key in _BLOCK_KEYS} for block in self.blocks]
        found = {"n_samples": self.n_samples, "options": _options(self.n_steps), "blocks": blocks}
        return {"reconstruction": found}


def _options(n_steps: int) -> dict[str, object]:
    """What is learned from, and how: part of the names of what studies keep."""
    regulariser = {"strength": STRENGTH, "warm_up": WARM_UP, "first_beta": FIRST_BETA, "last_beta": LAST_BETA}
    schedule = {"n_steps": n_steps, "learning_rate": LEARNING_RATE, **regulariser}
    return {"schedule": schedule, "n_timesteps": N_TIMESTEPS, "batch_rows": BATCH_ROWS, "seed": SEED}


def units_of(graph: DenoiserGraph, recipe: Recipe) -> tuple[ReconstructionUnit, ...]:
    """The units of a graph in its order, with the layers whose codes can be learned under a recipe."""
    blocks = {node.block for node in graph.layers}
    innermost = {b for b in blocks if b and not any(other.startswith(f"{b}.") for other in blocks)}
    members: dict[str, list[str]] = {}
    for node in graph.layers:
        members.setdefault(node.block if node.block in innermost else node.name, []).append(node.name)
    shared = {layer for tie in graph.ties for layer in tie}
    entries = {node.name: recipe.layers.get(node.name, FP16) for node in graph.layers if node.name not in shared}
    learned = {n for n, entry in entries.items() if any(p.format.numerics.is_uniform for p in parts_of(entry, 1))}
    return tuple(
        ReconstructionUnit(name, tuple(layers), tuple(layer for layer in layers if layer in learned))
        for name, layers in members.items()
    )


def reconstruct(lab: Lab, bank: Bank, recipe: Recipe, on: Sampling, *, n_steps: int = N_STEPS) -> Reconstruction:
    """Learns the rounding of layers on uniform grids on the model's own trajectory under a sampling plan.

    With a study, each block is saved when it is finished and not learned again. What one block is called with and gives
    is in memory at a time, besides the recorded calls of the denoiser.
    """
    units, setting = units_of(lab.graph, recipe), lab.setting(on, "step", weights_digest=bank.weights_digest)
    facts = {"reconstruction": RECONSTRUCTION_VERSION, "setting": setting, "recipe": recipe.key}
    options = _options(n_steps)
    keys = {unit: content_key({**facts, "options": options, "unit": unit}) for unit in units if unit.learned}
    if not keys:
        uniform = ", ".join(f.name for f in families.FAMILIES if f.is_uniform)
        raise InputError(f"only {uniform} formats round to a grid, and no layer of the recipe has one to reconstruct")
    weights, finished = bank.quantize(recipe), set[str]()
    calls = functools.cache(lambda: record(lab.pipe, on, at_most=N_TIMESTEPS).calls)  # when they are first needed
    n_missing = len(set(keys.values()) - (lab.study.probe_keys() if lab.study else frozenset()))
    found, parts = [], lab.parts()
    with parts.stage("learning the rounding", n_missing * n_steps) as stop:
        for unit in units:
            if unit.learned:
                learn = functools.partial(_learn, lab, unit, weights, finished, calls, n_steps)
                found.append(parts.part(ReconstructedBlock, keys[unit], learn))
                weights |= _coded(unit, found[-1], weights)
                parts.check(stop)
            finished |= weights.keys() & set(unit.layers)  # quantized for what follows
    return Reconstruction(weights, tuple(found), len(on.seeds), n_steps)


def _learn(
    lab: Lab,
    unit: ReconstructionUnit,
    weights: Mapping[str, QuantizedTensor],
    finished: set[str],
    calls: Callable[[], Sequence[DenoiserCall]],
    n_steps: int,
) -> ReconstructedBlock:
    """What one unit learns when all layers of units before it are quantized."""
    begin, denoiser = time.perf_counter(), lab.pipe.denoiser
    targets = capture_outputs(denoiser, unit.name, calls())
    with probed(denoiser, {layer: weights[layer] for layer in finished}):
        own = _Unit(denoiser, unit, capture(denoiser, unit.name, calls(), targets))
    devices = {layer: own.originals[layer].device for layer in unit.layers if layer in weights}
    packed = {layer: cast("QuantizedTensor", weights[layer].to(device)) for layer, device in devices.items()}
    nearest_error, learned_error = own.error(packed), 0.0
    if nearest_error == 0:
        lab.progress.advance(n_steps)
        learned = {layer: packed[layer] for layer in unit.learned}
    else:
        soft = {layer: SoftWeight(own.originals[layer], packed[layer]) for layer in unit.learned}
        stays = {layer: weight.dequantize() for layer, weight in packed.items() if layer not in soft}
        seed = int(content_key(f"sedimo reconstruction {SEED} {unit.name}")[:12], 16)
        generator, sizes = torch.Generator().manual_seed(seed), torch.tensor([float(part.n_rows) for part in own.data])

        def error() -> Tensor:
            part = own.data[int(torch.multinomial(sizes, 1, generator=generator))]  # each row is as likely as any other
            index = torch.randperm(part.n_rows, generator=generator)[:BATCH_ROWS]
            batch = part.rows(index.to(part.targets[0].device))
            named = own.named(stays | {layer: weight.soft() for layer, weight in soft.items()})
            return batch.squared_error(own.module, named) / (batch.n_rows * own.signal * nearest_error)

        learn_rounding(tuple(soft.values()), error, n_steps, after_step=lab.progress.advance)
        learned = {layer: weight.hard() for layer, weight in soft.items()}
        learned_error = own.error(packed | learned)
    return ReconstructedBlock(
        name=unit.name,
        nearest_error=nearest_error,
        learned_error=learned_error,
        n_rows=sum(part.n_rows for part in own.data),
        n_weights=sum(weights[layer].numel() for layer in unit.learned),
        n_changed=sum(_n_changed(weight, weights[layer]) for layer, weight in learned.items()),
        seconds=time.perf_counter() - begin,
        codes={n: tuple(map(_text, w.parts)) for n, w in learned.items()} if learned_error < nearest_error else {},
    )


class _Unit:
    """The module of a unit and what it is called with; called with other weights."""

    def __init__(self, denoiser: nn.Module, unit: ReconstructionUnit, data: Sequence[Captured]) -> None:
        self.module, self.data, self._name = denoiser.get_submodule(unit.name), data, unit.name
        self.originals = {layer: denoiser.get_submodule(layer).get_parameter("weight") for layer in unit.layers}
        self._n_rows = max(1, sum(part.n_rows for part in data))  # none where the pipeline never calls the unit
        self.signal = sum(float(t.double().square().sum()) for part in data for t in part.targets) / self._n_rows

    def error(self, weights: Mapping[str, QuantizedTensor]) -> float:
        """Squared error of the unit's output over its squared norm, on all rows."""
        named = self.named({layer: weight.dequantize() for layer, weight in weights.items()})
        with torch.no_grad():
            errors = [float(part.squared_error(self.module, named)) for part in slices(self.data, _EVALUATED_ROWS)]
        return math.fsum(errors) / (self._n_rows * self.signal) if self.signal else 0.0

    def named(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by their parameters' names in the unit's module, in the dtype of those."""
        names = {layer: f"{layer.removeprefix(f'{self._name}.')}.weight" for layer in weights} | {self._name: "weight"}
        return {names[layer]: weight.to(self.originals[layer].dtype) for layer, weight in weights.items()}


def _n_changed(weight: QuantizedTensor, other: QuantizedTensor) -> int:
    """Codes that differ between two weights of the same format."""
    shape = weight.packing.shape
    pairs = [(a, b) for a, b in zip(weight.parts, other.parts, strict=True) if a.codes is not None]
    return sum(int((a.unpacked_codes(shape).cpu() != b.unpacked_codes(shape).cpu()).sum()) for a, b in pairs)


def _text(part: WeightPart) -> str:
    return "" if part.codes is None else base64.b64encode(part.codes.cpu().numpy().tobytes()).decode("ascii")


def _coded(
    unit: ReconstructionUnit, block: ReconstructedBlock, weights: Mapping[str, QuantizedTensor]
) -> dict[str, QuantizedTensor]:
    """The layers of a unit with the codes that were learned."""
    if block.codes and set(block.codes) != set(unit.learned):
        raise StateError(f"the saved rounding of {unit.name!r} is of layers {sorted(block.codes)}")
    found = {}
    for layer, texts in block.codes.items():
        try:
            pairs = zip(weights[layer].parts, texts, strict=True)
            found[layer] = weights[layer].rewrapped([_part(*pair) for pair in pairs])
        except (ValueError, RuntimeError) as error:
            raise StateError(f"the saved codes of layer {layer!r} are damaged: {error}. Use another study") from error
    return found


def _part(part: WeightPart, text: str) -> WeightPart:
    if part.codes is None:
        return part
    codes = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
    return part.with_codes(codes.reshape(part.codes.shape).to(part.codes.device))


@dataclass(frozen=True, slots=True)
class RoundingSettings(Checked):
    """Whether rounding is learned, and for how many steps of each block; None: as many as usual."""

    is_wanted: bool = option(
        False, "--reconstruct", help="Learn the rounding of uaq formats, block by block, on the model's own trajectory."
    )
    n_steps: int | None = option(
        None, "--reconstruct-steps", least=1, help="Steps of learning per block; more take longer and help more."
    )

    def check_together(self) -> None:
        """Refuses steps of what is not done."""
        if self.n_steps is not None and not self.is_wanted:
            raise InputError("--reconstruct-steps says how long to learn the rounding: give --reconstruct, too")


def _price(lab: Lab, settings: RoundingSettings) -> Price:
    """The trajectory, its calls again twice per block, and in all blocks together as many passes as there are steps."""
    lab.refuse_unsampled("--reconstruct runs the pipeline", "Leave it out")
    on, n_steps = lab.seeds.more(N_SAMPLES), settings.n_steps or N_STEPS
    timing = lab.time_calls(on)
    share = min(1.0, N_TIMESTEPS / on.n_steps)
    n_calls = round(timing.n_calls * (1 + 2 * share * len(units_of(lab.graph, Recipe({})))))
    rows_of_a_call = _ROWS_PER_SAMPLE * min(on.batch_size, len(on.seeds))
    learning = n_steps * _GRADIENT_FACTOR * BATCH_ROWS / rows_of_a_call
    codes = lab.space.params  # a byte each, packed and written as text
    return Price((n_calls + learning) * timing.seconds_per_call, n_calls, disk_bytes=codes)


LEARNED_ROUNDING = Treatment(
    name="learned_rounding",
    words=Words(
        "learns the rounding of uaq codes, block by block, from what the blocks give at full precision",
        source="Li et al. 2021, BRECQ (arXiv 2102.05426)",
    ),
    knobs=RoundingSettings,
    finish=lambda lab, settings, bank, allocation: reconstruct(
        lab, bank, allocation.recipe, lab.seeds.more(N_SAMPLES), n_steps=settings.n_steps or N_STEPS
    ),
    price=_price,
    is_wanted=lambda settings: settings.is_wanted,
    excludes=("error_feedback",),
)
