"""The one public door: its names, its weight, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import sedimo

MAX_NAMES = 30
HEAVY = ("torch", "diffusers", "transformers", "numba", "scipy", "matplotlib", "click", "rich")


def test_the_door_is_small():
    assert len(sedimo.__all__) <= MAX_NAMES


@pytest.mark.parametrize("name", sedimo.__all__)
def test_every_name_resolves_and_is_no_module(name):
    value = getattr(sedimo, name)
    assert callable(value)
    assert value.__doc__, f"{name} has no docstring"
    assert name in dir(sedimo)


def test_names_are_listed_without_the_old_ones_and_with_the_version():
    assert "__version__" in dir(sedimo)
    assert not {"attribute", "explore", "probe"} & {*dir(sedimo)}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="attribute nothing"):
        sedimo.nothing  # noqa: B018


def test_a_bare_import_loads_nothing_heavy():
    code = f"import sedimo, sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


def test_the_version_is_that_of_the_changelog_and_the_package():
    from importlib.metadata import version
    from pathlib import Path

    changelog = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    assert f"## [{sedimo.__version__}]" in changelog
    assert version("sedimo") == sedimo.__version__
