"""Clients that connect and do not ask, or do not take their answers: others still get in, and the log stays short."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from listening import BASE, Listening, chat, listening

from posttrain.models.base_model import BaseModel
from posttrain.serve import connections
from posttrain.serve.keys import KeyFile, add_key
from posttrain.serve.limits import Limits

CHAT = "/v1/chat/completions"
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Half: "


class Process(NamedTuple):
    """A server as a process of its own, and the file that its errors go to."""

    running: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        found = urlsplit(self.url)
        return str(found.hostname), int(found.port or 0)

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.running.pid}/fd"))


@contextmanager
def command(folder: Path, *options: str, files: tuple[int, int]) -> Iterator[Process]:
    """`posttrain serve` with these soft and hard limits of open files."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, tuple(map(int, sys.argv[1:3])))\n"
        "from posttrain.cli import main; sys.exit(main(sys.argv[3:]))"
    )
    arguments = [sys.executable, "-c", code, *map(str, files), "serve", BASE, "--template", "gemma", "--port", "0", *options]
    log = folder / "errors.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), log.read_text()
        yield Process(process, line.split()[-1].removesuffix("/v1"), log)
    finally:
        process.kill()
        process.communicate()


def connect(stack: ExitStack, address: tuple[str, int], data: bytes = b"") -> socket.socket:
    made = stack.enter_context(socket.create_connection(address, timeout=30))
    if data:
        made.sendall(data)
    return made


def answer(made: socket.socket) -> tuple[int, bytes]:
    """The status and the body of the next answer on a connection."""
    found = http.client.HTTPResponse(made)
    found.begin()
    return found.status, found.read()


def accepts(made: socket.socket, data: bytes) -> bool:
    """Whether a connection still takes what is sent."""
    try:
        made.sendall(data)
    except OSError:
        return False
    return True


def closed(made: socket.socket) -> bool:
    """Whether the server has closed a connection, after whatever it said."""
    try:
        while made.recv(2**16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def test_more_half_open_connections_than_the_process_may_have_files_keep_nobody_out(tmp_path: Path):
    """A soft limit of 256 is raised to 512; 1,200 connections say nothing, half a request, or what is no HTTP at all."""
    key = add_key(tmp_path / "keys.json", "ann", ("use",))
    headers = {"authorization": f"Bearer {key}"}
    said = (b"", HALF, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), b"GET / HTTP/1.1\r\n\r\n" * 3)
    answers = []
    with ExitStack() as stack, command(tmp_path, "--keys", str(tmp_path / "keys.json"), files=(256, 512)) as server:
        client = stack.enter_context(httpx.Client(base_url=server.url, headers=headers, timeout=30))
        for number in range(1200):
            connect(stack, server.address, said[number % len(said)])
            if number % 100 == 99:
                answers.append(client.post(CHAT, json=chat("Hi")).status_code)  # on a connection that it keeps
                answers.append(httpx.post(server.url + CHAT, json=chat("Hi"), headers=headers, timeout=30).status_code)
        assert server.open_files() < 512
        assert httpx.get(server.url + "/ready", headers=headers).status_code == 200
        log = server.log.read_text()
    assert answers == [200] * 24
    assert len(log) < 4000, log[:2000]


