"""The quantizer that diffusers calls to save and load packed denoisers; registered by the import hook.

diffusers does not load strictly: what is missing stays on the meta device, what is extra is skipped. So names,
dtypes and shapes of the complete checkpoint are compared with the configuration and with the model before
diffusers makes a parameter, values are checked as they arrive, and nothing may be on meta at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from types import ModuleType

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from sedimo import __version__
from sedimo._import_hook import install
from sedimo.checkpoint.contents import assemble, describe, flatten_state, make_ordinary, named_layers
from sedimo.checkpoint.inputs import prepare_divisors, round_inputs
from sedimo.checkpoint.layout import METHOD, Configuration, read_configuration
from sedimo.checkpoint.validation import (
    check_against_model,
    check_nothing_on_meta,
    check_tensors,
    checksums_of,
    judge_headers,
    make_seal,
)
from sedimo.errors import InputError, StateError, UnsupportedError
from sedimo.pipelines.weights import read_header
from sedimo.quant.fitting import quantize_weight
from sedimo.quant.parts import TensorSpec
from sedimo.quant.tensor import QuantizedTensor

logger = logging.getLogger(__name__)

MADE_BY = f"sedimo {__version__}"
_LABELS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SedimoMethod(StrEnum):
    """The name under which diffusers knows the quantizer (it asks for an enum member)."""

    SEDIMO = METHOD


class SedimoConfig(QuantizationConfigMixin):
    """What `config.json` says about packed layers, or a recipe for packing while a source is loaded.

    `configuration` is written by Sedimo (docs/reference/formats.md). `recipe` maps layer names to format texts and is
    for `from_pretrained(source, quantization_config=SedimoConfig(recipe={...}))`.
    """

    def __init__(self, *, recipe: Mapping[str, str] | None = None, **configuration: object) -> None:
        plain = configuration or Configuration(made_by=MADE_BY).plain
        self.quant_method = SedimoMethod.SEDIMO  # type: ignore[assignment]  # diffusers lists only its own methods
        self.configuration = read_configuration(plain, place="quantization_config")
        if recipe and self.configuration.layers:
            raise StateError(
                "quantization_config has packed layers and a recipe for more of them; a packed checkpoint takes none. "
                "Remove the field 'recipe', or quantize the full-precision source"
            )
        self.recipe = dict(recipe or {})

    @classmethod
    def of(cls, model: nn.Module) -> SedimoConfig:
        """The configuration of a model's packed weights, and of what its layers are given."""
        return cls(recipe=None, **replace(describe(model), made_by=MADE_BY).plain)

    def to_dict(self) -> dict[str, object]:
        """The configuration as `config.json` holds it."""
        recipe: dict[str, object] = {"recipe": self.recipe} if self.recipe else {}
        return {**self.configuration.plain, **recipe}

    to_diff_dict = to_dict  # nothing is left to defaults


