"""Nothing but a method's own file writes the method's name: all else takes its constant, a trait or its words."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import sedimo
from sedimo.methods import METHODS

ROOT = Path(sedimo.__file__).parent
OTHER_MEANINGS = {  # the same word for something else
    ("hybrid", "jobs/quantize.py"): "a key of --json",
    ("hybrid", "methods/predictor/training.py"): "a ranking loss",
    ("uniform", "jobs/evidence.py"): "a kind of point of a curve",
    ("uniform", "reporting/explanation.py"): "a kind of point of a curve",
    ("uniform", "methods/portfolio.py"): "a kind of entrant",
    ("error", "methods/predictor/goal.py"): "what Python makes of warnings",
    ("auto", "reporting/drawing.py"): "the aspect of an image",
}
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def texts_of(path: Path) -> Iterator[str]:
    """The literal texts of a module but its docstrings."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings = {node.body[0].value for node in nodes if isinstance(node, _DOCUMENTED) and ast.get_docstring(node)}
    return (node.value for node in nodes if isinstance(node, ast.Constant) and node not in docstrings)


def test_a_method_is_named_in_its_own_file_only():
    names, places = {method.name for method in METHODS}, defaultdict(set)
    for path in ROOT.rglob("*.py"):
        for text in names.intersection(text for text in texts_of(path) if isinstance(text, str)):
            places[text].add(path.relative_to(ROOT).as_posix())
    meant = {(name, place) for name, found in places.items() for place in found}
    assert meant >= OTHER_MEANINGS.keys()
    homes = {name: [place for n, place in sorted(meant - OTHER_MEANINGS.keys()) if n == name] for name in names}
    assert all(len(found) == 1 and found[0].startswith("methods/") for found in homes.values()), homes
