"""NVIDIA ModelOpt's `auto_quantize` as a peer: its scores of its own formats, its choice among them, its weights.

ModelOpt scores each format of each layer by gradients of a loss, and a linear programme takes the least sum of scores
under a budget of average bits. The scores are kept as plain numbers, so that another budget costs one more solution;
its own checkpoints, which are pickled, are never written or read. A peer is told the budget in its own count, which
knows nothing of some scales; so its budget is found by bisection, as near to ours as its choices come and never above.

The loss is the mean squared error of the denoiser's output on recorded calls. Against the recorded output itself its
gradient would be zero at full precision, and every score with it; so the target is the recorded output plus unit noise,
which samples the Fisher information that the score is derived from.

This module is the one door to the package `nvidia-modelopt` (0.47), which is imported when it is first needed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sedimo.codec import content_key
from sedimo.errors import InputError, MissingExtraError
from sedimo.lab.exchange import probed
from sedimo.lab.lab import Lab
from sedimo.lab.objective import measure, measure_reference
from sedimo.methods.error import describe
from sedimo.methods.method import Finding, Method, NoKnobs, Price, Task, Words
from sedimo.metrics.signal import NoisePowers
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import output_tensor, record, rows_of
from sedimo.quant.formats import FP16, FULL_BITS
from sedimo.space import Decision, SearchSpace

PACKAGE, EXTRA = "nvidia-modelopt", "peers"
SCORES_VERSION = PEER_VERSION = 1
LOSS_SCALE = 1e5  # scores of the bare loss lie below the tolerance of ModelOpt's solver
FULL = f"fp{FULL_BITS}"
GRADIENT_FACTOR = 3.0  # a pass with gradients, in plain ones
LEAST_USED = 0.995  # of a budget, for a recipe to count as of equal size
PRECISION_BITS = 1e-3  # of the budget that a peer is told
_MAX_ROWS = 8  # of a call at a time: the output changes of all layers and formats are in memory together
_SCALE_BYTES = 2
_MATRIX = 2  # dimensions of a Linear weight


@dataclass(frozen=True, slots=True)
class IntFormat:
    """A symmetric integer format of ModelOpt: one float16 scale per output channel, or per `block` along the input."""

    bits: int
    block: int | None = None

    @property
    def name(self) -> str:
        """Such as `int4` or `int4b128`."""
        return f"int{self.bits}b{self.block}" if self.block else f"int{self.bits}"

    @property
    def effective_bits(self) -> float:
        """What ModelOpt is told that a weight takes; it knows no scales of channels [bits]."""
        return self.bits + (8 * _SCALE_BYTES / self.block if self.block else 0.0)

    def n_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the codes and scales of a weight `[out, in, ...]`."""
        n_scales = shape[0] * math.ceil(shape[1] / self.block) if self.block else shape[0]
        return math.ceil(math.prod(shape) * self.bits / 8) + n_scales * _SCALE_BYTES

    def attributes(self) -> dict[str, object]:
        """The quantizer in ModelOpt's words."""
        if self.block is None:
            return {"num_bits": self.bits, "axis": 0}
        blocks = {-1: self.block, "type": "static"}
        return {"num_bits": self.bits, "block_sizes": blocks, "effective_bits": self.effective_bits}


PER_CHANNEL = tuple(IntFormat(bits) for bits in (2, 3, 4, 5, 6, 8))
IN_BLOCKS = tuple(IntFormat(bits, 128) for bits in (3, 4, 5, 6))  # a block of a convolution is a row of its kernel
FORMATS: Mapping[str, IntFormat] = {
    f.name: f for f in sorted((*PER_CHANNEL, *IN_BLOCKS), key=lambda f: f.effective_bits)
}
EFFECTIVE_BITS: Mapping[str, float] = {name: f.effective_bits for name, f in FORMATS.items()} | {FULL: FULL_BITS}
_ALGORITHM = "mse"  # scales of least squared error: those of the largest weight waste two and three bits


@dataclass(frozen=True, slots=True)
class GroupScores:
    """ModelOpt's score of each format, by name, of layers that it gives one format; `fp16` leaves them alone."""

    layers: tuple[str, ...]
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ModelOptScores:
    """The scores of all groups, of a loss multiplied by `LOSS_SCALE`."""

    groups: tuple[GroupScores, ...]


@dataclass(frozen=True, slots=True)
class PeerRecipe:
    """What a peer chose: the name of its own format of every layer, and what that takes.

    `paper_bits` counts codes and 16 bits per scale, which is also what is stored [bits per weight]; `bops` are bit
    operations of one sample and denoiser call, attention included [BOPs].
    """

    formats: Mapping[str, str]
    paper_bits: float
    bops: int

    @property
    def key(self) -> str:
        """Content key of the formats."""
        return content_key(self.formats)


