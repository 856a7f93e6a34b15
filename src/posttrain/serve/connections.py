"""The server's connections: how many may be open, their time limits, and which one is closed when a new one needs its place.

A connection is idle while it has no admitted request: it waits for headers or for the next request, its request was refused,
or its client does not read the end of an answer. When all places are taken, a new connection replaces the oldest idle one,
first one that never had an admitted request. If no connection is idle, the new one gets 503.

    headers    `header_seconds` from the connection, or from the first byte of a later request, to the end of its headers
    idle       uvicorn's keep-alive time
    answers    a client that reads nothing of an answer for STALL_SECONDS is closed

The limit is below the process's limit of open files, so `accept` does not normally fail. If it does, the log gets one line per
minute. Only this file and `run.py` import uvicorn.
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
from posttrain.serve.middleware import HOLDS_PLACE, OWNER

# Maximum number of connections, and the highest file limit to request.
CONNECTIONS, FILES = 4096, 65_536
# File descriptors reserved for adapters, logs and threads: more than one turn of the event loop accepts.
RESERVED_FILES = 128
ACCEPTED_AT_ONCE = 32
# h11 refuses incomplete headers of more than 16 KiB, but accepts larger ones that arrive in one piece; so feed it small pieces.
PIECE_BYTES = 2048
# How long a client may read nothing of an answer in progress, and of a finished one.
STALL_SECONDS, CLOSING_SECONDS = 60.0, 10.0
_LOG_SECONDS = 60.0
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOG = logging.getLogger(__name__)
# Client errors are answered, not logged.
_CLIENTS_LOG = logging.getLogger(f"{__name__}.clients")
_CLIENTS_LOG.setLevel(logging.ERROR)


def connection_limit() -> int:
    """Raise the limit of open files as far as allowed and return how many connections fit below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(OSError, ValueError):  # a container may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
            soft = target
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
        """The protocol factory for uvicorn."""
        return cast(type[asyncio.Protocol], functools.partial(Connection, self))

    def add(self, connection: "Connection") -> bool:
        """Register a new connection, closing an idle one if necessary. Returns False if all are busy."""
        if len(self._open) >= self.most:
            idle = [candidate for candidate in self._open if not candidate.busy]
            never_admitted = (candidate for candidate in idle if not candidate.was_admitted)
            evicted = next(never_admitted, None) or next(iter(idle), None)
            if evicted is None:
                return False
            evicted.end()
        self._open[connection] = None
        return True

    def remove(self, connection: "Connection") -> None:
        """Unregister a connection that is closed or about to be."""
        self._open.pop(connection, None)

    def end(self) -> None:
        """Close all connections at once, even with unsent data."""
        for connection in list(self._open):
            connection.end()

    async def watch(self) -> None:
        """Close connections that exceed a time limit, until cancelled."""
        seconds = min(1.0, self.header_seconds / 4)
        while True:
            await asyncio.sleep(seconds)
            now = time.monotonic()
            for connection in list(self._open):
                connection.check(now)


class Connection(H11Protocol):
    """uvicorn's protocol with limits."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._connections, self.logger = connections, _CLIENTS_LOG
        # Whether any of its requests was admitted.
        self.was_admitted = False
        # When the wait for headers began; None while a request is answered or none has begun.
        self._reading_since: float | None = time.monotonic()
        # Unsent bytes of answers, and since when their number has not changed.
        self._unsent, self._unsent_since = 0, 0.0
        self._closing_since: float | None = None

    @property
    def answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def busy(self) -> bool:
        """Whether a request that holds a place is being answered."""
        return self.answering and HOLDS_PLACE in self.cycle.scope

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register the connection, or answer 503 if there is no place."""
        super().connection_made(transport)
        if not self._connections.add(self):
            transport.write(_full(self._connections.most))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Unregister the connection."""
        self._connections.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Track when a request begins and when its headers are complete."""
        if not self.answering and self._reading_since is None:
            self._reading_since = time.monotonic()
        while data and not self.transport.is_closing():
            size = len(data) if self.answering else PIECE_BYTES
            super().data_received(data[:size])
            data = data[size:]
        if self.answering:
            self._reading_since = None

    def on_response_complete(self) -> None:
        """Note that a request of this connection was admitted."""
        self.was_admitted |= OWNER in self.cycle.scope
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with the usual error envelope, unless an answer has already begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_plain(Refusal(400, "request", "not HTTP/1.1, or headers of more than 16 KiB")))
        self.transport.close()

    def check(self, now: float) -> None:
        """Close the connection if its client exceeds a time limit."""
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
            late = not self.answering and began is not None and now - began > self._connections.header_seconds
        if late:
            self.end()

    def end(self) -> None:
        """Close the connection at once, even with unsent data."""
        self._connections.remove(self)
        self.transport.abort()


def _full(most: int) -> bytes:
    return _plain(Refusal(503, "server", f"{most} connections are open", do="try again later", code="connections"))


def _plain(problem: Refusal) -> bytes:
    """A complete HTTP response for a request that reaches no route."""
    body, reason = encode(problem.body()), {400: "Bad Request", 503: "Service Unavailable"}[problem.status]
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"HTTP/1.1 {problem.status} {reason}", *(f"{k}: {v}" for k, v in (headers | problem.headers()).items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class OncePerMinute:
    """A log filter that passes each message once per minute, whatever its arguments, so that clients cannot fill the disk."""

    def __init__(self) -> None:
        self._next: dict[object, float] = {}

    def __call__(self, record: logging.LogRecord) -> bool:
        """Whether to log this record."""
        kind = record.exc_info[0] if record.exc_info else None
        key, now = (record.name, record.msg[:60] if isinstance(record.msg, str) else record.msg, kind), time.monotonic()
        if now < self._next.get(key, 0.0):
            return False
        self._next = {old: until for old, until in self._next.items() if until > now} | {key: now + _LOG_SECONDS}
        return True


@contextlib.contextmanager
def limited_logging() -> Iterator[None]:
    """Within the block, the event loop and uvicorn log each message once per minute, and a full file table in one line."""
    loop, once_per_minute = asyncio.get_running_loop(), OncePerMinute()
    loggers = [logging.getLogger(name) for name in ("asyncio", "uvicorn.error", "posttrain.serve", __name__, _CLIENTS_LOG.name)]

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _NO_FILES:
            _LOG.warning("cannot accept a connection: %s", os.strerror(error.errno))
        else:
            loop.default_exception_handler(context)

    previous = loop.get_exception_handler()
    loop.set_exception_handler(handle)
    for logger in loggers:
        logger.addFilter(once_per_minute)
    try:
        yield
    finally:
        loop.set_exception_handler(previous)
        for logger in loggers:
            logger.removeFilter(once_per_minute)
