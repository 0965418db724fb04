"""NVIDIA ModelOpt's `auto_quantize` as a peer: its scores of its own formats, its choice among them, its weights.

ModelOpt scores each format of each layer by gradients of a loss, and a linear programme takes the least sum of scores
under a budget of average bits. The scores are kept as plain numbers, so that another budget costs one more solution;
its own checkpoints, which are pickled, are never written or read.

The loss is the mean squared error of the denoiser's output on recorded calls. Against the recorded output itself its
gradient would be zero at full precision, and every score with it; so the target is the recorded output plus unit noise,
which samples the Fisher information that the score is derived from.

This module is the one door to the package `nvidia-modelopt` (0.47), which is imported when it is first needed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sedimo.codec import content_key
from sedimo.errors import InputError, MissingExtraError
from sedimo.lab.lab import Lab
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import output_tensor, record, rows_of
from sedimo.quant.formats import FULL_BITS

PACKAGE, EXTRA = "nvidia-modelopt", "peers"
SCORES_VERSION = 1
LOSS_SCALE = 1e5  # scores of the bare loss lie below the tolerance of ModelOpt's solver
FULL = f"fp{FULL_BITS}"
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
        return f"int{self.bits}" + (f"b{self.block}" if self.block else "")

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
class Scored:
    """What the linear programme chooses a format for: the scores, and the weights that it counts."""

    n_weights: int
    scores: Mapping[str, float]


def is_installed() -> bool:
    """Whether ModelOpt can be asked."""
    return find_spec("modelopt") is not None


def identity() -> Mapping[str, object]:
    """What determines the weights of a format, to name what is kept: ModelOpt's version, formats and calibration.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return {"modelopt": metadata.version(PACKAGE), "formats": tuple(FORMATS), "algorithm": _ALGORITHM}
    except metadata.PackageNotFoundError as error:
        raise _missing() from error


def load() -> None:
    """Imports ModelOpt, which takes seconds that belong to no measurement.

    Raises:
        MissingExtraError: it is not installed.
    """
    _module("modelopt.torch.quantization")


def measure_scores(lab: Lab, shapes: Mapping[str, Sequence[int]], on: Sampling) -> ModelOptScores:
    """Scores all formats of the layers in `shapes` (weight shapes by name) on the recorded calls of a plan.

    With a study, the scores are kept and not measured again. Block formats are offered to Linear layers alone.

    Raises:
        MissingExtraError: ModelOpt is not installed.
    """
    setting = lab.setting(on, "step", weights_digest=lab.weights.digest)
    named = {"modelopt scores": SCORES_VERSION, "setting": setting, "layers": tuple(shapes), **identity()}

    def measure() -> ModelOptScores:
        calls = record(lab.pipe, on).calls
        return _auto_quantize(copy.deepcopy(lab.pipe.denoiser), shapes, calls)  # counted: hooks are copied, too

    (found,) = lab.parts().each(ModelOptScores, "scores of ModelOpt", 1, [(content_key(named), measure)])
    return found


def solve(groups: Sequence[Scored], effective_bits: float) -> tuple[str, ...] | None:
    """The formats that ModelOpt's linear programme gives the groups, or None where it finds no solution.

    `effective_bits` are the average bits of a weight by its own count: codes, and scales of blocks.
    """
    searcher = _module("modelopt.torch.quantization.algorithms").AutoQuantizeGradientSearcher()
    searcher.config = searcher.default_search_config
    searcher.candidate_stats = {
        str(index): {
            "formats": list(group.scores),
            "scores": list(group.scores.values()),
            "costs": [group.n_weights * _effective_bits(name) / FULL_BITS for name in group.scores],
        }
        for index, group in enumerate(groups)
    }
    with _quiet():
        found, is_satisfied = searcher.run_search_with_stats(
            sum(group.n_weights for group in groups) * effective_bits / FULL_BITS
        )
    return tuple(chosen["format"] for chosen in found.values()) if is_satisfied else None


