"""Standard streams that are not what a program expects: closed before it starts, read by a program that ends, or not in UTF-8.

Where it stands: `cli.py` prepares its streams here before it does anything else, and so does the process of a reward function.
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


class _Lasting(io.FileIO):
    """Writes to a descriptor for as long as somebody reads, and then into nothing. With `lossy`, also what the disk refuses is
    left out: what is said of the work must not end the work.
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
    """Let a descriptor lead into nothing, for this process and those that it starts."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _lasting(stream: TextIO, *, lossy: bool) -> TextIO:
    """A stream that replaces this one; what is no stream of a descriptor (a test's) stays as it is."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    # PYTHONUNBUFFERED leaves out the buffer.
    raw = stream.buffer.raw if isinstance(stream.buffer, io.BufferedWriter) else stream.buffer
    if isinstance(raw, _Lasting) or not isinstance(raw, io.FileIO) or raw.fileno() not in (1, 2):
        return stream
    lasting = io.BufferedWriter(_Lasting(raw.fileno(), lossy=lossy))
    by_line = lossy or stream.line_buffering or stream.write_through
    return io.TextIOWrapper(lasting, stream.encoding, "replace", line_buffering=by_line)


def open_standard_streams() -> None:
    """Give the process three standard streams: one that was closed is empty, or leads into nothing; characters that a stream's
    encoding lacks are shown as "?"; and what is said on standard error never ends the command.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # the lowest that is free, which is this one
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stderr = _lasting(sys.stderr, lossy=True)


def keep_writing() -> None:
    """Work goes on when whoever read its output has ended."""
    sys.stdout = _lasting(sys.stdout, lossy=False)
    sys.stderr = _lasting(sys.stderr, lossy=True)
