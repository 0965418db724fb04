"""Measures what any tool made of the denoiser, on the same seeds and steps, and remembers it on disk.

A row is named by everything that determines it (weights, seeds, steps, tool, version, options); a measurement by the
quantized weights themselves, so that options that end in the same weights are measured once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from _peers.weights import Layers, Quantized, Size, find_layers, replaced_weights, size_of
from _suite.signal import SignalSummary, summarize
from sedimo.codec import content_key, from_json, to_json
from sedimo.errors import StateError
from sedimo.metrics.signal import NoisePowers, relative_noise
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.trajectory import output_tensor, record

ROW_VERSION = 2
FIRST_SEED = 10_000  # fresh seeds: none of them is searched with
N_CHECKED_ROWS = 4

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Row:
    """One tool with one set of options: its size and its noise per seed.

    `own_forward_db` compares the tool's own forward pass with that of its weights in the plain denoiser [dB].
    """

    tool: str
    label: str
    version: str
    size: Size
    powers: NoisePowers
    own_forward_db: float
    seconds: float
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> SignalSummary:
        """Mean SQNR and its errors."""
        return summarize(self.powers)


@dataclass(frozen=True, slots=True)
class _Measurement:
    powers: NoisePowers


class Evaluation:
    """The reference, the data that tools may search on, and the cache."""

    def __init__(self, adapter: DiffusersPipeline, n_seeds: int, n_steps: int, search: Sampling, cache: Path) -> None:
        self.adapter, self.search, self.cache = adapter, search, cache
        self.sampling = adapter.default_sampling(range(FIRST_SEED, FIRST_SEED + n_seeds), n_steps)
        if set(self.sampling.seeds) & set(search.seeds):
            raise ValueError("the search must not see the seeds that are measured")
        self.layers: Layers = find_layers(adapter.denoiser)
        cache.mkdir(parents=True, exist_ok=True)

    @cached_property
    def weights_digest(self) -> str:
        """sha256 of all parameters of the full-precision denoiser."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.adapter.denoiser.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.contiguous().view(torch.uint8).numpy())
        return total.hexdigest()

    @cached_property
    def _key(self) -> Mapping[str, object]:
        scheduler: Any = self.adapter.pipeline.scheduler
        return {
            "weights": self.weights_digest,
            "scheduler": type(scheduler).__name__ + repr(sorted(scheduler.config.items())),
            "sampling": self.sampling,
        }

    @cached_property
    def reference(self) -> torch.Tensor:
        """Final latents `[n, C, H, W]` at full precision."""
        path = self.cache / f"reference-{content_key(self._key)[:24]}.safetensors"
        if not path.exists():
            _write(path, lambda p: save_file({"latents": self.adapter.sample(self.sampling).contiguous()}, p))
        return load_file(path)["latents"]

    @cached_property
    def calls(self) -> tuple[DenoiserCall, ...]:
        """Denoiser calls of full-precision sampling on the search seeds."""
        return record(self.adapter, self.search).calls

    def row(self, tool: str, label: str, version: str, options: object, make: Callable[[], Quantized]) -> Row:
        """The row from the cache, or made and measured now."""
        named = {
            "version": ROW_VERSION,
            "tool": tool,
            "label": label,
            "tool version": version,
            "options": options,
            "search": self.search,
        }
        return self.remembered(Row, "row", {**self._key, **named}, lambda: self._make(tool, label, version, make))

    def remembered(self, kind: type[Value], word: str, named: object, make: Callable[[], Value]) -> Value:
        """A record from the cache, or made now and kept."""
        path = self.cache / f"{word}-{content_key(named)[:24]}.json"
        if path.exists():
            try:
                return from_json(kind, path.read_text(), place=str(path))
            except StateError:
                path.unlink()  # written by another version of this benchmark: make it again
        value = make()
        _write(path, lambda p: p.write_text(to_json(value)))
        return value

    def _make(self, tool: str, label: str, version: str, make: Callable[[], Quantized]) -> Row:
        started = time.perf_counter()
        quantized = make()
        seconds = time.perf_counter() - started
        check = self._own_forward_db(quantized)
        named = {**self._key, "quantized": {n: quantized.digest(n) for n in quantized.layers}}
        powers = self.remembered(_Measurement, "powers", named, lambda: self._measure(quantized)).powers
        size = size_of(quantized, self.layers)
        return Row(tool, label, version, size, powers, check, seconds, dict(quantized.facts))

    def _measure(self, quantized: Quantized) -> _Measurement:
        reference = self.reference.numpy()
        with replaced_weights(self.adapter.denoiser, quantized):
            latents = self.adapter.sample(self.sampling)
        return _Measurement(relative_noise(reference, latents.numpy()))

    @torch.no_grad()
    def _own_forward_db(self, quantized: Quantized) -> float:
        own = quantized.denoiser
        if own is None:
            return float("nan")
        call = self.calls[len(self.calls) // 2]
        inputs = {
            n: v[:N_CHECKED_ROWS] if isinstance(v, torch.Tensor) and v.ndim else v for n, v in call.inputs.items()
        }
        dtype = next(p.dtype for p in own.parameters() if p.is_floating_point())
        cast = {
            n: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in inputs.items()
        }
        with replaced_weights(self.adapter.denoiser, quantized):
            expected = output_tensor(self.adapter.denoiser(**inputs)).double()
        noise = (output_tensor(own(**cast)).double() - expected).square().sum()
        return float(10 * torch.log10(expected.square().sum() / noise))


def search_plan(adapter: DiffusersPipeline, n_seeds: int, n_steps: int) -> Sampling:
    """The sampling runs that every searching tool gets."""
    return adapter.default_sampling(range(n_seeds), n_steps)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    temporary.replace(path)


def best_of(rows: Sequence[Row], bits: float) -> Row | None:
    """The largest row of at most `bits` stored bits per weight, equal layers counted once."""
    fitting = [r for r in rows if r.size.bits_once <= bits + 1e-9]
    return max(fitting, key=lambda r: r.size.bits_once, default=None)