def quantized_weights(denoiser: nn.Module, formats: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The weights `[out, in, ...]` of the layers that ModelOpt quantizes, as it computes with them.

    `formats` are names by layer; layers at `fp16` are left out. The denoiser is not changed.

    Raises:
        InputError: a layer that ModelOpt does not quantize.
    """
    chosen = {layer: FORMATS[name] for layer, name in formats.items() if name != FULL}
    config = _config({f"{layer}.weight_quantizer": number_format for layer, number_format in chosen.items()})
    with _quiet(), torch.no_grad():
        model = _module("modelopt.torch.quantization").quantize(copy.deepcopy(denoiser), config)
        return {layer: _quantized(model, layer) for layer in chosen}


def _quantized(model: nn.Module, layer: str) -> torch.Tensor:
    module: Any = model.get_submodule(layer)
    quantizer = getattr(module, "weight_quantizer", None)
    if quantizer is None or not quantizer.is_enabled:
        raise InputError(f"ModelOpt does not quantize the layer {layer!r}, a {type(module).__name__}")
    weight: torch.Tensor = quantizer(module.weight)
    return weight.detach().clone()


def _auto_quantize(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], calls: Sequence[DenoiserCall]
) -> ModelOptScores:
    """The scores of a denoiser, which is consumed."""
    slices = [(call, first) for call in calls for first in range(0, len(call.output), _MAX_ROWS)]
    linear = [layer for layer, shape in shapes.items() if len(shape) == _MATRIX]
    by_matrix = {"module_name_patterns": linear, "quantization_formats": _configs(FORMATS.values())}
    modules = [n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    with _quiet():
        _, state = _module("modelopt.torch.quantization").auto_quantize(
            model,
            constraints={"effective_bits": float(FULL_BITS)},
            quantization_formats=_configs(PER_CHANNEL),
            module_search_spaces=[by_matrix] if linear else [],
            disabled_layers=[name for name in modules if name not in shapes],
            data_loader=slices,
            forward_step=lambda model, data: output_tensor(model(**rows_of(data[0], _rows(data[1])))),
            loss_func=_loss,
            num_calib_steps=1,  # the ranges are those of the weights
            num_score_steps=len(slices),
        )
    return ModelOptScores(tuple(_scores(stats) for stats in state["candidate_stats"].values()))


def _scores(stats: Mapping[str, Any]) -> GroupScores:
    names = [_name(recipe) for recipe in stats["formats"]]
    return GroupScores(tuple(stats["module_names"]), dict(zip(names, map(float, stats["scores"]), strict=True)))


def _name(recipe: Any) -> str:
    """The name of a format that ModelOpt gives back; the one without any enabled quantizer is fp16."""
    attributes = [entry["cfg"] for entry in recipe.config.quant_cfg if entry.get("cfg") is not None]
    if not attributes:
        return FULL
    (found,) = attributes
    block = (found["block_sizes"] or {}).get(-1)
    return IntFormat(found["num_bits"], block).name


def _rows(first: int) -> slice:
    return slice(first, first + _MAX_ROWS)


def _loss(output: torch.Tensor, data: tuple[DenoiserCall, int]) -> torch.Tensor:
    """The share of some rows in the scaled loss of their call."""
    call, first = data
    noise = torch.randn(call.output.shape, generator=torch.Generator().manual_seed(call.step))
    target = (call.output + noise.to(call.output))[_rows(first)]
    return LOSS_SCALE * (output - target).square().sum() / call.output.numel()


def _configs(formats: Any) -> list[dict[str, object]]:
    return [_config({"*weight_quantizer": number_format}) for number_format in formats]


def _config(formats: Mapping[str, IntFormat]) -> dict[str, object]:
    """ModelOpt's description of a model with these formats, by the names of quantizers."""
    entries = [{"quantizer_name": name, "cfg": f.attributes(), "enable": True} for name, f in formats.items()]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries], "algorithm": _ALGORITHM}


def _effective_bits(name: str) -> float:
    return float(FULL_BITS) if name == FULL else FORMATS[name].effective_bits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without ModelOpt's progress bars and its warnings about GPUs and formats of one's own."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def _module(name: str) -> Any:
    try:
        with _quiet():
            return import_module(name)
    except ImportError as error:
        raise _missing() from error


def _missing() -> MissingExtraError:
    return MissingExtraError(PACKAGE, EXTRA, "comparing with the peer 'modelopt'")
