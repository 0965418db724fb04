"""Single files are written whole, and only where a file can be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sedimo.errors import InputError
from sedimo.pipelines.folder import write_file


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    for content in (b"old", b"new"):
        write_file(tmp_path / "recipe.json", content)
        assert (tmp_path / "recipe.json").read_bytes() == content
    assert names(tmp_path) == ["recipe.json"]


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "recipe.json", b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_file(tmp_path / "recipe.json", b"new")
    assert (tmp_path / "recipe.json").read_bytes() == b"old"
    assert names(tmp_path) == ["recipe.json"]


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere/recipe.json", r"create '.*nowhere' first"), ("folder", "name a file inside it")]
)
def test_places_where_no_file_can_be_are_refused(tmp_path: Path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=message):
        write_file(tmp_path / name, b"x")
    assert names(tmp_path) == ["folder"]
