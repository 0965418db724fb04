"""From a denoiser to its graph: exported on the meta device, read, labelled, and grouped.

The denoiser itself is neither run nor changed, and none of its weights is copied.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.export import ExportedProgram

from sedimo.errors import InputError
from sedimo.graph.example_inputs import batch_size, find_inputs, signature_names
from sedimo.graph.flow import FlowNode, read_flow
from sedimo.graph.groups import find_groups
from sedimo.graph.labels import block_of, find_blocks, operation_type
from sedimo.graph.layers import WeightLayer, find_ties, meta_twin, other_weights, weight_layers, weight_names
from sedimo.graph.model import DenoiserGraph, Node

Capture = Callable[[], Mapping[str, object]]

_NOISY_LOGGERS = ("torch", "diffusers")


def trace_denoiser(
    denoiser: nn.Module,
    *,
    example_inputs: Mapping[str, object] | None = None,
    capture: Capture | None = None,
) -> DenoiserGraph:
    """The graph of a denoiser with real or meta weights, by `torch.export` on the meta device.

    Inputs are found by the names of the forward's arguments. `example_inputs` (argument name to value; of
    tensors only shape and dtype matter) settle what cannot be found so, or should have other sizes; `capture`
    gives the inputs of one real call when that fails. MACs are those of one sample at the sizes of the inputs.

    Raises:
        InputError: the inputs are unknown or do not fit, the denoiser cannot be exported, or its weights are
            quantized already.
    """
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
    layers = weight_layers(denoiser)
    if not layers:
        raise InputError(f"{type(denoiser).__name__} has no Linear or Conv weight: there is nothing to trace")
    program, inputs = export_denoiser(denoiser, example_inputs=example_inputs, capture=capture)
    shapes = {name: layer.shape for name, layer in layers.items()}
    flow = read_flow(program, weight_names(denoiser), shapes, batch_size(inputs))
    if not any(found.layer for found in flow):
        raise InputError(f"the forward of {type(denoiser).__name__} uses none of its layers: it is no denoiser")
    nodes, edges = _assemble(flow, layers, find_blocks(denoiser, layers))
    return DenoiserGraph(
        denoiser=type(denoiser).__name__,
        nodes=nodes,
        edges=edges,
        groups=find_groups(nodes, edges),
        ties=find_ties(denoiser),
        notes=_notes(nodes, edges, denoiser),
    )


def export_denoiser(
    denoiser: nn.Module, *, example_inputs: Mapping[str, object] | None = None, capture: Capture | None = None
) -> tuple[ExportedProgram, dict[str, object]]:
    """The denoiser as a program on the meta device, and the inputs by argument name that it was exported with.

    Inputs are found as for `trace_denoiser`, which raises what this does.
    """
    twin = meta_twin(denoiser)
    with _quiet(), _uncollected():
        inputs = _inputs_for(twin, example_inputs or {}, capture)
        return _export(twin, inputs), inputs


def _inputs_for(twin: nn.Module, examples: Mapping[str, object], capture: Capture | None) -> dict[str, object]:
    """Example inputs on the meta device: given, found by name, or captured."""
    names, is_open = signature_names(twin)
    unknown = sorted(set(examples) - set(names)) if not is_open else []
    if unknown:
        raise InputError(
            f"example_inputs names {', '.join(unknown)}, but the forward of {type(twin).__name__} "
            f"takes {', '.join(names)}"
        )
    given = {name: _to_meta(value) for name, value in examples.items()}
    try:
        return find_inputs(twin, given)
    except InputError as error:
        if capture is not None:
            return _captured(capture, names, is_open)
        raise InputError(
            f"{type(twin).__name__} cannot be traced with example inputs found by name: {error}. "
            f"Pass them, for example example_inputs={{{_usage(names)}}}; only shape and dtype matter"
        ) from error


def _captured(capture: Capture, names: Mapping[str, bool], is_open: bool) -> dict[str, object]:
    inputs = {name: _to_meta(value) for name, value in capture().items() if is_open or name in names}
    return {**inputs, "return_dict": False} if "return_dict" in names else inputs


def _usage(names: Mapping[str, bool]) -> str:
    required = [name for name, is_required in names.items() if is_required] or list(names)[:1]
    return ", ".join(f'"{name}": torch.empty(...)' for name in required)


def _to_meta(value: object) -> object:
    """The value with every tensor replaced by one of its shape and dtype on the meta device."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Mapping):
        return {k: _to_meta(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_to_meta(v) for v in value])
    return value


def _export(twin: nn.Module, inputs: dict[str, object]) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(twin, (), inputs, strict=False)
    except Exception as error:  # foreign code fails in any way, and export adds its own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{type(twin).__name__} cannot be exported: {type(error).__name__}: {reason[:300]}. "
            "Its forward must not depend on the values of tensors"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps warnings and log lines of torch and diffusers about tracing from the user, who cannot act on them."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pauses garbage collection, which took a third of an export's time by visiting its many long-lived objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _assemble(
    flow: Sequence[FlowNode], layers: Mapping[str, WeightLayer], blocks: frozenset[str]
) -> tuple[tuple[Node, ...], tuple[tuple[int, int], ...]]:
    """Named and labelled nodes, layers that the forward never calls last, and edges by target and argument."""
    taken = set(layers)
    counts: dict[str, int] = {}
    nodes = []
    for found in flow:
        if found.layer is not None:
            nodes.append(_layer_node(layers[found.layer], blocks, found.macs, found.streams or ()))
            continue
        name = _combine_name(found, counts, taken)
        operation = operation_type(name)
        nodes.append(Node(name, found.kind, operation, block_of(found.owner, blocks), found.macs))
    called = {found.layer for found in flow}
    nodes += [_layer_node(layer, blocks, 0) for name, layer in layers.items() if name not in called]
    edges = tuple((source, target) for target, found in enumerate(flow) for source in found.sources)
    return tuple(nodes), edges


def _layer_node(layer: WeightLayer, blocks: frozenset[str], macs: int, streams: tuple[int, ...] = ()) -> Node:
    block = block_of(layer.name, blocks)
    return Node(layer.name, "layer", operation_type(layer.name), block, macs, layer.layer_type, layer.shape, streams)


def _combine_name(found: FlowNode, counts: dict[str, int], taken: set[str]) -> str:
    """`transformer_blocks.3.add_1`: the module that combines, what it does, and the how-manieth time."""
    prefix = f"{found.owner}.{found.kind}" if found.owner else found.kind
    while True:
        number = counts.get(prefix, 0)
        counts[prefix] = number + 1
        name = f"{prefix}_{number}"
        if name not in taken:
            taken.add(name)
            return name


def _notes(nodes: Sequence[Node], edges: Sequence[tuple[int, int]], denoiser: nn.Module) -> tuple[str, ...]:
    """What a reader of the graph should know of weights that are not in it, or not used."""
    notes = []
    others = other_weights(denoiser)
    if others:
        notes.append(f"{len(others)} weights belong to no Linear or Conv layer and stay as they are: {_some(others)}")
    idle = [node.name for node in nodes if node.kind == "layer" and node.macs == 0]
    if idle:
        notes.append(f"{len(idle)} layers are not used in a call with these inputs: {_some(idle)}")
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