@dataclass(frozen=True, slots=True)
class PeerTrial:
    """Noise and signal power of each seed of a plan, with a peer's weights."""

    powers: NoisePowers


def is_installed() -> bool:
    """Whether ModelOpt can be asked."""
    return find_spec("modelopt") is not None


def identity() -> Mapping[str, object]:
    """What determines the weights of a format, to name what is kept: ModelOpt's version, formats and calibration."""
    try:
        return {"modelopt": metadata.version(PACKAGE), "formats": tuple(FORMATS), "algorithm": _ALGORITHM}
    except metadata.PackageNotFoundError as error:
        raise _missing() from error


def wanted_methods(
    methods: Sequence[Method[Any]], *, everything: Sequence[Method[Any]]
) -> tuple[tuple[Method[Any], ...], tuple[str, ...]]:
    """The methods that can be compared, with a note on peers that are missing when everything was asked for."""
    peers = [m.name for m in methods if m.is_peer]
    is_everything = {m.name for m in methods} == {m.name for m in everything}
    if peers and is_everything and not is_installed():
        note = f"{', '.join(peers)} left out: {PACKAGE} is not installed; pip install 'sedimo[{EXTRA}]'"
        return tuple(m for m in methods if not m.is_peer), (note,)
    if peers:
        _module("modelopt.torch.quantization")  # takes seconds that belong to no measurement
    return tuple(methods), ()


def measure_scores(lab: Lab, shapes: Mapping[str, Sequence[int]], on: Sampling) -> ModelOptScores:
    """Scores all formats of the layers in `shapes` (weight shapes by name) on the recorded calls of a plan.

    With a study, the scores are kept and not measured again. Block formats are offered to Linear layers alone.
    """
    setting = lab.setting(on, "step", weights_digest=lab.weights.digest)
    named = {"modelopt scores": SCORES_VERSION, "setting": setting, "layers": tuple(shapes), **identity()}

    def measure() -> ModelOptScores:
        calls = record(lab.pipe, on).calls
        return _auto_quantize(copy.deepcopy(lab.pipe.denoiser), shapes, calls)  # counted: hooks are copied, too

    (found,) = lab.parts().each(ModelOptScores, "scores of ModelOpt", 1, [(content_key(named), measure)])
    return found


def weights_of(space: SearchSpace, groups: Iterable[GroupScores]) -> list[tuple[Decision, ...]]:
    """The weights of each group, those of equal layers once, told as decisions: a peer knows no streams."""
    home = {layer: one for one in space.weights for layer in one.layers}
    return [tuple(dict.fromkeys(home[layer] for layer in group.layers)) for group in groups]


def solve(space: SearchSpace, groups: Sequence[GroupScores], effective_bits: float) -> tuple[str, ...] | None:
    """The formats that ModelOpt's linear programme gives the groups, or None where it finds no solution.

    `effective_bits` are the average bits of a weight by its own count: codes, and scales of blocks.
    """
    searcher = _module("modelopt.torch.quantization.algorithms").AutoQuantizeGradientSearcher()
    searcher.config = searcher.default_search_config
    n_weights = [sum(one.params for one in weights) for weights in weights_of(space, groups)]
    searcher.candidate_stats = {
        str(index): {
            "formats": list(group.scores),
            "scores": list(group.scores.values()),
            "costs": [n * EFFECTIVE_BITS[name] / FULL_BITS for name in group.scores],
        }
        for index, (group, n) in enumerate(zip(groups, n_weights, strict=True))
    }
    budget = sum(n_weights) * effective_bits / FULL_BITS
    with _quiet():
        found, is_satisfied = searcher.run_search_with_stats(budget)
    return tuple(chosen["format"] for chosen in found.values()) if is_satisfied else None


def nearest_below(budget: float, solve: Callable[[float], PeerRecipe | None]) -> PeerRecipe | None:
    """The largest recipe of at most `budget` paper bits, found by bisection of the bits that a peer is told.

    `solve` gives a recipe for those, or None. Sizes need not grow with them everywhere: no recipe above the budget is
    ever taken.
    """
    least, most = min(EFFECTIVE_BITS.values()), float(FULL_BITS)
    best: PeerRecipe | None = None
    while most - least > PRECISION_BITS:
        middle = (least + most) / 2
        found = solve(middle)
        if found is None or found.paper_bits > budget:
            most = middle
            continue
        least = middle
        best = found if best is None or found.paper_bits > best.paper_bits else best
    return best


