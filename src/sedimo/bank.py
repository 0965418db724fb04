"""The bank: what each format would do to each decision's weight, and the packed weights themselves on demand.

Candidates carry an error (exact, or estimated from some output channels) and bytes. Parameters (scales,
codebooks) are fitted when a recipe first needs them and kept, in memory or in a cache folder that survives a kill;
codes are recomputed from the weight. Weights are read one layer at a time.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sedimo.checkpoint.contents import narrowed
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError, UnfitFormatError
from sedimo.graph.model import Stream
from sedimo.pipelines.adapter import WeightSource
from sedimo.progress import SILENT, Progress
from sedimo.quant.activations import DYNAMIC, Activations, InputQuantizers
from sedimo.quant.fitting import Feedback, Moments, error_estimates, feedback_of, fit_parameters, with_codes
from sedimo.quant.formats import FP16, Format
from sedimo.quant.parts import Entry, Fitted, PartFormat, parts_of
from sedimo.quant.tensor import QuantizedTensor
from sedimo.space import Decision, Recipe, SearchSpace
from sedimo.store import Rows

Key = TypeVar("Key")
Made = TypeVar("Made")
FIT_VERSION = 1  # raise it when a fit changes: cached parameters and errors are then made anew
_TIMED_WEIGHTS = 1 << 18
_PACKED_BYTES_KEPT = 1 << 30
_SUMS, _SHAPE = "sums", "shape"  # of a saved fit: squared error and squared norm, float64 [2]; that of the weight
_FEEDBACK_BYTES_KEPT = 3 << 30  # all of it: recipes go through layers in order, and what is dropped is needed next


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one format does to one decision.

    `error` is the relative squared weight error ||W - W_q||^2 / ||W||^2 with its standard error; `n` is the
    number of output channels it was estimated from, 0 when it is exact. It is that of the nearest codes; codes by error
    feedback have a larger one, for less error in what the layer gives. `paper_bytes` and `stored_bytes` are
    those of the weight, stored once [bytes].
    """

    decision: str
    format: Format
    error: float
    standard_error: float
    n: int
    paper_bytes: int
    stored_bytes: int


