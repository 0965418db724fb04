"""From a denoiser to its graph: the flow of data between weight layers, read from an exported program.

The denoiser itself is neither run nor changed, and none of its weights is copied. Each value of the program carries its
*sources*: the graph nodes whose outputs reach it through operations that are not nodes themselves (norms, activations,
reshapes, gates). A weight layer becomes a node with edges from the sources of its input; an operation that combines two
streams becomes a node where the streams differ.

* `add`: a sum or difference of two streams with different sources.
* `concat`: a concatenation of streams with different sources.
* `modulate`: x * (1 + scale) [+ shift], where x and scale are streams.
* `attention`: scaled dot-product attention, or two matrix products in a row between streams.

A concatenation of the outputs of different layers makes *streams*: ranges of channels along one axis. An operation
hands them on only if it is known to put what it makes of channel c at channel c, whatever else it reads (a group
normalisation shares statistics between channels, but moves none). Everything else ends them: a layer downstream has one
stream. A layer whose input has streams along its input channels keeps them. Multiply-accumulates (MACs) of layers and
products are counted from the shapes that the trace saw, of one sample in one call; all else counts nothing.

A layer that is called several times is one node at the place of its first call; an input of a later call that
is computed after that place would close a cycle and is left out.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from sedimo.errors import InputError
from sedimo.graph.example_inputs import batch_size
from sedimo.graph.groups import find_groups
from sedimo.graph.layers import (
    block_of,
    find_blocks,
    find_ties,
    operation_type,
    other_weights,
    weight_layers,
    weight_names,
)
from sedimo.graph.model import DenoiserGraph, Node, NodeKind
from sedimo.graph.program import (
    READS_NOTHING,
    Capture,
    arguments_of,
    export_denoiser,
    operation_name,
    owner_of,
    shape_of,
)

_SUMS = frozenset({"add", "add_", "sub", "sub_"})
_CONCATS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack"})
_FACTORS = frozenset({"mul", "mul_"})
_PRODUCTS = frozenset({"matmul", "bmm", "mm", "baddbmm", "einsum"})
_LAYER_CALLS = frozenset({"linear", "conv1d", "conv2d", "conv3d", "convolution", "addmm", "matmul", "mm", "einsum"})
_ATTENTION_PREFIX = "scaled_dot_product"
_RELABELLINGS = frozenset(
    """to _to_copy type_as view view_as reshape reshape_as unsqueeze squeeze expand expand_as permute transpose t
    contiguous clone detach alias flatten unflatten slice select chunk split unbind getitem movedim repeat
    dropout""".split()  # noqa: SIM905  # a table is read like a sentence
)  # what may lie between 1 + scale and its use, or between a weight and its use
_OF_FIRST = frozenset({"type_as", "view_as", "reshape_as", "expand_as", "to"})  # of others, dtype and shape only
_KEEPING = frozenset(
    """group_norm layer_norm rms_norm batch_norm instance_norm silu gelu relu leaky_relu elu mish sigmoid tanh
    hardswish dropout feature_dropout to _to_copy type_as contiguous clone detach alias neg""".split()  # noqa: SIM905  # a table is read like a sentence
)
_INPUT_AXES = {"linear": -1, "conv1d": 1, "conv2d": 1, "conv3d": 1}
_SCALING = frozenset({"mul", "div"})  # by a number: with a tensor they are a combination
_RESIZING = frozenset(
    """upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d avg_pool1d avg_pool2d
    avg_pool3d""".split()  # noqa: SIM905
)  # change positions behind the second axis, which holds the channels


def trace_denoiser(
    denoiser: nn.Module, *, example_inputs: Mapping[str, object] | None = None, capture: Capture | None = None
) -> DenoiserGraph:
    """The graph of a denoiser with real or meta weights, by `torch.export` on the meta device.

    Inputs are found by the names of the forward's arguments. `example_inputs` (argument name to value; of tensors only
    shape and dtype matter) settle what cannot be found so, or should have other sizes; `capture` gives the inputs of
    one real call when that fails.
    """
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
    layers = weight_layers(denoiser)
    if not layers:
        raise InputError(f"{type(denoiser).__name__} has no Linear or Conv weight: there is nothing to trace")
    program, inputs = export_denoiser(denoiser, example_inputs=example_inputs, capture=capture)
    reader = _Reader(layers, find_blocks(denoiser, layers), batch_size(inputs))
    layer_of, parameters = weight_names(denoiser), program.graph_signature.inputs_to_parameters
    places = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    reader.run(program.graph_module, [_Value(weight=layer_of.get(parameters.get(place, ""))) for place in places])
    if not any(node.kind == "layer" for node in reader.nodes):
        raise InputError(f"the forward of {type(denoiser).__name__} uses none of its layers: it is no denoiser")
    called = {node.name for node in reader.nodes}
    nodes = (*reader.nodes, *(layer for name, layer in layers.items() if name not in called))
    edges = tuple((source, target) for target, sources in enumerate(reader.sources) for source in sources)
    remarks = {
        "weights belong to no Linear or Conv layer and stay as they are": other_weights(denoiser),
        "layers are not used in a call with these inputs": [n.name for n in nodes if n.kind == "layer" and not n.macs],
    }
    notes = (
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in remarks.items()
        if names
    )
    groups, ties = find_groups(nodes, edges), find_ties(denoiser)
    return DenoiserGraph(type(denoiser).__name__, nodes, edges, groups, ties, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Value:
    """Sources in order of use, the weight that a value is, and its streams: numbers of channels along an axis."""

    sources: tuple[int, ...] = ()
    weight: str | None = None
    is_one_plus: bool = False
    open_modulate: int | None = None
    writes: list[tuple[int, ...]] = field(default_factory=list)  # sources written in place later; views share it
    n_writes_seen: int = 0
    streams: tuple[int, ...] = ()
    axis: int = 0

    def along(self, axis: int, n_axes: int) -> tuple[int, ...]:
        """The streams if they are along this axis (negative: from the back), else none."""
        return self.streams if self.streams and self.axis == axis % n_axes else ()


_Arguments = Sequence[tuple[fx.Node, _Value]]


class _Reader:
    """Walks a program once, in order; `sources` are positions of nodes, first argument first."""

    def __init__(self, layers: Mapping[str, Node], blocks: Set[str], batch: int) -> None:
        self.nodes: list[Node] = []
        self.sources: list[list[int]] = []
        self._layers, self._blocks, self._batch = layers, blocks, batch
        self._positions: dict[str, int] = {}
        self._open_products: set[int] = set()

    def run(self, module: fx.GraphModule, inputs: Sequence[_Value]) -> list[_Value]:
        """The values of a program's outputs, given those of its inputs; nested programs are walked through."""
        environment, remaining, outputs = dict[fx.Node, _Value](), iter(inputs), list[_Value]()
        for node in module.graph.nodes:
            if node.op == "placeholder":
                environment[node] = replace(next(remaining, _Value()), writes=[], n_writes_seen=0)
            elif node.op == "call_function":
                environment[node] = self._call(module, node, environment)
            elif node.op == "output":
                outputs = [self._now(environment[a]) for a in node.all_input_nodes if a in environment]
        return outputs

    def _call(self, module: fx.GraphModule, node: fx.Node, environment: dict[fx.Node, _Value]) -> _Value:
        given = arguments_of(node)
        for place in given:
            inner = operator.attrgetter(str(place.target))(module) if place.op == "get_attr" else None
            if isinstance(inner, fx.GraphModule):  # a region without gradients or autocast: walked as if it stood here
                values = [self._now(environment.get(a, _Value())) for a in given if a is not place]
                return _Value(_union(v.sources for v in self.run(inner, values)))
        arguments = [(a, self._now(environment[a])) for a in given if a in environment]
        value = self._combine(operation_name(node), node, arguments)
        return self._track_storage(node, value, arguments, environment)

    def _combine(self, name: str, node: fx.Node, arguments: _Arguments) -> _Value:
        """The value of one operation; makes a node of it where it is one."""
        values = [value for _, value in arguments]
        layer = next((v.weight for v in values if v.weight is not None), None)
        if layer is not None and name in _LAYER_CALLS:
            return self._layer(layer, name, node, [(a, v) for a, v in arguments if v.weight is None])
        streams = [v for v in values if v.sources]
        made = None
        if name.startswith(_ATTENTION_PREFIX) and streams:
            query, key, value = (shape_of(a) for a, _ in arguments[:3])  # [..., Nq, d], [..., Nk, d], [..., Nk, dv]
            macs = math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
            made = self._new("attention", node, streams, macs)
        elif len(streams) > 1:
            made = self._combination(name, node, arguments, streams)
        if made is not None:
            return made
        first = values[0] if arguments and _keeps_channels(name, node, arguments[0][0]) else _Value()
        return replace(_contract(name, node, values), streams=first.streams, axis=first.axis)

    def _combination(self, name: str, node: fx.Node, arguments: _Arguments, streams: list[_Value]) -> _Value | None:
        """The node that an operation on several streams makes; None if it makes none."""
        if name in _PRODUCTS:
            return self._product(name, node, arguments)
        if name in _FACTORS and sum(v.is_one_plus for v in streams) == 1:
            made = self._new("modulate", node, sorted(streams, key=lambda v: v.is_one_plus))
            return replace(made, open_modulate=made.sources[0] if len(node.users) == 1 else None)
        if name in _SUMS:
            shifted = self._absorb_shift(node, arguments)
            if shifted is not None:
                return shifted
        if name in _SUMS | _CONCATS and len({frozenset(v.sources) for v in streams}) > 1:
            made = self._new("add" if name in _SUMS else "concat", node, streams)
            return made if name in _SUMS else _joined(made, node, [v for _, v in arguments])
        return None

    def _layer(self, layer: str, call: str, node: fx.Node, inputs: _Arguments) -> _Value:
        """A call of a layer, whose streams are those along the input channels of its weight, if all calls agree."""
        is_first, output = layer not in self._positions, shape_of(node)
        position = self._append(self._layers[layer]) if is_first else self._positions[layer]
        known = self.nodes[position]
        self._connect(position, _union(v.sources for _, v in inputs))
        axis = _INPUT_AXES.get(call)
        along = [] if axis is None else [v.along(axis, len(shape_of(a))) for a, v in inputs if node.args[:1] == (a,)]
        streams = along[0] if along else ()
        is_whole = sum(streams) == known.shape[1]  # not if channels are grouped
        is_agreed = is_whole and (is_first or known.streams == streams)
        macs = math.prod(output) * math.prod(known.shape[1:])  # [out, in / groups, ...]: right for any groups
        self._count(position, macs, node)
        self.nodes[position] = replace(self.nodes[position], streams=streams if is_agreed else ())
        return _Value((position,))

    def _product(self, name: str, node: fx.Node, arguments: _Arguments) -> _Value:
        """A matrix product of two streams: the first of an attention, or the second, which joins the first."""
        operands = [(a, v) for a, v in arguments if v.sources][-2:]
        macs = _einsum_macs(node) if name == "einsum" else math.prod(shape_of(node)) * shape_of(operands[0][0])[-1]
        for _, value in operands:
            first = value.sources[0]
            others = _union(v.sources for _, v in operands if v is not value)
            if value.sources == (first,) and first in self._open_products and all(s < first for s in others):
                self._connect(first, others)
                self._count(first, macs, node)
                self._open_products.remove(first)
                return _Value((first,))
        made = self._new("attention", node, [v for _, v in operands], macs)
        self._open_products.add(made.sources[0])
        return made

    def _absorb_shift(self, node: fx.Node, arguments: _Arguments) -> _Value | None:
        """The modulation made just before, if this sum is its shift, whose sources then join it; None otherwise.

        A shift shares a source with the scale, or is broadcast; what is neither is a residual stream.
        """
        opened = [v.open_modulate for _, v in arguments if v.open_modulate is not None]
        shifts = [(a, v) for a, v in arguments if v.open_modulate is None and v.sources]
        if len(opened) != 1 or len(shifts) != 1:
            return None
        (shift_node, shift), position = shifts[0], opened[0]
        is_broadcast = math.prod(shape_of(shift_node)) < math.prod(shape_of(node))
        is_shift = is_broadcast or not set(self.sources[position]).isdisjoint(shift.sources)
        if not is_shift or not all(s < position for s in shift.sources):
            return None
        self._connect(position, shift.sources)
        return _Value((position,))

    def _new(self, kind: NodeKind, node: fx.Node, streams: Sequence[_Value], macs: int = 0) -> _Value:
        """A node named by the module that combines, what it does, and the how-manieth time: `blocks.3.add_1`."""
        owner = owner_of(node)
        names = (f"{owner}.{kind}_{i}" if owner else f"{kind}_{i}" for i in itertools.count())
        name = next(free for free in names if free not in self._positions and free not in self._layers)
        position = self._append(Node(name, kind, operation_type(name), block_of(owner, self._blocks), 0))
        self._count(position, macs, node)
        self._connect(position, _union(v.sources for v in streams))
        return _Value((position,))

    def _count(self, position: int, macs: int, call: fx.Node) -> None:
        """Adds the MACs of a call to a node."""
        known = self.nodes[position]
        self.nodes[position] = replace(known, macs=known.macs + per_sample(macs, shape_of(call), self._batch))

    def _append(self, node: Node) -> int:
        self._positions[node.name] = len(self.nodes)
        self.nodes.append(node)
        self.sources.append([])
        return self._positions[node.name]

    def _connect(self, position: int, sources: Iterable[int]) -> None:
        known = self.sources[position]
        known.extend(s for s in sources if s < position and s not in known)

    def _now(self, value: _Value) -> _Value:
        """The value with what was written into its storage since it was made."""
        later, seen = value.writes[value.n_writes_seen :], value.n_writes_seen
        sources = _union([value.sources, *later])
        return _Value(sources, value.weight, writes=value.writes, n_writes_seen=seen) if later else value

    def _track_storage(
        self, node: fx.Node, value: _Value, arguments: _Arguments, environment: Mapping[fx.Node, _Value]
    ) -> _Value:
        """Views share their input's storage; an operation in place writes its sources into it."""
        is_mutation, is_view = False, node.target is operator.getitem
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            is_mutation, is_view = schema.is_mutable, any(r.alias_info is not None for r in schema.returns)
        if not arguments or not (is_mutation or is_view):
            return value
        writes = environment[arguments[0][0]].writes
        if is_mutation:
            writes.append(value.sources)
        return replace(value, writes=writes, n_writes_seen=len(writes))