def grouped(space: SearchSpace, scores: ModelOptScores, *, factor: float = 1.0) -> tuple[GroupScores, ...]:
    """A peer's scores, times a factor: layers of equal weights are scored together."""
    found: list[GroupScores] = []
    for scored, weights in zip(scores.groups, weights_of(space, scores.groups), strict=True):
        layers = dict.fromkeys(layer for one in weights for layer in one.layers)
        total = {name: factor * score for name, score in scored.scores.items()}
        for other in [g for g in found if not layers.keys().isdisjoint(g.layers)]:
            found.remove(other)
            layers |= dict.fromkeys(other.layers)
            total = {name: score + other.scores[name] for name, score in total.items() if name in other.scores}
        found.append(GroupScores(tuple(layers), total))
    return tuple(found)


def peer_recipe(space: SearchSpace, groups: Sequence[GroupScores], chosen: Sequence[str] | None) -> PeerRecipe | None:
    """The recipe of one format per group, weights of no group at 16 bits; None where nothing was chosen."""
    if chosen is None:
        return None
    pairs = zip(weights_of(space, groups), chosen, strict=True)
    names = dict.fromkeys(space.weights, FULL) | {d: name for weights, name in pairs for d in weights}
    n_bytes = sum(d.paper_bytes(FP16) if name == FULL else FORMATS[name].n_bytes(d.shape) for d, name in names.items())
    macs = sum(d.macs * (FULL_BITS if name == FULL else FORMATS[name].bits) for d, name in names.items())
    return PeerRecipe(
        formats={layer: name for d, name in names.items() for layer in d.layers},
        paper_bits=8 * n_bytes / space.params,
        bops=macs * FULL_BITS + space.attention_bops,
    )


def quantized_weights(denoiser: nn.Module, formats: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The weights `[out, in, ...]` of the layers that ModelOpt quantizes, as it computes with them.

    `formats` are names by layer; layers at `fp16` are left out. The denoiser is not changed.
    """
    chosen = {layer: FORMATS[name] for layer, name in formats.items() if name != FULL}
    config, found = _config({f"{layer}.weight_quantizer": f for layer, f in chosen.items()}), dict[str, torch.Tensor]()
    with _quiet(), torch.no_grad():
        model = _module("modelopt.torch.quantization").quantize(copy.deepcopy(denoiser), config)
        for layer in chosen:
            module: Any = model.get_submodule(layer)
            quantizer = getattr(module, "weight_quantizer", None)
            if quantizer is None or not quantizer.is_enabled:
                raise InputError(f"ModelOpt does not quantize the layer {layer!r}, a {type(module).__name__}")
            found[layer] = quantizer(module.weight).detach().clone()
    return found


def _auto_quantize(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], calls: Sequence[DenoiserCall]
) -> ModelOptScores:
    """The scores of a denoiser, which is consumed."""
    starts = ((call, first) for call in calls for first in range(0, len(call.output), _MAX_ROWS))
    parts = [(call, slice(first, first + _MAX_ROWS)) for call, first in starts]
    linear = [layer for layer, shape in shapes.items() if len(shape) == _MATRIX]
    by_matrix = {
        "module_name_patterns": linear,
        "quantization_formats": [_config({"*weight_quantizer": f}) for f in FORMATS.values()],
    }
    modules = [n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    with _quiet():
        _, state = _module("modelopt.torch.quantization").auto_quantize(
            model,
            constraints={"effective_bits": float(FULL_BITS)},
            quantization_formats=[_config({"*weight_quantizer": f}) for f in PER_CHANNEL],
            module_search_spaces=[by_matrix] if linear else [],
            disabled_layers=[name for name in modules if name not in shapes],
            data_loader=parts,
            forward_step=lambda model, data: output_tensor(model(**rows_of(*data))),
            loss_func=_loss,
            num_calib_steps=1,  # the ranges are those of the weights
            num_score_steps=len(parts),
        )
    scores = (
        (stats["module_names"], zip(map(_name, stats["formats"]), map(float, stats["scores"]), strict=True))
        for stats in state["candidate_stats"].values()
    )
    return ModelOptScores(tuple(GroupScores(tuple(layers), dict(pairs)) for layers, pairs in scores))


def _name(recipe: Any) -> str:
    """The name of a format that ModelOpt gives back; the one without any enabled quantizer is fp16."""
    attributes = [entry["cfg"] for entry in recipe.config.quant_cfg if entry.get("cfg") is not None]
    if not attributes:
        return FULL
    (found,) = attributes
    return IntFormat(found["num_bits"], (found["block_sizes"] or {}).get(-1)).name


def _loss(output: torch.Tensor, data: tuple[DenoiserCall, slice]) -> torch.Tensor:
    """The share of some rows in the scaled loss of their call."""
    call, rows = data
    noise = torch.randn(call.output.shape, generator=torch.Generator().manual_seed(call.step))
    target = (call.output + noise.to(call.output))[rows]
    return LOSS_SCALE * (output - target).square().sum() / call.output.numel()


def _config(formats: Mapping[str, IntFormat]) -> dict[str, object]:
    """ModelOpt's description of a model with these formats, by the names of quantizers."""
    entries = [{"quantizer_name": name, "cfg": f.attributes(), "enable": True} for name, f in formats.items()]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries], "algorithm": _ALGORITHM}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without ModelOpt's progress bars and its warnings about GPUs and formats of one's own."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


