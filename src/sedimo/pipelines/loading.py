"""From a folder, a hub id, `zoo:NAME` or an object to a pipeline behind Sedimo's seam.

Nothing is executed that comes with a checkpoint: pipelines and components must be classes of diffusers or
transformers, and weights must be safetensors. Both are checked before diffusers is asked to load.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError
from packaging.version import Version
from safetensors import SafetensorError
from torch import nn

from sedimo.codec import parse_json
from sedimo.errors import InputError, MissingExtraError, SedimoError, StateError
from sedimo.pipelines.adapter import PipelineObject
from sedimo.pipelines.diffusers import BareDenoiser, DiffusersPipeline
from sedimo.pipelines.weights import (
    DENOISER_NAMES,
    PICKLE_SUFFIXES,
    WEIGHTS_STEM,
    WEIGHTS_STEMS,
    chosen_variant,
    dtype_name,
    find_weights,
    read_header,
    refuse_adapter_names,
    stored_dtype,
    variants,
)

logger = logging.getLogger(__name__)

_SHORT_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_NAMES = {name: dtype for short, dtype in _SHORT_NAMES.items() for name in (dtype_name(dtype), short)}
_LIBRARIES = ("diffusers", "transformers")
_DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"

Source = str | Path | DiffusionPipeline | nn.Module
ZOO_PREFIX = "zoo:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_pipeline(
    source: Source,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
) -> DiffusersPipeline | BareDenoiser:
    """A pipeline from a folder, a hub id, `zoo:NAME`, or a pipeline or denoiser that is loaded already.

    A folder that holds a denoiser alone gives a `BareDenoiser`. By default the device is the GPU if there is one,
    and the dtype is float32 on the CPU and that of the denoiser's weights on a GPU; an object stays as it is. A
    quantized checkpoint loads too (`is_quantized` tells). bfloat16 on a processor that cannot multiply it is loaded
    with a warning.
    """
    wanted = _DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted not in _DTYPE_NAMES.values():
        raise InputError(f"dtype must be one of {', '.join(_DTYPE_NAMES)}, got {dtype!r}")
    if isinstance(source, nn.Module | DiffusionPipeline):
        owner: Any = source  # diffusers has few types
        loaded = BareDenoiser(source) if isinstance(source, nn.Module) else DiffusersPipeline(owner)
        if wanted is not None and wanted is not loaded.dtype:
            if loaded.is_quantized:
                raise InputError(f"{loaded.name} is quantized and cannot be cast to {wanted}; load it with that dtype")
            owner.to(wanted)
        if device is not None:
            owner.to(_parse_device(device))
        return loaded
    name, folder = locate(source, variant)
    load = _load_folder if (folder / "model_index.json").is_file() else _load_denoiser
    return load(folder, name, _parse_device(device), wanted, variant)


def locate(source: str | Path, variant: str | None) -> tuple[str, Path]:
    """Name for people, and folder, of a folder, a hub id or `zoo:NAME`."""
    text = str(source)
    if text.startswith(ZOO_PREFIX):
        return text, zoo_path(text.removeprefix(ZOO_PREFIX))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve().name, folder
    if folder.is_file():
        raise InputError(f"{folder} is a single file; give the folder of a diffusers pipeline (with model_index.json)")
    if isinstance(source, str) and is_hub_id(text):
        return text, _hub_folder(text, variant)
    raise InputError(f"there is no folder {folder}; give a diffusers folder, a hub id like owner/name, or zoo:NAME")


def _load_folder(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype | None, variant: str | None
) -> DiffusersPipeline:
    index = _read_object(folder / "model_index.json")
    components = _checked_components(folder, index)
    denoiser_name = next((n for n in DENOISER_NAMES if n in components), None)
    if denoiser_name is None:
        raise InputError(
            f"the pipeline in {folder} has no denoiser: none of its components "
            f"({', '.join(components)}) is called {' or '.join(DENOISER_NAMES)}"
        )
    denoiser = folder / denoiser_name
    if not (denoiser / "config.json").is_file():
        raise StateError(f"{denoiser / 'config.json'} is missing; copy or download the folder again")
    _read_config(denoiser)
    asked = _asked(denoiser, variant, dtype, device)
    chosen = asked["variant"]
    if device.type == "cpu" and dtype is torch.bfloat16 and not _cpu_multiplies_bfloat16():
        _warn_of_slow_bfloat16()
    asked |= {"variant": chosen or _variant_of_others(folder), **_labels(folder, index)}
    load: Callable[..., PipelineObject] = DiffusionPipeline.from_pretrained
    with _loading(folder):
        pipeline = load(folder, **asked)
    adapter = DiffusersPipeline(pipeline, name=name, folder=folder, variant=chosen)
    for component, network in pipeline.components.items():
        if isinstance(network, nn.Module):
            _refuse_incomplete(network, folder / component)
    pipeline.to(device)
    return adapter


def _load_denoiser(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype | None, variant: str | None
) -> BareDenoiser:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is no diffusers folder: it has no model_index.json (a pipeline) and no config.json (a denoiser)"
        )
    kind = _model_class(folder, _read_config(folder))
    asked = _asked(folder, variant, dtype, device)
    with _loading(folder):
        denoiser = kind.from_pretrained(folder, **asked)
    _refuse_incomplete(denoiser, folder)
    return BareDenoiser(denoiser.to(device).eval(), name=name, folder=folder, variant=asked["variant"])


def load_architecture(folder: Path) -> nn.Module:
    """The denoiser of a folder without its weights, on the meta device, whether it is quantized or not."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no denoiser's folder: it has no config.json")
    config = _read_object(folder / "config.json")
    kind = _model_class(folder, config)
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    with _loading(folder), torch.device("meta"):
        denoiser: nn.Module = kind.from_config(plain)
    return denoiser.eval()


