"""Where the factors of smoothed inputs can go: into what is computed before, exactly, or nowhere.

The input of a layer can be divided by a factor per channel by dividing what it is made of: affine parameters of a
normalisation, rows of other layers, bare parameters. That is exact only if every other reader of these numbers can take
the same factors: all readers are in the set of layers to be smoothed, and channels that meet share a factor. A layer
for which this cannot be shown has to divide its input itself.

Channels are followed through the exported program. Every element of a value carries a label: the row of a layer, the
channel of a normalisation, or the element of a parameter that it is made of and scales with. Operations that only move
elements are carried out on the labels themselves, so that any reshaping is followed exactly; an operation that is
homogeneous in its input hands labels on; one that adds two streams ties their labels together, for they must carry the
same factor; every other operation pins the labels that it sees to the factor 1. What is not known to be exact is
pinned: unknown operations, nested programs, operations in place, the outputs of the denoiser.

A value x + k with a constant k (the 1 + scale of AdaLN) scales with m if x becomes x m + k (m - 1): its labels claim
the constant, which the bias of their layer takes. A label whose uses claim different constants is pinned.

Tensors of labels that repeat along axes do not hold the repeats: few elements stand for many.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from sedimo.errors import InputError
from sedimo.graph.layers import LAYERS, find_ties, weight_layers, weight_names
from sedimo.graph.program import (
    READS_NOTHING,
    Capture,
    arguments_of,
    export_denoiser,
    operation_name,
    owner_of,
    shape_of,
)

_MAX_ELEMENTS = 1 << 22  # of labels that are not broadcast; larger ones are pinned
_MAX_PARAMETER = 1 << 16  # elements of a bare parameter that are followed
_MOVES = frozenset(
    """view reshape unsqueeze squeeze expand permute transpose t flatten unflatten slice select chunk split
    split_with_sizes unbind getitem movedim repeat narrow""".split()  # noqa: SIM905  # a table is read like a sentence
)
_SAME = frozenset({"to", "_to_copy", "contiguous", "clone", "detach", "alias", "type_as", "dropout", "neg"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_NORMS = {"layer_norm": (2, 3), "group_norm": (2, 3), "rms_norm": (2, None)}  # places of weight and bias
_MEANS = frozenset({"upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "avg_pool2d"})
_AVERAGES = {  # operations whose output is a sum over positions of one argument, with weights that the others make
    "scaled_dot_product_attention": 2,
    "matmul": 1,
    "bmm": 1,
    **dict.fromkeys(_MEANS, 0),
}
_PLAIN_FORWARDS = {kind.forward for kind in LAYERS}
Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]
NONE = -1
_PINNED = 0  # the label of everything that must stay as it is
_NO_LABELS = np.zeros(0, np.int64)


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
    """Finds where the factors of the inputs of `layers` can go; layers that share a weight follow one another."""
    known, chosen = weight_layers(denoiser), dict.fromkeys(layers)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"{type(denoiser).__name__} has no layer {unknown[0]!r}; sedimo inspect lists its layers")
    program, _ = export_denoiser(denoiser, example_inputs=example_inputs, capture=capture)
    weights, first, names, shapes = weight_names(denoiser), dict[int, str](), dict[str, str](), {}
    for name, parameter in denoiser.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        shared = first.setdefault(id(parameter), name)  # one name each, but a layer's weight has its own, shared or not
        names[name] = f"{weights[name]}.weight" if name in weights else shared
    inputs = program.graph_signature.inputs_to_parameters
    channels = _Channels(shapes, {f"{layer}.weight": layer for layer in known})
    channels.read(program.graph, {place: names.get(name, name) for place, name in inputs.items()})
    return _Folder(denoiser, channels).fold(list(chosen))


@dataclass(frozen=True)
class _Value:
    """Labels of a value's elements, None if all are pinned; `parameter` names the one that the value is.

    `offset` is added to what the labels stand for; None: their uses are claimed. It may still grow while `is_open`.
    """

    labels: torch.Tensor | None = None
    offset: float | None = None
    is_open: bool = False
    parameter: str | None = None


_Handler = Callable[[fx.Node], _Value | list[_Value] | None]


class _Channels:
    """Reads a program: what its operations say about labels.

    `labels` are those of the rows, or elements, of each parameter that carries some; `roles` tells what a parameter is
    used as, `biases` the bias that its own operation adds to it. `ties` are pairs of labels that carry one factor;
    `calls` those of layers: the layer, the module that calls it, and pairs (channel, label) of what it reads.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, str]) -> None:
        self._shapes, self._layers = shapes, layers
        self.n_labels = 1
        self.labels: dict[str, Integers] = {}
        self.roles: dict[str, set[str]] = defaultdict(set)
        self.biases: dict[str, str | None] = {}
        self.ties: list[Integers] = []
        self.calls: list[tuple[str, str, Integers]] = []
        self.claims: Reals = np.zeros(0)
        self._claimed: list[tuple[Integers, float]] = []
        self._environment: dict[fx.Node, _Value | list[_Value]] = {}
        self._handlers: dict[str, _Handler] = {  # none for operations in place
            **dict.fromkeys(_MOVES, self._move),
            **dict.fromkeys(_SAME, self._same),
            "add": self._sum,
            "sub": self._sum,
            "mul": self._factor,
            "div": self._quotient,
            "cat": self._concatenation,
            **dict.fromkeys({"linear", *_CONVOLUTIONS}, self._layer),
            **dict.fromkeys(_NORMS, self._norm),
            **dict.fromkeys(_AVERAGES, self._average),
        }

    def read(self, graph: fx.Graph, names: Mapping[str, str]) -> None:
        """Walks the program once; `names` gives the one name under which the parameter of a placeholder is known."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self._environment[node] = _Value(parameter=names.get(node.name))
            elif node.op == "call_function":
                self._environment[node] = self._call(node)
            else:
                self._pin(*map(self._of, arguments_of(node)))
        self.claims = np.full(self.n_labels, np.nan)
        for labels, offset in self._claimed:
            known = self.claims[labels]
            self.ties.append(_with(labels[~np.isnan(known) & (known != offset)], _PINNED))
            self.claims[labels] = offset
        self.claims = np.nan_to_num(self.claims)

    def _call(self, node: fx.Node) -> _Value | list[_Value]:
        name = operation_name(node)
        if READS_NOTHING.fullmatch(name):
            return _Value()
        handler = self._handlers.get(name)
        result = None if handler is None else handler(node)
        if result is None:
            self._pin(*map(self._of, arguments_of(node)))
            return _Value()
        return result

    # Layers and normalisations

    def _layer(self, node: fx.Node) -> _Value | None:
        """A weight layer: reads labels by input channel, and gives each output row a label of its own."""
        inputs, weight, bias = (self._value(node, i) for i in range(3))
        parameter = None if weight is None else weight.parameter
        if parameter is None or parameter not in self._layers or inputs is None or inputs.parameter:
            return None
        shape, is_convolution = shape_of(node.args[0]), operation_name(node) in _CONVOLUTIONS
        axis = 1 if is_convolution else -1
        is_grouped = is_convolution and shape[1] != self._shapes[parameter][1]
        self.roles[parameter].add("grouped" if is_grouped else "weight")
        if inputs.labels is None:
            pairs = _with(np.arange(shape[axis]), _PINNED)
        else:
            (labels,) = _compact(inputs.labels.movedim(axis, 0), keep=0)
            self._claim(inputs)
            channels = torch.arange(len(labels)).reshape(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)
            pairs = _unique_pairs(channels, labels)
        self.calls.append((self._layers[parameter], owner_of(node), pairs))
        if bias is not None and bias.parameter is None:
            self._pin(bias)
            return _Value()
        return self._made(node, parameter, None if bias is None else bias.parameter, axis)

    def _norm(self, node: fx.Node) -> _Value | None:
        """A normalisation: its input is pinned, its affine parameters scale its output."""
        name = operation_name(node)
        weight, bias = (None if place is None else self._value(node, place) for place in _NORMS[name])
        self._pin(self._value(node, 0))
        parameter = None if weight is None else weight.parameter
        is_affine = parameter is not None and len(self._shapes[parameter]) == 1
        if parameter is None or not is_affine or (bias is not None and bias.parameter is None):
            self._pin(weight, bias)
            return _Value()
        self.roles[parameter].add("affine")
        return self._made(node, parameter, None if bias is None else bias.parameter, 1 if "group" in name else -1)

    def _made(self, node: fx.Node, parameter: str, bias: str | None, axis: int) -> _Value:
        """What an operation makes of a parameter's rows along an axis, and the bias that it adds to them."""
        if bias is not None:
            self.roles[bias].add(f"bias of {parameter}")
        if self.biases.setdefault(parameter, bias) != bias:
            self.roles[parameter].add("with another bias")
        shape, n = shape_of(node), self._shapes[parameter][0]
        place = [1] * len(shape)
        place[axis] = n
        return _Value(self._labels_of(parameter, n).reshape(place).expand(shape), 0.0, True)

    # Operations that hand labels on

    def _move(self, node: fx.Node) -> _Value | list[_Value] | None:
        """Moves elements: carried out on the labels."""
        source = self._of(node.args[0])
        if isinstance(source, list):
            index = node.args[1]
            return source[index] if isinstance(index, int) else None
        source = self._labelled(source)
        if source.labels is None:
            count = node.meta.get("val")
            return [_Value()] * len(count) if isinstance(count, list | tuple) else _Value()
        moved = self._moved(node, source.labels)
        if isinstance(moved, torch.Tensor):
            return self._kept(replace(source, labels=moved), shape_of(node))
        return None if moved is None else [replace(source, labels=piece) for piece in moved]

    def _moved(self, node: fx.Node, labels: torch.Tensor) -> torch.Tensor | Sequence[torch.Tensor] | None:
        name, shape = operation_name(node), shape_of(node)
        is_fit = math.prod(shape) <= _MAX_ELEMENTS
        if name in ("view", "reshape", "flatten", "unflatten"):
            try:
                return labels.view(shape)
            except RuntimeError:  # repeats have to be written out
                return labels.reshape(shape) if is_fit else None
        if name == "expand":
            return _expanded(labels, shape)
        if len(arguments_of(node)) > 1 or (name == "repeat" and not is_fit):
            return None
        moved: torch.Tensor | Sequence[torch.Tensor] = node.target(labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]  # an operator of torch
        return moved

    def _same(self, node: fx.Node) -> _Value | None:
        """Changes no channel: casts, copies, dropout that does nothing, a sign."""
        name = operation_name(node)
        if name == "dropout" and (node.args[1] != 0 and (len(node.args) < 3 or node.args[2] is not False)):
            return None
        value = self._of(node.args[0])
        if isinstance(value, list):
            return None
        return replace(value, is_open=False) if name == "neg" and value.labels is not None else value

    def _sum(self, node: fx.Node) -> _Value | None:
        """Adds a constant, or ties two streams together."""
        if node.kwargs.get("alpha", 1) != 1:
            return None
        first, second = self._operands(node)
        if first is None or second is None:
            value, constant = (first, node.args[1]) if second is None else (second, node.args[0])
            return self._shifted(value, constant, is_first=second is None, is_sum=operation_name(node) == "add")
        carrier, other = (first, second) if first.is_open or not second.is_open else (second, first)
        a, b = _expanded(carrier.labels, shape_of(node)), _expanded(other.labels, shape_of(node))
        if a is None or b is None:
            return None
        self._claim(other)
        self.ties.append(_unique_pairs(*_compact(a, b)))
        return replace(carrier, labels=a)  # a constant added to the sum is added to one of the two

    def _shifted(self, value: _Value | None, constant: object, *, is_first: bool, is_sum: bool) -> _Value | None:
        if value is None or value.labels is None or not is_sum or not isinstance(constant, int | float):
            return None
        if constant == 0:
            return value
        return replace(value, offset=(value.offset or 0.0) + constant) if value.is_open and is_first else None

    def _factor(self, node: fx.Node) -> _Value | None:
        """A product: one of the streams carries the factor, preferably one without a constant; the other is pinned."""
        first, second = self._operands(node)
        pairs = ((first, second), (second, first))
        scaled = [(v, other) for v, other in pairs if v is not None and v.labels is not None]
        if not scaled:
            return None
        carrier, other = min(scaled, key=lambda pair: bool(pair[0].offset))
        if other is None:  # times a number
            return replace(carrier, is_open=False)
        self._pin(other)
        self._claim(carrier)
        return self._kept(_Value(_expanded(carrier.labels, shape_of(node))), shape_of(node))

    def _quotient(self, node: fx.Node) -> _Value | None:
        value, divisor = self._value(node, 0), self._value(node, 1)
        if value is None or value.labels is None:
            return None
        self._pin(divisor)
        return self._kept(replace(value, is_open=False, labels=_expanded(value.labels, shape_of(node))), shape_of(node))

    def _concatenation(self, node: fx.Node) -> _Value | None:
        sources, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if not isinstance(sources, list | tuple) or not isinstance(axis, int):
            return None
        values = [self._of(s) for s in sources]
        plain = [v for v in values if isinstance(v, _Value) and v.parameter is None]
        if len(plain) != len(values) or all(v.labels is None for v in plain):
            return None
        pieces = [
            torch.zeros((), dtype=torch.int64).expand(shape_of(s)) if v.labels is None else v.labels
            for s, v in zip(sources, plain, strict=True)
        ]
        for value in plain:
            self._claim(value)
        joined = torch.cat(_compact(*pieces, keep=axis % pieces[0].ndim), dim=axis)
        return _Value(joined.expand(shape_of(node)))

    def _average(self, node: fx.Node) -> _Value | None:
        """Attention, interpolation, pooling: keeps channels that are the same at all positions that are summed.

        Those are along all axes behind the channels of an image, or along the axis before the channels of tokens.
        """
        name = operation_name(node)
        place = _AVERAGES[name]
        self._pin(*(self._of(a) for i, a in enumerate((*node.args, *node.kwargs.values())) if i != place))
        value = self._value(node, place)
        if value is None or value.labels is None or value.labels.ndim < 2 or value.offset:
            return None
        one = value.labels
        for axis in range(2, one.ndim) if name in _MEANS else (-2,):
            one = one.narrow(axis, 0, 1)
        repeated = _expanded(one, shape_of(node))
        if repeated is None or not bool((_compact(value.labels)[0] == _compact(one)[0]).all()):
            return None
        self._claim(value)
        return _Value(repeated)

    # What is known of values

    def _value(self, node: fx.Node, position: int) -> _Value | None:
        """The value of an argument, None if it is no value of the program."""
        argument = node.args[position] if position < len(node.args) else None
        value = self._of(argument)
        if isinstance(value, list):
            self._pin(value)
            return _Value()
        return value if isinstance(argument, fx.Node) else None

    def _operands(self, node: fx.Node) -> tuple[_Value | None, _Value | None]:
        first, second = (v if v is None else self._labelled(v) for v in (self._value(node, i) for i in (0, 1)))
        return first, second

    def _of(self, argument: object) -> _Value | list[_Value]:
        return self._environment.get(argument, _Value()) if isinstance(argument, fx.Node) else _Value()

    def _labelled(self, value: _Value) -> _Value:
        """A bare parameter gets a label for each element when it enters a sum, a product, or is moved."""
        name = value.parameter
        if name is None:
            return value
        self.roles[name].add("otherwise" if name in self._layers else "elements")
        shape = self._shapes[name]
        if name in self._layers or math.prod(shape) > _MAX_PARAMETER:
            return _Value()
        return _Value(self._labels_of(name, math.prod(shape)).reshape(shape), 0.0, True)

    def _kept(self, value: _Value, shape: Sequence[int]) -> _Value | None:
        """The value, unless its labels have another shape than it or take too much memory."""
        labels = value.labels
        if labels is None or tuple(labels.shape) != tuple(shape) or _compact(labels)[0].numel() > _MAX_ELEMENTS:
            return None
        return value

    # What is noted of labels

    def _labels_of(self, parameter: str, n: int) -> torch.Tensor:
        """The labels `[n]` of a parameter's rows or elements."""
        if parameter not in self.labels:
            self.labels[parameter] = np.arange(self.n_labels, self.n_labels + n)
            self.n_labels += n
        return torch.from_numpy(self.labels[parameter])

    def _claim(self, value: _Value) -> None:
        """A use of the value as x + its offset, x being what its labels stand for."""
        if value.labels is not None and value.offset is not None:
            self._claimed.append((_distinct(value.labels), value.offset))

    def _pin(self, *values: _Value | list[_Value] | None) -> None:
        """The values must stay as they are."""
        for value in values:
            for one in value if isinstance(value, list) else [value]:
                if one is not None and one.parameter is not None:
                    self.roles[one.parameter].add("otherwise")
                if one is not None and one.labels is not None:
                    self.ties.append(_with(_distinct(one.labels), _PINNED))


