"""Parts of a measurement: saved when they are finished, not measured again, and safe to stop between.

Ctrl-C once: finish what runs, save it, say how to go on. Ctrl-C twice: stop at once.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

from sedimo.bank import SILENT, Progress
from sedimo.codec import content_key
from sedimo.errors import Interrupted
from sedimo.lab.objective import counted_calls
from sedimo.lab.study import Execution, Setting, Study, measuring
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import Trajectory, record

logger = logging.getLogger(__name__)

Part = TypeVar("Part")
Result = TypeVar("Result")


class StopRequest:
    """Whether the user asked to stop; work checks it between two units that are saved."""

    def __init__(self) -> None:
        self.is_set = False

    def check(self, how_to_resume: str) -> None:
        """Ends the work when the user asked for it."""
        if self.is_set:
            raise Interrupted(how_to_resume)


@contextlib.contextmanager
def graceful_interrupt() -> Iterator[StopRequest]:
    """While inside, the first SIGINT sets the request and the second one raises KeyboardInterrupt.

    Outside the main thread signals cannot be caught; then the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if request.is_set:
            raise KeyboardInterrupt
        request.is_set = True
        logger.warning("finishing what runs; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


class Parts:
    """The parts of one measurement of a denoiser, kept in a study if there is one, with what each took."""

    def __init__(self, adapter: PipelineAdapter, study: Study | None, progress: Progress = SILENT) -> None:
        self._adapter, self._study, self._progress = adapter, study, progress
        self._taken: dict[str, Execution] = {}

    def trajectory(self, sampling: Sampling, setting: Setting, *, at_most: int | None = None) -> Trajectory:
        """The recorded calls of a plan; they are too large to keep, but what the first time took is kept."""
        key = content_key({"trajectory": setting})
        found, execution = self._timed(lambda: record(self._adapter, sampling, at_most=at_most))
        kept = self._study.execution(key) if self._study else None
        if self._study and kept is None:
            self._study.put_execution(key, execution)
        self._taken[key] = kept or execution
        return found

    def part(self, kind: type[Part], key: str, measure: Callable[[], Part]) -> Part:
        """The part of that name from the study, or measured now and saved there; without a study, measured."""
        saved = self._study.probe(kind, key) if self._study else None
        if self._study and saved is not None:
            kept = self._study.execution(key)
            self._taken |= {} if kept is None else {key: kept}
            return saved
        part, self._taken[key] = self._timed(measure)
        if self._study:
            self._study.put_execution(key, self._taken[key])
            self._study.put_probe(key, part)
        return part

    def each(
        self, kind: type[Part], label: str, n_parts: int, works: Iterable[tuple[str, Callable[[], Part]]]
    ) -> Iterator[Part]:
        """The parts of `n_parts` works (content key, and how to measure it), one after another: the one resumable loop.

        People see how far it is under `label`. Ctrl-C once finishes and saves the part that is being measured.
        """
        with self.stage(label, n_parts) as stop:
            for key, measure in works:
                yield self.part(kind, key, measure)
                self._progress.advance(1)
                self.check(stop)

    @contextlib.contextmanager
    def stage(self, label: str, n_steps: int) -> Iterator[StopRequest]:
        """A stage of the work that people see, and that Ctrl-C may ask to end (see `check`)."""
        self._progress.start(n_steps, label)
        with graceful_interrupt() as stop:
            yield stop
        self._progress.done()

    @property
    def execution(self) -> Execution:
        """What all parts so far took together, whenever they were measured."""
        taken = self._taken.values()
        return Execution.here(sum(e.seconds for e in taken), sum(e.n_calls for e in taken))

    def check(self, stop: StopRequest) -> None:
        """Ends the work when the user asked for it, and says where what was measured is."""
        kept = f"saved in {self._study.path}; run the same command again to go on" if self._study else ""
        stop.check(f"interrupted: what was measured is {kept or 'lost; give a study to keep it'}")

    def _timed(self, measure: Callable[[], Result]) -> tuple[Result, Execution]:
        with measuring(self._study), counted_calls(self._adapter) as calls:
            begin = time.perf_counter()
            found = measure()
        return found, Execution.here(time.perf_counter() - begin, len(calls))
