"""The command line, called in this process."""

from __future__ import annotations

import json

from click.testing import CliRunner

from sedimo.cli.main import main


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}\n{result.exception!r}"
    return result


def run_json(*arguments):
    return json.loads(run(*arguments, "--json").stdout)
