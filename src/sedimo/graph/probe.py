"""Finds example inputs of a denoiser by trying them on a copy without weights.

A size that is not known is a large number until a layer receives it: the layer's weight tells what it should
have been. A form of an argument (image or tokens, present or absent) that fails is exchanged for the one with
which the denoiser gets farthest. Nothing is computed: all tensors lie on the meta device.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sedimo.errors import InputError
from sedimo.graph.inputs import ARGUMENTS, Sizes

_MAX_CHANGES = 24  # of forms, before giving up
_MAX_LEARNED = 64  # sizes in one attempt
_SMALL_REST = 100_000  # known sizes that are added to an unknown one stay below
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MISMATCHES = tuple(
    re.compile(pattern)
    for pattern in (
        r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
        r"Expected size (\d+) but got size (\d+)",
        r"Given normalized_shape=\[(\d+)\].*got input of size\[(?:\d+, )*(\d+)\]",
        r"broadcast a dimension of length (\d+) at -1.* broadcastable to \[(?:\d+, )*(\d+)\]",
    )
)


class _SizeLearned(Exception):  # noqa: N818  # not an error: it ends an attempt that has taught something
    """A size was learned; the attempt starts again with it."""


@dataclass(frozen=True)
class _Attempt:
    """What came of running a denoiser with some forms: how many modules ran, and the failure if any."""

    inputs: dict[str, object]
    learned: Mapping[str, int]
    unresolved: frozenset[str]
    n_modules_run: int
    layers_run: frozenset[str]
    failure: Exception | None

    @property
    def progress(self) -> float:
        return float("inf") if self.failure is None else self.n_modules_run


def signature_names(denoiser: nn.Module) -> tuple[dict[str, bool], bool]:
    """The forward's argument names, each with whether it is required; and whether any other name is accepted."""
    parameters = inspect.signature(denoiser.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name: p.default is p.empty for p in named}, is_open


def find_inputs(twin: nn.Module, given: Mapping[str, object]) -> dict[str, object]:
    """Inputs by argument name with which the weightless denoiser runs; `given` ones are used as they are.

    Raises:
        InputError: a required argument has a name that is not known, or no form of the known ones works.
    """
    names, _ = signature_names(twin)
    unknown = [name for name, required in names.items() if required and name not in ARGUMENTS and name not in given]
    if unknown:
        raise InputError(f"it requires the arguments {', '.join(unknown)}, for which no example is known")
    fixed = dict(given)
    if "return_dict" in names:
        fixed.setdefault("return_dict", False)
    known = [name for name in names if name in ARGUMENTS and name not in fixed]
    forms = {name: 0 for name in known if names[name] or ARGUMENTS[name].is_usual}
    for name in ("hidden_states", "sample"):
        if name in forms:
            forms[name] = _first_form_of_latents(twin)
    search = _Search(twin, fixed, {name: names[name] for name in known})
    return search.run(forms)


def _first_form_of_latents(twin: nn.Module) -> int:
    """An image where the config tells its size, a video where the first layer is three-dimensional, else tokens."""
    first = next((m for m in twin.modules() if isinstance(m, _LAYERS)), None)
    if isinstance(first, nn.Conv3d):
        return 2
    has_area = any(config_of(twin).get(key) is not None for key in ("sample_size", "sample_height"))
    return 0 if has_area or isinstance(first, nn.Conv2d) else 1


def config_of(denoiser: nn.Module) -> Mapping[str, object]:
    """The config of a diffusers model; empty for any other module."""
    config = getattr(denoiser, "config", None)
    return dict(config) if isinstance(config, Mapping) else {}


def _dtype_of(denoiser: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in denoiser.parameters() if p.is_floating_point())
    return next((d for d in floating if d.itemsize > 1), torch.get_default_dtype())


