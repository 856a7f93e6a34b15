"""Replies of a server on disk, by the content of the request, and what they cost. `generate/remote.py` uses it.

A file is append-only JSON lines, each written in one call: {"key", "reply", "requests", "tokens"}. A line that a crash cut off
is skipped, and the next one begins on a new line. Two processes may append to one file; each sees the other's lines only when
it opens the file. A lost disk cache is paid for again, so lines are not synchronised to the disk one by one.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

from posttrain.artifacts import disk_error


class ReplyCache:
    """Replies by key, and the requests and tokens that were spent on them, also by earlier processes. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises ArtifactError if the disk fails."""
        self.path, self.requests, self.tokens = path, 0, 0
        self._replies: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with path.open("rb") as file:
                lines = file.read()
        except OSError as error:
            raise disk_error(path, error) from error
        self._torn = bool(lines) and not lines.endswith(b"\n")
        for line in lines.split(b"\n"):
            self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            key, reply, requests, tokens = (entry[name] for name in ("key", "reply", "requests", "tokens"))
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if isinstance(requests, int) and isinstance(tokens, int):
            self.requests, self.tokens = self.requests + requests, self.tokens + tokens
        if isinstance(key, str) and isinstance(reply, dict):
            self._replies[key] = reply

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply of a request, None if there is none."""
        return self._replies.get(key)

    def add(self, key: str, reply: dict[str, Any] | None, *, requests: int, tokens: int) -> None:
        """Store a reply, or None for a request that failed, with its cost. Raises ArtifactError if the disk fails."""
        entry = {"key": key, "reply": reply, "requests": requests, "tokens": tokens}
        line = json.dumps(entry, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                left = b"\n" + line if self._torn else line
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError as error:
                self._torn = True
                raise disk_error(self.path, error) from error
            self._torn = False
            if reply is not None:
                self._replies[key] = reply

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
