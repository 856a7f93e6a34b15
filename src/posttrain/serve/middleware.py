"""What every request passes before a route sees it, as plain ASGI: who asks, how much, whether there is room, who has left.

    key        without a good one nothing but /health answers, and a browser that opens the page asks for it; without keys
               only names of this machine are listened to, so that a page of another site cannot reach in (DNS rebinding)
    room       a bounded number of requests is inside, of which each owner (a key; without keys everybody is one) has a share,
               and none is taken while the server goes down
    body       read here to its end or its limit, so that no route waits for a slow sender; who sends slowly holds places for
               bodies, and no place inside
    turn       bodies are handed to the routes, which parse them, one at a time and in turn between owners
    leaving    a client that closes its connection ends its request, streaming or not

Left out: TLS and limits by address, which belong to a proxy in front.
"""

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from posttrain.errors import BusyError
from posttrain.generate.fair_queue import Shares
from posttrain.serve.errors import Refusal, encode, refusal
from posttrain.serve.keys import KeyFile
from posttrain.serve.limits import Limits
from posttrain.serve.turns import TextThreads, Turns, asking

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})
# What a browser opens by its address: it may ask its user for the key and send it as a password. Nowhere else, or a page of
# another site could use what the browser remembers.
PAGE = "/"
# Routes that change what is served.
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
# Routes whose requests are counted, those that are turned away here as well.
COUNTED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
# Routes that answer while the server goes down.
WATCHING_PATHS = frozenset({"/health", "/ready", "/metrics"})
# Of a body that is refused, as much is read, for so long, as lets a client see the answer rather than a reset connection.
SPARE_BODIES, SPARE_SECONDS = 8, 5.0
# What the gate notes of a request: whose it is, once it may come in, and that it holds a place.
OWNER, HOLDS = "posttrain.owner", "posttrain.holds"
# Requests of one owner may have as many bytes as so many of the largest bodies.
BODIES = 64
# Beyond the limit of a request's time: what a client that reads nothing may still hold on to.
LAST_SECONDS = 30.0
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


