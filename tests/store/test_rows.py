"""Rows that survive a kill, and files that are refused."""

from __future__ import annotations

import functools
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest

from sedimo.errors import InputError, StateError
from sedimo.store import APPLICATION_ID, Rows

WRITER = """
import os, sys
from pathlib import Path
from sedimo.store import Rows
rows = Rows(Path(sys.argv[1]))
for i in range(100000):
    rows.put("trial", f"{i:06d}", {"i": i})
    print(i, flush=True)
"""


def test_a_row_comes_back_after_the_file_is_closed(tmp_path):
    path = tmp_path / "new" / "study.sqlite"
    with closing(Rows(path)) as rows:
        rows.put("trial", "b", {"x": 1})
        rows.put("trial", "a", {"x": 2})
        rows.put("probe", "a", [])
    with closing(Rows(path, create=False)) as rows:
        assert rows.all(dict[str, int], "trial") == ({"x": 2}, {"x": 1})
        assert rows.keys("probe") == ("a",)
        assert rows.get(dict[str, int], "trial", "c") is None
        rows.put("trial", "a", {"x": 3})
        assert rows.get(dict[str, int], "trial", "a") == {"x": 3}
        assert rows.text("trial", "a") == '{"x":3}'
        with pytest.raises(StateError, match=r"study.sqlite: trial a.* must be of type str"):
            rows.get(dict[str, str], "trial", "a")


def test_many_rows_are_written_together_or_not_at_all(tmp_path):
    with closing(Rows(tmp_path / "s.sqlite")) as rows:
        with pytest.raises(TypeError, match="a record cannot hold a object"):
            rows.put_many("trial", {"a": 1, "b": object()})
        with pytest.raises(sqlite3.Error):
            rows.put_many("trial", {"a": 1, ("b",): 2})
        assert rows.keys("trial") == ()
        rows.put("trial", "c", 2)
        assert rows.keys("trial") == ("c",)


def test_what_was_put_survives_a_killed_writer(tmp_path):
    path = tmp_path / "s.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout]
    writer.wait()
    writer.stdout.close()
    with closing(Rows(path)) as rows:
        found = [int(key) for key in rows.keys("trial")]
        assert found[: len(acknowledged)] == acknowledged
        assert len(found) <= len(acknowledged) + 1
        rows.put("trial", "after", 1)


def test_two_writers_wait_for_each_other(tmp_path):
    path = tmp_path / "s.sqlite"
    code = textwrap.dedent(
        """
        import sys
        from contextlib import closing
        from pathlib import Path
        from sedimo.store import Rows
        with closing(Rows(Path(sys.argv[1]))) as rows:
            for i in range(30):
                rows.put("trial", f"{sys.argv[2]}{i}", 1)
        """
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [w.wait() for w in writers] == [0, 0]
    with closing(Rows(path)) as rows:
        assert len(rows.keys("trial")) == 60


class BusyAtFirst(sqlite3.Connection):
    """Refuses another journal twice, as SQLite does at once when two processes create one file."""

    refusals = 2

    def execute(self, text, *parameters):
        if text.startswith("PRAGMA journal_mode") and BusyAtFirst.refusals:
            BusyAtFirst.refusals -= 1
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
            raise error
        return super().execute(text, *parameters)


def test_opening_waits_while_another_process_creates_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=BusyAtFirst))
    with closing(Rows(tmp_path / "s.sqlite")) as rows:
        rows.put("trial", "a", 1)
        assert rows.keys("trial") == ("a",)
    assert BusyAtFirst.refusals == 0


def test_a_foreign_file_is_refused(tmp_path):
    text = tmp_path / "text"
    text.write_text("not a database, but long enough to be looked at " * 40)
    with pytest.raises(StateError, match="not a readable file of rows"):
        Rows(text)
    other = tmp_path / "other"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(StateError, match="another program"):
        Rows(other)
    with pytest.raises(InputError, match="no study"):
        Rows(tmp_path / "nowhere", create=False)


@pytest.mark.parametrize(("version", "age"), [(1, "an older"), (99, "a newer")])
def test_another_layout_is_refused(tmp_path, version, age):
    path = tmp_path / "s.sqlite"
    Rows(path).close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()
    with pytest.raises(
        StateError, match=rf"{age} version of Sedimo \(layout version {version}, this one .*use a new folder"
    ):
        Rows(path)
