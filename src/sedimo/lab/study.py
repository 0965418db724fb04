"""A study: trials and probes of one denoiser in one durable file, and the records that explain them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from sedimo.codec import from_json, to_json
from sedimo.errors import InputError, StateError
from sedimo.lab.ledger import Ledger
from sedimo.lab.trial import Execution, Setting, Trial
from sedimo.store.rows import Rows

FILE_NAME = "study.sqlite"
SPACE, GRAPH = "space", "graph"  # names of records: what the trials decide about
Record = TypeVar("Record")


class Study:
    """An open study in a folder (`study.sqlite` inside) or a file named `*.sqlite`; a context manager.

    Kinds of rows: `trial` by content key, `probe` (parts of layer-wise measurements) by content key, `execution` (what
    a part took) by the same key, and named records (`space`, `candidates`, `graph`, a table ...) by name.

    Raises:
        InputError: `create` is false and there is none.
        StateError: the file is damaged, foreign, or of another version's layout.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        """Opens the study, or creates it."""
        path = Path(path)
        self.path = path if path.suffix == ".sqlite" else path / FILE_NAME
        self._rows = Rows(self.path, create=create)
        self._ledgers: list[Ledger] = []

    def __enter__(self) -> Study:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._rows.close()

    def trials(self, setting: Setting | None = None) -> tuple[Trial, ...]:
        """All trials, or those of one setting, sorted by key."""
        found = (self._read(Trial, "trial", key, text) for key, text in self._rows.items("trial"))
        return tuple(trial for trial in found if setting is None or trial.setting == setting)

    def trial(self, key: str) -> Trial | None:
        """The trial of that name, or None when it has not been measured."""
        text = self._rows.get("trial", key)
        if text is None:
            return None
        found = self._read(Trial, "trial", key, text)
        for ledger in self._ledgers:
            ledger.trials[key] = found
        return found

    def trial_keys(self) -> frozenset[str]:
        """The names of all measured trials."""
        return frozenset(self._rows.keys("trial"))

    def put_trial(self, trial: Trial) -> None:
        """Saves a trial; durable when it returns."""
        self._rows.put("trial", trial.key, to_json(trial))

    def probe(self, kind: type[Record], key: str) -> Record | None:
        """The part of a layer-wise measurement saved under a content key, or None."""
        text = self._rows.get("probe", key)
        return None if text is None else self._read(kind, "probe", key, text)

    def execution(self, key: str) -> Execution | None:
        """What the part of that name took when it was measured; None where nothing is kept of it."""
        text = self._rows.get("execution", key)
        found = None if text is None else self._read(Execution, "execution", key, text)
        self._enter(key, found)
        return found

    def put_execution(self, key: str, execution: Execution) -> None:
        """Saves what a part took; before the part, so that no part is without."""
        self._rows.put("execution", key, to_json(execution))
        self._enter(key, execution)

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """Collects what is asked for inside: trials, and what parts of probes took."""
        ledger = Ledger()
        self._ledgers.append(ledger)
        try:
            yield ledger
        finally:
            self._ledgers.remove(ledger)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Tells ledgers that what is done inside is measuring."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            for ledger in self._ledgers:
                ledger.measuring_seconds += time.perf_counter() - begin

    def probe_keys(self) -> frozenset[str]:
        """The names of all saved parts of layer-wise measurements."""
        return frozenset(self._rows.keys("probe"))

    def put_probe(self, key: str, part: object) -> None:
        """Saves a part of a layer-wise measurement (a frozen dataclass)."""
        self._rows.put("probe", key, to_json(part))

    def record(self, kind: type[Record], name: str) -> Record:
        """A named record, such as the search space.

        Raises:
            InputError: the study has no such record.
        """
        text = self._rows.get("record", name)
        if text is None:
            known = ", ".join(self._rows.keys("record")) or "none"
            raise InputError(f"the study {self.path} has no record {name!r}; it has: {known}")
        return self._read(kind, "record", name, text)

    def record_names(self) -> tuple[str, ...]:
        """Names of the records, sorted."""
        return self._rows.keys("record")

    def has_record(self, name: str) -> bool:
        """Whether there is a record of that name."""
        return name in self.record_names()

    def put_record(self, name: str, record: object) -> None:
        """Saves a record under a name, in place of an older one."""
        self._rows.put("record", name, to_json(record))

    def claim(self, name: str, record: object) -> None:
        """Saves a record that must never change in this study; checks it when it is there already.

        Raises:
            StateError: the study was begun with another value.
        """
        text, saved = to_json(record), self._rows.get("record", name)
        if saved is None:
            self._rows.put("record", name, text)
        elif saved != text:
            raise StateError(
                f"the study {self.path} was begun with another {name}; choose another folder or the same settings"
            )

    def _enter(self, key: str, execution: Execution | None) -> None:
        for ledger in self._ledgers:
            ledger.parts[key] = execution

    def _read(self, kind: type[Record], row: str, key: str, text: str) -> Record:
        return from_json(kind, text, place=f"{self.path.name}: {row} {key[:12]}")
