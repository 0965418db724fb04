"""What pages say of the command line and of each other is true; `make docs` looks at the rest."""

from __future__ import annotations

import re
from functools import cache

import pytest
from pages import DOCS, ROOT, site

import sedimo

PAGES = sorted([ROOT / "README.md", *(page for page in DOCS.rglob("*.md") if "adr" not in page.parts)])
SHELL = re.compile(r"^```(?:sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PUBLIC = re.compile(r"\bsedimo\.(\w+)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OTHERS = {"--help", "--help-method", "--json", "--version"}  # of every command, or of `sedimo` itself
BENCHMARKS = re.compile(r"`[^`]*\.py[^`]*`|\(`--[^`]*`\)")  # commands of benchmarks have options of their own
CONFLICT = re.compile(r"^(<{7}|={7}$|>{7})", re.MULTILINE)  # what an unfinished merge leaves
NAMED_PAGE = re.compile(r"docs/[\w/-]+\.md")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def named(page):
    return str(page.relative_to(ROOT))


@cache
def help_of(command):
    return site.whole_help_of(command)


@cache
def all_help():
    return " ".join(help_of(command) for command in site.command_names())


def test_all_commands_are_found():
    assert {"allocate", "compare", "evaluate", "explore", "inspect", "quantize", "run"} <= set(site.command_names())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_have_the_options_that_pages_give_them(page):
    for block in SHELL.findall(page.read_text()):
        for line in block.splitlines():
            words = line.removeprefix("$ ").split("#")[0].split()
            if words[:1] != ["sedimo"]:
                continue
            assert words[1] in site.command_names(), line
            for option in {*OPTION.findall(" ".join(words))} - OTHERS:
                assert option in help_of(words[1]), f"{named(page)}: {line}"


@pytest.mark.parametrize("page", [p for p in PAGES if "results" not in p.parts], ids=named)
def test_options_named_in_the_text_exist(page):
    for option in {*OPTION.findall(BENCHMARKS.sub("", page.read_text()))} - OTHERS:
        assert option in all_help(), f"{named(page)}: {option}"


def test_public_names_that_pages_use_exist():
    for page in PAGES:
        used = {name for block in PYTHON.findall(page.read_text()) for name in PUBLIC.findall(block)}
        assert used <= set(sedimo.__all__), named(page)


@pytest.mark.parametrize("page", [*PAGES, *DOCS.glob("adr/*.md")], ids=named)
def test_no_page_holds_two_versions_of_a_passage(page):
    assert not CONFLICT.search(page.read_text())


def test_pages_that_the_code_names_exist():
    texts = [path.read_text() for kind in ("py", "j2") for path in (ROOT / "src").rglob(f"*.{kind}")]
    found = {name for text in texts for name in NAMED_PAGE.findall(text)}
    assert found
    assert {name for name in found if not (ROOT / name).is_file()} == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_on_a_code_host_too(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{named(page)}: {target}"


def test_what_is_generated_has_its_mark_on_one_page():
    marks = [mark for page in DOCS.rglob("*.md") for mark in site.MARK.findall(page.read_text())]
    assert sorted(marks) == sorted(site.GENERATED)


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/mermaid.js"></script>',
        '<link href="https://fonts.example/css?family=Roboto" rel="stylesheet">',
        '<img alt="map" src="//pictures.example/map.png">',
    ],
)
def test_a_page_that_asks_another_server_is_refused(html):
    with pytest.raises(ValueError, match="asks another server"):
        site.on_post_page(f"<html>{html}</html>", page="a page")


def test_links_to_other_servers_are_fine():
    html = '<a href="https://arxiv.org/abs/2412.14628">paper</a><img src="pictures/map.png"><link rel="icon">'
    assert site.on_post_page(html, page="a page") == html


def test_figures_in_tables_stay_on_one_line():
    shown = site.on_page_markdown("a ± b\n| `uaq4` | 1.0 ± 0.2 | +1.5 [+1.0, +2.0], n = 8 |")
    assert shown == "a ± b\n| `uaq4` | 1.0\u00a0±\u00a00.2 | +1.5 [+1.0,\u00a0+2.0], n = 8 |"
