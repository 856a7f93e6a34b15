"""Connections of the server: how many may be open, how long a client may take over its headers, and which are closed first.

A connection that has no admitted request is worth little: it waits for headers, is kept for a next request, was refused, or
does not take the end of an answer. It has limits of time, and where all places are taken the oldest of these is closed for
the one that comes: first those that never had an admitted request. Where every connection has one, the new one gets 503.

    headers    `header_seconds` from the connection, or from the first byte of a later request, to the end of its headers
    idle       uvicorn's keep-alive time
    answers    a client that takes nothing of an answer for STALL_SECONDS is closed

There are fewer places than the process may have files, so `accept` does not fail for want of one; where it does, the log has
one line a minute. Only this file and `run.py` know uvicorn.
"""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import resource
import time
from collections.abc import Iterator
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from posttrain.serve.errors import Refusal, encode
from posttrain.serve.middleware import HOLDS, OWNER

# Connections at most, and the largest file limit that is asked for.
CONNECTIONS, FILES = 4096, 65_536
# Files that connections leave to adapters, logs and threads; it is more than are accepted in one turn of the event loop.
RESERVED_FILES = 128
ACCEPTED_AT_ONCE = 32
# h11 refuses headers of more than 16 KiB that are not whole yet: what comes in one large piece it would take.
PIECE_BYTES = 2048
# A client takes nothing of its answer for so long, or of one that is over.
STALL_SECONDS, CLOSING_SECONDS = 60.0, 10.0
_LOG_SECONDS = 60.0
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOG = logging.getLogger(__name__)
# What clients do wrong is answered, not logged.
_CLIENTS_LOG = logging.getLogger(f"{__name__}.clients")
_CLIENTS_LOG.setLevel(logging.ERROR)


def connection_limit() -> int:
    """Raise the limit of open files as far as this process may, and return how many connections fit below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a container may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    files = FILES if soft == resource.RLIM_INFINITY else soft
    return max(1, min(CONNECTIONS, files - min(RESERVED_FILES, files // 2)))


class Connections:
    """The connections of one server. `most` is how many may be open."""

    def __init__(self, *, most: int, header_seconds: float) -> None:
        self.most, self.header_seconds = most, header_seconds
        # Oldest first.
        self._open: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def protocol(self) -> type[asyncio.Protocol]:
        """What uvicorn makes a connection with."""
        return cast(type[asyncio.Protocol], functools.partial(Connection, self))

    def add(self, connection: "Connection") -> bool:
        """Count a new connection, for which another one may be closed. False where all are in use."""
        if len(self._open) >= self.most:
            idle = (one for one in self._open if not one.busy)
            leaves = next((one for one in self._open if not one.busy and not one.known), None) or next(idle, None)
            if leaves is None:
                return False
            leaves.end()
        self._open[connection] = None
        return True

    def remove(self, connection: "Connection") -> None:
        """A connection is closed, or is about to be."""
        self._open.pop(connection, None)

    def end(self) -> None:
        """Close all, whatever their clients have not taken."""
        for connection in list(self._open):
            connection.end()

    async def watch(self) -> None:
        """Close what takes too long, until cancelled."""
        seconds = min(1.0, self.header_seconds / 4)
        while True:
            await asyncio.sleep(seconds)
            now = time.monotonic()
            for connection in list(self._open):
                connection.check(now)


class Connection(H11Protocol):
    """uvicorn's protocol with limits."""

    def __init__(self, others: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._others, self.logger = others, _CLIENTS_LOG
        # Whether a request of it was admitted before.
        self.known = False
        # Since when headers are waited for; None while a request is answered, or none has begun.
        self._reading_since: float | None = time.monotonic()
        # Bytes of answers that the client has not taken, and since when they are as many.
        self._unsent, self._unsent_since = 0, 0.0
        self._closing_since: float | None = None

    @property
    def answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def busy(self) -> bool:
        """Whether a request that holds a place is being answered."""
        return self.answering and HOLDS in self.cycle.scope

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it; where there is no place, answer 503."""
        super().connection_made(transport)
        if not self._others.add(self):
            transport.write(_full(self._others.most))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no longer."""
        self._others.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Note when a request begins and when its headers are whole."""
        if not self.answering and self._reading_since is None:
            self._reading_since = time.monotonic()
        while data and not self.transport.is_closing():
            size = len(data) if self.answering else PIECE_BYTES
            super().data_received(data[:size])
            data = data[size:]
        if self.answering:
            self._reading_since = None

    def on_response_complete(self) -> None:
        """A next request may come."""
        self.known |= OWNER in self.cycle.scope
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the words of every other mistake; where an answer has begun, there is no more to say."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_plain(Refusal(400, "request", "not HTTP/1.1, or headers of more than 16 KiB")))
        self.transport.close()

    def check(self, now: float) -> None:
        """Close it where the client takes too long."""
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            late = now - self._closing_since > CLOSING_SECONDS
        elif unsent and now - self._unsent_since > STALL_SECONDS:
            late = True
        else:
            began = self._reading_since
            late = not self.answering and began is not None and now - began > self._others.header_seconds
        if late:
            self.end()

    def end(self) -> None:
        """Close it at once, whatever the client has not taken."""
        self._others.remove(self)
        self.transport.abort()


def _full(most: int) -> bytes:
    return _plain(Refusal(503, "server", f"{most} connections are open", do="ask again later", code="connections"))


def _plain(problem: Refusal) -> bytes:
    """A whole response, for a client that no route hears."""
    body, reason = encode(problem.body()), {400: "Bad Request", 503: "Service Unavailable"}[problem.status]
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"HTTP/1.1 {problem.status} {reason}", *(f"{k}: {v}" for k, v in (headers | problem.headers()).items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Seldom:
    """A filter that lets a message through once a minute, whatever its arguments: what clients cause must not fill a disk."""

    def __init__(self) -> None:
        self._next: dict[object, float] = {}

    def __call__(self, record: logging.LogRecord) -> bool:
        """Whether it is time to say this again."""
        kind = record.exc_info[0] if record.exc_info else None
        key, now = (record.name, record.msg[:60] if isinstance(record.msg, str) else record.msg, kind), time.monotonic()
        if now < self._next.get(key, 0.0):
            return False
        self._next = {old: until for old, until in self._next.items() if until > now} | {key: now + _LOG_SECONDS}
        return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, this thread's event loop and uvicorn say each thing once a minute, and a full table of files in one line."""
    loop, seldom = asyncio.get_running_loop(), Seldom()
    loggers = [logging.getLogger(name) for name in ("asyncio", "uvicorn.error", "posttrain.serve", __name__, _CLIENTS_LOG.name)]

    def heard(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _NO_FILES:
            _LOG.warning("no connection can be taken: %s", os.strerror(error.errno))
        else:
            loop.default_exception_handler(context)

    before = loop.get_exception_handler()
    loop.set_exception_handler(heard)
    for logger in loggers:
        logger.addFilter(seldom)
    try:
        yield
    finally:
        loop.set_exception_handler(before)
        for logger in loggers:
            logger.removeFilter(seldom)
