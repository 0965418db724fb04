"""Ctrl-C once: finish what runs, save it, say how to go on. Ctrl-C twice: stop at once."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from sedimo.errors import Interrupted

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether the user asked to stop; work checks it between two units that are saved."""

    def __init__(self) -> None:
        self.is_set = False

    def check(self, how_to_resume: str) -> None:
        """Ends the work when the user asked for it.

        Raises:
            Interrupted: with `how_to_resume` as its message.
        """
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
