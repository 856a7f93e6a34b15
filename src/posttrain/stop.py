"""SIGTERM and Ctrl-C: the first signal requests a save and a stop, the second ends the process at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from posttrain.errors import Interrupted


class StopSignal:
    """`asked` becomes true when the process should save its state and end. Long work calls `check` between its parts."""

    def __init__(self) -> None:
        self.asked = False

    def check(self, doing: str) -> None:
        """Raise Interrupted after a request to stop. `doing` completes "stopped while …"."""
        if self.asked:
            raise Interrupted(f"stopped while {doing}; run the same command to go on")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            # No clean-up is needed: files are published completely or not at all.
            os._exit(128 + number)
        self.asked = True

    @contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Handle the signals inside the block. Python allows this only in the main thread."""
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
