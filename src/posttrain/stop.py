"""SIGTERM and Ctrl-C: the first asks the running work to save and end, the second ends the process at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from posttrain.errors import Interrupted


class StopSignal:
    """`asked` turns true when the process should save and end. Long work calls `check` between its parts."""

    def __init__(self) -> None:
        self.asked = False

    def check(self, doing: str) -> None:
        """Raise Interrupted when asked to stop. `doing` completes "stopped while …"."""
        if self.asked:
            raise Interrupted(f"stopped while {doing}; run the same command to go on")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            # No clean-up on purpose: files are published whole or not at all, so there is nothing to clean.
            os._exit(128 + number)
        self.asked = True

    @contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Handle the signals while inside. Python allows it in the main thread only."""
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
