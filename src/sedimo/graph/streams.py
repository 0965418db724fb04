"""Which channels of a value are which stream of a concatenation, as long as the program leaves them where they are.

A concatenation of the outputs of different layers makes streams: ranges along one axis. An operation hands them on only
if it is known to put what it makes of channel c at channel c, whatever else it reads (a group normalisation shares
statistics between channels, but moves none). Everything else ends them: a layer downstream then has one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from sedimo.graph.program import shape_of

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


@dataclass(frozen=True, slots=True)
class Streams:
    """Numbers of channels of the streams of a value, in order, along an axis counted from the front."""

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
