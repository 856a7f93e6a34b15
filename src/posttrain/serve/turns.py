"""Threads for templates, tokenizers and JSON, shared fairly between owners.

This work runs outside the event loop. One owner uses at most half of the threads, and waiting owners take turns, so that an
owner with many requests delays mostly its own.

`run_in_text_thread` is `asyncio.to_thread` for a request. The middleware sets its threads and owner with `requests_of`.
"""

import asyncio
import contextlib
import os
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from posttrain.serve.errors import Refusal

P = ParamSpec("P")
T = TypeVar("T")

THREADS = min(32, max(4, os.cpu_count() or 1))


class FairSemaphore:
    """A semaphore with `places` places. One owner holds at most `each` of them; waiting owners get free ones in turn."""

    def __init__(self, places: int, each: int) -> None:
        self._free, self._each = places, each
        self._used: Counter[str] = Counter()
        # By owner, the next one first.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def acquire(self, owner: str) -> None:
        """Wait for a place. `release` returns it."""
        if self._free and self._used[owner] < self._each:
            self._take(owner)
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(owner)
            raise

    def release(self, owner: str) -> None:
        """Return a place and give it to the next waiting owner."""
        self._free += 1
        self._used[owner] -= 1
        if not self._used[owner]:
            del self._used[owner]
        while self._free and (owners := [name for name in self._waiting if self._used[name] < self._each]):
            turns = self._waiting.pop(owners[0])
            future = turns.popleft()
            if turns:
                self._waiting[owners[0]] = turns  # to the end of the queue
            if not future.cancelled():
                self._take(owners[0])
                future.set_result(None)

    def _take(self, owner: str) -> None:
        self._free -= 1
        self._used[owner] += 1

    @contextlib.asynccontextmanager
    async def hold(self, owner: str) -> AsyncIterator[None]:
        """Hold a place for the length of a block."""
        await self.acquire(owner)
        try:
            yield
        finally:
            self.release(owner)


class TextThreads:
    """Threads for work on text. `seconds` is the longest wait for a thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._turns = FairSemaphore(THREADS, THREADS // 2)
        self._pool = ThreadPoolExecutor(THREADS, "posttrain text")

    async def run(self, owner: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the work in a thread and return its result. Raises Refusal if no thread is free in time."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._turns.acquire(owner)
        except TimeoutError:
            raise Refusal(
                503, "server", "no free thread within --queue-seconds", do="try again later", code="timeout"
            ) from None
        loop = asyncio.get_running_loop()
        job = self._pool.submit(work, *args, **kwargs)

        def release(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._turns.release, owner)

        # Release when the thread ends, not when the caller is cancelled: the thread continues to run.
        job.add_done_callback(release)
        return await asyncio.wrap_future(job)


_CURRENT: ContextVar[tuple[TextThreads, str] | None] = ContextVar("posttrain owner", default=None)


@contextlib.contextmanager
def requests_of(threads: TextThreads, owner: str) -> Iterator[None]:
    """Within the block, and in tasks started in it, `run_in_text_thread` works for this owner."""
    token = _CURRENT.set((threads, owner))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_owner() -> str:
    """The owner of the current request, or an empty string."""
    current = _CURRENT.get()
    return "" if current is None else current[1]


async def run_in_text_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run the work in a thread of the current request and return its result. Raises as `TextThreads.run` does."""
    current = _CURRENT.get()
    if current is None:
        return await asyncio.to_thread(work, *args, **kwargs)
    return await current[0].run(current[1], work, *args, **kwargs)
