"""Text of a completion as its tokens come, and the stop strings in it.

A token may end inside of a character, and a stop string may cross tokens: text that could still become either is held back
until the next token decides. Only the newest tokens are decoded again.
"""

from collections.abc import Callable, Sequence


class TextStream:
    """Pieces of text that are final. After a stop string nothing more comes; `stopped` says that it was met."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), *, after: int = 0) -> None:
        self._decode, self._stop, self._after = decode, tuple(stop), after
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that became final with this token. Stop strings count from the token after `after` others on."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :])

    def end(self) -> str:
        """What was held back, when no token comes any more."""
        rest = self._decode(self._ids[self._start :])[len(self._decode(self._ids[self._start : self._read])) :]
        text = self._release(rest) + self._held
        self._held = ""
        return text

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        if len(self._ids) > self._after:
            places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
            if places:
                self.stopped, self._held = True, ""
                return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many last letters of the text a stop string begins with, not counting a whole one."""
    place = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while place >= 0 and not stop.startswith(text[place:]):
        place = text.find(stop[0], place + 1)
    return len(text) - place if place >= 0 else 0
