"""The `sedimo` command: arguments in, one call of a verb, tables or JSON out.

Everything heavy is imported when a command runs, so that `sedimo --help` answers at once. With `--json`
nothing but JSON is on standard output; progress and logs go to standard error.
"""

from __future__ import annotations

import sys

import click

from sedimo import __version__
from sedimo.cli import commands, search_commands, study_commands
from sedimo.cli.console import run_guarded

EXIT_CODES = """\b
Exit codes:
  0    done
  1    an error nobody foresaw (please report it)
  2    the command line was not understood
  3    an input cannot be used: file, name, format, budget
  4    stored data contradicts itself, or an operation is not supported
  5    an optional package is missing
  130  interrupted; what was finished is saved and the same command goes on
"""


class _GuardedGroup(click.Group):
    """Turns the errors of `sedimo.errors` into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        return run_guarded(lambda: super(_GuardedGroup, self).invoke(ctx), verbose=bool(ctx.params.get("verbose")))


@click.group(
    cls=_GuardedGroup,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="sedimo")
@click.option("-v", "--verbose", is_flag=True, help="Show logs, and the traceback of an error.")
def main(verbose: bool) -> None:
    """Decide how many bits each weight of a diffusion model deserves, and write the smaller checkpoint.

    SRC is a diffusers folder, a hub id, or zoo:NAME (embedded: zoo:cifar-dit, zoo:cifar-ldm).
    """
    if verbose:
        import logging

        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")


for _command in (*commands.ALL, *study_commands.ALL, *search_commands.ALL):
    main.add_command(_command)
