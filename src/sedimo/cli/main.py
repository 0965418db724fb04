"""The `sedimo` command, made from the jobs' settings: arguments in, one job, its page or JSON out.

Everything heavy is imported when a command runs, so that `sedimo --help` answers at once. With `--json` nothing but
JSON is on standard output; progress and logs go to standard error.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

import click

import sedimo.jobs
from sedimo import __version__
from sedimo.cli.console import ConsoleProgress, run_guarded
from sedimo.settings import REQUIRED, Option, leaves, one_of

if TYPE_CHECKING:
    from sedimo.jobs.job import Job

EXIT_CODES = """\b
Exit codes:
  0    done
  1    an unexpected error (please report it)
  2    the command line was not understood
  3    an input cannot be used: file, name, format, budget
  4    stored data contradicts itself, or an operation is not supported
  5    an optional package is missing
  130  interrupted; what was finished is saved and the same command goes on
"""
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class _Argument(click.Argument):
    """An argument that help says something of."""

    words = ""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.make_metavar(ctx), self.words


class _Option(click.Option):
    """An option whose default is shown as it is typed."""

    def get_help_extra(self, ctx: click.Context) -> click.types.OptionHelpExtra:
        extra = super().get_help_extra(ctx)
        if "default" in extra and isinstance(self.show_default, str):
            extra["default"] = self.show_default  # click puts a text into brackets
        return extra


def _parameter(option: Option, *, is_hidden: bool = False) -> click.Parameter:
    """What click reads an option with; its name is the keyword of Python."""
    more: dict[str, Any] = {"type": _kind(option), "required": option.default is REQUIRED, "metavar": option.metavar}
    if not option.flags and not option.no:
        found = _Argument([option.word], nargs=-1 if get_origin(option.kind) is tuple else 1, **more)
        found.words = option.words
        return found
    flags = [*option.flags]
    if option.kind is bool:
        flags = ["/".join(flag for flag in (*flags, option.no) if flag)]
        more = {"is_flag": True, "default": None, **({} if option.flags else {"flag_value": True})}
    elif option.bare is not None:
        more |= {"is_flag": False, "flag_value": option.bare}
    elif option.default not in (REQUIRED, None, "", ()):
        more |= {"show_default": str(option.default)}
    return _Option([*flags, option.word], help=option.words, hidden=is_hidden, **more)


def _kind(option: Option) -> Any:
    """Its type as click knows it."""
    if option.place:
        is_file = option.place == "file"
        return click.Path(exists=True, dir_okay=not is_file, file_okay=is_file, path_type=Path)
    if option.choices:
        return click.Choice(option.choices)
    if option.kind is Path:
        return click.Path(path_type=Path)
    if option.kind is int and (math.isfinite(option.least) or math.isfinite(option.most)):
        low, high = (int(end) if math.isfinite(end) else None for end in (option.least, option.most))
        return click.IntRange(low, high)
    return option.kind if option.kind in (int, float) else str


def _value(option: Option, given: object) -> object:
    """What was given as the field holds it; an error names the flag."""
    if option.kind is bool and not option.flags:
        return False  # a flag that says no
    value = option.parse(str(given)) if option.parse is not None else given
    option.refuse(value, option.flags[-1] if option.flags else option.metavar or option.word)
    return value


class _JobCommand(click.Command):
    """A command that does a job. Options stand under headings; those of one method or treatment are asked for."""

    def __init__(self, name: str, job: Job[Any, Any]) -> None:
        own = {leaf.word: leaf for leaf in leaves(job.settings, "Options")}
        taken = {flag for leaf in own.values() for flag in leaf.flags}
        offers = {
            one.name: [
                replace(leaf, flags=tuple(flag for flag in leaf.flags if flag not in taken))
                for leaf in leaves(one.knobs)
                if leaf.word not in own
            ]
            for one in job.offers()
        }
        self._job, self._offers, self._leaves, self._shown = job, offers, own, [*own.values()]
        for owner, offered in offers.items():
            fresh = {leaf.word: leaf for leaf in offered if leaf.word not in self._leaves}  # the others are shared
            self._leaves |= fresh
            self._shown += [*fresh.values()][:1] if owner in job.offered["treatments"] else []
        self._own = [click.Option(["--json", "as_json"], is_flag=True, help="Print JSON and nothing else.")]
        if job.plan is not None:
            self._own.append(click.Option(["--dry-run"], is_flag=True, help="Tell what it takes, and stop."))
        if self._offers:
            text = "Say what a method or treatment is and what its options are, and stop."
            more: dict[str, Any] = {"is_eager": True, "expose_value": False, "callback": self._help_method}
            self._own.append(click.Option(["--help-method"], metavar="NAME", help=text, **more))
        super().__init__(
            name,
            params=[
                *(_parameter(leaf, is_hidden=leaf not in self._shown) for leaf in self._leaves.values()),
                *self._own,
            ],
            callback=self._do,
            help=re.sub(r"\n\n(?=\w+  )", "\n\n\b\n", job.words),  # click leaves the lines of a table alone
            context_settings=_CONTEXT,
        )

    def _do(self, *, as_json: bool, dry_run: bool = False, **values: object) -> None:
        given = {word: _value(self._leaves[word], one) for word, one in values.items() if one not in (None, ())}
        settings = self._job.read(given, command=shlex.join(["sedimo", *sys.argv[1:]]))
        job, shown = self._job, ConsoleProgress()
        work, page = (job.plan, job.plan_page) if dry_run and job.plan is not None else (job.run, job.page)
        if dry_run:
            shown.start(1, "planning")
        try:
            found = work(settings, shown)
        finally:
            shown.done()
        if as_json:
            click.echo(json.dumps(job.as_json(found), indent=1, sort_keys=True, ensure_ascii=False))
        else:
            from sedimo.reporting.terminal import print_page  # not for help, which answers at once

            print_page(page(found))

    def _help_method(self, ctx: click.Context, _param: click.Parameter, name: str | None) -> None:
        if name is None:
            return
        one_of(self._offers)(name, "--help-method")
        words, formatter = next(one.words for one in self._job.offers() if one.name == name), ctx.make_formatter()
        told = {"about": words.summary, "sees": words.sees, "misses": words.misses, "source": words.source}
        _write_panel(formatter, name, [(what, text) for what, text in told.items() if text])
        if records := _records(ctx, map(_parameter, self._offers[name])):
            formatter.write_paragraph()
            _write_panel(formatter, f"Options of {name}", records)
        click.echo(formatter.getvalue().rstrip("\n"))
        ctx.exit()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options under the headings of their settings, in as few lines as can be."""
        panels: dict[str, list[click.Parameter]] = {}
        for leaf in sorted(self._shown, key=lambda leaf: leaf.panel in ("Formats", "Sampling", "")):  # which many share
            panels.setdefault(leaf.panel or "Treatments", []).append(_parameter(leaf))
        panels["Output and help"] = [*self._own, *(p for p in self.get_params(ctx) if p not in self.params)]
        formatter.write_paragraph()
        for panel, parameters in panels.items():
            _write_panel(formatter, panel, _records(ctx, parameters))
        if self._offers:
            names = ((kind, ", ".join(found)) for kind, found in self._job.offered.items() if found)
            _write_panel(formatter, "What NAME may be", [*names])