def _read_object(path: Path) -> dict[str, Any]:
    plain = parse_json(path.read_bytes(), place=str(path))
    if not isinstance(plain, dict):
        raise StateError(f"{path} must hold an object, got {type(plain).__name__}")
    return plain


def _read_config(denoiser: Path) -> dict[str, Any]:
    config = _read_object(denoiser / "config.json")
    quantization = config.get("quantization_config", {})
    if not isinstance(quantization, dict):
        raise StateError(f"{denoiser / 'config.json'}: quantization_config must be an object, got {quantization!r:.80}")
    return config


def _asked(denoiser: Path, variant: str | None, dtype: torch.dtype | None, device: torch.device) -> dict[str, Any]:
    """What diffusers is asked for. Weights become float32 on the CPU and what most of them are stored in on a GPU."""
    variant = chosen_variant(denoiser, WEIGHTS_STEM, variant)
    files, _ = find_weights(denoiser, WEIGHTS_STEM, variant)
    for path in files:
        refuse_adapter_names(read_header(path).tensors, str(path))
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else stored_dtype(files)
    return {_DTYPE_ARGUMENT: dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}


def _labels(folder: Path, index: dict[str, Any]) -> dict[str, object]:
    """The class names with numbers as keys: JSON has made texts of them, at which diffusers wonders aloud."""
    labels = index.get("id2label")
    if labels is None:
        return {}
    if not isinstance(labels, dict) or not all(k.isdecimal() and isinstance(v, str) for k, v in labels.items()):
        raise StateError(f"{folder / 'model_index.json'}: id2label must map class numbers to names, got {labels!r:.80}")
    return {"id2label": {int(k): v for k, v in labels.items()}}


