"""Weights by layer name: from a live denoiser, or from its files one tensor at a time.

Both list every tensor named `*.weight` of two or more dimensions (embedding tables among them; the graph says
which of them are layers). Their digests change when any weight does, but a file's digest is that of its bytes
and a module's that of its tensors: the two do not agree with each other. Neither accepts weights that are
quantized already, or that adapters stand in front of.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sedimo.codec import parse_json
from sedimo.errors import InputError, StateError
from sedimo.pipelines.adapter import WeightSource

DENOISER_NAMES = ("transformer", "unet")
WEIGHTS_STEM = "diffusion_pytorch_model"  # models of diffusers; those of transformers are called `model`
WEIGHTS_STEMS = (WEIGHTS_STEM, "model")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")

DTYPES: dict[str, torch.dtype] = {  # by their names in safetensors files
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}

_SHARD = r"-\d{5}-of-\d{5}"
_VARIANT = rf"(?:\.(?P<variant>(?![\w-]*{_SHARD})[\w-]+))?"
_SUFFIX = ".weight"
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_COMPUTE_DTYPES = ("F32", "F16", "BF16")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Shape and dtype of a file's tensors, its metadata and size; a dtype may be one that `DTYPES` does not list."""

    path: Path
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    metadata: Mapping[str, str]
    file_bytes: int


def read_header(path: Path) -> FileHeader:
    """The header of a safetensors file; no tensor is read."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            tensors = {key: (tuple(s.get_shape()), str(s.get_dtype())) for key, s in slices.items()}
            return FileHeader(path, tensors, file.metadata() or {}, path.stat().st_size)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} is not a complete safetensors file: {error}. Copy or download it again") from error


def variants(folder: Path, stem: str) -> tuple[str | None, ...]:
    """The variants of weights in a folder, None for the plain ones, which come first."""
    single = re.compile(rf"{re.escape(stem)}{_VARIANT}\.safetensors")
    index = re.compile(rf"{re.escape(stem)}\.safetensors\.index{_VARIANT}\.json")
    matches = (single.fullmatch(p.name) or index.fullmatch(p.name) for p in folder.iterdir())
    return tuple(sorted({m["variant"] for m in matches if m}, key=lambda v: v or ""))


def chosen_variant(folder: Path, stem: str, variant: str | None) -> str | None:
    """The variant asked for of a component's weights; else None, the plain ones; else the only variant there is."""
    present = variants(folder, stem)
    if not present:
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLE_SUFFIXES]
        if not pickles:
            raise InputError(f"{folder} holds no weights {stem}*.safetensors")
        raise InputError(
            f"{folder} holds its weights only as {pickles[0]}, a format that can execute code when it is read. "
            "Sedimo reads safetensors only: load it where you trust it and save it again with "
            "save_pretrained(..., safe_serialization=True), or get a revision that has safetensors"
        )
    chosen = variant if variant is not None else present[0]
    if chosen not in present or (variant is None and chosen is not None and len(present) > 1):
        names = ", ".join(v or "(plain)" for v in present)
        raise InputError(f"{folder} has weights of the variants {names}, not {variant or 'plain'}; choose one of them")
    return chosen


def find_weights(folder: Path, stem: str, variant: str | None) -> tuple[tuple[Path, ...], Path | None]:
    """The files of a component's weights, of the variant that `chosen_variant` gives; and the index of several."""
    chosen = chosen_variant(folder, stem, variant)
    middle = f".{chosen}" if chosen else ""
    single = folder / f"{stem}{middle}.safetensors"
    if single.is_file():
        return (single,), None
    index = folder / f"{stem}.safetensors.index{middle}.json"
    return tuple(folder / name for name in sorted(set(_read_index(index).values()))), index


def component_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """A component's files by their new names; of its weights one variant, safetensors where there are any."""
    every = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    present = {stem: known for stem in WEIGHTS_STEMS if (known := variants(folder, stem))}
    if not present:
        return every
    found = {name: path for name, path in every.items() if not _holds_weights(path.name)}
    for stem, known in present.items():
        files, index = find_weights(folder, stem, variant if variant in known else None)
        if index is None:
            found[f"{stem}.safetensors"] = files[0]
        else:
            found |= {f"{stem}.safetensors.index.json": index, **{file.name: file for file in files}}
    return found