class Bank:
    """Candidates of every decision, and their packed weights.

    Made by `fit_bank`. `activations` says how the inputs of layers are rounded whose format asks for it. Of packed
    weights the last used ones stay in memory, up to 1 GiB.
    """

    def __init__(
        self,
        weights: WeightSource,
        space: SearchSpace,
        candidates: Sequence[Candidate],
        *,
        cache: BankCache | None = None,
        activations: Activations = DYNAMIC,
        moments: Moments | None = None,
    ) -> None:
        self.weights, self.space, self.activations, self.moments = weights, space, activations, moments
        self.candidates = tuple(candidates)
        self._cache = cache or BankCache(None)
        self._packed = _LastUsed[tuple[str, Entry], QuantizedTensor](
            _PACKED_BYTES_KEPT, lambda packed: packed.stored_bytes
        )
        self._feedback = _LastUsed[tuple[str, int, int], list[Feedback]](
            _FEEDBACK_BYTES_KEPT, lambda parts: sum(part.order.nbytes + part.asked.nbytes for part in parts)
        )

    @property
    def weights_digest(self) -> str:
        """sha256 of the full-precision weights."""
        return self.weights.digest

    @property
    def digest(self) -> str:
        """Names what turns a recipe into a denoiser: the full-precision weights, and how all is rounded."""
        keys = {"activations": self.activations.key, "moments": self.moments.key if self.moments else ""}
        named = {name: key for name, key in keys.items() if key}
        return content_key({"weights": self.weights_digest, **named}) if named else self.weights_digest

    def rounding(self, activations: Activations) -> Bank:
        """The same bank with other rules for activations; nothing is fitted again."""
        return self._with(activations, self.moments)

    def compensating(self, moments: Moments) -> Bank:
        """The same bank with codes by error feedback (see `quant.fitting`); nothing is fitted again."""
        return self._with(self.activations, moments)

    def _with(self, activations: Activations, moments: Moments | None) -> Bank:
        known = (self.weights, self.space, self.candidates)
        return Bank(*known, cache=self._cache, activations=activations, moments=moments)

    def input_quantizers(self, recipe: Recipe) -> InputQuantizers:
        """How a recipe rounds the inputs of layers.

        Raises:
            InputError: parts of a layer differ in their activation bits, or a static range is not known.
        """
        return self.activations.quantizers(recipe.activation_bits)

    @cached_property
    def index(self) -> Mapping[tuple[str, Format], Candidate]:
        """Candidates by (decision, format)."""
        return {(c.decision, c.format): c for c in self.candidates}

    @cached_property
    def _weight_of(self) -> Mapping[str, Decision]:
        return {layer: w for w in self.space.weights for layer in w.layers}

    def quantized(self, decision: str, number_format: Format) -> QuantizedTensor:
        """The packed weight of a decision (of a stream: its part) at a format; fitted when it is first needed.

        Raises:
            InputError: an unknown decision, fp16, or a weight that cannot be quantized.
        """
        known = self.space.decision_index.get(decision)
        if known is None:
            raise InputError(f"no such decision in {self.space.denoiser}: {decision!r}")
        if not number_format.is_quantized:
            raise InputError(f"{decision} at fp16 is left alone; there is nothing to quantize")
        return self._held(known, number_format.weight_format)

    def changes(self, decision: str) -> Iterator[tuple[Format, torch.Tensor]]:
        """Quantized minus full-precision weight, float32 `[out, in, ...]`, for each quantized format of a decision.

        Of a stream, it is the part of the weight that reads it. The weight is read once and nothing is packed or kept.
        """
        known = self.space.decision_index[decision]
        weight = read_weight(self.weights, known)
        exact = weight.float()
        for number_format, parameters in self._parameters(known.name, weight, known.weight_formats).items():
            yield number_format, self._coded(known, 0, weight, parameters).dequantize() - exact

    def stored_bytes(self, recipe: Recipe) -> int:
        """Bytes of the tensors of all weights under a recipe, those left alone as their source has them [bytes]."""
        alone = {d: c.stored_bytes for (d, f), c in self.index.items() if not f.is_quantized}
        surplus = 0
        for d in self.space.decisions:
            number_format = recipe.format_of(d.layers[0], d.stream)
            if d.name in alone and number_format is not None and not number_format.is_quantized:
                surplus += alone[d.name] - d.stored_bytes(FP16)
        return self.space.stored_bytes(recipe) + surplus

    def quantize(self, recipe: Recipe) -> dict[str, QuantizedTensor]:
        """The packed weights of a recipe by layer name; layers at fp16 are absent, tied layers share one tensor.

        Raises:
            InputError: a layer that the space does not have, or parts that do not fit the layer.
        """
        found: dict[str, QuantizedTensor] = {}
        for layer, entry in recipe.weights_alone.layers.items():
            weight = self._weight_of.get(layer)
            if weight is None:
                raise InputError(f"the recipe names a layer that {self.space.denoiser} does not have: {layer!r}")
            if entry != FP16:
                found[layer] = self._held(weight, entry)
        return found

    def _held(self, weight: Decision, entry: Entry) -> QuantizedTensor:
        """The packed weight of an entry, kept from an earlier use or made; `weight` may be a stream's."""
        return self._packed.get((weight.name, entry), lambda: self._make(weight, parts_of(entry, weight.shape[1])))

    def _make(self, weight: Decision, parts: Sequence[PartFormat]) -> QuantizedTensor:
        values, n_inputs = read_weight(self.weights, weight), weight.shape[1]
        if [p.start for p in parts] != [0, *(p.stop for p in parts[:-1])] or parts[-1].stop != n_inputs:
            raise InputError(f"parts of layer {weight.name!r} must cover its {n_inputs} inputs in order")
        pieces: list[Fitted | torch.Tensor] = []
        for part in parts:
            if not part.format.is_quantized:
                pieces.append(narrowed(values)[:, part.start : part.stop])
                continue
            is_whole = part.stop - part.start == n_inputs
            name = weight.name if is_whole else Stream(part.start, part.stop, n_inputs).named(weight.name)
            piece = values[:, part.start : part.stop]
            parameters = self._parameters(name, piece, (part.format,))[part.format]
            pieces.append(self._coded(weight, part.start, piece, parameters))
        packed = QuantizedTensor.from_fitted(pieces, values.dtype)
        packed.layer_name = weight.layers[0]
        return packed

    def _coded(self, weight: Decision, first: int, piece: torch.Tensor, parameters: Fitted) -> Fitted:
        """The piece of a weight that begins at one of its input channels: nearest codes, or by error feedback."""
        parts = [] if self.moments is None else self._feedback_of(self.moments, weight, first, piece)
        return with_codes(piece, parameters, parts, layer_name=weight.name)

    def _feedback_of(self, moments: Moments, weight: Decision, first: int, piece: torch.Tensor) -> list[Feedback]:
        """That of the piece's columns among those of its layer, of which a stream has a part."""
        whole, width = self._weight_of[weight.layers[0]].name, math.prod(piece.shape[2:])
        first += 0 if weight.stream is None else weight.stream.start
        start, stop = first * width, (first + piece.shape[1]) * width
        return self._feedback.get((whole, start, stop), lambda: feedback_of(moments.blocks(whole), start, stop))

    def _parameters(self, name: str, weight: torch.Tensor, formats: Sequence[Format]) -> dict[Format, Fitted]:
        """The parameters of a layer's weight or of the part of it that is so named."""
        known = self._cache.parameters(name)
        missing = [f for f in formats if f not in known]
        if missing:
            made = fit_parameters(weight, missing, layer_name=name)
            self._cache.put_parameters(name, made)
            known = {**known, **made}
        return {f: known[f] for f in formats}


