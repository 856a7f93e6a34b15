"""One key asks for all that it can: another one is answered every time, and who is turned away is told whose limit it was."""

import asyncio
import contextlib
import json
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from adapter_folders import write_adapter
from listening import BASE, Listening, chat, listening

from posttrain.errors import BusyError
from posttrain.generate.engine import ROWS
from posttrain.generate.fair_queue import OwnerShares
from posttrain.models.base_model import BaseModel
from posttrain.serve.keys import KeyFile, add_key
from posttrain.serve.limits import Limits
from posttrain.serve.turns import FairSemaphore, TextThreads

CHAT = "/v1/chat/completions"
NAMES = "abcd"


def test_a_share_leaves_room_for_whoever_comes_anew():
    """each = 14: two owners have all 28 beside the reserve of 4; whoever holds none has one of these."""
    shares = OwnerShares(14, "server", "requests are admitted")
    for owner in ("ann", "bob"):
        shares.take(owner, 14)
        with pytest.raises(BusyError, match=f'server · 14 requests are admitted and 1 more .* · at most 14 of "{owner}" · try'):
            shares.take(owner)
    for owner in "1234":
        shares.take(owner)
        with pytest.raises(BusyError, match="at most 28 of all · try again later"):
            shares.take(owner)
    with pytest.raises(BusyError, match="32 requests are admitted and 1 more are requested · at most 32 of all"):
        shares.take("5")
    shares.give("ann", 10)
    with pytest.raises(BusyError, match='at most 4 of "bob"'):  # 28 among six
        shares.take("bob")
    shares.take("1", 2)
    assert shares.held == Counter({"bob": 14, "ann": 4, "1": 3, "2": 1, "3": 1, "4": 1})
    for owner, held in list(shares.held.items()):
        shares.give(owner, held)
    assert shares.total == len(shares.held) == 0
    with pytest.raises(BusyError, match="0 requests are admitted and 15 more are requested · at most 14 ·"):
        shares.take("", 15)


def test_owners_take_turns_and_who_leaves_loses_none():
    async def work() -> list[str]:
        turns, order = FairSemaphore(2, 1), list[str]()

        async def one(owner: str) -> None:
            async with turns.hold(owner):
                order.append(owner)
                await asyncio.sleep(0)

        first = [asyncio.create_task(one("ann")) for _ in range(6)]
        await asyncio.sleep(0)
        first[1].cancel()
        others = [asyncio.create_task(one(owner)) for owner in ("bob", "cat", "bob")]
        await asyncio.gather(*first, *others, return_exceptions=True)
        await asyncio.wait_for(asyncio.gather(turns.acquire("x"), turns.acquire("y")), 5)
        return order

    order = asyncio.run(work())
    assert Counter(order) == {"ann": 5, "bob": 2, "cat": 1}
    assert order.index("cat") < 4


def test_text_of_one_owner_leaves_threads_to_others(monkeypatch: pytest.MonkeyPatch):
    """Work that a client no longer waits for still has its thread, and counts."""

    async def work() -> None:
        threads, go = TextThreads(30.0), threading.Event()
        asked = [asyncio.create_task(threads.run("ann", go.wait)) for _ in range(50)]
        await asyncio.sleep(0.05)
        asked[0].cancel()
        for _ in range(20):
            assert await threads.run("bob", threading.current_thread) is not threading.main_thread()
        go.set()
        assert await asyncio.gather(*asked[1:]) == [True] * 49

    asyncio.run(work())


class Callers:
    """Many callers of one key, each of which begins anew when its request is over."""

    def __init__(self, url: str, key: str) -> None:
        self._host, self._port, self._key = urlsplit(url).hostname, urlsplit(url).port, key
        # What became of the requests that were answered.
        self.statuses = Counter[int]()

    def head(self, length: int) -> bytes:
        return (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self._key}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    async def ask(self, body: dict[str, Any]) -> tuple[int, bytes]:
        """The status of an answer and the whole of it."""
        async with self.connection() as (reader, writer):
            data = json.dumps(body).encode()
            writer.write(self.head(len(data)) + data)
            whole = await reader.read()
            self.statuses[int(whole[9:12])] += 1
            return int(whole[9:12]), whole

    async def send_slowly(self, _: int) -> None:
        async with self.connection() as (reader, writer):
            writer.write(self.head(1000))
            answer = asyncio.create_task(reader.read())
            with contextlib.suppress(OSError):
                while not answer.done():
                    writer.write(b" ")
                    await asyncio.wait([answer], timeout=0.1)
            self.statuses[int((await answer)[9:12])] += 1

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def go_on(self, number: int, once: Callable[["Callers", int], Any]) -> None:
        while True:
            with contextlib.suppress(OSError, ValueError):
                await once(self, number)


