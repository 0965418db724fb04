"""Every command does what it did when the goldens were recorded: JSON, keys of studies, recipes, packed bytes, figures.

Keys, recipes and bytes are compared exactly, numbers with a tolerance (`replaying.RELATIVE`), so that the goldens hold
on machines with other instruction sets and thread counts. `record.py` records them again.
"""

from __future__ import annotations

import json

import pytest
import torch
from commands import CASES, ERRORS
from replaying import GOLDENS, Workshop, differences, page_cells


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("replay"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # as when they were recorded


def golden(name):
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_command_does_what_it_did(workshop, case):
    found = differences(golden(case.name), workshop.run(case))
    assert not found, "\n".join(found[:40])


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.name)
def test_a_bad_order_is_refused_as_it_was(workshop, case):
    assert workshop.run(case, is_error=True) == golden("errors")[case.name]


def test_every_golden_has_its_case():
    assert {file.stem for file in GOLDENS.glob("*.json")} == {case.name for case in CASES} | {"errors"}
    assert golden("errors").keys() == {case.name for case in ERRORS}


def test_a_page_may_look_different_but_must_say_the_same():
    page = "<style>td{}</style><table><tr><td><code>a.<wbr>b</code></td><td>(1.50 ± 0.2) 10⁻⁵</td><td>3 s</td></tr>"
    kept = page_cells(page)["cells"]
    assert kept == ["(1.50 ± 0.2) 10⁻⁵", "a.b"]
    for other, lost in (
        ("<ul><li>a.b <b>(1.51 ± 0.2) 10⁻⁵</b> , once", ""),
        ("<ul><li>a.b <b>(1.60 ± 0.2) 10⁻⁵</b> once", "1.50"),
        ("<ul><li>a.b <b>(1.50 ± 0.2) 10⁻⁴</b> once", "1.50"),
        ("<ul><li>a.c <b>(1.50 ± 0.2) 10⁻⁵</b> once", "a.b"),
    ):
        told = differences({"pages": {"x": kept}}, {"pages": {"x": page_cells(other)}})
        assert (lost in told[0]) if lost else told == []