class Gate:
    """The application behind its checks. `places` is how many requests of one owner may be inside; `inside` how many of all
    are, those whose body is read counted.

    `refused` hears the status of each request for an answer that is turned away here.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: KeyFile | None,
        hosts: frozenset[str],
        limits: Limits,
        places: int,
        refused: Callable[[int], None],
    ) -> None:
        self.app, self._keys, self._hosts, self._limits, self._refused = app, keys, hosts, limits, refused
        self.places = Shares(places, "server", "requests are inside")
        self._bodies = Shares(places, "server", "bodies are read")
        self._bytes = Shares(BODIES * limits.body_bytes, "server", "bytes of requests are inside")
        self._entering, self._threads = Turns(1, 1), TextThreads(limits.queue_seconds)
        self.draining = False
        # The limits of time of the bodies that are read.
        self._reading: set[asyncio.Timeout] = set()

    @property
    def inside(self) -> int:
        """Requests that hold a place."""
        return self.places.total + self._bodies.total

    async def empty(self) -> None:
        """Wait until nobody is inside."""
        while self.inside:
            await asyncio.sleep(0.02)

    def stop_reading(self) -> None:
        """Wait no longer for bodies that are not there yet."""
        for limit in self._reading:
            limit.reschedule(asyncio.get_running_loop().time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (or the lifespan of the application)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        send, incoming = _with_headers(send), _Incoming(receive)
        try:
            owner = self._admit(scope["path"], headers)
            anyone = scope["path"] in OPEN_PATHS
            if not anyone:
                scope[OWNER] = owner
            with asking(self._threads, owner):
                if scope["method"] == "POST" and not anyone:
                    await self._post(scope, headers, owner, incoming, send)
                else:  # no route reads a body then
                    await self._run(scope, b"", owner, incoming, send)
        except (Refusal, BusyError) as problem:
            if not incoming.over and b"expect" not in headers:  # a client that asks first has sent no body yet
                await self._discard(incoming)
            await self._turn_away(scope, send, refusal(problem))

    async def _post(
        self, scope: Scope, headers: dict[bytes, bytes], owner: str, receive: "_Incoming", send: Send
    ) -> None:  # fmt: skip
        """A request that holds a place. Raises Refusal or BusyError before the route has it."""
        most, length = self._limits.body_bytes, headers.get(b"content-length", b"0")
        size = most if b"transfer-encoding" in headers or not length.isdigit() else int(length[:20])
        if size > most:
            raise self._too_long()
        self.places.check(owner)
        with self._bytes.hold(owner, size):
            scope[HOLDS] = True
            try:
                with self._bodies.hold(owner):
                    body = await self._read(receive)
                with self.places.hold(owner):
                    await self._run(scope, body, owner, receive, send)
            finally:
                del scope[HOLDS]

    async def _turn_away(self, scope: Scope, send: Send, problem: Refusal) -> None:
        if scope["path"] in COUNTED_PATHS:
            self._refused(problem.status)
        await _answer(send, problem)

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> str:
        """Whose request it is. Raises Refusal where it may not come in."""
        owner = self._who(path, headers)
        if self.draining and path not in WATCHING_PATHS:
            raise Refusal(503, "server", "going down", do="ask again later", code="shutting_down")
        return owner

    def _who(self, path: str, headers: dict[bytes, bytes]) -> str:
        if path in OPEN_PATHS:
            return ""
        if self._keys is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            if _without_port(host) not in self._hosts:
                raise Refusal(403, "Host", "another name than this machine's", do="give the server a --keys file", code="host")
            return ""
        schemes = ("bearer", "basic") if path == PAGE else ("bearer",)
        key = self._keys.check(_presented(headers, schemes))
        if key is None:
            do = "give the key as the password" if path == PAGE else "send Authorization: Bearer KEY"
            raise Refusal(401, "Authorization", "no valid key", do=do, code="invalid_api_key", scheme=schemes[-1])
        needed = "admin" if path in ADMIN_PATHS else "use"
        if needed not in key.scopes:
            raise Refusal(403, "Authorization", f"a key without the scope {needed}", do="use another key", code="scope")
        return key.name

    async def _read(self, receive: "_Incoming") -> bytes:
        """The body. Raises Refusal for one that is too long or too slow."""
        body, seconds = bytearray(), self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds) as limit:
                self._reading.add(limit)
                while not receive.over:
                    body += (await receive()).get("body", b"")
                    if len(body) > self._limits.body_bytes:
                        raise self._too_long()
        except TimeoutError:
            receive.over = True
            raise Refusal(408, "body", f"not there after {seconds:g} seconds", do="send it faster", code="timeout") from None
        finally:
            self._reading.discard(limit)
        return bytes(body)

    def _too_long(self) -> Refusal:
        most = self._limits.body_bytes
        return Refusal(413, "body", f"more than {most} bytes", allowed=f"at most {most}", code="body_too_large")

    async def _discard(self, receive: "_Incoming") -> None:
        """Read on for a while, to be heard when the answer is sent."""
        left = SPARE_BODIES * self._limits.body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(SPARE_SECONDS, self._limits.body_seconds)):
                while left > 0 and not receive.over:
                    left -= len((await receive()).get("body", b""))

    async def _run(self, scope: Scope, body: bytes, owner: str, receive: Receive, send: Send) -> None:
        """The route, until it has answered or its client has left."""
        given = False

        async def again() -> Message:
            nonlocal given
            if not given:
                given = True
                if body:
                    await self._entering.acquire(owner)
                    # What the route does until it waits for something, parsing above all, is its turn.
                    asyncio.get_running_loop().call_soon(self._entering.release, owner)
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # leaving is watched here and nowhere else
            raise AssertionError

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = asyncio.ensure_future(self.app(scope, again, send)), asyncio.ensure_future(gone())
        longest = self._limits.request_seconds + LAST_SECONDS
        try:
            await asyncio.wait(tasks, timeout=longest, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not tasks[0].cancelled():
            tasks[0].result()


class _Incoming:
    """The messages of a request, and whether its body is over or is waited for no longer."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self.over = receive, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.over = self.over or not message.get("more_body", False)
        return message


def _presented(headers: dict[bytes, bytes], schemes: tuple[str, ...]) -> str:
    """The key that a request brings, or nothing."""
    scheme, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() not in schemes:
        return ""
    if scheme.lower() == "bearer":
        return given.strip()
    with contextlib.suppress(ValueError):  # what is no base64 or no text is no key
        return base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
    return ""


def _without_port(host: str) -> str:
    """A name or address without its port: `[::1]:8000` is `[::1]`."""
    return host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host


def _with_headers(send: Send) -> Send:
    """What every answer says, unless it says something else."""

    async def outer(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message.get("headers", [])}
            more = [pair for pair in HEADERS.items() if pair[0] not in there]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return outer


async def _answer(send: Send, problem: Refusal) -> None:
    body = encode(problem.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **problem.headers()}
    start = {"type": "http.response.start", "status": problem.status}
    await send({**start, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})
