"""The flow of data between weight layers, read from an exported program.

Each value of the program carries its *sources*: the graph nodes whose outputs reach it through operations
that are not nodes themselves (norms, activations, reshapes, gates). A weight layer becomes a node with edges
from the sources of its input; an operation that combines two streams becomes a node where the streams differ.

* `add`: a sum or difference of two streams with different sources.
* `concat`: a concatenation of streams with different sources.
* `modulate`: x * (1 + scale) [+ shift], where x and scale are streams.
* `attention`: scaled dot-product attention, or two matrix products in a row between streams.

A concatenation also tells the *streams* of its value, which operations that leave channels where they are hand on; a
layer whose input has streams along its input channels keeps them. Multiply-accumulates (MACs) of layers and products
are counted from the shapes that the trace saw, of one sample in one call; all else counts nothing.

A layer that is called several times is one node at the place of its first call; an input of a later call that
is computed after that place would close a cycle and is left out.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.export import ExportedProgram

from sedimo.graph.model import NodeKind
from sedimo.graph.program import arguments_of, is_mutation, operation_name, owner_of, shape_of

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
_OF_NONE = re.compile(r"(zeros|ones|empty|full|rand|randn)_like|new_\w+|_assert\w*|sym_\w+")
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


@dataclass(slots=True)
class FlowNode:
    """A node while it is being found. `sources` are positions of nodes, first argument first; `owner` is the module.

    `streams` are those of a layer's input in all calls so far, None before the first.
    """

    kind: NodeKind
    owner: str
    layer: str | None
    sources: list[int] = field(default_factory=list)
    macs: int = 0
    is_open_product: bool = False
    streams: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Value:
    """What is known of a value: sources in order of use, the weight it is, whether it is 1 + a stream, its streams."""

    sources: tuple[int, ...] = ()
    weight: str | None = None
    is_one_plus: bool = False
    open_modulate: int | None = None
    storage: int = -1
    n_writes_seen: int = 0
    streams: Streams | None = None


def read_flow(
    program: ExportedProgram, layer_of: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], batch: int
) -> list[FlowNode]:
    """All nodes of an exported program in the order of their first call.

    `layer_of` tells the layer of each weight's name in the program, `shapes` the shape of each layer's weight,
    `batch` the number of samples in the inputs.
    """
    reader = _Reader(shapes, batch)
    names = program.graph_signature.inputs_to_parameters
    inputs = [
        _Value(weight=layer_of.get(names.get(node.name, "")))
        for node in program.graph.nodes
        if node.op == "placeholder"
    ]
    reader.run(program.graph_module, inputs)
    return reader.nodes


class _Reader:
    """Walks a program once, in order."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], batch: int) -> None:
        self.nodes: list[FlowNode] = []
        self._shapes = shapes
        self._batch = batch
        self._of_layer: dict[str, int] = {}
        self._writes: dict[int, list[tuple[int, ...]]] = {}
        self._n_storages = 0

    def run(self, module: fx.GraphModule, inputs: Sequence[_Value]) -> list[_Value]:
        """The values of a program's outputs, given those of its inputs; nested programs are walked through."""
        environment: dict[fx.Node, _Value] = {}
        remaining = iter(inputs)
        outputs: list[_Value] = []
        for node in module.graph.nodes:
            if node.op == "placeholder":
                environment[node] = self._fresh(next(remaining, _Value()))
            elif node.op == "call_function":
                environment[node] = self._call(module, node, environment)
            elif node.op == "output":
                outputs = [self._now(environment[a]) for a in node.all_input_nodes if a in environment]
        return outputs

    def _call(self, module: fx.GraphModule, node: fx.Node, environment: dict[fx.Node, _Value]) -> _Value:
        name = operation_name(node)
        nested = [
            a for a in arguments_of(node) if a.op == "get_attr" and isinstance(_attribute(module, a), fx.GraphModule)
        ]
        if nested:
            return self._nested(module, node, nested[0], environment)
        arguments = [(a, self._now(environment[a])) for a in arguments_of(node) if a in environment]
        value = self._combine(name, node, arguments)
        return self._track_storage(node, value, [a for a, _ in arguments], environment)

    def _nested(
        self, module: fx.GraphModule, node: fx.Node, inner: fx.Node, environment: dict[fx.Node, _Value]
    ) -> _Value:
        """A program inside the program (a region without gradients or autocast): walked as if it stood here."""
        arguments = [a for a in arguments_of(node) if a is not inner]
        values = [self._now(environment.get(a, _Value())) for a in arguments]
        outputs = self.run(_attribute(module, inner), values)
        return self._fresh(_Value(_union(v.sources for v in outputs)))

    def _combine(self, name: str, node: fx.Node, arguments: list[tuple[fx.Node, _Value]]) -> _Value:
        """The value of one operation; makes a node of it where it is one."""
        values = [value for _, value in arguments]
        layer = next((v.weight for v in values if v.weight is not None), None)
        if layer is not None and name in _LAYER_CALLS:
            return self._layer(layer, node, [(a, v) for a, v in arguments if v.weight is None])
        streams = [v for v in values if v.sources]
        made = None
        if name.startswith(_ATTENTION_PREFIX) and streams:
            query, key, value = (shape_of(a) for a, _ in arguments[:3])
            made = self._new("attention", node, streams, attention_macs(query, key, value))
        elif len(streams) > 1:
            made = self._combination(name, node, arguments, streams)
        if made is not None:
            return made
        streams_kept = arguments[0][1].streams if arguments and keeps_channels(name, node, arguments[0][0]) else None
        return replace(_contract(name, node, values), streams=streams_kept)

    def _combination(
        self, name: str, node: fx.Node, arguments: list[tuple[fx.Node, _Value]], streams: list[_Value]
    ) -> _Value | None:
        """The node that an operation on several streams makes; None if it makes none."""
        if name in _PRODUCTS:
            return self._product(name, node, arguments)
        if name in _FACTORS and sum(v.is_one_plus for v in streams) == 1:
            made = self._new("modulate", node, sorted(streams, key=lambda v: v.is_one_plus), 0)
            return replace(made, open_modulate=made.sources[0] if len(node.users) == 1 else None)
        if name in _SUMS:
            shifted = self._absorb_shift(node, arguments)
            if shifted is not None:
                return shifted
        if name in _SUMS | _CONCATS and len({frozenset(v.sources) for v in streams}) > 1:
            made = self._new("add" if name in _SUMS else "concat", node, streams, 0)
            return made if name in _SUMS else replace(made, streams=joined(node, [v.streams for _, v in arguments]))
        return None

    def _layer(self, layer: str, node: fx.Node, inputs: list[tuple[fx.Node, _Value]]) -> _Value:
        output = shape_of(node)
        macs = per_sample(layer_macs(self._shapes[layer], output), output, self._batch)
        if layer not in self._of_layer:
            self._of_layer[layer] = len(self.nodes)
            self.nodes.append(FlowNode("layer", layer, layer))
        position = self._of_layer[layer]
        self._connect(position, _union(v.sources for _, v in inputs))
        self.nodes[position].macs += macs
        self._note_streams(position, node, inputs)
        return _Value((position,))

    def _note_streams(self, position: int, node: fx.Node, inputs: list[tuple[fx.Node, _Value]]) -> None:
        """The streams along the input channels of the weight, if all calls have the same."""
        found = self.nodes[position]
        streams = next((v.streams for a, v in inputs if node.args[:1] == (a,)), None)
        sizes = () if streams is None else streams.read_by(operation_name(node))
        if found.streams not in (None, sizes) or sum(sizes) != self._shapes[found.owner][1]:  # grouped channels
            sizes = ()
        found.streams = sizes

    def _product(self, name: str, node: fx.Node, arguments: list[tuple[fx.Node, _Value]]) -> _Value:
        """A matrix product of two streams: the first of an attention, or the second, which joins the first."""
        operands = [(a, v) for a, v in arguments if v.sources][-2:]
        output = shape_of(node)
        macs = _einsum_macs(node) if name == "einsum" else product_macs(shape_of(operands[0][0]), output)
        for _, value in operands:
            first = value.sources[0]
            others = _union(v.sources for _, v in operands if v is not value)
            if value.sources == (first,) and self.nodes[first].is_open_product and all(s < first for s in others):
                self._connect(first, others)
                self.nodes[first].macs += per_sample(macs, output, self._batch)
                self.nodes[first].is_open_product = False
                return _Value((first,))
        made = self._new("attention", node, [v for _, v in operands], macs)
        self.nodes[made.sources[0]].is_open_product = True
        return made

    def _absorb_shift(self, node: fx.Node, arguments: list[tuple[fx.Node, _Value]]) -> _Value | None:
        """The modulation made just before, if this sum is its shift, whose sources then join it; None otherwise.

        A shift shares a source with the scale, or is broadcast; what is neither is a residual stream.
        """
        opened = [v.open_modulate for _, v in arguments if v.open_modulate is not None]
        shifts = [(a, v) for a, v in arguments if v.open_modulate is None and v.sources]
        if len(opened) != 1 or len(shifts) != 1:
            return None
        (shift_node, shift), position = shifts[0], opened[0]
        scale_sources = set(self.nodes[position].sources)
        is_broadcast = math.prod(shape_of(shift_node)) < math.prod(shape_of(node))
        if not all(s < position for s in shift.sources) or not (is_broadcast or scale_sources & set(shift.sources)):
            return None
        self._connect(position, shift.sources)
        return _Value((position,))

    def _new(self, kind: NodeKind, node: fx.Node, streams: Sequence[_Value], macs: int) -> _Value:
        position = len(self.nodes)
        macs = per_sample(macs, shape_of(node), self._batch)
        self.nodes.append(FlowNode(kind, owner_of(node), None, macs=macs))
        self._connect(position, _union(v.sources for v in streams))
        return _Value((position,))

    def _connect(self, position: int, sources: Iterable[int]) -> None:
        known = self.nodes[position].sources
        known.extend(s for s in sources if s < position and s not in known)

    def _fresh(self, value: _Value) -> _Value:
        self._n_storages += 1
        return replace(value, storage=self._n_storages, n_writes_seen=0)

    def _now(self, value: _Value) -> _Value:
        """The value with what was written into its storage since it was made."""
        later = self._writes.get(value.storage, [])[value.n_writes_seen :]
        if not later:
            return value
        return replace(
            value, sources=_union([value.sources, *later]), is_one_plus=False, open_modulate=None, streams=None
        )

    def _track_storage(
        self, node: fx.Node, value: _Value, arguments: list[fx.Node], environment: dict[fx.Node, _Value]
    ) -> _Value:
        """Views share their input's storage; an operation in place writes its sources into it."""
        if not arguments or not (is_mutation(node) or _is_view(node)):
            return self._fresh(value)
        base = environment[arguments[0]].storage
        if is_mutation(node):
            self._writes.setdefault(base, []).append(value.sources)
        return replace(value, storage=base, n_writes_seen=len(self._writes.get(base, ())))