def _records(ctx: click.Context, parameters: Iterable[click.Parameter]) -> list[tuple[str, str]]:
    return [record for one in parameters if (record := one.get_help_record(ctx)) is not None]


def _write_panel(formatter: click.HelpFormatter, heading: str, lines: Sequence[tuple[str, str]]) -> None:
    """A heading with its lines; no empty line stands around it."""
    formatter.write_heading(heading)
    formatter.indent()
    formatter.write_dl(lines)
    formatter.dedent()


class _Jobs(click.Group):
    """Loads a job when it is asked for, and turns the errors of `sedimo.errors` into a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(sedimo.jobs.JOBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in sedimo.jobs.JOBS:
            return None
        return _JobCommand(cmd_name, importlib.import_module(f"sedimo.jobs.{cmd_name}").JOB)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names with the first lines of the jobs' modules, none of which is imported for that."""
        folder = Path(inspect.getfile(sedimo.jobs)).parent
        texts = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(n, (ast.get_docstring(ast.parse(t)) or "").partition("\n")[0]) for n, t in texts.items()]
            )

    def invoke(self, ctx: click.Context) -> object:
        return run_guarded(lambda: super(_Jobs, self).invoke(ctx), verbose=bool(ctx.params.get("verbose")))


@click.group(cls=_Jobs, epilog=EXIT_CODES, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="sedimo")
@click.option("-v", "--verbose", is_flag=True, help="Show logs, and the traceback of an error.")
def main(verbose: bool) -> None:
    """Decide how many bits each weight of a diffusion model deserves, and write the smaller checkpoint.

    SRC is a diffusers folder, a hub id, or zoo:NAME (embedded: zoo:cifar-dit, zoo:cifar-ldm).
    """
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
