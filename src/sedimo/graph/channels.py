"""Which numbers of a denoiser may carry a factor per channel, followed through its exported program.

Every element of a value carries a label: the row of a layer, the channel of a normalisation, or the element of a
parameter that it is made of and scales with. Operations that only move elements are carried out on the labels
themselves, so that any reshaping is followed exactly; an operation that is homogeneous in its input hands labels on;
one that adds two streams ties their labels together, for they must carry the same factor; every other operation pins
the labels that it sees to the factor 1. What is not known to be exact is pinned: unknown operations, nested programs,
operations in place, the outputs of the denoiser.

A value x + k with a constant k (the 1 + scale of AdaLN) scales with m if x becomes x m + k (m - 1): its labels claim
the constant, which the bias of their layer takes. A label whose uses claim different constants is pinned.

Tensors of labels that repeat along axes do not hold the repeats: few elements stand for many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx
from torch.export import ExportedProgram

from sedimo.graph.program import READS_NOTHING, arguments_of, operation_name, owner_of, shape_of

_MAX_ELEMENTS = 1 << 22  # of labels that are not broadcast; larger ones are pinned
_MAX_PARAMETER = 1 << 16  # elements of a bare parameter that are followed
_MOVES = frozenset(
    """view reshape unsqueeze squeeze expand permute transpose t flatten unflatten slice select chunk split
    split_with_sizes unbind getitem movedim repeat narrow""".split()  # noqa: SIM905  # a table is read like a sentence
)
_SAME = frozenset({"to", "_to_copy", "contiguous", "clone", "detach", "alias", "type_as", "dropout", "neg"})
_LINEAR = frozenset({"linear"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_NORMS = {"layer_norm": (2, 3), "group_norm": (2, 3), "rms_norm": (2, None)}  # places of weight and bias
_MEANS = frozenset({"upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "avg_pool2d"})
Labels = npt.NDArray[np.int64]
PINNED = 0  # the label of everything that must stay as it is


def read_channels(
    program: ExportedProgram,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, str],
    names: Mapping[str, str],
) -> Channels:
    """Follows channels through an exported program.

    `shapes` are those of all parameters, `layers` tells the layer of each weight's name; `names` gives the one name
    under which a parameter of the program is known.
    """
    reader = _Reader(shapes, layers)
    inputs = program.graph_signature.inputs_to_parameters
    reader.run(program.graph, {place: names.get(name, name) for place, name in inputs.items()})
    return reader.ledger.found()


class _Reader:
    def __init__(self, shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, str]) -> None:
        self._shapes, self._layers = shapes, layers
        self.ledger = Ledger()
        self._environment: dict[fx.Node, Value | list[Value]] = {}

    def run(self, graph: fx.Graph, names: Mapping[str, str]) -> None:
        for node in graph.nodes:
            if node.op == "placeholder":
                self._environment[node] = Value(parameter=names.get(node.name))
            elif node.op == "call_function":
                self._environment[node] = self._call(node)
            else:
                self._pin_all(node)

    def _call(self, node: fx.Node) -> Value | list[Value]:
        name = operation_name(node)
        if READS_NOTHING.fullmatch(name):
            return Value()
        handler = self._handler(name)  # none for operations in place
        result = None if handler is None else handler(node)
        if result is None:
            self._pin_all(node)
            return Value()
        return result

    def _handler(self, name: str) -> Callable[[fx.Node], Value | list[Value] | None] | None:
        if name in _MOVES:
            return self._move
        if name in _SAME:
            return self._same
        table: dict[str, Callable[[fx.Node], Value | list[Value] | None]] = {
            "add": self._sum,
            "sub": self._sum,
            "mul": self._factor,
            "div": self._quotient,
            "cat": self._concatenation,
            "scaled_dot_product_attention": self._attention,
            "matmul": self._product,
            "bmm": self._product,
            **dict.fromkeys(_LINEAR | _CONVOLUTIONS, self._layer),
            **dict.fromkeys(_NORMS, self._norm),
            **dict.fromkeys(_MEANS, self._mean),
        }
        return table.get(name)

    # Layers and normalisations

    def _layer(self, node: fx.Node) -> Value | None:
        """A weight layer: reads labels by input channel, and gives each output row a label of its own."""
        inputs, weight, bias = (self._value(node, i) for i in range(3))
        parameter = None if weight is None else weight.parameter
        if parameter is None or parameter not in self._layers or inputs is None or inputs.parameter:
            return None
        name = operation_name(node)
        is_grouped = name in _CONVOLUTIONS and shape_of(node.args[0])[1] != self._shapes[parameter][1]
        axis = -1 if name in _LINEAR else 1
        layer = self._layers[parameter]
        self.ledger.note_use(parameter, "grouped" if is_grouped else "weight")
        self.ledger.note_call(Call(layer, owner_of(node), self._read(inputs, shape_of(node.args[0]), axis)))
        bias_name = None if bias is None else bias.parameter
        if bias_name is not None:
            self.ledger.note_use(bias_name, f"bias of {parameter}")
        if bias is not None and bias_name is None:
            self.ledger.pin(bias)
            return Value()
        return self._made(node, parameter, bias_name, axis)

    def _norm(self, node: fx.Node) -> Value | None:
        """A normalisation: its input is pinned, its affine parameters scale its output."""
        name = operation_name(node)
        places = _NORMS[name]
        inputs = self._value(node, 0)
        weight, bias = (None if p is None else self._value(node, p) for p in places)
        self.ledger.pin(inputs)
        if weight is None:
            self.ledger.pin(bias)
            return Value()
        sizes = self._shapes.get(weight.parameter or "", ())
        if weight.parameter is None or len(sizes) != 1 or (bias is not None and bias.parameter is None):
            self.ledger.pin(weight)
            self.ledger.pin(bias)
            return Value()
        self.ledger.note_use(weight.parameter, "affine")
        if bias is not None and bias.parameter is not None:
            self.ledger.note_use(bias.parameter, f"bias of {weight.parameter}")
        return self._made(
            node, weight.parameter, None if bias is None else bias.parameter, 1 if "group" in name else -1
        )

    def _made(self, node: fx.Node, parameter: str, bias: str | None, axis: int) -> Value:
        shape = shape_of(node)
        n = self._shapes[parameter][0]
        self.ledger.note_bias(parameter, bias)
        place = [1] * len(shape)
        place[axis] = n
        return Value(self.ledger.labels_of(parameter, n).reshape(place).expand(shape), 0.0, True)

    def _read(self, value: Value, shape: Sequence[int], axis: int) -> Labels:
        """Pairs (channel, label) of what a layer reads."""
        if value.labels is None:
            channels = np.arange(shape[axis])
            return np.stack([channels, np.full_like(channels, PINNED)], axis=1)
        labels = compact(value.labels.movedim(axis, 0), keep=0)
        self.ledger.claim(value)
        places = torch.arange(labels.shape[0]).reshape(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)
        return unique_pairs(places, labels)

    # Operations that hand labels on

    def _move(self, node: fx.Node) -> Value | list[Value] | None:
        """Moves elements: carried out on the labels."""
        source = self._of(node.args[0])
        if isinstance(source, list):
            index = node.args[1]
            return source[index] if isinstance(index, int) else None
        source = self._labelled(source)
        if source.labels is None:
            self.ledger.pin(source)
            count = node.meta.get("val")
            return [Value()] * len(count) if isinstance(count, list | tuple) else Value()
        moved = self._moved(node, source.labels)
        if isinstance(moved, torch.Tensor):
            return self._kept(replace(source, labels=moved, parameter=None), shape_of(node))
        return None if moved is None else [replace(source, labels=piece, parameter=None) for piece in moved]

    def _moved(self, node: fx.Node, labels: torch.Tensor) -> torch.Tensor | Sequence[torch.Tensor] | None:
        name, shape = operation_name(node), shape_of(node)
        if name in ("view", "reshape", "flatten", "unflatten"):
            return reshaped(labels, shape, _MAX_ELEMENTS)
        if name == "expand":
            return expanded(labels, shape)
        if len(list(arguments_of(node))) > 1 or (name == "repeat" and math.prod(shape) > _MAX_ELEMENTS):
            return None
        moved: torch.Tensor | Sequence[torch.Tensor] = node.target(labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]  # an operator of torch
        return moved

    def _same(self, node: fx.Node) -> Value | list[Value] | None:
        """Changes no channel: casts, copies, dropout that does nothing, a sign."""
        name = operation_name(node)
        if name == "dropout" and (node.args[1] != 0 and (len(node.args) < 3 or node.args[2] is not False)):
            return None
        value = self._of(node.args[0])
        if isinstance(value, list):
            return None
        return replace(value, is_open=False) if name == "neg" and value.labels is not None else value

    def _sum(self, node: fx.Node) -> Value | None:
        """Adds a constant, or ties two streams together."""
        first, second = (self._value(node, i) for i in (0, 1))
        if node.kwargs.get("alpha", 1) != 1:
            return None
        if first is None or second is None:
            value, constant = (first, node.args[1]) if second is None else (second, node.args[0])
            return self._shifted(value, constant, is_first=second is None, is_sum=operation_name(node) == "add")
        first, second = self._labelled(first), self._labelled(second)
        if first.labels is None or second.labels is None:
            return None
        carrier, other = (first, second) if first.is_open or not second.is_open else (second, first)
        a, b = expanded(carrier.labels, shape_of(node)), expanded(other.labels, shape_of(node))
        if a is None or b is None:
            return None
        self.ledger.claim(other)
        self.ledger.tie(unique_pairs(*compact_together(a, b)))
        return replace(carrier, labels=a, parameter=None)  # a constant added to the sum is added to one of the two

    def _shifted(self, value: Value | None, constant: object, *, is_first: bool, is_sum: bool) -> Value | None:
        value = None if value is None else self._labelled(value)
        if value is None or value.labels is None or not is_sum or not isinstance(constant, int | float):
            return None
        if constant == 0:
            return value
        return replace(value, offset=(value.offset or 0.0) + constant) if value.is_open and is_first else None

    def _factor(self, node: fx.Node) -> Value | None:
        """A product: one of the streams carries the factor, preferably one without a constant; the other is pinned."""
        first, second = (v if v is None else self._labelled(v) for v in (self._value(node, i) for i in (0, 1)))
        pairs = ((first, second), (second, first))
        scaled = [(v, other) for v, other in pairs if v is not None and v.labels is not None]
        if not scaled:
            return None
        carrier, other = min(scaled, key=lambda pair: bool(pair[0].offset))
        if other is None:  # times a number
            return replace(carrier, is_open=False, parameter=None)
        self.ledger.pin(other)
        self.ledger.claim(carrier)
        return self._kept(Value(expanded(carrier.labels, shape_of(node))), shape_of(node))

    def _quotient(self, node: fx.Node) -> Value | None:
        value, divisor = self._value(node, 0), self._value(node, 1)
        if value is None or value.labels is None:
            return None
        self.ledger.pin(divisor)
        return self._kept(replace(value, is_open=False, labels=expanded(value.labels, shape_of(node))), shape_of(node))

    def _concatenation(self, node: fx.Node) -> Value | None:
        sources, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if not isinstance(sources, list | tuple) or not isinstance(axis, int):
            return None
        values = [self._of(s) for s in sources]
        plain = [v for v in values if isinstance(v, Value) and v.parameter is None]
        if len(plain) != len(values) or all(v.labels is None for v in plain):
            return None
        pieces = [
            torch.zeros((), dtype=torch.int64).expand(shape_of(s)) if v.labels is None else v.labels
            for s, v in zip(sources, plain, strict=True)
        ]
        for value in plain:
            self.ledger.claim(value)
        return Value(concatenated(pieces, axis).expand(shape_of(node)))

    def _attention(self, node: fx.Node) -> Value | None:
        """Weights of the values sum over positions: channels that are the same at all positions are kept."""
        for argument in (*node.args[:2], *node.args[3:], *node.kwargs.values()):
            self.ledger.pin(self._of(argument))
        return self._summed(node, self._value(node, 2))

    def _product(self, node: fx.Node) -> Value | None:
        self.ledger.pin(self._value(node, 0))
        return self._summed(node, self._value(node, 1))

    def _summed(self, node: fx.Node, value: Value | None) -> Value | None:
        """The last axis of `value`, summed over the one before it with any weights."""
        if value is None or value.labels is None or value.labels.ndim < 2 or value.offset:
            return None
        one = value.labels[..., :1, :]
        return self._averaged(node, value, one)

    def _mean(self, node: fx.Node) -> Value | None:
        """Interpolation or pooling over positions, of channels that are the same at all of them."""
        value = self._value(node, 0)
        if value is None or value.labels is None or value.offset:
            return None
        return self._averaged(
            node, value, value.labels[(slice(None), slice(None), *[slice(1)] * (value.labels.ndim - 2))]
        )

    def _averaged(self, node: fx.Node, value: Value, one: torch.Tensor) -> Value | None:
        repeated, labels = expanded(one, shape_of(node)), value.labels
        if repeated is None or labels is None or not bool((compact(labels) == compact(one)).all()):
            return None
        self.ledger.claim(value)
        return Value(repeated)

    # What is known of values

    def _value(self, node: fx.Node, position: int) -> Value | None:
        """The value of an argument, None if it is no value of the program."""
        argument = node.args[position] if position < len(node.args) else None
        value = self._of(argument)
        if isinstance(value, list):
            self.ledger.pin(value)
            return Value()
        return value if isinstance(argument, fx.Node) else None

    def _of(self, argument: object) -> Value | list[Value]:
        return self._environment.get(argument, Value()) if isinstance(argument, fx.Node) else Value()

    def _labelled(self, value: Value) -> Value:
        """A bare parameter gets a label for each element when it enters a sum, a product, or is moved."""
        name = value.parameter
        if name is None:
            return value
        if name in self._layers:
            self.ledger.note_use(name, "otherwise")
            return Value()
        shape = self._shapes[name]
        self.ledger.note_use(name, "elements")
        if math.prod(shape) > _MAX_PARAMETER:
            return Value()
        return Value(self.ledger.labels_of(name, math.prod(shape)).reshape(shape), 0.0, True)

    def _kept(self, value: Value, shape: Sequence[int]) -> Value | None:
        """The value, unless its labels have another shape than it or take too much memory."""
        labels = value.labels
        is_fit = labels is not None and tuple(labels.shape) == tuple(shape) and compact(labels).numel() <= _MAX_ELEMENTS
        return value if is_fit else None

    def _pin_all(self, node: fx.Node) -> None:
        for argument in arguments_of(node):
            self.ledger.pin(self._of(argument))


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


def compact(labels: torch.Tensor, keep: int | None = None) -> torch.Tensor:
    """One element of each axis along which the tensor only repeats; the axis `keep` stays whole."""
    for axis in range(labels.ndim):
        if axis != keep and labels.stride(axis) == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact_together(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one shape without the axes along which both only repeat."""
    for axis in range(a.ndim):
        if a.stride(axis) == b.stride(axis) == 0 and a.shape[axis] > 1:
            a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
    return a, b