class SedimoQuantizer(DiffusersQuantizer):
    """Loads packed layers as `QuantizedTensor` parameters, and flattens them again for saving."""

    use_keep_in_fp32_modules = True  # as without quantization: the two must give the same bits
    requires_calibration = False
    is_serializable = True
    is_trainable = True  # gradients flow through packed weights to adapters; the codes themselves are fixed
    is_compileable = True  # torch.compile(fullgraph=True) works
    supports_parallel_loading = False  # the tensors of one layer may lie in two shards, which are read in turn

    def __init__(self, quantization_config: SedimoConfig, *, pre_quantized: bool = True) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self._found: dict[str, TensorSpec] = {}
        self._seal: str | None = None
        self._checksums: dict[str, str] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._dtype = torch.get_default_dtype()

    @property
    def config(self) -> SedimoConfig:
        """What diffusers keeps under its own name and type."""
        if not isinstance(self.quantization_config, SedimoConfig):
            raise InputError(f"Sedimo's quantizer takes a SedimoConfig, got {type(self.quantization_config).__name__}")
        return self.quantization_config

    def validate_environment(
        self, torch_dtype: torch.dtype | None = None, device_map: object = None, **_: object
    ) -> None:
        """Refuses offloading to disk, and dtypes that denoisers do not compute in, before anything is read."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise UnsupportedError("packed weights cannot be offloaded to disk: use device_map with 'cpu' instead")
        if torch_dtype is not None and torch_dtype not in _LABELS:
            raise InputError(f"torch_dtype must be one of {', '.join(map(str, _LABELS))}, got {torch_dtype}")

    def update_torch_dtype(  # type: ignore[override]  # None is passed on as None
        self, torch_dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Keeps the dtype asked for, which becomes the label of packed weights."""
        self._dtype = torch_dtype or torch.get_default_dtype()
        return torch_dtype

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Lets an automatic device map count at most a byte per packed weight."""
        return {f"{name}.weight": torch.int8 for name in self.config.configuration.owners}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str]) -> list[str]:
        """Judges the headers of all files and translates their names into the model's."""
        if not self.pre_quantized:
            return loaded_keys
        paths, configuration = [Path(str(file)) for file in checkpoint_files], self.config.configuration
        if wrong := [path.name for path in paths if path.suffix != ".safetensors"]:
            raise StateError(f"a packed checkpoint is read from safetensors files only, got {wrong}")
        packed = configuration.tensors
        self._found, self._seal = judge_headers([read_header(path) for path in paths], configuration)
        if set(loaded_keys) != set(self._found):
            names = sorted(set(loaded_keys) ^ set(self._found))
            raise StateError(f"the index of the shards and the shards disagree about {names[:5]}. Copy them again.")
        plain = [name for name in self._found if name not in packed]
        return [*plain, *(f"{name}.weight" for name in configuration.owners)]

    def maybe_update_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replaces the stored tensors of complete layers by their packed weight; keeps those of incomplete ones."""
        if not self.pre_quantized:
            return state_dict
        if self._seal is None:
            raise UnsupportedError("a packed checkpoint is loaded with from_pretrained(folder), not from a single file")
        check_tensors(state_dict, self._checksums)
        found, configuration = dict(state_dict), self.config.configuration
        for layer, entry in configuration.layers.items():
            names = list(entry.tensors(layer))
            self._pending.update({name: found.pop(name) for name in names if name in found})
            if all(name in self._pending for name in names):
                own = {name: self._pending.pop(name) for name in names}
                found[f"{layer}.weight"] = assemble(layer, entry, own, self._dtype)
        shared = ((n, f"{owner}.weight") for n, owner in configuration.owners.items())
        return found | {f"{n}.weight": found[owner] for n, owner in shared if owner in found}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: object, **_: object
    ) -> bool:
        """Whether a loaded tensor goes through `create_quantized_param`."""
        layer = param_name.removesuffix(".weight")
        return isinstance(param_value, QuantizedTensor) or layer in self.config.recipe

    def create_quantized_param(  # type: ignore[override]  # diffusers declares any arguments and ignores the result
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        *_: object,
        **__: object,
    ) -> None:
        """Puts a packed weight into the model; layers that share one get the same parameter."""
        layer = param_name.removesuffix(".weight")
        if not isinstance(param_value, QuantizedTensor):
            param_value = quantize_weight(param_value, self.config.recipe[layer], layer_name=layer)
        weight = param_value.to(target_device)
        owner = self.config.configuration.owners.get(layer, layer)
        shared = model.get_submodule(owner)._parameters["weight"] if owner != layer else None
        is_alike = shared is not None and (shared.dtype, shared.device) == (weight.dtype, weight.device)
        fresh = shared if is_alike else nn.Parameter(weight, requires_grad=False)
        model.get_submodule(layer)._parameters["weight"] = fresh

    def _process_model_before_weight_loading(self, model: nn.Module, **_: object) -> None:
        if self.pre_quantized:
            if self._seal is None:
                raise UnsupportedError("a packed checkpoint is loaded with from_pretrained(folder) only")
            prepare_divisors(model, self.config.configuration.smoothed)
            check_against_model(self._found, self.config.configuration, model)
            self._checksums = checksums_of(self._seal, self._found)
        elif unknown := sorted(set(self.config.recipe) - {name for name, _ in named_layers(model)}):
            raise InputError(f"the recipe names layers that the model does not have: {unknown[:5]}")

    def _process_model_after_weight_loading(self, model: nn.Module, **_: object) -> None:
        if self._pending:
            raise StateError(f"packed layers are incomplete: {sorted(self._pending)[:5]} came without their companions")
        check_nothing_on_meta(model)
        round_inputs(model, self.config.configuration.inputs)
        if not self.pre_quantized:
            self.quantization_config = SedimoConfig.of(model)
            _store(model, self.quantization_config)
        self._found, self._checksums = {}, {}
        model.__dict__["is_quantized"] = False  # diffusers would refuse .to(dtype), which only relabels packed weights

    def _dequantize(self, model: nn.Module) -> nn.Module:
        make_ordinary(model)
        _forget(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, torch.Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of the file, packed weights flattened, and the seal."""
        if not safe_serialization:
            raise UnsupportedError("packed weights are saved as safetensors only: leave safe_serialization at True")
        tensors = flatten_state(state_dict, self.config.configuration)
        return tensors, make_seal(tensors, self.config.configuration)


def attach(model: nn.Module) -> None:
    """Tells a diffusers model what of it diffusers does not know, so that it saves itself; other modules need nothing.

    That is: packed weights, divided and rounded inputs. A model that has none of them forgets that it ever had some.
    """
    if not isinstance(model, ConfigMixin):
        return
    config = SedimoConfig.of(model)
    if not config.configuration.is_needed:
        _forget(model)
        model.__dict__.pop("hf_quantizer", None)
        return
    _store(model, config)
    model.__dict__.update(
        hf_quantizer=SedimoQuantizer(config), quantization_method=config.quant_method, is_quantized=False
    )


def register(auto: ModuleType) -> None:
    """Writes the quantizer and its configuration into the tables of `diffusers.quantizers.auto`."""
    if not hasattr(DiffusersQuantizer, "maybe_update_state_dict"):
        logger.warning("this diffusers is too old to load Sedimo's checkpoints; install diffusers >= 0.39")
        return
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = SedimoQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SedimoConfig


def _store(model: nn.Module, config: SedimoConfig) -> None:
    if isinstance(model, ConfigMixin):
        register_to_config: Callable[..., None] = model.register_to_config  # diffusers leaves it untyped
        register_to_config(quantization_config=config)


def _forget(model: nn.Module) -> None:
    frozen: Callable[[dict[str, object]], object] = FrozenDict
    internal: Mapping[str, object] = model.__dict__["_internal_dict"]
    kept = {key: value for key, value in internal.items() if key != "quantization_config"}
    model.__dict__["_internal_dict"] = frozen(kept)
    model.__dict__.pop("quantization_method", None)


install()  # if this module was what imported diffusers, the hook ran before there was anything to register
