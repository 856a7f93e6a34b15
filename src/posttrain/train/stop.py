"""SIGTERM and Ctrl-C: the first asks whatever works to save and end, a second one ends the process at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """`asked` turns true when the process should save and end; long work looks at it between its pieces."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            # No clean-up on purpose: files are published whole or not at all, so there is nothing to clean.
            os._exit(128 + number)
        self.asked = True

    @contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Listen while inside. Only the main thread may."""
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
