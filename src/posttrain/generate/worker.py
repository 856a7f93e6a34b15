"""The engine for a server: asyncio code submits requests, and one thread runs the steps.

    async with serving(base) as server:
        answer = server.submit(Request(...))
        async for event in answer: ...        if the client disconnects: `answer.cancel()`

Requests wait in a bounded queue, of which each owner has a share. If it is full, `submit` raises `BusyError` at once. All work
on the model runs in the engine's thread, which passes every event to the event loop of its caller. A shutdown cancels running
requests.
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
from posttrain.generate.fair_queue import OwnerShares
from posttrain.generate.prefix import PrefixCache
from posttrain.generate.requests import Event, Request
from posttrain.generate.short_threads import run_in_short_thread
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter

# Maximum number of waiting completions of one owner.
WAITING = 256
# The engine stops after this many failed steps in a row.
FAILURES = 3


class Answer:
    """The answer to one request: an async iterator over the events of all its completions."""

    def __init__(self, server: "Server", request: Request, together: int) -> None:
        self.request, self._server, self._together = request, server, together
        self.loop = asyncio.get_running_loop()
        self._events: deque[Event | BaseException] = deque()
        self._waiter: asyncio.Future[None] | None = None
        # Events that the engine's thread has not passed on yet.
        self._pending: list[Event | BaseException] = []
        self._started: set[int] = set()
        # The engine's number of each completion, set when the thread takes the request.
        self.numbers: list[int] = []
        self._open_completions = request.completions

    @property
    def ready(self) -> bool:
        """Whether the next event is available without waiting."""
        return bool(self._events)

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Event:
        """The next event; `event.row` counts the request's completions from 0. Raises the error that stopped the engine."""
        if not self._open_completions:
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
            self._open_completions = 0
            raise event
        if event.over:
            self._open_completions -= 1
        return event

    def cancel(self) -> None:
        """Cancel the remaining completions, for example after a disconnection. Their last events still come."""
        self._server.send(_CancelNote(self))

    def collect(self, event: Event | BaseException) -> list[Event | BaseException]:
        """Called by the engine's thread: the events to pass on now. First tokens and ends never wait for others."""
        self._pending.append(event)
        if not isinstance(event, BaseException):
            first = event.row not in self._started
            self._started.add(event.row)
            if not first and not event.over and len(self._pending) < self._together:
                return []
        pending, self._pending = self._pending, []
        return pending

    def put(self, events: Sequence[Event | BaseException]) -> None:
        """Called in the caller's event loop."""
        self._events.extend(events)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _SubmitNote(NamedTuple):
    answer: Answer
    adapter: LoraAdapter | None


class _CancelNote(NamedTuple):
    answer: Answer


class Server:
    """Runs an engine in a thread. Created by `serving`. `submit` and `Answer.cancel` may be called from any event loop."""

    def __init__(self, base: BaseModel, waiting: int = WAITING) -> None:
        self._engine = run_in_short_thread(Engine, base, serving=True)
        self._queue = OwnerShares(waiting, "generation", "completions wait")
        self._changed = threading.Condition()
        self._notes: list[_SubmitNote | _CancelNote] = []
        self._closing = False
        self._failed: BaseException | None = None
        self._failures = 0
        self._answers: dict[int, tuple[Answer, int]] = {}
        self._thread = threading.Thread(target=self._run, name="posttrain engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, together: int = 1) -> Answer:
        """Submit a request. Its events are passed on in groups of at most `together`.

        Raises ModelError or AdapterError if it is invalid, BusyError if too many wait. The adapter is looked up here, because
        its name may be reassigned before the thread takes the request.
        """
        adapter = self._engine.check(request)
        with self._changed:
            if self._closing or self._failed is not None:
                raise BusyError("generation", "the engine has stopped", do="restart the server")
            self._queue.take(request.owner, request.completions)
            answer = Answer(self, request, together)
            self._notes.append(_SubmitNote(answer, adapter))
            self._changed.notify()
        return answer

    @property
    def waiting(self) -> int:
        """The number of completions that have not started."""
        return self._queue.total

    @property
    def prefixes(self) -> PrefixCache:
        """The prefix cache of the engine."""
        return self._engine.prefixes

    @property
    def idle(self) -> bool:
        """Whether no completion is waiting or running."""
        return not (self._notes or self._answers or self._engine.live)

    @property
    def stopped(self) -> bool:
        """Whether requests are no longer accepted."""
        return self._closing or self._failed is not None

    def send(self, note: _SubmitNote | _CancelNote) -> None:
        """Send a note to the engine's thread."""
        with self._changed:
            self._notes.append(note)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the current step and cancel running requests. Waits for the thread."""
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
        except BaseException as error:  # noqa: BLE001 - every waiting caller must get the error
            with self._changed:
                self._failed = error
                notes, self._notes = self._notes, []
            answers = [note.answer for note in notes if isinstance(note, _SubmitNote)]
            _deliver((answer, error) for answer in [*{id(a): a for a, _ in self._answers.values()}.values(), *answers])

    def _take_notes(self) -> bool:
        """Wait for work and pass the notes to the engine. Returns False on shutdown."""
        with self._changed:
            self._changed.wait_for(lambda: self._notes or self._closing or self._engine.live)
            notes, self._notes, closing = self._notes, [], self._closing
        for note in notes:
            answer = note.answer
            if isinstance(note, _CancelNote):
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
            for note in self._notes:
                if isinstance(note, _SubmitNote):
                    self._queue.held[note.answer.request.owner] += note.answer.request.completions
        deliveries: list[tuple[Answer, Event | BaseException]] = []
        for event in events:
            answer, completion = self._answers[event.row]
            if event.over:
                del self._answers[event.row]
            deliveries.append((answer, event._replace(row=completion) if event.error is None else event.error))
            if event.error is not None:  # one failed completion ends the whole answer
                for number in answer.numbers:
                    self._engine.cancel(number)
        _deliver(deliveries)

    def _events(self) -> list[Event]:
        """Run one step. If it fails, cancel its requests and reset the engine. After FAILURES failures in a row, raise."""
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


def _deliver(deliveries: Iterable[tuple[Answer, Event | BaseException]]) -> None:
    """Pass events to the callers' event loops. Each loop is woken once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Answer, list[Event | BaseException]]]] = {}
    for answer, event in deliveries:
        if events := answer.collect(event):
            by_loop.setdefault(answer.loop, []).append((answer, events))
    for loop, answers in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(_put_all, answers)


def _put_all(answers: Sequence[tuple[Answer, Sequence[Event | BaseException]]]) -> None:
    for answer, events in answers:
        answer.put(events)


@contextlib.asynccontextmanager
async def serving(base: BaseModel, waiting: int = WAITING) -> AsyncIterator[Server]:
    """Run a server for the length of a block."""
    server = Server(base, waiting)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.close)
