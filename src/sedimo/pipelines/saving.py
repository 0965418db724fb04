"""Writing a pipeline as a diffusers folder: the denoiser anew, everything else as it came.

Components that are still the objects that were loaded are copied file by file from the source folder, so that
their bytes (and their dtype) stay; of several variants of their weights the loaded one is copied, under its
plain name. Components that the user exchanged are written by their own `save_pretrained`. A folder appears
whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sedimo.errors import InputError
from sedimo.pipelines.files import WEIGHTS_STEMS, WeightFiles, find_weights, is_weight_file, variants
from sedimo.pipelines.objects import PipelineObject


@dataclass(frozen=True)
class LoadedFrom:
    """Where a pipeline's components came from: its folder, the variant of the weights, and the objects themselves."""

    folder: Path
    variant: str | None
    components: Mapping[str, object]


def save_pipeline(pipeline: PipelineObject, denoiser_name: str, out: Path, *, source: LoadedFrom | None) -> Path:
    """Writes `pipeline` to the new folder `out`, from which `DiffusionPipeline.from_pretrained` loads it.

    `source` is None for a pipeline that was made in memory.

    Raises:
        InputError: `out` exists and is not an empty folder.
    """
    with _new_folder(out) as folder:
        for name, component in pipeline.components.items():
            if component is None:
                continue
            if source is not None and name != denoiser_name and source.components.get(name) is component:
                _copy_component(source.folder / name, folder / name, source.variant)
            else:
                component.save_pretrained(folder / name)  # type: ignore[attr-defined]  # components of diffusers all have it
        _write_index(pipeline, folder)
    return out


def save_denoiser_only(denoiser: nn.Module, out: Path) -> Path:
    """Writes a denoiser alone to the new folder `out`.

    Raises:
        InputError: `out` exists and is not an empty folder, or the network is not one of diffusers.
    """
    if not hasattr(denoiser, "save_pretrained"):
        raise InputError(f"a {type(denoiser).__name__} has no save_pretrained; only diffusers models can be saved")
    with _new_folder(out) as folder:
        denoiser.save_pretrained(folder)  # type: ignore[operator]  # diffusers has no types
    return out


def _copy_component(source: Path, out: Path, variant: str | None) -> None:
    out.mkdir()
    for path in source.iterdir():
        if path.is_file() and not is_weight_file(path.name):
            shutil.copyfile(path, out / path.name)
    for stem in WEIGHTS_STEMS:
        present = variants(source, stem)
        if present:
            _copy_weights(find_weights(source, stem, variant if variant in present else None), out, stem)


def _copy_weights(found: WeightFiles, out: Path, stem: str) -> None:
    if found.index is None:
        shutil.copyfile(found.files[0], out / f"{stem}.safetensors")
        return
    shutil.copyfile(found.index, out / f"{stem}.safetensors.index.json")
    for file in found.files:
        shutil.copyfile(file, out / file.name)


def _write_index(pipeline: PipelineObject, folder: Path) -> None:
    """`model_index.json` as diffusers writes it, with the class names that it forgets."""
    pipeline.save_config(folder)
    labels = getattr(pipeline, "labels", None)
    if not labels:
        return
    path = folder / "model_index.json"
    names: dict[int, list[str]] = {}
    for label, number in labels.items():
        names.setdefault(number, []).append(label)
    index = json.loads(path.read_text())
    index["id2label"] = {str(number): ", ".join(names[number]) for number in sorted(names)}
    path.write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `out` once it is complete."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already and is not an empty folder; choose another or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _sync(folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
