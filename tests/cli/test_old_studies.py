"""Studies of other versions: told apart before anything of them is read."""

from __future__ import annotations

import sqlite3

import pytest
from click.testing import CliRunner

from sedimo.cli.main import main
from sedimo.lab.study import FILE_NAME, Study


@pytest.mark.parametrize("command", [("trials",), ("allocate", "--bits", "4"), ("report",), ("attribute",)])
def test_a_study_of_the_first_release_is_refused_with_a_remedy(tmp_path, command):
    Study(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    name, *options = command
    result = CliRunner().invoke(main, [name, str(tmp_path), *options])
    assert result.exit_code == 4
    assert "was written by an older version of Sedimo" in result.stderr
    assert "use a new folder, or the version that wrote it" in result.stderr