def _holds_weights(name: str) -> bool:
    """Whether a file of a component holds weights, in any form, or is an index of them."""
    suffixes = (".safetensors", ".onnx", ".onnx_data", ".gguf", *PICKLE_SUFFIXES)
    return Path(name).suffix in suffixes or re.search(r"\.index(\.[A-Za-z0-9_-]+)?\.json$", name) is not None


def _read_index(index: Path) -> dict[str, str]:
    plain = parse_json(index.read_bytes(), place=str(index))
    weight_map = plain.get("weight_map") if isinstance(plain, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise StateError(f"{index} must hold an object `weight_map` of tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise StateError(f"{index}: tensor {name!r} must be in a safetensors file beside the index, got {file!r}")
        if not (index.parent / file).is_file():
            raise StateError(f"{index} names the file {file}, which is missing; copy or download the folder again")
    return weight_map


class ModuleWeights:
    """Weights of a live denoiser; read as they are at that moment, a shared one under each name."""

    def __init__(self, denoiser: nn.Module) -> None:
        refuse_adapters(denoiser)
        named = denoiser.named_parameters(remove_duplicate=False)
        self._tensors = {n.removesuffix(_SUFFIX): p for n, p in named if n.endswith(_SUFFIX) and p.ndim >= 2}
        self.layer_names = tuple(self._tensors)
        for name, tensor in self._tensors.items():
            what = f"the weight of layer {name!r} is"
            if type(tensor) not in (nn.Parameter, torch.Tensor):
                kind = type(tensor).__name__
                raise InputError(f"{what} a {kind}, quantized already; quantize from the full-precision source")
            if tensor.is_meta:
                raise InputError(f"{what} on the meta device and holds no numbers; load it first")

    @cached_property
    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes, taken once."""
        total = hashlib.sha256()
        for name, tensor in self._tensors.items():
            total.update(f"{name}\0{dtype_name(tensor.dtype)}\0{tuple(tensor.shape)}\0".encode())
            total.update(self.read(name).contiguous().flatten().view(torch.uint8).numpy().data)
        return total.hexdigest()

    def read(self, layer_name: str) -> torch.Tensor:
        """The weight of a layer, detached, on the CPU in its own dtype; shares memory with a weight on the CPU."""
        return _known(layer_name, self._tensors).detach().cpu()


class FileWeights:
    """Weights of a denoiser's folder (or of the denoiser in a pipeline's folder): one file, or shards with index.

    Every header is checked when the source is made; tensors are read when asked for and do not stay mapped. `variant`
    is the `fp16` of `*.fp16.safetensors`.
    """

    def __init__(self, folder: Path | str, variant: str | None = None) -> None:
        self.folder = denoiser_folder(Path(folder))
        _refuse_quantized(self.folder)
        self.files, index = find_weights(self.folder, WEIGHTS_STEM, variant)
        homes = _tensor_homes(self.files, index)
        self._keys = {
            _module_name(key, homes): (path, key)
            for key, (path, shape) in homes.items()
            if key.endswith(_SUFFIX) and len(shape) >= 2
        }
        self.layer_names = tuple(self._keys)

    @cached_property
    def digest(self) -> str:
        """sha256 over the files' bytes, in the order of their names, taken once."""
        total = hashlib.sha256()
        for path in sorted(self.files):
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def read(self, layer_name: str) -> torch.Tensor:
        """The weight of a layer in its stored dtype, in memory of its own."""
        path, key = _known(layer_name, self._keys)
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(key).clone()
        except (SafetensorError, OSError) as error:
            raise StateError(f"{path} cannot be read any more (tensor {key!r}): {error}") from error
        return tensor


def _tensor_homes(files: Sequence[Path], index: Path | None) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor of a set of weights."""
    homes: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in files:
        tensors = read_header(path).tensors
        refuse_adapter_names(tensors, str(path))
        for key, (shape, _) in tensors.items():
            if key in homes:
                raise StateError(f"tensor {key!r} is both in {homes[key][0].name} and in {path.name} of {path.parent}")
            homes[key] = (path, shape)
    got = {key: path.name for key, (path, _) in homes.items()}
    wanted = got if index is None else _read_index(index)
    wrong = sorted(k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k))
    if wrong:
        raise StateError(
            f"index and shards in {files[0].parent} disagree about {len(wrong)} tensors: {wrong[0]!r} should be "
            f"in {wanted.get(wrong[0])}, is in {got.get(wrong[0])}"
        )
    return homes


def _module_name(key: str, keys: Mapping[str, object]) -> str:
    """The layer's name in the module: diffusers renames the attention of its oldest checkpoints on loading."""
    name = key.removesuffix(_SUFFIX)
    parent, _, last = name.rpartition(".")
    if last in _OLD_ATTENTION and all(f"{parent}.{old}{_SUFFIX}" in keys for old in _OLD_ATTENTION):
        return f"{parent}.{_OLD_ATTENTION[last]}"
    return name


def _known(layer_name: str, known: Mapping[str, Found]) -> Found:
    if layer_name not in known:
        raise InputError(f"there is no weight of a layer {layer_name!r} among {len(known)}, such as {list(known)[:3]}")
    return known[layer_name]


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `float16`."""
    return str(dtype).removeprefix("torch.")


def denoiser_folder(folder: Path) -> Path:
    """The folder of the denoiser's files: `folder`, or its `transformer` or `unet` if it is a pipeline's."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    if not (folder / "model_index.json").is_file():
        return folder
    for name in DENOISER_NAMES:
        if (folder / name).is_dir():
            return folder / name
    raise InputError(f"the pipeline in {folder} has no folder {' or '.join(DENOISER_NAMES)} with a denoiser")


def stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """The dtype of most floating-point parameters (not scales or codebooks) in files; float32 if they hold none."""
    sizes = dict.fromkeys(_COMPUTE_DTYPES, 0)
    for path in files:
        for key, (shape, dtype) in read_header(path).tensors.items():
            if key.endswith((_SUFFIX, ".bias")) and dtype in sizes:
                sizes[dtype] += math.prod(shape)
    return DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]  # the first, float32, of equals


