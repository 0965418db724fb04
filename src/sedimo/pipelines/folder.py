"""Folders and files that appear whole or not at all, and files that get into a folder by link or by copy."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sedimo.errors import InputError
from sedimo.pipelines.adapter import PipelineObject
from sedimo.pipelines.weights import component_files


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place once the block has ended without an error.

    Raises:
        InputError: `out` is a file, or a folder that is not empty and may not be overwritten.
    """
    out = out.absolute()  # the working folder has no name otherwise
    _refuse_used(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        _give_usual_permissions(folder)
        _sync(folder)
        _refuse_used(out, overwrite=overwrite)  # another one may have written there meanwhile
        _exchange(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse_used(out: Path, *, overwrite: bool) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise InputError(f"{out} exists already and is not an empty folder: choose another, or allow to overwrite it")


def write_file(target: Path, content: bytes) -> None:
    """Writes a file; an existing one is replaced at once or not at all.

    Raises:
        InputError: the folder does not exist, or `target` is a folder itself.
    """
    if not target.parent.is_dir():
        raise InputError(f"the folder of a file must exist, got {str(target)!r}: create {str(target.parent)!r} first")
    if target.is_dir():
        raise InputError(f"a file cannot take the place of a folder, got {str(target)!r}: name a file inside it")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def place_file(source: Path, target: Path, *, link: bool) -> bool:
    """Puts a file's content at `target` by a hard link where wanted and possible, else by a copy; True if linked.

    Symbolic links (as in the hub's cache) are followed to the file itself.
    """
    real = source.resolve(strict=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(real, target)
        except OSError:  # another device, or a file system without links
            pass
        else:
            return True
    shutil.copyfile(real, target)
    return False


def _exchange(folder: Path, out: Path) -> None:
    """Renames `folder` to `out`; an old `out` is moved aside first and removed last."""
    if not out.exists():
        folder.rename(out)
        _sync_directory(out.parent)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent)) / out.name
    out.rename(aside)
    try:
        folder.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    _sync_directory(out.parent)
    shutil.rmtree(aside.parent, ignore_errors=True)


def _give_usual_permissions(folder: Path) -> None:
    """Undoes the private modes of temporary folders and of safetensors; linked files belong to the source, too."""
    mask = _umask()
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            path.chmod(0o666 & ~mask)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return  # directories cannot be opened there, and renames are durable without
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
