"""Nothing that executes what it reads, also where ruff's ban is lifted to let diffusers in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BANNED = {"pickle", "cPickle", "dill", "shelve", "joblib", "torch.load"}


def banned_names(source: str) -> set[str]:
    """Banned modules that are imported, and `torch.load` however it is reached."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.split(".")[0], *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return found & BANNED


@pytest.mark.parametrize("folder", ["src", "zoo", "benchmarks", "scripts"])
def test_no_code_reads_pickles(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(f.relative_to(ROOT)): names for f in files if (names := banned_names(f.read_text(encoding="utf-8")))}
    assert found == {}


def test_the_search_sees_what_it_looks_for():
    source = "import pickle as p\nfrom torch import load\nimport torch\ntorch.load('x')\nimport json\njson.load(f)\n"
    assert banned_names(source) == {"pickle", "torch.load"}
