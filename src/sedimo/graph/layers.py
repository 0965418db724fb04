"""The weight layers of a module tree, its blocks, the layers that share a weight, and a copy without weights.

A weight layer is a module of type Linear, Conv1d, Conv2d or Conv3d whose own parameter `weight` has the shape
that its type implies. Everything else that holds weights (bare parameters, transposed convolutions, weights
computed by a parametrization) is not quantized; `other_weights` names it.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Set

import torch
from torch import nn

from sedimo.errors import InputError
from sedimo.graph.model import LayerType, Node

LAYER_TYPES: Mapping[LayerType, type[nn.Module]] = {
    "Linear": nn.Linear,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
}
LAYERS = tuple(LAYER_TYPES.values())
_N_PROBED_ELEMENTS = 16
_MIN_LAYERS_OF_A_BLOCK = 2
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OFFLOAD_HOOKS = ("_hf_hook", "_diffusers_hook")  # accelerate's and diffusers' device placement
_LEFT_BEHIND = object()


def weight_layers(denoiser: nn.Module) -> dict[str, Node]:
    """All weight layers by name, in the order of the module tree, not run yet; a module used under two names once."""
    kinds: dict[str, tuple[LayerType, tuple[int, ...]]] = {}
    for name, module in denoiser.named_modules():
        layer_type = next((text for text, kind in LAYER_TYPES.items() if isinstance(module, kind)), None)
        weight = module._parameters.get("weight")
        if layer_type is None or weight is None:
            continue
        shape, wanted = tuple(weight.shape), _implied_shape(module)
        if shape != wanted:
            raise InputError(
                f"layer {name!r}: a {layer_type} must have a weight of shape {wanted}, got {shape} "
                f"({type(weight).__name__}). It seems to be quantized already; load the original weights"
            )
        kinds[name] = layer_type, shape
    blocks = find_blocks(denoiser, kinds)
    return {
        name: Node(name, "layer", operation_type(name), block_of(name, blocks), 0, *kind)
        for name, kind in kinds.items()
    }


def operation_type(path: str) -> str:
    """The path with its indices removed: equal for all layers that do the same job.

    Example:
        >>> operation_type("transformer_blocks.3.attn1.to_out.0")
        'transformer_blocks.attn1.to_out'
    """
    return ".".join(part for part in path.split(".") if not part.isdigit())


def find_blocks(denoiser: nn.Module, layer_names: Iterable[str]) -> frozenset[str]:
    """Paths of all blocks: numbered elements of a container that hold at least two weight layers.

    `transformer_blocks.3` and `down_blocks.1.resnets.0` are blocks; `to_out.0` and `ff.net.0` are not.
    """
    n_layers = Counter(path for name in layer_names for path in _ancestors(name))
    containers = {name for name, m in denoiser.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    places = {path: path.rpartition(".") for path, n in n_layers.items() if n >= _MIN_LAYERS_OF_A_BLOCK}
    return frozenset(path for path, (parent, _, last) in places.items() if last.isdigit() and parent in containers)


def block_of(path: str, blocks: Set[str]) -> str:
    """The innermost block that holds a node or module, or "" outside all blocks."""
    return next((p for p in (path, *_ancestors(path)) if p in blocks), "")


def _ancestors(path: str) -> list[str]:
    """Paths of the modules around a path, innermost first: `a.b` and `a` of `a.b.c`."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def weight_names(denoiser: nn.Module) -> dict[str, str]:
    """Names of weights to names of their layers; a module used under two names has two entries."""
    first_names = {id(denoiser.get_submodule(name)): name for name in weight_layers(denoiser)}
    modules = denoiser.named_modules(remove_duplicate=False)
    return {f"{name}.weight".lstrip("."): first_names[id(m)] for name, m in modules if id(m) in first_names}


def other_weights(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of floating point parameters of two or more dimensions that belong to no weight layer."""
    own, named = weight_names(denoiser), denoiser.named_parameters()
    return tuple(n for n, p in named if p.dim() >= 2 and p.dtype.is_floating_point and n not in own)


def find_ties(denoiser: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The sets of layers that share one parameter, or hold equal values (real weights of one shape and dtype)."""
    by_key: dict[object, list[tuple[torch.Tensor, list[str]]]] = {}
    for name in weight_layers(denoiser):
        weight = denoiser.get_submodule(name).get_parameter("weight")
        sets = by_key.setdefault(_value_key(weight), [])
        for first, members in sets:
            if first is weight or (not first.is_meta and torch.equal(first, weight)):
                members.append(name)
                break
        else:
            sets.append((weight, [name]))
    return tuple(tuple(members) for sets in by_key.values() for _, members in sets if len(members) > 1)


def meta_twin(denoiser: nn.Module) -> nn.Module:
    """A copy of the module tree in which every tensor lies on the meta device, each layer with a weight of its own.

    No weight is copied; hooks (offloading, recorders) are left behind. The copy is in evaluation mode.
    """
    memo = _memo_without_weights(denoiser)
    try:
        twin = copy.deepcopy(denoiser, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{type(denoiser).__name__} cannot be copied without its weights: {error}") from error
    for module in twin.modules():
        module._compiled_call_impl = None  # would call the original
        if any(module.__dict__.pop(hook, None) is _LEFT_BEHIND for hook in _OFFLOAD_HOOKS):
            module.__dict__.pop("forward", None)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _meta_parameter(parameter)
    return twin.eval()


def _implied_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    raise TypeError(f"{type(module).__name__} is no weight layer")  # callers ask for weight layers only


def _value_key(weight: torch.Tensor) -> object:
    """Equal for weights that may be equal, so that few are read whole; identity where values cannot be read."""
    if weight.is_meta or type(weight) not in (nn.Parameter, torch.Tensor):
        return id(weight)
    flat = weight.detach().flatten()
    positions = torch.linspace(0, max(flat.numel() - 1, 0), _N_PROBED_ELEMENTS).long().to(flat.device)
    return (tuple(weight.shape), weight.dtype, tuple(flat[positions].double().tolist()))


def _memo_without_weights(denoiser: nn.Module) -> dict[int, object]:
    memo: dict[int, object] = {}
    for module in denoiser.modules():
        for tensor in _tensors_of(module):
            memo[id(tensor)] = _meta_parameter(tensor) if isinstance(tensor, nn.Parameter) else meta_tensor(tensor)
        for table in _HOOK_TABLES:
            memo[id(module.__dict__.get(table))] = OrderedDict()
        for hook in _OFFLOAD_HOOKS:
            memo[id(module.__dict__.get(hook))] = _LEFT_BEHIND
    memo.pop(id(None), None)
    return memo


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors that a module keeps as plain attributes, also in containers."""
    stack = [value for name, value in vars(module).items() if name != "_modules"]
    seen = set()
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, Mapping) else value)


def meta_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype on the meta device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _meta_parameter(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(meta_tensor(parameter), requires_grad=False)