def _contract(name: str, node: fx.Node, values: Sequence[_Value]) -> _Value:
    """The value of an operation that is no node: it passes its sources on."""
    if not values or _OF_NONE.fullmatch(name):
        return _Value()
    sources = values[0].sources if name in _OF_FIRST else _union(v.sources for v in values)
    if name == "add" and sources and len(values) == 1 and 1 in node.args:
        return _Value(sources, is_one_plus=True)
    if name in _RELABELLINGS:
        first = values[0]
        is_open = first.open_modulate is not None and len(node.users) == 1
        return _Value(sources, first.weight, first.is_one_plus, first.open_modulate if is_open else None)
    return _Value(sources)


def _union(groups: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(source for group in groups for source in group))


def _attribute(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    found: object = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found  # type: ignore[return-value]  # the caller asks isinstance


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


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info is not None for r in target._schema.returns)


@dataclass(frozen=True, slots=True)
class Streams:
    """Numbers of channels of the streams of a value, in order, along an axis counted from the front.

    A concatenation of the outputs of different layers makes streams: ranges along one axis. An operation hands them on
    only if it is known to put what it makes of channel c at channel c, whatever else it reads (a group normalisation
    shares statistics between channels, but moves none). Everything else ends them: a layer downstream has one stream.
    """

    axis: int
    n_axes: int
    sizes: tuple[int, ...]

    def along(self, axis: int) -> tuple[int, ...]:
        """The sizes if they are along this axis (negative: from the back), else none."""
        return self.sizes if self.axis == axis % self.n_axes else ()

    def read_by(self, layer_call: str) -> tuple[int, ...]:
        """The sizes if the call of a layer (`linear`, `conv2d`) has them as input channels, else none."""
        axis = _INPUT_AXES.get(layer_call)
        return () if axis is None else self.along(axis)