def _contract(name: str, node: fx.Node, values: Sequence[_Value]) -> _Value:
    """The value of an operation that is no node: it passes its sources on."""
    if not values or READS_NOTHING.fullmatch(name):
        return _Value()
    first = values[0]
    sources = first.sources if name in _OF_FIRST else _union(v.sources for v in values)
    if name == "add" and sources and len(values) == 1 and 1 in node.args:
        return _Value(sources, is_one_plus=True)
    if name in _RELABELLINGS:
        return _Value(sources, first.weight, first.is_one_plus, first.open_modulate if len(node.users) == 1 else None)
    return _Value(sources)


def _union(groups: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(source for group in groups for source in group))


def _einsum_macs(node: fx.Node) -> int:
    """The product of the sizes of all indices: each combination is one multiplication."""
    equation, operands = str(node.args[0]), node.args[1]
    if "..." in equation or not isinstance(operands, list | tuple):
        return 0
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes = {
        letter: size
        for term, operand in zip(terms, operands, strict=True)
        if isinstance(operand, fx.Node)
        for letter, size in zip(term, shape_of(operand), strict=True)
    }
    return math.prod(sizes.values())


def _joined(made: _Value, node: fx.Node, known: Sequence[_Value]) -> _Value:
    """A concatenation (`cat`) of `known` tensors with its streams; a stack has none."""
    tensors = node.args[0] if node.args else ()
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(tensors, list | tuple) or not isinstance(axis, int) or len(known) != len(tensors):
        return made
    shape, shapes = shape_of(node), [shape_of(tensor) for tensor in tensors]
    if any(len(own) != len(shape) for own in shapes):
        return made
    axis %= len(shape)
    pairs = zip(known, shapes, strict=True)
    sizes = tuple(size for value, own in pairs for size in value.along(axis, len(shape)) or (own[axis],))
    return replace(made, streams=sizes, axis=axis) if sum(sizes) == shape[axis] else made


def _keeps_channels(name: str, node: fx.Node, first: fx.Node) -> bool:
    """Whether an operation puts what it makes of each channel of its first argument at the same channel."""
    if node.args[:1] != (first,):
        return False
    before, after = shape_of(first), shape_of(node)
    if name in _SCALING:
        return before == after and not any(isinstance(a, fx.Node) for a in node.args[1:])
    if name in _RESIZING:
        return len(before) == len(after) and before[:2] == after[:2]
    return name in _KEEPING and before == after


def per_sample(macs: int, output_shape: Sequence[int], batch: int) -> int:
    """MACs of one sample of a call; an output that does not grow with `batch` was computed once and counts whole."""
    return macs // batch if output_shape and output_shape[0] % batch == 0 else macs
