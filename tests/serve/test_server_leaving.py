"""Clients that leave, and a server that goes down: nothing is left in flight, and no answer is cut short without a word."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from listening import BASE, chat, listening

from posttrain.generate.engine import Engine
from posttrain.generate.requests import Event
from posttrain.generate.worker import FAILURES, Answer
from posttrain.models.base_model import BaseModel
from posttrain.serve.limits import Limits

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
# So long that nobody waits for its end.
ENDLESS = {"tokens": 1900, "min_tokens": 1900}


def raw(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Ends:
    """Of each answer that was given up, by number of its rows: the tokens that came after, and the seconds to its end."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tokens: dict[int, int] = {}
        self.seconds: dict[int, float] = {}
        cancel, step = Answer.cancel, Engine.step
        given_up: dict[int, float] = {}

        def heard(answer: Answer) -> None:
            given_up.update(dict.fromkeys(answer.numbers, time.monotonic()))
            cancel(answer)

        def stepped(engine: Engine) -> list[Event]:
            late = set(given_up)  # a step that has begun is not the one in which a token would be one too many
            events = step(engine)
            for event in events:
                if event.row in given_up and event.rollout is not None:
                    self.seconds[event.row] = time.monotonic() - given_up[event.row]
                    self.tokens.setdefault(event.row, 0)
                elif event.row in late and event.token is not None:
                    self.tokens[event.row] = self.tokens.get(event.row, 0) + 1
            return events

        patch.setattr(Answer, "cancel", heard)
        patch.setattr(Engine, "step", stepped)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_clients_that_leave_leave_nothing_in_flight(tiny: BaseModel, count: int, monkeypatch: pytest.MonkeyPatch):
    """Streaming or not, before the first token, after it, or with half of a request sent; within one token."""
    ends = Ends(monkeypatch)

    async def one(number: int, port: int, places: asyncio.Semaphore) -> None:
        body = raw(chat(f"Hi {number}", stream=number % 2 == 0, n=1 + number % 3, **ENDLESS))
        async with places:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(body[: len(body) // 2] if number % 10 == 9 else body)
            await writer.drain()
            if number % 4 == 0:
                await reader.read(1)
            elif number % 4 != 1:
                await asyncio.sleep(0.01 * (number % 7))
            writer.transport.abort()

    async def work(port: int) -> None:
        places = asyncio.Semaphore(20)
        await asyncio.gather(*(one(number, port, places) for number in range(count)))

    with listening(tiny) as server:
        asyncio.run(work(urlsplit(server.url).port or 0))
        server.settle()
        text = server.get("/metrics").text
        assert f'posttrain_completions_open{{model="{BASE}"}} 0.0\n' in text
        assert f'posttrain_completions_waiting{{model="{BASE}"}} 0.0\n' in text
        assert "posttrain_queue_length 0.0\n" in text
        assert f'posttrain_requests_total{{model="{BASE}",status="499"}}' in text
        assert server.post(CHAT, chat("Hi")).status_code == 200
    assert len(ends.tokens) > count / 4, "most leave while they are computed"
    assert max(ends.tokens.values()) <= 1


def test_what_is_in_flight_ends_well_while_new_requests_are_turned_away(tiny: BaseModel):
    with listening(tiny) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
        connection.request("POST", CHAT, json.dumps(chat("Hi", stream=True, tokens=300, min_tokens=300)), JSON)
        response = connection.getresponse()
        response.read(1)
        server.stop()
        while server.get("/ready").status_code == 200:
            pass
        turned_away = server.post(CHAT, chat("Hi"))
        assert (turned_away.status_code, turned_away.json()["error"]["code"]) == (503, "shutting_down")
        assert turned_away.headers["retry-after"] == "1"
        assert server.get("/health").status_code == server.get("/metrics").status_code == 200
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()


@contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`posttrain serve` as a process of its own, under a hook that counts connections made and classes unpickled."""
    code = (
        "import sys; heard = []\n"
        "def hook(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.sendto', 'socket.getaddrinfo', 'pickle.find_class'):\n"
        "        heard.append((event, str(arguments[-1 if event == 'pickle.find_class' else 0 if 'addr' in event else 1])))\n"
        "sys.addaudithook(hook)\n"
        "from posttrain.cli import main\n"
        "code = main(sys.argv[1:]); print('heard', heard, flush=True); sys.exit(code)"
    )
    arguments = [sys.executable, "-c", code, "serve", BASE, "--template", "gemma", "--port", "0", *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"serving {BASE} at http://127.0.0.1:"), line
        yield process, line.split()[-1].removesuffix("/v1")
    finally:
        process.kill()
        process.communicate()


async def stream(client: httpx.AsyncClient, url: str, number: int, begun: asyncio.Semaphore) -> str:
    """The last event of a stream: every second one is short, the others have no end in time."""
    more = ENDLESS if number % 2 else {"tokens": 40, "min_tokens": 40}
    last = ""
    async with client.stream("POST", url + CHAT, json=chat(f"Hi {number}", stream=True, **more)) as response:
        assert response.status_code == 200
        begun.release()
        async for line in response.aiter_lines():
            last = line or last
    return last


def test_64_streams_while_the_process_is_asked_to_end():
    """Those that end in time end whole, the others in an error event; 0 connections go out, and the exit code is 0."""

    async def work(process: subprocess.Popen[str], url: str) -> list[str]:
        begun = asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            streams = [asyncio.create_task(stream(client, url, number, begun)) for number in range(64)]
            for _ in range(64):  # all are under way
                await begun.acquire()
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*streams)

    with command("--shutdown-timeout", "5") as (process, url):
        last = asyncio.run(work(process, url))
        out, errors = process.communicate(timeout=60)
    cut = [line for line in last if line != "data: [DONE]"]
    assert all(json.loads(line.removeprefix("data: "))["error"]["code"] == "shutting_down" for line in cut)
    assert 0 < len(cut) < 64
    assert process.returncode == 0, errors
    assert errors == ""
    heard = out.splitlines()[-1].removeprefix("heard ")
    assert heard == "[('socket.getaddrinfo', '127.0.0.1')]"  # its own address, which is no name


def test_a_second_signal_does_not_wait():
    with command() as (process, url):
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("POST", CHAT, json.dumps(chat("Hi", stream=True, **ENDLESS)), JSON)
        response = connection.getresponse()
        response.read(1)
        process.send_signal(signal.SIGTERM)
        while httpx.get(url + "/ready").status_code == 200:
            pass
        process.send_signal(signal.SIGINT)
        assert b'"code": "shutting_down"' in response.read()
        connection.close()
        assert process.wait(30) == 0


def test_an_engine_that_died_is_told_and_the_server_is_not_ready(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    def dies(self: Engine) -> list[Event]:
        raise MemoryError("a secret of the machine")

    with listening(tiny) as server:
        monkeypatch.setattr(Engine, "step", dies)
        for _ in range(FAILURES):  # until the engine is given up
            assert server.get("/ready").status_code == 200
            dead = server.post(CHAT, chat("Hi", stream=True))
            assert (dead.status_code, dead.json()["error"]["code"]) == (500, "internal_error")
            assert "secret" not in dead.text
        after = server.post(CHAT, chat("Hi"))
        assert (after.status_code, after.json()["error"]["code"]) == (503, "stopped")
        assert (server.get("/ready").status_code, server.get("/health").status_code) == (503, 200)


def test_the_time_to_go_down_ends_what_is_not_streamed_with_503(tiny: BaseModel):
    with listening(tiny, limits=Limits(shutdown_seconds=0.2)) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
        connection.request("POST", CHAT, json.dumps(chat("Hi", **ENDLESS)), JSON)
        while not server.gate.admitted:
            pass
        server.stop()
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "shutting_down")
        connection.close()


def test_a_sender_that_is_slow_does_not_hold_up_the_end(tiny: BaseModel):
    """Nor does one that never sent its headers."""
    with listening(tiny, limits=Limits(shutdown_seconds=0.2)) as server:
        address = urlsplit(server.url).hostname, urlsplit(server.url).port
        with socket.create_connection(address, timeout=30) as silent, socket.create_connection(address, timeout=30) as slow:
            slow.sendall(raw(chat("Hi"))[:-1])
            while not server.gate.admitted:
                time.sleep(0.01)
            server.stop()
            assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
            assert silent.recv(1) == b""
