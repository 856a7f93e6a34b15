"""Work that is waited for in turn: whoever asks for much waits behind himself, and hardly anybody else does.

Templates, tokenizers and the JSON of long answers run in a few threads beside the event loop. One owner has at most half of
them, and those who wait take turns, so that another owner's work begins as soon as one piece of work is done.

`in_turn` is `asyncio.to_thread` for a request: whose it is, and which threads there are, the gate says once (`asking`).
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


class Turns:
    """Places that are waited for. One owner holds at most `each` of them; owners that wait get free ones in turn."""

    def __init__(self, places: int, each: int) -> None:
        self._free, self._each = places, each
        self._held: Counter[str] = Counter()
        # By owner, whose turn is next first.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def acquire(self, owner: str) -> None:
        """Wait for a place, which `release` gives back."""
        if self._free and self._held[owner] < self._each:
            self._take(owner)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(owner)
            raise

    def release(self, owner: str) -> None:
        """Give a place back; the next one that waits has it."""
        self._free += 1
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        while self._free and (owners := [one for one in self._waiting if self._held[one] < self._each]):
            turns = self._waiting.pop(owners[0])
            turn = turns.popleft()
            if turns:
                self._waiting[owners[0]] = turns  # behind the others
            if not turn.cancelled():
                self._take(owners[0])
                turn.set_result(None)

    def _take(self, owner: str) -> None:
        self._free -= 1
        self._held[owner] += 1

    @contextlib.asynccontextmanager
    async def hold(self, owner: str) -> AsyncIterator[None]:
        """A place for the length of a block."""
        await self.acquire(owner)
        try:
            yield
        finally:
            self.release(owner)


class TextThreads:
    """Threads for work on text. `seconds` is how long a turn may be waited for."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._turns = Turns(THREADS, THREADS // 2)
        self._pool = ThreadPoolExecutor(THREADS, "posttrain text")

    async def run(self, owner: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the work returns. Raises what it raises, and Refusal where its turn does not come in time."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._turns.acquire(owner)
        except TimeoutError:
            raise Refusal(503, "server", "no thread within the queue's limit", do="ask again later", code="timeout") from None
        loop = asyncio.get_running_loop()
        job = self._pool.submit(work, *args, **kwargs)

        def over(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._turns.release, owner)

        # Not when it is no longer waited for: the thread works on.
        job.add_done_callback(over)
        return await asyncio.wrap_future(job)


_ASKING: ContextVar[tuple[TextThreads, str] | None] = ContextVar("posttrain asking", default=None)


@contextlib.contextmanager
def asking(threads: TextThreads, owner: str) -> Iterator[None]:
    """Inside, and in tasks that begin inside, `in_turn` works for this owner."""
    token = _ASKING.set((threads, owner))
    try:
        yield
    finally:
        _ASKING.reset(token)


def owner() -> str:
    """Who asks here."""
    found = _ASKING.get()
    return "" if found is None else found[1]


async def in_turn(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the work returns, which a thread does when its owner's turn comes. Raises as `TextThreads.run` does."""
    found = _ASKING.get()
    if found is None:
        return await asyncio.to_thread(work, *args, **kwargs)
    return await found[0].run(found[1], work, *args, **kwargs)