def refuse_changed(weights: WeightSource, denoiser: nn.Module, layers: Iterable[str] | None = None) -> None:
    """Refuses a denoiser whose weights (of some `layers`) are not a source's: what is packed would not be measured."""
    live = ModuleWeights(denoiser)
    for name in live.layer_names if layers is None else set(live.layer_names).intersection(layers):
        ours = live.read(name)
        wanted = weights.read(name).to(ours.dtype)
        is_comparable = ours.shape == wanted.shape
        if not torch.equal(ours, wanted) and not (is_comparable and torch.allclose(ours, wanted, 0, 0, equal_nan=True)):
            place = f"the one in {weights.folder}" if isinstance(weights, FileWeights) else "the one of the bank"
            raise InputError(
                f"the weight of layer {name!r} is not {place} (was an adapter fused into it, or is it another "
                "model's?). Save the pipeline to a folder of its own and load that one, or pass the pipeline object "
                "itself to sedimo.load, and fit its own bank"
            )


def refuse_endless(denoiser: nn.Module) -> None:
    """Refuses a denoiser with NaN or infinity anywhere: nothing that it computes could be measured."""
    for name, tensor in (*denoiser.named_parameters(), *denoiser.named_buffers()):
        is_checked = tensor.is_floating_point() and not tensor.is_meta
        if is_checked and not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise InputError(f"the tensor {name!r} of the denoiser holds NaN or infinity; repair the checkpoint first")


def refuse_adapters(denoiser: nn.Module) -> None:
    """Refuses a denoiser with adapters."""
    for name, module in denoiser.named_modules():
        if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
            state = "merged into" if getattr(module, "merged", False) else "attached to"
            raise InputError(
                f"an adapter (LoRA) is {state} layer {name!r}: packing would freeze it into the codes unseen, or lose "
                "it. Call unload_lora_weights() first (after fuse_lora(), if its effect is wanted)."
            )


def refuse_adapter_names(names: Iterable[str], place: str) -> None:
    """Refuses stored tensors whose names tell that an adapter is among them."""
    for name in names:
        if ".base_layer." in name or ".lora_" in name or name.startswith("lora_"):
            raise InputError(f"{place} holds an adapter (LoRA), such as {name!r}: save the denoiser without it")


def _refuse_quantized(folder: Path) -> None:
    config = folder / "config.json"
    plain = parse_json(config.read_bytes(), place=str(config)) if config.is_file() else {}
    quantization = plain.get("quantization_config") if isinstance(plain, dict) else None
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"the denoiser in {folder} is quantized already (by {method!r}); quantize from its full-precision source"
        )
