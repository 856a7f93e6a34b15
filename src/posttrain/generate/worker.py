"""The engine for a server: requests come from asyncio, one thread of its own runs the steps.

    async with serving(base) as server:
        answer = server.submit(Request(...))
        async for event in answer: ...        a client that leaves early: `answer.cancel()`

Requests wait in a bounded queue, of which each owner has a share; where it is full the answer is `BusyError`, at once. All work
on the model happens in the one thread, and in it every event is handed to the loop of whoever asked. Shutting down ends what is
in flight with "cancelled".
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import NamedTuple

from posttrain.errors import BusyError
from posttrain.generate.engine import Engine
from posttrain.generate.fair_queue import Shares
from posttrain.generate.prefix import PrefixCache
from posttrain.generate.requests import Event, Request
from posttrain.generate.short_threads import apart
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter

# Completions of one owner that may wait for a place.
WAITING = 256
# Steps that fail one after the other until the engine is given up.
FAILURES = 3


class Answer:
    """What comes of one request: an async iterator of the events of all its completions, to the end of the last."""

    def __init__(self, server: "Server", request: Request, together: int) -> None:
        self.request, self._server, self._together = request, server, together
        self.loop = asyncio.get_running_loop()
        self._events: deque[Event | BaseException] = deque()
        self._waiter: asyncio.Future[None] | None = None
        # Events that the engine's thread has not handed over yet.
        self._held: list[Event | BaseException] = []
        self._begun: set[int] = set()
        # The engine's number of each completion; known once the thread has taken the request.
        self.numbers: list[int] = []
        self._left = request.completions

    @property
    def ready(self) -> bool:
        """Whether the next event is there."""
        return bool(self._events)

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Event:
        """The next event; `event.row` counts the request's completions from 0. Raises what the engine died of."""
        if not self._left:
            raise StopAsyncIteration
        if not self._events:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
        event = self._events.popleft()
        if isinstance(event, BaseException):
            self._left = 0
            raise event
        if event.over:
            self._left -= 1
        return event

    def cancel(self) -> None:
        """End what is left of it; its completions still send their last events. For a client that has gone."""
        self._server.tell(_Cancel(self))

    def hold(self, event: Event | BaseException) -> list[Event | BaseException]:
        """Called by the engine's thread: what is to be handed over now. First tokens and ends never wait for others."""
        self._held.append(event)
        if not isinstance(event, BaseException):
            first = event.row not in self._begun
            self._begun.add(event.row)
            if not first and not event.over and len(self._held) < self._together:
                return []
        held, self._held = self._held, []
        return held

    def put(self, events: Sequence[Event | BaseException]) -> None:
        """Called in the loop of whoever asked."""
        self._events.extend(events)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Submit(NamedTuple):
    answer: Answer
    adapter: LoraAdapter | None


class _Cancel(NamedTuple):
    answer: Answer