class _Search:
    """Hill climbing over the forms of the arguments."""

    def __init__(self, twin: nn.Module, fixed: Mapping[str, object], known: Mapping[str, bool]) -> None:
        self._twin = twin
        self._fixed = fixed
        self._known = known

    def run(self, forms: dict[str, int]) -> dict[str, object]:
        attempt = self._attempt(forms, {})
        for _ in range(_MAX_CHANGES):
            if attempt.failure is None:
                break
            better = [(self._attempt(f, self._kept(attempt, forms, f)), f) for f in self._neighbours(forms)]
            best, best_forms = max(better, key=lambda pair: pair[0].progress, default=(attempt, forms))
            if best.progress <= attempt.progress:
                break
            attempt, forms = best, best_forms
        if attempt.failure is not None:
            raise InputError(
                f"its forward fails with the examples {_describe(attempt.inputs)}: {_first_line(attempt.failure)}"
            ) from attempt.failure
        return self._use_idle_layers(attempt, forms).inputs

    def _use_idle_layers(self, attempt: _Attempt, forms: dict[str, int]) -> _Attempt:
        """Adds optional arguments that bring layers to life which would not run otherwise."""
        layers = {n for n, m in self._twin.named_modules() if isinstance(m, _LAYERS)}
        for name in self._known:
            if layers <= attempt.layers_run:
                break
            if name in forms or name.endswith("mask"):
                continue
            for form in range(len(ARGUMENTS[name].forms)):
                trial = self._attempt({**forms, name: form}, attempt.learned)
                if trial.failure is None and len(trial.layers_run) > len(attempt.layers_run):
                    attempt, forms = trial, {**forms, name: form}
                    break
        return attempt

    def _neighbours(self, forms: dict[str, int]) -> Iterator[dict[str, int]]:
        for name, required in self._known.items():
            for form in range(len(ARGUMENTS[name].forms)):
                if forms.get(name) != form:
                    yield {**forms, name: form}
            if name in forms and not required:
                yield {n: f for n, f in forms.items() if n != name}

    @staticmethod
    def _kept(attempt: _Attempt, before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
        """Learned sizes, without those of arguments whose form changes."""
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        return {of: size for of, size in attempt.learned.items() if of not in changed}

    def _attempt(self, forms: Mapping[str, int], learned: Mapping[str, int]) -> _Attempt:
        sizes = Sizes(config_of(self._twin), _dtype_of(self._twin), learned=dict(learned))
        for _ in range(_MAX_LEARNED):
            inputs = {**{name: ARGUMENTS[name].forms[form](sizes) for name, form in forms.items()}, **self._fixed}
            watch = _Watch(sizes)
            try:
                with torch.no_grad(), watch.on(self._twin):
                    self._twin(**inputs)
            except _SizeLearned:
                continue
            except Exception as error:  # noqa: BLE001  # foreign code fails in any way; it is reported
                if watch.learn_from_message(str(error)):
                    continue
                failure: Exception | None = error
            else:
                failure = None
            break
        else:
            failure = InputError("sizes do not settle")
        unresolved = frozenset(sizes.unknown) - frozenset(sizes.learned)
        return _Attempt(inputs, sizes.learned, unresolved, watch.n_modules_run, frozenset(watch.layers_run), failure)


class _Watch:
    """Sees every module that runs and learns unknown sizes from what it receives."""

    def __init__(self, sizes: Sizes) -> None:
        self.n_modules_run = 0
        self.layers_run: set[str] = set()
        self._sizes = sizes

    @contextmanager
    def on(self, denoiser: nn.Module) -> Iterator[None]:
        """Watches within the context."""
        handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in denoiser.named_modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def look(module: nn.Module, arguments: tuple[object, ...]) -> None:
            first = arguments[0] if arguments else None
            if isinstance(first, torch.Tensor):
                self._look(module, first)
            if isinstance(module, _LAYERS):
                self.layers_run.add(name)
            self.n_modules_run += 1

        return look

    def _look(self, module: nn.Module, received: torch.Tensor) -> None:
        expected = _expected_width(module, received)
        if expected is None:
            return
        axis, size = expected
        if received.shape[axis] != size and self._learn(received.shape[axis], size):
            raise _SizeLearned
        if received.shape[axis] != size and isinstance(module, _LAYERS):
            raise ValueError(
                f"a {type(module).__name__} expects size {size} in dimension {axis}, got {tuple(received.shape)}"
            )

    def _learn(self, got: int, wanted: int) -> bool:
        """Solves got = factor * unknown + rest for the unknown that makes it `wanted`."""
        open_sizes = [(got % size, of, got // size) for of, size in self._sizes.unknown.items()]
        for rest, of, factor in sorted(open_sizes):
            size, remainder = divmod(wanted - rest, factor) if factor else (0, 1)
            if of not in self._sizes.learned and rest < _SMALL_REST and size > 0 and remainder == 0:
                self._sizes.learned[of] = size
                return True
        return False

    def learn_from_message(self, message: str) -> bool:
        """Learns a size from an error about two sizes that should be equal."""
        for pattern in _MISMATCHES:
            match = pattern.search(message)
            if match:
                first, second = int(match[1]), int(match[2])
                return self._learn(max(first, second), min(first, second))
        return False


def _expected_width(module: nn.Module, received: torch.Tensor) -> tuple[int, int] | None:
    """The axis that holds the features of a layer's or norm's input, and their number; None where any will do."""
    if isinstance(module, nn.Linear):
        return -1, module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        n_dims = len(module.kernel_size) + 2
        if received.dim() != n_dims:
            raise ValueError(f"a {type(module).__name__} expects {n_dims} dimensions, got {tuple(received.shape)}")
        return 1, module.in_channels
    weight = module._parameters.get("weight")
    if weight is not None and weight.dim() == 1 and "Norm" in type(module).__name__ and not hasattr(module, "num_groups"):
        return -1, weight.numel()
    return None


def _describe(inputs: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={_describe_value(value)}" for name, value in inputs.items())


def _describe_value(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + _describe(value) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_describe_value(v) for v in value) + ")"
    return repr(value)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
