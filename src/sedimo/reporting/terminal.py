"""A page on a terminal: its answer, numbers, tables and notes; what needs room, a browser shows."""

from __future__ import annotations

import sys

from rich import markup
from rich.console import Console
from rich.table import Table as RichTable

from sedimo.reporting.page import Block, Claim, Facts, Items, Page, Table, Text, say
from sedimo.reporting.words import THIN, plain

_WIDTH = 120  # where there is no terminal


def print_page(page: Page) -> None:
    """Prints a page on standard output: figures, folded details and explanations of them are left out."""
    console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _WIDTH)
    if page.title:
        console.print(f"[bold]{_escape(page.title)}[/bold]")
    tiles = (f"{t.value} {t.unit}, {t.label}" + (f" ({t.note})" if t.note else "") for t in page.tiles)
    _print_sentences(console, page.headline, *page.warnings, *tiles)
    for section in page.sections:
        if len(page.sections) > 1:
            console.print(f"\n[bold]{_escape(section.title)}[/bold]")
        for block in section.blocks:
            _print_block(console, block)


def _print_block(console: Console, block: Block) -> None:
    match block:
        case Table():
            _print_table(console, block)
        case Facts(pairs, is_glossary=False):
            width = max(len(name) for name, _ in pairs)
            for name, value in pairs:
                console.print(f"{_escape(name.ljust(width))}  {_escape(plain(value))}", soft_wrap=True)
        case Items(texts):
            _print_sentences(console, *texts)
        case Claim(verdict, sentence, more):
            _print_sentences(console, f"{verdict}: {sentence} {' '.join(more)}")
        case Text(text, "plain"):
            _print_sentences(console, text)


def _print_table(console: Console, table: Table) -> None:
    _print_sentences(console, table.caption)
    shown = RichTable(box=None, pad_edge=False)
    for i, column in enumerate(table.columns):
        title = f"{column.value}\n{column.note}" if column.note else f"{column.value}"
        is_left = i == 0 or table.is_text(i)
        shown.add_column(_escape(title), justify="left" if is_left else "right", overflow="fold")
    group = ""
    for row in table.rows:
        if row.group != group:
            group = row.group
            shown.add_row(f"[bold]{_escape(group)}[/bold]", *([""] * (len(table.columns) - 1)))
        texts = (" ".join(part for part in say(*pair) if part) for pair in zip(row.cells, table.columns, strict=True))
        shown.add_row(*map(_escape, texts), style="bold" if row.is_marked else None)
    console.print(shown)


def _print_sentences(console: Console, *texts: str) -> None:
    for text in filter(None, texts):
        console.print(_escape(plain(text)), soft_wrap=True)


def _escape(text: str) -> str:
    """Text without markup, in characters that every terminal has."""
    return markup.escape(text.replace(THIN, " "))
