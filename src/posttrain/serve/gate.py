"""What every request passes before a route sees it, as plain ASGI: who asks, how much, whether there is room, who has left.

    key        without a good one nothing but /health answers, and a browser that opens the page asks for it; without keys
               only names of this machine are listened to, so that a page of another site cannot reach in (DNS rebinding)
    room       a bounded number of requests is inside, and none is taken while the server goes down
    body       read here to its end or its limit, so that no route waits for a slow sender
    leaving    a client that closes its connection ends its request, streaming or not

Left out: TLS and limits by address, which belong to a proxy in front.
"""

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from posttrain.serve.envelope import Refusal, encode
from posttrain.serve.keys import Keys
from posttrain.serve.limits import Limits

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
# Beyond the limit of a request's time: what a client that reads nothing may still hold on to.
LAST_SECONDS = 30.0
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


class Gate:
    """The application behind its checks. `places` is how many requests may be inside; `inside` how many are.

    `refused` hears the status of each request for an answer that is turned away here.
    """

    def __init__(
        self, app: App, *, keys: Keys | None, hosts: frozenset[str], limits: Limits, places: int, refused: Callable[[int], None]
    ) -> None:
        self.app, self._keys, self._hosts, self._limits, self._places = app, keys, hosts, limits, places
        self._refused = refused
        self.inside = 0
        self.draining = False

    async def empty(self) -> None:
        """Wait until nobody is inside."""
        while self.inside:
            await asyncio.sleep(0.02)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (or the lifespan of the application)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        send = _with_headers(send)
        counted = scope["method"] == "POST"
        try:
            owner = self._admit(scope["path"], headers, counted)
            if scope["path"] not in OPEN_PATHS:
                scope[OWNER] = owner
        except Refusal as problem:
            await self._discard(headers, receive)
            await self._turn_away(scope, send, problem)
            return
        if not counted:  # no route reads a body then
            await self._run(scope, b"", receive, send)
            return
        self.inside += 1
        scope[HOLDS] = True
        try:
            body = await self._read(headers, receive)
            await self._run(scope, body, receive, send)
        except Refusal as problem:
            await self._turn_away(scope, send, problem)
        finally:
            self.inside -= 1
            del scope[HOLDS]

    async def _turn_away(self, scope: Scope, send: Send, problem: Refusal) -> None:
        if scope["path"] in COUNTED_PATHS:
            self._refused(problem.status)
        await _answer(send, problem)

    def _admit(self, path: str, headers: dict[bytes, bytes], counted: bool) -> str:
        """Whose request it is. Raises Refusal where it may not come in."""
        owner = self._who(path, headers)
        if self.draining and path not in WATCHING_PATHS:
            raise Refusal(503, "server", "going down", do="ask again later", code="shutting_down")
        if counted and self.inside >= self._places:
            raise Refusal(
                429, "server", f"{self.inside} requests are inside", allowed=f"at most {self._places}", do="ask again later",
                code="queue_full",
            )  # fmt: skip
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

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body. Raises Refusal for one that is too long or too slow."""
        most, body = self._limits.body_bytes, bytearray()
        length = headers.get(b"content-length", b"0")
        too_long = length.isdigit() and int(length[:20]) > most
        seconds = self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                while not too_long:
                    message = await receive()
                    body += message.get("body", b"")
                    too_long = len(body) > most
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refusal(408, "body", f"not there after {seconds:g} seconds", do="send it faster", code="timeout") from None
        if too_long:
            await self._discard(headers, receive)
            raise Refusal(413, "body", f"more than {most} bytes", allowed=f"at most {most}", code="body_too_large")
        return bytes(body)

    async def _discard(self, headers: dict[bytes, bytes], receive: Receive) -> None:
        """Read on for a while, to be heard when the answer is sent. A client that asks first has sent no body yet."""
        if b"expect" in headers:
            return
        left = SPARE_BODIES * self._limits.body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(SPARE_SECONDS, self._limits.body_seconds)):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The route, until it has answered or its client has left."""
        given = False

        async def again() -> Message:
            nonlocal given
            if not given:
                given = True
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