class _LastUsed(Generic[Key, Made]):
    """Things that are costly to make, the last used ones up to a number of bytes; the last one always."""

    def __init__(self, most_bytes: int, size_of: Callable[[Made], int]) -> None:
        self._kept: dict[Key, Made] = {}
        self._bytes, self._most_bytes, self._size_of = 0, most_bytes, size_of

    def get(self, key: Key, make: Callable[[], Made]) -> Made:
        """What was made for a key, or is made now."""
        if key not in self._kept:
            self._kept[key] = make()
            self._bytes += self._size_of(self._kept[key])
        self._kept[key] = self._kept.pop(key)  # to the end
        while self._bytes > self._most_bytes and len(self._kept) > 1:
            self._bytes -= self._size_of(self._kept.pop(next(iter(self._kept))))
        return self._kept[key]


class BankCache:
    """Parameters by decision and format: in memory, or in a folder that survives a kill, then with candidates by key.

    The folder belongs to one set of weights: `bank.sqlite` holds candidates, one safetensors file per decision the
    scales and codebooks of its formats. A file is written whole under another name and then renamed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, dict[Format, Fitted]] = {}
        self._rows = Rows(folder / "bank.sqlite") if folder else None

    def candidate(self, key: str) -> Candidate | None:
        """The saved candidate of a key, or None; memory keeps none, for a bank has them."""
        return None if self._rows is None else self._rows.get(Candidate, "candidate", key)

    def put_candidates(self, candidates: Mapping[str, Candidate]) -> None:
        """Saves candidates by key."""
        if self._rows is not None:
            self._rows.put_many("candidate", candidates)

    def parameters(self, decision: str) -> dict[Format, Fitted]:
        """The fitted parameters of a decision by format."""
        if self._folder is None:
            return self._memory.get(decision, {})
        path, found = _file_of(self._folder, decision), dict[Format, dict[str, torch.Tensor]]()
        try:
            for name, tensor in (load_file(path) if path.exists() else {}).items():
                text, _, field = name.rpartition(".")
                found.setdefault(Format.parse(text), {})[field] = tensor
            return {f: _fitted(f, tensors) for f, tensors in found.items()}
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise StateError(f"{path} in the bank's cache is damaged: {error!r}. Delete it to fit it again") from error

    def put_parameters(self, decision: str, fitted: Mapping[Format, Fitted]) -> None:
        """Keeps fitted parameters."""
        known = {**self.parameters(decision), **fitted}
        if self._folder is None:
            self._memory[decision] = known
            return
        tensors: dict[str, torch.Tensor] = {}
        for f, one in known.items():
            sums = torch.tensor([one.squared_error, one.squared_norm], dtype=torch.float64)
            own = {**one.parameters, _SUMS: sums, _SHAPE: torch.tensor(one.shape)}
            for name, tensor in own.items():  # formats may share one
                tensors[f"{f}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
        path = _file_of(self._folder, decision)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


def _file_of(folder: Path, decision: str) -> Path:
    return folder / f"{hashlib.sha256(decision.encode()).hexdigest()[:32]}.safetensors"


def _fitted(number_format: Format, tensors: dict[str, torch.Tensor]) -> Fitted:
    squared_error, squared_norm = tensors.pop(_SUMS).tolist()
    shape = tuple(tensors.pop(_SHAPE).tolist())
    return Fitted(number_format, shape, tensors, squared_error, squared_norm)


def fit_bank(
    weights: WeightSource,
    space: SearchSpace,
    *,
    sample_channels: int | None = None,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> Bank:
    """The bank of a space: every candidate's error and bytes.

    With `sample_channels`, errors are estimated from that many output channels of each weight, and nothing is
    fitted until it is used; else every format is fitted in full. With a `cache` folder the work is saved as it
    goes, named by the weights and the format, and reused; a killed run goes on where it was. A format that cannot
    hold a weight is dropped from the choices of that decision, with a note in the bank's space.

    Raises:
        InputError: a weight is missing, has another shape, holds infinity or NaN, or fits into none of its formats.
    """
    store = BankCache(cache / f"{weights.digest[:32]}-v{FIT_VERSION}" if cache else None)
    candidates, decisions, notes = list[Candidate](), list[Decision](), list[str]()
    progress.start(len(space.decisions), "fitting formats" if sample_channels is None else "estimating errors")
    for decision in space.decisions:
        found = _candidates(weights, decision, sample_channels, store)
        kept = tuple(candidate.format for candidate in found)
        dropped = [str(f) for f in decision.formats if f not in kept]
        if not kept:
            raise InputError(f"layer {decision.name!r} can be held by none of {', '.join(dropped)}; add kmc4 or fp16")
        if dropped:
            notes.append(f"{decision.name}: {', '.join(dropped)} cannot hold its values and were dropped")
        candidates += found
        decisions.append(replace(decision, formats=kept))
        progress.advance(1)
    progress.done()
    space = replace(space, decisions=tuple(decisions), notes=(*space.notes, *notes)) if notes else space
    return Bank(weights, space, candidates, cache=store)


def time_fits(weights: WeightSource, space: SearchSpace) -> float:
    """Seconds that one weight in one format takes on this machine, timed on some rows of the largest weight."""
    decision = max(space.decisions, key=lambda d: d.params)
    formats = [f for f in decision.formats if f.is_quantized]
    if not formats:
        return 0.0
    weight = read_weight(weights, decision)
    rows = weight[: max(1, _TIMED_WEIGHTS * weight.shape[0] // weight.numel())]
    fitting = list(possible(lambda some: fit_parameters(rows, some), formats))  # compiles, or loads what was compiled
    if not fitting:
        return 0.0
    begin = time.perf_counter()
    fit_parameters(rows, fitting)
    return (time.perf_counter() - begin) / (rows.numel() * len(fitting))


def read_weight(weights: WeightSource, decision: Decision) -> torch.Tensor:
    """The weight of a decision, checked: `[out, in, ...]`, of a stream the part that reads it."""
    whole, stream = weights.read(decision.layers[0]), decision.stream
    n_inputs = decision.shape[1] if stream is None else stream.n_inputs
    shape = (decision.shape[0], n_inputs, *decision.shape[2:])
    if tuple(whole.shape) != shape:
        raise InputError(
            f"layer {decision.layers[0]!r} has a weight of shape {tuple(whole.shape)}, the space says {shape}"
        )
    if not torch.isfinite(whole).all():
        raise InputError(f"the weight of layer {decision.layers[0]!r} holds infinity or NaN and cannot be quantized")
    return whole if stream is None else whole[:, stream.start : stream.stop]


def _candidates(
    weights: WeightSource, decision: Decision, sample_channels: int | None, store: BankCache
) -> list[Candidate]:
    n_all = decision.shape[0]
    n_channels = n_all if sample_channels is None else min(sample_channels, n_all)
    row = {"version": FIT_VERSION, "layer": decision.layers[0], "decision": decision.name, "shape": decision.shape}
    formats = dict.fromkeys(f.weight_format for f in decision.formats)
    keys = {f: content_key({**row, "format": f, "n_channels": n_channels}) for f in formats}
    found = {f: c for f, key in keys.items() if (c := store.candidate(key)) is not None}
    missing = [f for f in keys if f not in found]
    if missing:
        weight = read_weight(weights, decision)

        def measure(formats: Sequence[Format]) -> dict[Format, Candidate]:
            if n_channels == n_all:
                fitted = fit_parameters(weight, formats, layer_name=decision.name)
                store.put_parameters(decision.name, fitted)
                return {f: _candidate(decision, f, fitted[f].stored_bytes, fitted[f].relative_error) for f in formats}
            seed = int(hashlib.sha256(decision.name.encode()).hexdigest()[:12], 16)
            generator = torch.Generator().manual_seed(seed)
            estimates = error_estimates(
                weight, formats, n_channels=n_channels, generator=generator, layer_name=decision.name
            )
            return {
                f: _candidate(decision, f, decision.stored_bytes(f), e.value, e.standard_error, e.n)
                for f, e in estimates.items()
            }

        made = possible(measure, [f for f in missing if f.is_quantized])
        whole = weight if decision.stream is None else weights.read(decision.layers[0])
        for f in missing:
            if not f.is_quantized:  # left alone, it takes what it takes in a file; a stream has its share of the whole
                made[f] = _candidate(decision, f, decision.params * narrowed(whole).element_size())
        store.put_candidates({keys[f]: candidate for f, candidate in made.items()})
        found |= made
    return [replace(found[f.weight_format], format=f) for f in decision.formats if f.weight_format in found]


def possible(make: Callable[[Sequence[Format]], dict[Format, Made]], formats: Sequence[Format]) -> dict[Format, Made]:
    """What `make` gives for the formats that can hold a weight; the others are left out."""
    try:
        return make(formats)
    except UnfitFormatError:
        one_by_one = ([f] for f in formats if len(formats) > 1)
        return {f: made for one in one_by_one for f, made in possible(make, one).items()}


def _candidate(
    decision: Decision, f: Format, stored_bytes: int, error: float = 0.0, standard_error: float = 0.0, n: int = 0
) -> Candidate:
    return Candidate(decision.name, f, error, standard_error, n, decision.paper_bytes(f), stored_bytes)