KINDS: dict[str, Callable[[Callers, int], Any]] = {
    "quick": lambda callers, number: callers.ask(chat(f"Hi {number}", tokens=2)),
    "slow bodies": lambda callers, number: callers.send_slowly(number),
    "long": lambda callers, number: callers.ask(chat(f"Hi {number}", tokens=1900, min_tokens=1900)),
    "many each": lambda callers, number: callers.ask(chat("Hi", tokens=300, min_tokens=300, n=16)),
    "many models": lambda callers, number: callers.ask(chat("Hi", model=NAMES[number % 4], tokens=20, min_tokens=20)),
    "long conversations": lambda callers, number: callers.ask(
        chat("", messages=[{"role": ("user", "assistant")[turn % 2], "content": f"{number} word"} for turn in range(99)])
    ),
}


@pytest.fixture(scope="module")
def served(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Listening, str, str]]:
    """A server of few places, and the keys of two."""
    folder = tmp_path_factory.mktemp("shares")
    adapters = {name: write_adapter(folder / name, tiny, seed) for seed, name in enumerate(NAMES)}
    ann, bob = (add_key(folder / "keys.json", name, ("use",)) for name in ("ann", "bob"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROWS, "cpu", 4)
        with listening(tiny, limits=Limits(queue=8), keys=KeyFile(folder / "keys.json"), adapters=adapters) as server:
            yield server, ann, bob


async def beside(url: str, ann: str, bob: str, kind: str, callers: int, asked: int) -> tuple[Counter[int], Counter[int]]:
    """What the requests of both became: those of the callers, and those of the other key."""
    many, other = Callers(url, ann), Callers(url, bob)
    tasks = [asyncio.create_task(many.go_on(number, KINDS[kind])) for number in range(callers)]
    await asyncio.sleep(0.3)
    for number in range(asked):
        await other.ask(chat(f"Hello {number}", model=(BASE, *NAMES)[number % 5], tokens=3))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return many.statuses, other.statuses


@pytest.mark.parametrize("kind", KINDS)
def test_another_key_is_answered_every_time(served: tuple[Listening, str, str], kind: str):
    server, ann, bob = served
    _, other = asyncio.run(beside(server.url, ann, bob, kind, 40, 6))
    server.settle()
    assert other == {200: 6}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_450_callers_of_one_key_keep_out_nobody(tiny: BaseModel, tmp_path: Path, kind: str):
    adapters = {name: write_adapter(tmp_path / name, tiny, seed) for seed, name in enumerate(NAMES)}
    ann, bob = (add_key(tmp_path / "keys.json", name, ("use",)) for name in ("ann", "bob"))
    with listening(tiny, keys=KeyFile(tmp_path / "keys.json"), adapters=adapters) as server:
        many, other = asyncio.run(beside(server.url, ann, bob, kind, 450, 40))
        server.settle()
    assert other == {200: 40}, many


def test_who_is_turned_away_is_told_whose_limit_it_was(served: tuple[Listening, str, str]):
    server, ann, bob = served
    for holds, whose in (({"ann": 12}, r'at most 12 of \\"ann\\"'), ({"cat": 12, "dan": 12, "eve": 3}, "at most 27 of all")):
        with contextlib.ExitStack() as stack:
            for owner, count in holds.items():
                stack.enter_context(server.gate.places.hold(owner, count))
            status, whole = asyncio.run(Callers(server.url, ann).ask(chat("Hi")))
            assert status == 429
            assert b"\r\nretry-after: 1\r\n" in whole
            assert re.search(whose.encode(), whole), whole
    with server.gate.places.hold("ann", 12):
        assert asyncio.run(Callers(server.url, bob).ask(chat("Hi")))[0] == 200


def test_slow_senders_hold_no_place_inside(served: tuple[Listening, str, str]):
    server, ann, _ = served

    async def work() -> None:
        callers = Callers(server.url, ann)
        tasks = [asyncio.create_task(callers.go_on(number, Callers.send_slowly)) for number in range(20)]
        while server.gate.admitted < 12:
            await asyncio.sleep(0.01)
        assert server.gate.places.total == 0
        status, whole = await callers.ask(chat("Hi"))
        assert (status, b"12 bodies are being read and 1 more" in whole) == (429, True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(work())
    server.settle()