def _compact(*tensors: torch.Tensor, keep: int | None = None) -> list[torch.Tensor]:
    """One element of each axis along which all the tensors only repeat; the axis `keep` stays whole."""
    compact = list(tensors)
    for axis in range(tensors[0].ndim):
        if axis != keep and all(t.stride(axis) == 0 and t.shape[axis] > 1 for t in compact):
            compact = [t.narrow(axis, 0, 1) for t in compact]
    return compact


def _distinct(labels: torch.Tensor) -> Integers:
    return np.unique(_compact(labels)[0].numpy())


def _unique_pairs(a: torch.Tensor, b: torch.Tensor) -> Integers:
    """The different pairs `[n, 2]` of elements at the same place of two tensors of one shape."""
    pairs: Integers = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)], dim=1), dim=0).numpy()
    return pairs


def _expanded(labels: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor | None:
    """The tensor repeated to a shape; None if it does not broadcast to it."""
    try:
        return None if labels is None else labels.expand(tuple(shape))
    except RuntimeError:
        return None


def _with(labels: Integers, other: int) -> Integers:
    """Pairs `[n, 2]` of each label with another one."""
    return np.stack([labels, np.full_like(labels, other)], axis=1)


class _Folder:
    """What is done with channels that were read: the layers to smooth, and their labels beside those that feed them."""

    def __init__(self, denoiser: nn.Module, channels: _Channels) -> None:
        self._denoiser, self._channels = denoiser, channels
        self._tied = {name: members for members in find_ties(denoiser) for name in members}

    def fold(self, chosen: Sequence[str]) -> Folding:
        wanted = dict.fromkeys(member for name in chosen for member in self._members(name))
        reasons = {name: self._why_not(name) for name in wanted}
        told = {name: [why for member in self._members(name) if (why := reasons.get(member))] for name in wanted}
        refused = {name: found[0] for name, found in told.items() if found}
        first, n_labels = dict[str, Integers](), self._channels.n_labels  # labels of input channels, after all others
        for name in wanted:
            if name not in refused:
                n = int(self._denoiser.get_parameter(f"{name}.weight").shape[1])
                first[name] = np.arange(n_labels, n_labels + n)
                n_labels += n
        ties = [*self._channels.ties, _with(self._pinned_rows(), _PINNED)]
        for layer, _, pairs in self._channels.calls:  # what layers that are not smoothed read is pinned
            reads = _with(pairs[:, 1], _PINNED)
            ties.append(np.stack([first[layer][pairs[:, 0]], pairs[:, 1]], axis=1) if layer in first else reads)
        ties += [np.stack([columns, first[self._members(name)[0]]], axis=1) for name, columns in first.items()]
        divided, components = _settle(n_labels, ties, first)
        inputs = {name: components[labels] for name, labels in first.items()}
        for name in divided:
            owner = first[self._members(name)[0]]
            inputs[name] = n_labels + int(owner[0]) + np.arange(len(first[name]))
        return self._numbered(inputs, divided, components, refused)

    def _members(self, name: str) -> tuple[str, ...]:
        """The layers that share a layer's weight, itself included."""
        return self._tied.get(name, (name,))

    def _why_not(self, name: str) -> str | None:
        """Why a layer cannot be smoothed at all."""
        callers = {owner for layer, owner, _ in self._channels.calls if layer == name}
        roles = self._channels.roles.get(f"{name}.weight")
        if not callers:
            return "it is not used in a call with these inputs"
        if roles != {"weight"}:
            return "its channels are grouped" if roles == {"grouped"} else "its weight is used outside of it, too"
        module = self._denoiser.get_submodule(name)
        names = {known for known, found in self._denoiser.named_modules(remove_duplicate=False) if found is module}
        is_plain = callers <= names and type(module).forward in _PLAIN_FORWARDS
        return None if is_plain else "its call is not that of a plain layer"

    def _pinned_rows(self) -> Integers:
        """Rows that must stay: of parameters that are used in another way, too, or cannot take a constant."""
        found, pinned = self._channels, [_NO_LABELS]
        for name, labels in found.labels.items():
            bias = found.biases.get(name)
            is_free = len(found.roles[name]) == 1 and name.removesuffix(".weight") not in self._tied
            is_free &= bias is None or found.roles[bias] == {f"bias of {name}"}
            takes_constant = bias is not None or found.roles[name] == {"elements"}
            pinned.append(labels if not is_free else labels[(found.claims[labels] != 0) & (not takes_constant)])
        return np.concatenate(pinned)

    def _numbered(
        self, inputs: Mapping[str, Integers], divided: frozenset[str], components: Integers, refused: Mapping[str, str]
    ) -> Folding:
        """The folding with classes numbered from 0."""
        used = np.unique(np.concatenate([_NO_LABELS, *inputs.values()]))
        carried = np.unique(np.concatenate([_NO_LABELS, *(inputs[name] for name in inputs if name not in divided)]))
        parameters = {}
        for name, labels in self._channels.labels.items():
            is_carrier = np.isin(components[labels], carried)
            if is_carrier.any():
                own = np.where(is_carrier, np.searchsorted(used, components[labels]), NONE)
                offsets = np.where(is_carrier, self._channels.claims[labels], 0.0)
                parameters[name] = Rows(own, offsets, self._channels.biases.get(name))
        numbered = {name: np.searchsorted(used, found) for name, found in inputs.items()}
        return Folding(len(used), numbered, divided, parameters, refused)


def _settle(n_labels: int, ties: Iterable[Integers], first: Mapping[str, Integers]) -> tuple[frozenset[str], Integers]:
    """Layers with a pinned channel divide their input themselves, which pins what they read; until nothing changes.

    Gives these layers, and the component of each label `[n]` under the ties.
    """
    known, divided = [*ties], set[str]()
    while True:
        rows, columns = np.concatenate(known).T
        graph = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(n_labels, n_labels))
        components: Integers = connected_components(graph, directed=False)[1].astype(np.int64)
        is_pinned = components == components[_PINNED]
        fresh = [name for name, own in first.items() if name not in divided and is_pinned[own].any()]
        if not fresh:
            return frozenset(divided), components
        divided.update(fresh)
        known += [_with(first[name], _PINNED) for name in fresh]
