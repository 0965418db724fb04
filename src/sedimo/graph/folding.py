"""Where the factors of smoothed inputs can go: into what is computed before, exactly, or nowhere.

The input of a layer can be divided by a factor per channel by dividing what it is made of: affine parameters of a
normalisation, rows of other layers, bare parameters (`channels.py` follows them). That is exact only if every other
reader of these numbers can take the same factors: all readers are in the set of layers to be smoothed, and channels
that meet share a factor. A layer for which this cannot be shown has to divide its input itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from sedimo.errors import InputError
from sedimo.graph.channels import PINNED, Channels, classes, read_channels
from sedimo.graph.layers import find_ties, weight_layers, weight_names
from sedimo.graph.program import Capture, export_denoiser

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]
NONE = -1
_PLAIN_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


@dataclass(frozen=True)
class Rows:
    """A parameter that takes factors along its first axis (a layer's, a normalisation's) or for each element.

    `classes` `[n]` are the classes of its rows or elements, NONE where they stay. Where the rows' output is used as
    x + k, `offsets` `[n]` hold k: dividing by s then takes k (1/s - 1) more, in the parameter `bias`.
    """

    classes: Integers
    offsets: Reals
    bias: str | None


@dataclass(frozen=True)
class Folding:
    """Classes of channels that share a factor, by input channel of each layer, and who takes the factors.

    `inputs` has every layer that can be smoothed; those in `divided` must divide their input themselves, the inputs of
    all others are divided by what is done to `parameters`. `refused` tells why other layers cannot be smoothed.
    """

    n_classes: int
    inputs: Mapping[str, Integers]
    divided: frozenset[str]
    parameters: Mapping[str, Rows]
    refused: Mapping[str, str]


def find_folding(
    denoiser: nn.Module,
    layers: Iterable[str],
    *,
    example_inputs: Mapping[str, object] | None = None,
    capture: Capture | None = None,
) -> Folding:
    """Finds where the factors of the inputs of `layers` can go; layers that share a weight follow one another.

    Raises:
        InputError: an unknown layer, or a denoiser that cannot be exported (see `trace_denoiser`).
    """
    known = weight_layers(denoiser)
    chosen = dict.fromkeys(layers)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"{type(denoiser).__name__} has no layer {unknown[0]!r}; sedimo inspect lists its layers")
    program, _ = export_denoiser(denoiser, example_inputs=example_inputs, capture=capture)
    names = _canonical_names(denoiser)
    shapes = {name: tuple(p.shape) for name, p in denoiser.named_parameters(remove_duplicate=False)}
    owners = {f"{layer}.weight": layer for layer in known}
    channels = read_channels(program, shapes, owners, names)
    return _Folder(denoiser, channels).fold(list(known), list(chosen))


def _canonical_names(denoiser: nn.Module) -> dict[str, str]:
    """One name for each parameter, but each layer's weight under a name of its own, shared or not."""
    weights, first, found = weight_names(denoiser), dict[int, str](), {}
    for name, parameter in denoiser.named_parameters(remove_duplicate=False):
        shared = first.setdefault(id(parameter), name)
        found[name] = f"{weights[name]}.weight" if name in weights else shared
    return found