class Server:
    """Runs an engine in a thread. Made by `serving`; `submit` and `Answer.cancel` may be called from any event loop."""

    def __init__(self, base: BaseModel, waiting: int = WAITING) -> None:
        self._engine = apart(Engine, base, serving=True)
        self._queue = Shares(waiting, "generation", "completions wait")
        self._changed = threading.Condition()
        self._told: list[_Submit | _Cancel] = []
        self._closing = False
        self._failed: BaseException | None = None
        self._failures = 0
        self._answers: dict[int, tuple[Answer, int]] = {}
        self._thread = threading.Thread(target=self._run, name="posttrain engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, together: int = 1) -> Answer:
        """Take a request, whose events may be handed over up to so many `together`.

        Raises ModelError or AdapterError where it cannot be answered, BusyError where too many wait. What it is answered with
        is settled here: an adapter may lose its name to another before the thread comes to it.
        """
        adapter = self._engine.check(request)
        with self._changed:
            if self._closing or self._failed is not None:
                raise BusyError("generation", "the engine has stopped", do="start the server again")
            self._queue.take(request.owner, request.completions)
            answer = Answer(self, request, together)
            self._told.append(_Submit(answer, adapter))
            self._changed.notify()
        return answer

    @property
    def waiting(self) -> int:
        """Completions that have not begun."""
        return self._queue.total

    @property
    def prefixes(self) -> PrefixCache:
        """What is kept of prompts."""
        return self._engine.prefixes

    @property
    def idle(self) -> bool:
        """Whether no completion is left, waiting or in flight."""
        return not (self._told or self._answers or self._engine.live)

    @property
    def stopped(self) -> bool:
        """Whether nothing is taken any more."""
        return self._closing or self._failed is not None

    def tell(self, what: _Submit | _Cancel) -> None:
        """Leave a note for the thread."""
        with self._changed:
            self._told.append(what)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the step in hand and end what is in flight. Waits for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_notes():
                self._step()
            for number in self._answers:
                self._engine.cancel(number)
            self._step()
        except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            with self._changed:
                self._failed = error
                told, self._told = self._told, []
            asked = [note.answer for note in told if isinstance(note, _Submit)]
            _deliver((answer, error) for answer in [*{id(a): a for a, _ in self._answers.values()}.values(), *asked])

    def _take_notes(self) -> bool:
        """Wait for something to do, and let the engine know what came. False when it is time to go."""
        with self._changed:
            self._changed.wait_for(lambda: self._told or self._closing or self._engine.live)
            told, self._told, closing = self._told, [], self._closing
        for note in told:
            answer = note.answer
            if isinstance(note, _Cancel):
                for number in answer.numbers:
                    self._engine.cancel(number)
                continue
            answer.numbers = self._engine.take(answer.request, note.adapter)
            for completion, number in enumerate(answer.numbers):
                self._answers[number] = (answer, completion)
        return not closing

    def _step(self) -> None:
        events = self._events()
        with self._changed:
            self._queue.held = self._engine.waiting
            for note in self._told:
                if isinstance(note, _Submit):
                    self._queue.held[note.answer.request.owner] += note.answer.request.completions
        found: list[tuple[Answer, Event | BaseException]] = []
        for event in events:
            answer, completion = self._answers[event.row]
            if event.over:
                del self._answers[event.row]
            found.append((answer, event._replace(row=completion) if event.error is None else event.error))
            if event.error is not None:  # with one of its completions the whole answer is over
                for number in answer.numbers:
                    self._engine.cancel(number)
        _deliver(found)

    def _events(self) -> list[Event]:
        """What a step brings. One that fails by no row's fault ends all in flight, and the engine begins anew; several in a row
        end it."""
        if not self._engine.live:
            return []
        try:
            events = self._engine.step()
            self._failures = 0
            return events
        except Exception as error:
            self._failures += 1
            if self._failures == FAILURES:
                raise
            logging.getLogger(__name__).exception("a step of the engine failed")
            self._engine.reset()
            answers, self._answers = {id(a): a for a, _ in self._answers.values()}, {}
            _deliver((answer, error) for answer in answers.values())
            return []


def _deliver(found: Iterable[tuple[Answer, Event | BaseException]]) -> None:
    """Hand events over, from the engine's thread: a loop is woken once for all of them."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Answer, list[Event | BaseException]]]] = {}
    for answer, event in found:
        if events := answer.hold(event):
            by_loop.setdefault(answer.loop, []).append((answer, events))
    for loop, answers in by_loop.items():
        with contextlib.suppress(RuntimeError):  # a loop that was closed in the meantime hears nothing any more
            loop.call_soon_threadsafe(_put_all, answers)


def _put_all(answers: Sequence[tuple[Answer, Sequence[Event | BaseException]]]) -> None:
    for answer, events in answers:
        answer.put(events)


@contextlib.asynccontextmanager
async def serving(base: BaseModel, waiting: int = WAITING) -> AsyncIterator[Server]:
    """A running server for the length of a block."""
    server = Server(base, waiting)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.close)
