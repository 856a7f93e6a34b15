"""Robust standard streams: closed at the start, read by a program that exits, or with an encoding other than UTF-8.

`cli.py` calls this first, and so does the process of a reward function.
"""

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

# The reader ended, or the terminal is gone.
_NO_READER = (errno.EPIPE, errno.EIO)


class _ResilientFile(io.FileIO):
    """Writes to a descriptor, and discards the output once its reader has ended. With `lossy`, disk errors are ignored too, so
    that log output cannot stop the work.
    """

    def __init__(self, descriptor: int, *, lossy: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._lossy = lossy

    def write(self, data: "Buffer") -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _NO_READER:
                discard(self.fileno())
            elif not self._lossy:
                raise
            return memoryview(data).nbytes


def discard(descriptor: int) -> None:
    """Redirect a descriptor to /dev/null, for this process and its children."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _resilient(stream: TextIO, *, lossy: bool) -> TextIO:
    """A resilient replacement of a stream. A stream without a descriptor (in tests) is returned unchanged."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    # With PYTHONUNBUFFERED there is no buffer.
    raw = stream.buffer.raw if isinstance(stream.buffer, io.BufferedWriter) else stream.buffer
    if isinstance(raw, _ResilientFile) or not isinstance(raw, io.FileIO) or raw.fileno() not in (1, 2):
        return stream
    buffer = io.BufferedWriter(_ResilientFile(raw.fileno(), lossy=lossy))
    line_buffering = lossy or stream.line_buffering or stream.write_through
    return io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=line_buffering)


def open_standard_streams() -> None:
    """Ensure three working standard streams. A closed one becomes /dev/null, characters that an encoding lacks become "?", and
    errors on standard error are ignored.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # os.open takes the lowest free descriptor, which is this one
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stderr = _resilient(sys.stderr, lossy=True)


def keep_writing() -> None:
    """Continue the work after the reader of its output has ended."""
    sys.stdout = _resilient(sys.stdout, lossy=False)
    sys.stderr = _resilient(sys.stderr, lossy=True)