class _Folder:
    def __init__(self, denoiser: nn.Module, channels: Channels) -> None:
        self._denoiser, self._channels = denoiser, channels
        self._tied = {name: members for members in find_ties(denoiser) for name in members}

    def fold(self, known: Sequence[str], chosen: Sequence[str]) -> Folding:
        wanted = dict.fromkeys(member for name in chosen for member in self._tied.get(name, (name,)))
        refused = self._refused(wanted)
        smoothed = [name for name in wanted if name not in refused]
        first, n_labels = self._columns(smoothed)
        ties = [self._channels.ties, self._pinned_rows(), *self._reads(first), *self._shared_columns(first)]
        divided, components = _settle(n_labels, ties, first)
        inputs = {name: components[labels] for name, labels in first.items()}
        own = {name: self._tied.get(name, (name,))[0] for name in divided}
        starts = {owner: n_labels + int(first[owner][0]) for owner in own.values()}
        inputs |= {name: starts[owner] + np.arange(len(first[name])) for name, owner in own.items()}
        return self._numbered(inputs, divided, components, refused)

    def _refused(self, wanted: Iterable[str]) -> dict[str, str]:
        """Layers that cannot be smoothed at all, with those that share their weight."""
        called: dict[str, set[str]] = {}
        for call in self._channels.calls:
            called.setdefault(call.layer, set()).add(call.owner)
        own = {name: self._why_not(name, called.get(name, set())) for name in wanted}
        reasons: dict[str, str] = {}
        for name in own:
            found = [reason for member in self._tied.get(name, (name,)) if (reason := own.get(member))]
            if found:
                reasons[name] = found[0]
        return reasons

    def _why_not(self, name: str, callers: set[str]) -> str | None:
        module = self._denoiser.get_submodule(name)
        roles = self._channels.roles.get(f"{name}.weight", frozenset())
        if not callers:
            return "it is not used in a call with these inputs"
        if roles != {"weight"}:
            return "its channels are grouped" if roles == {"grouped"} else "its weight is used outside of it, too"
        is_own = all(caller in self._denoiser_names(module) for caller in callers)
        return None if is_own and type(module).forward in _PLAIN_FORWARDS else "its call is not that of a plain layer"

    def _denoiser_names(self, module: nn.Module) -> set[str]:
        return {name for name, found in self._denoiser.named_modules(remove_duplicate=False) if found is module}

    def _columns(self, smoothed: Sequence[str]) -> tuple[dict[str, Integers], int]:
        """Labels of the input channels of each layer, after those of the channels that feed them."""
        found, n_labels = {}, self._channels.n_labels
        for name in smoothed:
            n = int(self._denoiser.get_parameter(f"{name}.weight").shape[1])
            found[name] = np.arange(n_labels, n_labels + n)
            n_labels += n
        return found, n_labels

    def _pinned_rows(self) -> Integers:
        """Rows that must stay: of parameters that are used in another way, too, or cannot take a constant."""
        found = self._channels
        tied = {f"{name}.weight" for name in self._tied}
        pinned = []
        for name, start in found.first.items():
            labels = np.arange(start, start + found.sizes[name])
            bias = found.biases.get(name)
            is_free = len(found.roles[name]) == 1 and name not in tied
            is_free &= bias is None or found.roles[bias] == {f"bias of {name}"}
            takes_constant = bias is not None or found.roles[name] == {"elements"}
            pinned.append(labels if not is_free else labels[(found.claims[labels] != 0) & (not takes_constant)])
        return _with(np.concatenate([np.zeros(0, np.int64), *pinned]), PINNED)

    def _reads(self, first: Mapping[str, Integers]) -> Iterable[Integers]:
        """Ties of what a layer reads to its input channels; what others read is pinned."""
        for call in self._channels.calls:
            columns = first.get(call.layer)
            if columns is None:
                yield _with(call.pairs[:, 1], PINNED)
            else:
                yield np.stack([columns[call.pairs[:, 0]], call.pairs[:, 1]], axis=1)

    def _shared_columns(self, first: Mapping[str, Integers]) -> Iterable[Integers]:
        for name, columns in first.items():
            yield np.stack([columns, first[self._tied.get(name, (name,))[0]]], axis=1)

    def _numbered(
        self, inputs: Mapping[str, Integers], divided: frozenset[str], components: Integers, refused: Mapping[str, str]
    ) -> Folding:
        """The folding with classes numbered from 0."""
        used = np.unique(np.concatenate([np.zeros(0, np.int64), *inputs.values()]))
        folded = [inputs[name] for name in inputs if name not in divided]
        carried = np.unique(np.concatenate([np.zeros(0, np.int64), *folded]))
        parameters = {}
        for name, start in self._channels.first.items():
            labels = np.arange(start, start + self._channels.sizes[name])
            is_carrier = np.isin(components[labels], carried)
            if is_carrier.any():
                own = np.where(is_carrier, np.searchsorted(used, components[labels]), NONE)
                offsets = np.where(is_carrier, self._channels.claims[labels], 0.0)
                parameters[name] = Rows(own, offsets, self._channels.biases.get(name))
        numbered = {name: np.searchsorted(used, found) for name, found in inputs.items()}
        return Folding(len(used), numbered, divided, parameters, refused)


def _settle(n_labels: int, ties: Iterable[Integers], first: Mapping[str, Integers]) -> tuple[frozenset[str], Integers]:
    """Layers with a pinned channel divide their input themselves, which pins what they read; until nothing changes."""
    known, divided = [*ties], set[str]()
    while True:
        components = classes(n_labels, np.concatenate(known))
        is_pinned = components == components[PINNED]
        fresh = [name for name, columns in first.items() if name not in divided and is_pinned[columns].any()]
        if not fresh:
            return frozenset(divided), components
        divided.update(fresh)
        known += [_with(first[name], PINNED) for name in fresh]


def _with(labels: Integers, other: int) -> Integers:
    return np.stack([labels, np.full_like(labels, other)], axis=1)
