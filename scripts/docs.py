"""What the site holds that code says already: help of every command, the public door, the glossary of the report.

`mkdocs build` calls the `on_...` functions (`hooks` in mkdocs.yml). A page marks the place with a comment such as
`<!-- generated: glossary -->`. So nothing is written twice, no generated page is committed, and what is generated
cannot be out of date. A built page that asks another server for anything is an error.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TABLE_ROW = re.compile(r"(?m)^\|.*$")
UNBROKEN = re.compile(r"(?<=\d) (?=± \d)|(?<=±) (?=\d)|(?<=\d,) (?=[+-]?\d[\d.]*\])")
MARK = re.compile(r"<!-- generated: ([a-z-]+) -->")
REQUEST = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//"
    r"|<link(?![^>]*rel=\"?canonical)[^>]*\shref=\"?(?:https?:)?//"
)
HELP_COLUMNS = "92"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Puts what is generated in the place of its mark, and keeps figures in tables on one line."""
    return TABLE_ROW.sub(lambda row: UNBROKEN.sub("\N{NO-BREAK SPACE}", row[0]), MARK.sub(_generated, markdown))


def on_post_page(output: str, page: object, **_: object) -> str:
    """Refuses a page that would ask another server for a script, a style, a font or a picture."""
    asked = REQUEST.search(output)
    if asked is not None:
        raise ValueError(f"{page} asks another server: {output[asked.start() : asked.end() + 60]}")
    return output


def _generated(mark: re.Match[str]) -> str:
    return GENERATED[mark[1]]()


def run_command(*arguments: str) -> tuple[int, str]:
    """The exit code of the `sedimo` command called in this process, and what it printed on standard output."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["sedimo"].split(":")
    main, printed, code = getattr(importlib.import_module(module), name), io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["sedimo", *arguments]), contextlib.redirect_stdout(printed):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    return code, printed.getvalue()


def help_of(*command: str) -> str:
    """What `sedimo COMMAND --help` prints."""
    return printed_by(*command, "--help")


def printed_by(*arguments: str) -> str:
    """What the `sedimo` command prints, without colours and as wide as a page."""
    plain = {"COLUMNS": HELP_COLUMNS, "TERMINAL_WIDTH": HELP_COLUMNS, "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, plain):
        code, text = run_command(*arguments)
    if code:
        raise ValueError(f"sedimo {' '.join(arguments)} exited with {code}")
    return text.strip("\n")


def whole_help_of(command: str) -> str:
    """The help of a command, and the options that it has for single methods and treatments."""
    return "\n\n".join([help_of(command), *(printed_by(command, "--help-method", name) for name in offers(command))])


def offers(command: str) -> tuple[str, ...]:
    """The methods and treatments that a command has options of."""
    from sedimo.jobs import JOBS

    module = next(name for name in JOBS if name.removesuffix("_") == command)
    return tuple(one.name for one in importlib.import_module(f"sedimo.jobs.{module}").JOB.offers())


def command_names() -> tuple[str, ...]:
    """The commands, as `sedimo --help` lists them."""
    listed = re.split(r"(?m)^\W*Commands\b.*$", help_of())[-1]
    return tuple(re.findall(r"(?m)^[│|]?\s{0,3}([a-z]{3,})\s{2,}\S", listed))


def command_line() -> str:
    """A section with the help of each command, the options of methods and treatments included."""
    sections = [("sedimo", help_of()), *((f"sedimo {name}", whole_help_of(name)) for name in command_names())]
    return "\n\n".join(f"## {title}\n\n```text\n{text}\n```" for title, text in sections)


def python_door() -> str:
    """An entry of mkdocstrings for every public name, verbs first, under the name that people import."""
    import sedimo

    verbs, records = [], []
    for name in sorted(sedimo.__all__):
        value = getattr(sedimo, name)
        if "<locals>" in value.__qualname__:  # an old name that warns
            continue
        home = f"{value.__module__}.{value.__qualname__}"
        entry = f"::: {home}\n    options:\n      heading: sedimo.{name}\n      toc_label: {name}\n"
        tensors = [base for base in getattr(value, "__mro__", ()) if base.__module__ == "torch"]
        if tensors:  # its own members, not those that it takes over
            own = [member for member in vars(value) if not member.startswith("_") and not hasattr(tensors[0], member)]
            entry += f"      members: {[*own, 'dequantize']}\n"
        (records if inspect.isclass(value) else verbs).append(entry)
    return "\n".join(["## Functions\n", *verbs, "## Classes\n", *records])


def glossary() -> str:
    """The words of the report."""
    from sedimo.reporting.words import EXPLANATION_GLOSSARY, GLOSSARY

    words = sorted((GLOSSARY | EXPLANATION_GLOSSARY).items(), key=lambda entry: entry[0].lower())
    return "\n\n".join(f"**{word}.** {meaning}" for word, meaning in words)


GENERATED: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "python": python_door,
    "glossary": glossary,
}
