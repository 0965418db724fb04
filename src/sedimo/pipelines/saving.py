"""Writing a pipeline as a diffusers folder: the denoiser anew, everything else as it came.

Components that are still the objects that were loaded are copied file by file from the source folder, so that
their bytes (and their dtype) stay; of several variants of their weights the loaded one is copied, under its
plain name. Components that the user exchanged are written by their own `save_pretrained`. A folder appears
whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sedimo.errors import InputError
from sedimo.pipelines.adapter import PipelineObject
from sedimo.pipelines.files import component_files
from sedimo.pipelines.folder import new_folder, place_file

Finish = Callable[[Path, str], None]  # the folder, and how files of other components came there (empty: none did)


@dataclass(frozen=True)
class LoadedFrom:
    """Where a pipeline's components came from: its folder, the variant of the weights, and the objects themselves."""

    folder: Path
    variant: str | None
    components: Mapping[str, object]


def save_pipeline(
    pipeline: PipelineObject, denoiser_name: str, out: Path, *, source: LoadedFrom | None, finish: Finish | None = None
) -> Path:
    """Writes `pipeline` to the new folder `out`, from which `DiffusionPipeline.from_pretrained` loads it.

    `source` is None for a pipeline that was made in memory. `finish` may add files to the folder before it takes
    the place of `out`.

    Raises:
        InputError: `out` exists and is not an empty folder.
    """
    present = {name: component for name, component in pipeline.components.items() if component is not None}
    loaded = source.components if source is not None else {}
    kept = [name for name, c in present.items() if name != denoiser_name and loaded.get(name) is c]
    with new_folder(out) as folder:
        n_copied = 0 if source is None else sum(_copy_component(source, name, folder) for name in kept)
        written = [name for name in present if name not in kept]
        for name in written:
            present[name].save_pretrained(folder / name)  # type: ignore[attr-defined]  # components of diffusers all have it
        _write_index(pipeline, folder)
        if finish is not None:
            finish(folder, _placed(n_copied, [name for name in written if name != denoiser_name]))
    return out


def save_denoiser_only(denoiser: nn.Module, out: Path, *, finish: Finish | None = None) -> Path:
    """Writes a denoiser alone to the new folder `out`; `finish` as for `save_pipeline`.

    Raises:
        InputError: `out` exists and is not an empty folder, or the network is not one of diffusers.
    """
    if not hasattr(denoiser, "save_pretrained"):
        raise InputError(f"a {type(denoiser).__name__} has no save_pretrained; only diffusers models can be saved")
    with new_folder(out) as folder:
        denoiser.save_pretrained(folder)  # type: ignore[operator]  # diffusers has no types
        if finish is not None:
            finish(folder, "")
    return out


def _copy_component(source: LoadedFrom, name: str, folder: Path) -> int:
    """Copies a component's files and returns their number."""
    files = component_files(source.folder / name, source.variant)
    for path, file in files.items():
        place_file(file, folder / name / path, link=False)
    return len(files)


def _placed(n_copied: int, written: Sequence[str]) -> str:
    """How the files of other components came into a folder, for its card."""
    copied = [f"{n_copied} copied from the source folder"] if n_copied else []
    anew = [f"those of {', '.join(written)} written anew"] if written else []
    return ", ".join(copied + anew)


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