def _module(name: str) -> Any:
    try:
        with _quiet():
            return import_module(name)
    except ImportError as error:
        raise _missing() from error


def _missing() -> MissingExtraError:
    return MissingExtraError(PACKAGE, EXTRA, "comparing with the peer 'modelopt'")


def measure_peers(lab: Lab, on: Sampling, recipes: Sequence[PeerRecipe]) -> dict[str, NoisePowers]:
    """Noise of peers' recipes on the seeds of a plan, by key: their weights in the same denoiser; resumes."""
    distinct = {recipe.key: recipe for recipe in recipes}
    if not distinct:
        return {}
    pipe, setting = lab.pipe, lab.setting(on, weights_digest=lab.weights.digest)
    reference = functools.cache(lambda: measure_reference("final_latents", pipe, on))
    named = {"peer trial": PEER_VERSION, "setting": setting, **identity()}

    def trial(recipe: PeerRecipe) -> PeerTrial:
        compared = reference()  # at full precision, so before the weights are exchanged
        with probed(pipe.denoiser, quantized_weights(pipe.denoiser, recipe.formats)):
            return PeerTrial(measure(pipe, compared)[0])

    works = ((content_key({**named, "recipe": k}), functools.partial(trial, one)) for k, one in distinct.items())
    found = lab.parts().each(PeerTrial, "recipes of peers", len(distinct), works)
    return {key: one.powers for key, one in zip(distinct, found, strict=True)}


def _why_not(lab: Lab, task: Task[NoKnobs]) -> str:
    """Why a peer cannot take part: orders that it has no word for."""
    if task.budget.bops is not None:
        return "it knows no budget of bit operations"
    if lab.ends is not None:
        return "it decides on first and last layers as on all others"
    if any(f.activation_bits < FULL_BITS for d in lab.space.decisions for f in d.formats):
        return "its formats are of weights alone"
    if lab.is_changed:
        return "it is compared on the source as it is, not smoothed"
    return ""


def _price(lab: Lab, _task: Task[NoKnobs]) -> Price:
    """A trajectory, its calls again with gradients, and every layer's output with every format."""
    timing = lab.time_calls(lab.seeds.search)
    seconds = timing.n_calls * timing.seconds_per_call * (1 + GRADIENT_FACTOR + len(FORMATS))
    return Price(seconds, 2 * timing.n_calls)


def _measure(lab: Lab, task: Task[NoKnobs]) -> Finding:
    """The peer's scores, on the searched seeds; the table, of weight error in our formats, only describes."""
    found, reason = describe(lab.any_bank), _why_not(lab, task)
    if reason:
        return replace(found, notes=(f"left out: {reason}",))
    shapes = {layer: w.shape for w in found.bank.space.weights for layer in w.layers}
    return found.with_evidence(measure_scores(lab, shapes, lab.seeds.search))


def _decide(lab: Lab, task: Task[NoKnobs], finding: Finding, *, scale: float) -> Finding:
    """The peer's recipe under so many paper bits, as evidence, with notes on it."""
    scores, space, budget = finding.of(ModelOptScores), finding.bank.space, task.budget.in_bits(lab.space.params)
    if scores is None:
        return finding
    groups = grouped(space, scores, factor=(scale / LOSS_SCALE) ** 2)
    found = nearest_below(budget, lambda bits: peer_recipe(space, groups, solve(space, groups, bits)))
    if found is None:
        note = f"left out: its linear programme finds no recipe of at most {budget:.2f} bits per weight"
        return replace(finding, notes=(note,))
    if found.paper_bits < LEAST_USED * budget:
        note = f"its linear programme leaves {1 - found.paper_bits / budget:.1%} of the budget unused"
        finding = replace(finding, notes=(note,))
    return finding.with_evidence(found)


MODELOPT = Method(
    name="modelopt",
    words=Words(
        summary="NVIDIA ModelOpt's gradient scores and linear programme, in its own formats",
        source="nvidia-modelopt 0.47, auto_quantize",
        sees="first-order noise of the denoiser's output in its formats",
        misses="formats of codebooks; its costs are not shown",
    ),
    is_described=True,
    is_peer=True,
    price=_price,
    measure=_measure,
    decide=functools.partial(_decide, scale=LOSS_SCALE),
)
MODELOPT_UNSCALED = replace(
    MODELOPT,
    name="modelopt-unscaled",
    words=replace(MODELOPT.words, summary="modelopt with the bare loss, whose scores lie below its solver's tolerance"),
    decide=functools.partial(_decide, scale=1.0),
)