def test_a_full_table_of_files_is_told_in_one_line(tmp_path: Path):
    """Something else in the process takes the files that are kept for it: whoever waits is served as soon as there are some."""
    code = (
        "import asyncio, os, resource, socket\n"
        "from posttrain.serve import connections\n"
        "async def work():\n"
        "    with connections.limited_logging():\n"
        "        most = connections.ACCEPTED_AT_ONCE\n"
        "        server = await asyncio.start_server(lambda r, w: w.close(), '127.0.0.1', 0, backlog=most)\n"
        "        address = server.sockets[0].getsockname()\n"
        "        clients = [socket.socket() for _ in range(8)]\n"
        "        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1,) * 2)\n"
        "        [client.connect(address) for client in clients]\n"
        "        await asyncio.sleep(2.5)\n"
        "        clients.pop().close(); clients.pop().close()\n"
        "        await asyncio.sleep(1.5)\n"
        "        clients[0].settimeout(5); print(await asyncio.to_thread(clients[0].recv, 1))\n"
        "asyncio.run(work())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "b''\n", done.stderr
    assert done.stderr == "cannot accept a connection: Too many open files\n"


@contextmanager
def few(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch, most: int, **limits: float) -> Iterator[tuple[Listening, ExitStack]]:
    """A server with few connections, and what closes those of the test."""
    monkeypatch.setattr(connections, "CONNECTIONS", most)
    with ExitStack() as stack, listening(tiny, limits=Limits()._replace(**limits)) as server:
        yield server, stack


def address_of(server: Listening) -> tuple[str, int]:
    return str(urlsplit(server.url).hostname), int(urlsplit(server.url).port or 0)


def test_headers_have_a_limit_of_time_however_slowly_they_come(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """At the start of a connection, and of a later request on it; what is sent a byte at a time is no quicker."""
    with few(tiny, monkeypatch, 64, header_seconds=0.5) as (server, stack):
        silent, slow, later = (connect(stack, address_of(server)) for _ in range(3))
        later.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(later)[0] == 200
        left = {slow, later}
        for byte in (HALF * 10).decode():
            for made in list(left):
                if not accepts(made, byte.encode()):
                    left.discard(made)
            if not left:
                break
            time.sleep(0.05)
        assert not left
        assert closed(silent)
        assert server.get("/health").status_code == 200


def test_a_kept_connection_is_not_closed_for_want_of_headers(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """A next request may begin later than headers may take."""
    with few(tiny, monkeypatch, 64, header_seconds=0.2) as (server, stack):
        client = stack.enter_context(httpx.Client(base_url=server.url))
        for _ in range(3):
            assert client.get("/health").status_code == 200
            time.sleep(0.5)
        made = connect(stack, address_of(server), b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(3):
            assert answer(made)[0] == 200
            time.sleep(0.5)
            made.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(made)[0] == 200


def test_connections_without_a_request_make_room_oldest_first(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """A stream stays, and so does the connection of a client that was answered before, as long as there is another."""
    with few(tiny, monkeypatch, 4) as (server, stack):
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=30))
        long = chat("Hi", tokens=400, min_tokens=400, stream=True)
        stream = stack.enter_context(client.stream("POST", CHAT, json=long))
        assert stream.status_code == 200
        lines = stream.iter_lines()
        next(lines)
        kept = connect(stack, address_of(server), b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(kept)[0] == 200
        first, second = connect(stack, address_of(server), HALF), connect(stack, address_of(server))
        third = connect(stack, address_of(server), HALF)
        assert closed(first)
        fourth = connect(stack, address_of(server))
        assert closed(second)
        kept.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(kept)[0] == 200
        for made in (third, fourth):
            made.settimeout(0.2)
            assert not closed(made)
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_where_every_connection_has_a_request_a_new_one_is_told_so(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    with few(tiny, monkeypatch, 1) as (server, stack):
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=30))
        with client.stream("POST", CHAT, json=chat("Hi", tokens=1900, min_tokens=1900, stream=True)) as stream:
            assert stream.status_code == 200
            status, body = answer(connect(stack, address_of(server)))
            assert status == 503
            assert json.loads(body)["error"]["code"] == "connections"
        client.close()
        while server.get("/health").status_code != 200:
            time.sleep(0.02)


def test_a_client_that_takes_nothing_of_its_answer_is_closed(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.3)
    with few(tiny, monkeypatch, 64, header_seconds=0.4) as (server, stack):
        made = stack.enter_context(socket.socket())
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.connect(address_of(server))
        many = {**chat("Hi", tokens=1900, min_tokens=1900, n=16, logprobs=True, top_logprobs=20), "stream": True}
        data = json.dumps(many).encode()
        made.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % CHAT.encode())
        made.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
        while accepts(made, b"x"):
            time.sleep(0.05)
        server.settle()


def test_who_has_no_key_holds_no_connection(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A body that comes slowly is nobody's, on a route that wants a key and on the one that does not."""
    key = add_key(tmp_path / "keys.json", "ann", ("use",))
    monkeypatch.setattr(connections, "CONNECTIONS", 4)
    with ExitStack() as stack, listening(tiny, keys=KeyFile(tmp_path / "keys.json")) as server:
        for number in range(16):
            path = (CHAT, "/health")[number % 2]
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer no\r\nContent-Length: 1000\r\n\r\n"
            connect(stack, address_of(server), head.encode() + b"{")
            if number % 4 == 3:
                assert server.gate.admitted == 0
                assert server.post(CHAT, chat("Hi"), headers={"authorization": f"Bearer {key}"}).status_code == 200
                server.settle()  # the answer reaches the client before its place is given back
        asks_first = (
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n" % CHAT.encode()
        )
        assert answer(connect(stack, address_of(server), asks_first))[0] == 401


def test_what_is_no_http_is_answered_in_the_words_of_every_mistake(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    wrong = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\r\n\r\nGET", b"GET / HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000, b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 5000,
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", b"GET / HTTP/1.1\nHost : a\n\n",
    ]  # fmt: skip
    with few(tiny, monkeypatch, 64) as (server, stack):
        for data in wrong:
            status, body = answer(connect(stack, address_of(server), data + b"\r\n\r\n"))
            assert status == 400, data[:60]
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_requests_that_come_before_the_answer_are_answered_in_their_order(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """Pipelined, of HTTP/1.0, with a whole address, with a body where none belongs, or with one that is announced first."""
    with few(tiny, monkeypatch, 64) as (server, stack):
        one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        body = json.dumps(chat("Hi")).encode()
        post = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % (
            CHAT.encode(), len(body),
        )  # fmt: skip
        made = connect(stack, address_of(server), (post + b"\r\n" + body + one) * 3 + b"GET /nothing HTTP/1.0\r\n\r\n")
        whole = b""
        while part := made.recv(2**16):
            whole += part
        assert [int(part[:3]) for part in whole.split(b"HTTP/1.1 ")[1:]] == [200] * 6 + [403]
        whole_address = b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert answer(connect(stack, address_of(server), whole_address))[0] == 404
        unread = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
        made = connect(stack, address_of(server), unread)
        assert answer(made)[0] == 200
        made.sendall(b"12345" + one)
        assert answer(made)[0] == 200
        made = connect(stack, address_of(server), post + b"Expect: 100-continue\r\n\r\n")
        assert made.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        made.sendall(body)
        assert answer(made)[0] == 200