def unique_pairs(a: torch.Tensor, b: torch.Tensor) -> Labels:
    """The different pairs `[n, 2]` of elements at the same place of two tensors of one shape."""
    pairs: Labels = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)], dim=1), dim=0).numpy()
    return pairs


def concatenated(pieces: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """The pieces along an axis; axes along which all of them only repeat have length 1 in the result."""
    axis %= pieces[0].ndim
    for other in range(pieces[0].ndim):
        if other != axis and all(p.stride(other) == 0 for p in pieces):
            pieces = [p.narrow(other, 0, 1) for p in pieces]
    return torch.cat(list(pieces), dim=axis)


def expanded(labels: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor | None:
    """The tensor repeated to a shape; None if it does not broadcast to it."""
    if labels is None or labels.ndim > len(shape):
        return None
    padded = [1] * (len(shape) - labels.ndim) + list(labels.shape)
    fits = all(a in (1, b) for a, b in zip(padded, shape, strict=True))
    return labels.expand(tuple(shape)) if fits else None


def reshaped(labels: torch.Tensor, shape: Sequence[int], most: int) -> torch.Tensor | None:
    """The tensor in another shape; None if that would have to hold more than `most` elements."""
    try:
        return labels.view(tuple(shape))
    except RuntimeError:  # repeats would have to be written out
        return labels.reshape(tuple(shape)) if math.prod(shape) <= most else None