def joined(node: fx.Node, known: Sequence[Streams | None]) -> Streams | None:
    """The streams of a concatenation (`cat`) whose tensors have the `known` ones; None of a stack."""
    tensors = node.args[0] if node.args else ()
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    shape = shape_of(node)
    if not isinstance(tensors, list | tuple) or not isinstance(axis, int) or len(known) != len(tensors):
        return None
    axis %= len(shape)
    sizes: list[int] = []
    for tensor, streams in zip(tensors, known, strict=True):
        own = shape_of(tensor)
        if len(own) != len(shape):
            return None
        sizes += (streams.along(axis) if streams is not None else ()) or (own[axis],)
    return Streams(axis, len(shape), tuple(sizes)) if sum(sizes) == shape[axis] else None


def keeps_channels(name: str, node: fx.Node, first: fx.Node) -> bool:
    """Whether an operation puts what it makes of each channel of its first argument at the same channel."""
    if node.args[:1] != (first,):
        return False
    before, after = shape_of(first), shape_of(node)
    if name in _SCALING:
        return before == after and not any(isinstance(a, fx.Node) for a in node.args[1:])
    if name in _RESIZING:
        return len(before) == len(after) and before[:2] == after[:2]
    return name in _KEEPING and before == after


def layer_macs(weight_shape: Sequence[int], output_shape: Sequence[int]) -> int:
    """MACs of one call of a layer: each output element is a sum over one row of the weight.

    `weight_shape` is `[out, in / groups, ...]`, so that grouped convolutions are right without knowing the
    number of groups.

    Example:
        >>> layer_macs((8, 4), (1, 16, 8))
        512
    """
    return math.prod(output_shape) * math.prod(weight_shape[1:])


def attention_macs(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """MACs of the two products of attention, `[..., Nq, d]`, `[..., Nk, d]`, `[..., Nk, dv]`.

    Example:
        >>> attention_macs((1, 2, 16, 8), (1, 2, 4, 8), (1, 2, 4, 8))
        2048
    """
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def product_macs(left: Sequence[int], output: Sequence[int]) -> int:
    """MACs of a matrix product of `left` `[..., n, k]`.

    Example:
        >>> product_macs((1, 2, 16, 8), (1, 2, 16, 4))
        1024
    """
    return math.prod(output) * left[-1]


def per_sample(macs: int, output_shape: Sequence[int], batch: int) -> int:
    """MACs of one sample, from those of a call whose output has `batch` samples in its first dimension.

    An output whose first dimension is no multiple of `batch` was computed once for all samples and counts whole.
    """
    has_batch = bool(output_shape) and output_shape[0] % batch == 0
    return macs // batch if has_batch else macs
