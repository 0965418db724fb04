"""What is known of a denoiser's channels while its program is read: labels, ties between them, claims and uses.

A label stands for a number that a channel may be scaled by: of a row of a layer, a channel of a normalisation, or an
element of a parameter. The label PINNED is that of everything that must stay as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from sedimo.graph.broadcasts import compact

Labels = npt.NDArray[np.int64]
PINNED = 0


@dataclass(frozen=True)
class Value:
    """Labels of a value's elements, None if all are pinned; `parameter` names the one that the value is.

    `offset` is the constant added to what the labels stand for, None when the labels' uses are claimed already; it
    may still grow while `is_open`.
    """

    labels: torch.Tensor | None = None
    offset: float | None = None
    is_open: bool = False
    parameter: str | None = None


@dataclass(frozen=True)
class Call:
    """One call of a weight layer: the labels of its input by channel, in pairs (channel, label)."""

    layer: str
    owner: str
    pairs: Labels


@dataclass(frozen=True)
class Channels:
    """What was read from a program.

    `first` gives the first label of each parameter that carries labels (its rows, or its elements), `sizes` how many;
    `biases` the bias that is added to it by its own operation. `ties` are pairs of labels that carry one factor,
    `claims` the constant of each label. `roles` tells what each parameter is used as.
    """

    n_labels: int
    first: Mapping[str, int]
    sizes: Mapping[str, int]
    biases: Mapping[str, str | None]
    ties: Labels
    claims: npt.NDArray[np.float64]
    calls: Sequence[Call]
    roles: Mapping[str, frozenset[str]]


def classes(n_labels: int, ties: Labels) -> Labels:
    """The component of each label `[n]` under ties `[m, 2]`; those of the label PINNED are pinned."""
    ones = np.ones(len(ties), dtype=np.int8)
    graph = coo_matrix((ones, (ties[:, 0], ties[:, 1])), shape=(n_labels, n_labels))
    found: Labels = connected_components(graph, directed=False)[1].astype(np.int64)
    return found


class Ledger:
    """Collects what the operations of a program say about labels."""

    def __init__(self) -> None:
        """Empty, but for the pinned label."""
        self._n_labels = 1
        self._first: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._biases: dict[str, str | None] = {}
        self._ties: list[Labels] = []
        self._claimed: list[tuple[Labels, float]] = []
        self._calls: list[Call] = []
        self._roles: dict[str, set[str]] = {}

    def found(self) -> Channels:
        """Everything; labels whose uses claim different constants are pinned."""
        claims = np.full(self._n_labels, np.nan)
        conflicts = []
        for labels, offset in self._claimed:
            known = claims[labels]
            conflicts.append(labels[~np.isnan(known) & (known != offset)])
            claims[labels] = offset
        pinned = np.concatenate([np.zeros(0, np.int64), *conflicts])
        ties = [*self._ties, np.stack([pinned, np.full_like(pinned, PINNED)], axis=1)]
        return Channels(
            self._n_labels,
            self._first,
            self._sizes,
            self._biases,
            np.concatenate(ties),
            np.nan_to_num(claims),
            self._calls,
            {name: frozenset(roles) for name, roles in self._roles.items()},
        )

    def labels_of(self, parameter: str, n: int) -> torch.Tensor:
        """The labels `[n]` of a parameter's rows or elements."""
        if parameter not in self._first:
            self._first[parameter], self._sizes[parameter] = self._n_labels, n
            self._n_labels += n
        first = self._first[parameter]
        return torch.arange(first, first + self._sizes[parameter])

    def claim(self, value: Value) -> None:
        """A use of the value as x + its offset, x being what its labels stand for."""
        if value.labels is not None and value.offset is not None:
            self._claimed.append((np.unique(compact(value.labels).numpy()), value.offset))

    def note_use(self, parameter: str, role: str) -> None:
        """What a parameter is used as."""
        self._roles.setdefault(parameter, set()).add(role)

    def pin(self, value: Value | list[Value] | None) -> None:
        """The value must stay as it is."""
        for one in value if isinstance(value, list) else [value]:
            if one is None:
                continue
            if one.parameter is not None:
                self.note_use(one.parameter, "otherwise")
            if one.labels is not None:
                labels = np.unique(compact(one.labels).numpy())
                self._ties.append(np.stack([labels, np.full_like(labels, PINNED)], axis=1))

    def tie(self, pairs: Labels) -> None:
        """Pairs `[n, 2]` of labels must carry the same factor."""
        self._ties.append(pairs)

    def note_call(self, call: Call) -> None:
        """A layer reads labels."""
        self._calls.append(call)

    def note_bias(self, parameter: str, bias: str | None) -> None:
        """A parameter's operation adds this bias, always the same one."""
        if self._biases.setdefault(parameter, bias) != bias:
            self.note_use(parameter, "with another bias")
