"""The command line, called in this process: arguments in; exit code, standard output and standard error out."""

from __future__ import annotations

import json
from dataclasses import dataclass

from click.testing import CliRunner

from sedimo.cli.main import main


@dataclass(frozen=True)
class Answer:
    """What a command gave."""

    exit_code: int
    stdout: str
    stderr: str
    output: str  # both, as a terminal shows them
    exception: BaseException | None


def call(*arguments):
    """The only place that knows by which library the command line is made."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return Answer(result.exit_code, result.stdout, result.stderr, result.output, result.exception)


def run(*arguments, code=0):
    answer = call(*arguments)
    assert answer.exit_code == code, f"{answer.exit_code}: {answer.output}\n{answer.exception!r}"
    return answer


def run_json(*arguments):
    return json.loads(run(*arguments, "--json").stdout)
