"""The tutorials do what they say: every command and every line of Python in them is run, in order, in one folder.

On the tiny pipeline and with few samples, so that a tutorial takes less than a minute.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from dataclasses import dataclass

import pytest
from pages import DOCS, site

import sedimo

TUTORIALS = ("first-checkpoint", "read-the-report", "search-a-recipe")
MODEL = "zoo:cifar-dit"
NEW_NAMES = re.compile(r"sedimo\.(Lab|replace|quantize)\b")  # all of them come with `sedimo.Lab`
HAS_LAB = "Lab" in sedimo.__all__
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FEW = {"--seeds": "2", "--steps": "2"}
SMALLER = {  # what a command takes instead of its usual amounts, where nobody looks at the result
    "quantize": FEW,
    "evaluate": FEW,
    "run": {**FEW, "--trials": "40", "--refine": "1"},
    "explore": {**FEW, "--trials": "24"},
}


@dataclass(frozen=True)
class Block:
    """A block of a tutorial: commands, each after a dollar sign, or Python."""

    kind: str
    text: str

    @property
    def is_pending(self) -> bool:
        return self.kind == "python" and not HAS_LAB and NEW_NAMES.search(self.text) is not None

    @property
    def commands(self) -> list[list[str]]:
        return [shlex.split(line[2:]) for line in self.text.splitlines() if line.startswith("$ ")]


def blocks_of(tutorial: str) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall((DOCS / "tutorials" / f"{tutorial}.md").read_text())]


def without_what_waits(blocks: list[Block]) -> list[Block]:
    """All commands, and Python up to the first block that waits for `sedimo.Lab`: later ones may use its names."""
    first = next((i for i, block in enumerate(blocks) if block.is_pending), len(blocks))
    return [block for i, block in enumerate(blocks) if i < first or block.kind == "console"]


def smaller(command: list[str]) -> list[str]:
    """The command with few samples and trials, whatever it says itself."""
    changed = list(command)
    for option, value in SMALLER.get(command[1], {}).items():
        if option in changed:
            changed[changed.index(option) + 1] = value
        else:
            changed += [option, value]
    return changed


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a loaded machine is no failure
@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_the_tutorial_runs(tutorial, tiny_pipeline_folder, tmp_path):
    source, names = str(tiny_pipeline_folder), {}
    with contextlib.chdir(tmp_path):
        for block in without_what_waits(blocks_of(tutorial)):
            for command in block.commands if block.kind == "console" else ():
                words = [source if word == MODEL else word for word in smaller(command)[1:]]
                code, printed = site.run_command(*words)
                assert code == 0, f"{shlex.join(command)} exited with {code}"
                assert printed.strip(), f"{shlex.join(command)} printed nothing"
            if block.kind == "python":
                exec(compile(block.text.replace(MODEL, source), tutorial, "exec"), names)


@pytest.mark.skipif(not HAS_LAB, reason="some Python of the tutorials waits for `sedimo.Lab`, and is not run yet")
def test_no_python_waits():
    assert not [block for tutorial in TUTORIALS for block in blocks_of(tutorial) if block.is_pending]


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_only_commands_of_sedimo_stand_after_a_dollar_sign(tutorial):
    commands = [command for block in blocks_of(tutorial) if block.kind == "console" for command in block.commands]
    assert commands
    assert {command[0] for command in commands} == {"sedimo"}


def test_every_tutorial_is_run():
    pages = (DOCS / "tutorials").glob("*.md")
    assert {*TUTORIALS, "index"} == {page.stem for page in pages}


def test_commands_are_made_smaller():
    few = ["--seeds", "2", "--steps", "2"]
    assert smaller(["sedimo", "run", "m", "--trials", "60"]) == [
        *("sedimo", "run", "m", "--trials", "40", *few, "--refine", "1"),
    ]
    assert smaller(["sedimo", "trials", "s"]) == ["sedimo", "trials", "s"]
