"""Folders and files that appear whole or not at all, and files that get into a folder by link or by copy."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sedimo.errors import InputError


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place once the block has ended without an error."""
    out = out.absolute()  # the working folder has no name otherwise
    _refuse_used(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        _settle(folder)
        _refuse_used(out, overwrite=overwrite)  # another one may have written there meanwhile
        _exchange(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse_used(out: Path, *, overwrite: bool) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise InputError(f"{out} exists already and is not an empty folder: choose another, or allow to overwrite it")


def write_file(target: Path, content: bytes) -> None:
    """Writes a file; an existing one is replaced at once or not at all."""
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
        with contextlib.suppress(OSError):  # another device, or a file system without links
            os.link(real, target)
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


def _settle(folder: Path) -> None:
    """Writes all to the disk, and undoes the private modes of temporary folders and of safetensors."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync_directory(path)
            continue
        if path.stat().st_nlink == 1:  # linked files belong to the source, too
            path.chmod(0o666 & ~mask)
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
