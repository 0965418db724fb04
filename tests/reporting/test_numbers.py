"""Every number that pages showed at commit f8fa1a1, before there was a `Page`, is still shown."""

from __future__ import annotations

import json
from pathlib import Path

import page_examples
import pytest
from numbers_in import numbers

from sedimo.reporting.html import render

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "page_numbers.json").read_text())


@pytest.fixture(scope="module")
def pages():
    return page_examples.pages()


@pytest.mark.parametrize("name", GOLDEN)
def test_every_number_shown_before_is_shown(name, pages):
    assert set(GOLDEN[name]) - numbers(render(pages[name])) == set()


def test_every_page_is_held_against_what_was_shown(pages):
    assert set(GOLDEN) == set(pages)