def _checked_components(folder: Path, index: dict[str, Any]) -> tuple[str, ...]:
    """Components that the pipeline has, known to be of classes that may be run; absent ones are `[null, null]`."""
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or not hasattr(diffusers, class_name):
        raise _own_code(folder, "pipeline", class_name)
    named = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and len(v) == 2}
    present = {k: v for k, v in named.items() if all(isinstance(x, str) for x in v)}
    for name, (library, kind) in present.items():
        is_pipeline_part = hasattr(diffusers.pipelines, library) and not (folder / name / f"{library}.py").exists()
        if library not in _LIBRARIES and not is_pipeline_part:
            raise _own_code(folder, f"component {name}", f"{library}.{kind}")
        if not (folder / name).is_dir():
            raise StateError(f"{folder} lacks the folder {name} that its model_index.json names; copy it again")
        suffixes = {path.suffix for path in (folder / name).iterdir()}
        if ".safetensors" not in suffixes and not suffixes.isdisjoint(PICKLE_SUFFIXES):
            chosen_variant(folder / name, WEIGHTS_STEM, None)  # says what is there and what to do
    return tuple(present)


def _own_code(folder: Path, what: str, kind: object) -> InputError:
    return InputError(
        f"the {what} in {folder} is of the class {kind!r}, which is not part of diffusers or transformers; code that "
        "comes with a checkpoint is not run. Load it yourself and pass the pipeline object"
    )


def _variant_of_others(folder: Path) -> str | None:
    """The variant to ask diffusers for where the denoiser has none: that of a component which has nothing else."""
    others = (variants(p, stem) for p in folder.iterdir() if p.is_dir() for stem in WEIGHTS_STEMS)
    return next((found[0] for found in others if found and None not in found), None)


def _model_class(folder: Path, config: dict[str, Any]) -> Any:
    class_name = config.get("_class_name")
    kind = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise _own_code(folder, "denoiser", class_name)
    return kind


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it: AVX-512 BF16 or AMX, or those of ARM."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache  # said once, however often a job loads its pipeline
def _warn_of_slow_bfloat16() -> None:
    if multiprocessing.parent_process() is None:  # a worker's driver has said it
        logger.warning(
            "this processor has no bfloat16 instructions (AVX-512 BF16 or AMX): bf16 is several times slower than fp32 "
            "here. Use fp32, which is the default on a CPU."
        )


def _parse_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch asserts that it was built with CUDA
        raise InputError(f"the device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return parsed


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Without the libraries' progress bars; their errors name the folder."""
    with ExitStack() as stack:
        for switch in (diffusers.utils.logging, transformers.utils.logging):
            if switch.is_progress_bar_enabled():
                stack.callback(switch.enable_progress_bar)
                switch.disable_progress_bar()
        try:
            yield
        except SedimoError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise StateError(f"diffusers could not load {folder}: {error}") from error


def _refuse_incomplete(denoiser: nn.Module, folder: Path) -> None:
    if missing := [n for n, p in denoiser.named_parameters() if p.is_meta]:
        raise StateError(f"the weights in {folder} lack {len(missing)} tensors, such as {missing[0]!r}; copy it again")


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, `owner/name`."""
    return _HUB_ID.fullmatch(text) is not None


def _hub_folder(hub_id: str, variant: str | None) -> Path:
    """The folder in the local cache of a pipeline of the hub, downloaded if needed: safetensors only, no code."""
    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, variant=variant))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{hub_id!r} is no folder here and could not be had from the hub: {reason}. Check the name and the "
            "network (a private one needs `hf auth login`), or download it and give the folder"
        ) from error


def zoo_path(name: str) -> Path:
    """Folder of the embedded pipeline `name`."""
    zoo = zoo_module("sedimo_zoo", f"the embedded model 'zoo:{name}'")
    try:
        return existing(zoo.model_path(name))
    except ValueError as error:
        raise InputError(str(error)) from error


def zoo_module(module: str, purpose: str) -> ModuleType:
    """A module of the package sedimo-zoo; `purpose` is what it is for."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError("sedimo-zoo", "zoo", purpose) from error


def existing(path: Path) -> Path:
    """The path of data of sedimo-zoo, known to be there."""
    if not path.exists():
        raise StateError(f"sedimo-zoo is installed without its data: {path} is missing; install it again")
    return path
