"""Incremental decoding of a completion, and its stop strings.

A token may end within a character, and a stop string may span tokens. Text that could still become either is held back until
the next token decides. Only the newest tokens are decoded again.
"""

from collections.abc import Callable, Sequence


class TextStream:
    """Returns text as soon as it is final. After a stop string, `stopped` is true and no more text is returned."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), *, after: int = 0) -> None:
        self._decode, self._stop, self._after = decode, tuple(stop), after
        self._ids: list[int] = []
        self._start = self._read = 0
        self._pending = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token and return the text that became final. Stop strings are ignored in the first `after` tokens."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :])

    def end(self) -> str:
        """Return the text that was held back, at the end of the completion."""
        rest = self._decode(self._ids[self._start :])[len(self._decode(self._ids[self._start : self._read])) :]
        text = self._release(rest) + self._pending
        self._pending = ""
        return text

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._pending + piece
        if len(self._ids) > self._after:
            positions = [position for stop in self._stop if (position := text.find(stop)) >= 0]
            if positions:
                self.stopped, self._pending = True, ""
                return text[: min(positions)]
        overlap = max((_partial_stop(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - overlap :]
        return text[: len(text) - overlap]


def _partial_stop(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a proper prefix of a stop string."""
    position = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while position >= 0 and not stop.startswith(text[position:]):
        position = text.find(stop[0], position + 1)
    return len(text) - position if position >= 0 else 0
