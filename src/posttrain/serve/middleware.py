"""The ASGI middleware that every request passes before a route: authentication, admission, the body, disconnection.

    key          without a valid key only /health answers; a browser that opens the page asks its user for the key. Without a
                 key file only requests to names of this machine are admitted, which prevents DNS rebinding
    admission    a bounded number of requests is admitted, each owner (a key; without keys all clients are one owner) has a
                 share of it, and none is admitted during shutdown
    body         read here completely or up to its limit, so no route waits for a slow sender. Bodies being read have their own
                 places, so a slow sender holds no place of an admitted request
    parsing      routes receive and parse bodies one at a time, in turn between owners
    disconnect   a client that closes its connection cancels its request, streaming or not

Not included: TLS and limits by address. Use a proxy for them.
"""

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from posttrain.errors import BusyError
from posttrain.generate.fair_queue import OwnerShares
from posttrain.serve.errors import Refusal, encode, refusal
from posttrain.serve.keys import KeyFile
from posttrain.serve.limits import Limits
from posttrain.serve.turns import FairSemaphore, TextThreads, requests_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})
# The page that a browser opens. Only here may the key be an HTTP Basic password: browsers remember it, and on other paths a
# page of another site could use it.
PAGE = "/"
# Routes that load and unload adapters.
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
# Routes whose refused requests are counted.
COUNTED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
# Routes that answer during shutdown.
MONITORING_PATHS = frozenset({"/health", "/ready", "/metrics"})
# How much of a refused body is read, in largest bodies, and for how long: a client that is still sending would otherwise see
# a reset connection instead of the answer.
SPARE_BODIES, SPARE_SECONDS = 8, 5.0
# Keys of the ASGI scope: the owner of an admitted request, and whether it holds a place.
OWNER, HOLDS_PLACE = "posttrain.owner", "posttrain.holds"
# All requests of one owner together may have as many bytes as this number of largest bodies.
BODIES = 64
# Extra time beyond the request limit, after which a client that reads nothing loses its place.
LAST_SECONDS = 30.0
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


class Middleware:
    """The application behind its checks. `places` is the number of admitted requests per owner. `admitted` is the current
    number over all owners, including requests whose body is being read.

    `refused` is called with the status of each generation request that is refused here.
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
        self.places = OwnerShares(places, "server", "requests are admitted")
        self._bodies = OwnerShares(places, "server", "bodies are being read")
        self._bytes = OwnerShares(BODIES * limits.body_bytes, "server", "bytes of requests are admitted")
        self._entering, self._threads = FairSemaphore(1, 1), TextThreads(limits.queue_seconds)
        self.draining = False
        # The timeouts of the bodies being read.
        self._reading: set[asyncio.Timeout] = set()

    @property
    def admitted(self) -> int:
        """The number of requests that hold a place."""
        return self.places.total + self._bodies.total

    async def empty(self) -> None:
        """Wait until no request is admitted."""
        while self.admitted:
            await asyncio.sleep(0.02)

    def stop_reading(self) -> None:
        """Stop waiting for bodies that are incomplete."""
        for limit in self._reading:
            limit.reschedule(asyncio.get_running_loop().time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan of the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        send, incoming = _with_headers(send), _Incoming(receive)
        try:
            owner = self._admit(scope["path"], headers)
            open_path = scope["path"] in OPEN_PATHS
            if not open_path:
                scope[OWNER] = owner
            with requests_of(self._threads, owner):
                if scope["method"] == "POST" and not open_path:
                    await self._post(scope, headers, owner, incoming, send)
                else:  # no route reads a body then
                    await self._run(scope, b"", owner, incoming, send)
        except (Refusal, BusyError) as problem:
            if not incoming.over and b"expect" not in headers:  # with "Expect: 100-continue" no body was sent yet
                await self._discard(incoming)
            await self._turn_away(scope, send, refusal(problem))

    async def _post(
        self, scope: Scope, headers: dict[bytes, bytes], owner: str, receive: "_Incoming", send: Send
    ) -> None:  # fmt: skip
        """Admit a POST request and run its route. Raises Refusal or BusyError before the route runs."""
        most, length = self._limits.body_bytes, headers.get(b"content-length", b"0")
        size = most if b"transfer-encoding" in headers or not length.isdigit() else int(length[:20])
        if size > most:
            raise self._too_long()
        self.places.check(owner)
        with self._bytes.hold(owner, size):
            scope[HOLDS_PLACE] = True
            try:
                with self._bodies.hold(owner):
                    body = await self._read(receive)
                with self.places.hold(owner):
                    await self._run(scope, body, owner, receive, send)
            finally:
                del scope[HOLDS_PLACE]

    async def _turn_away(self, scope: Scope, send: Send, problem: Refusal) -> None:
        if scope["path"] in COUNTED_PATHS:
            self._refused(problem.status)
        await _answer(send, problem)

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> str:
        """The owner of a request. Raises Refusal if it is not admitted."""
        owner = self._owner(path, headers)
        if self.draining and path not in MONITORING_PATHS:
            raise Refusal(503, "server", "shutting down", do="try again later", code="shutting_down")
        return owner

    def _owner(self, path: str, headers: dict[bytes, bytes]) -> str:
        if path in OPEN_PATHS:
            return ""
        if self._keys is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            if _without_port(host) not in self._hosts:
                raise Refusal(403, "Host", "not a name of this machine", do="start the server with --keys FILE", code="host")
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
        """Read the body. Raises Refusal if it is too long or too slow."""
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
            raise Refusal(408, "body", f"incomplete after {seconds:g} seconds", do="send it faster", code="timeout") from None
        finally:
            self._reading.discard(limit)
        return bytes(body)

    def _too_long(self) -> Refusal:
        most = self._limits.body_bytes
        return Refusal(413, "body", f"more than {most} bytes", allowed=f"at most {most}", code="body_too_large")

    async def _discard(self, receive: "_Incoming") -> None:
        """Read more of a refused body, so that the client is ready to read the answer."""
        remaining = SPARE_BODIES * self._limits.body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(SPARE_SECONDS, self._limits.body_seconds)):
                while remaining > 0 and not receive.over:
                    remaining -= len((await receive()).get("body", b""))

    async def _run(self, scope: Scope, body: bytes, owner: str, receive: Receive, send: Send) -> None:
        """Run the route until it has answered or the client disconnects."""
        body_sent = False

        async def receive_body() -> Message:
            nonlocal body_sent
            if not body_sent:
                body_sent = True
                if body:
                    await self._entering.acquire(owner)
                    # The turn ends when the route first waits, which is after parsing.
                    asyncio.get_running_loop().call_soon(self._entering.release, owner)
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # `disconnected` below watches for the disconnection
            raise AssertionError

        async def disconnected() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = asyncio.ensure_future(self.app(scope, receive_body, send)), asyncio.ensure_future(disconnected())
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
    """The messages of a request. `over` is true once the body is complete or given up."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self.over = receive, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.over = self.over or not message.get("more_body", False)
        return message


def _presented(headers: dict[bytes, bytes], schemes: tuple[str, ...]) -> str:
    """The key in the Authorization header, or an empty string."""
    scheme, _, credentials = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() not in schemes:
        return ""
    if scheme.lower() == "bearer":
        return credentials.strip()
    with contextlib.suppress(ValueError):  # invalid base64 or UTF-8: no key
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    return ""


def _without_port(host: str) -> str:
    """A name or address without its port: `[::1]:8000` is `[::1]`."""
    return host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host


def _with_headers(send: Send) -> Send:
    """Add the default headers to every response that does not set them."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", [])}
            missing = [pair for pair in HEADERS.items() if pair[0] not in present]
            message = {**message, "headers": [*message.get("headers", []), *missing]}
        await send(message)

    return send_with_headers


async def _answer(send: Send, problem: Refusal) -> None:
    body = encode(problem.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **problem.headers()}
    start = {"type": "http.response.start", "status": problem.status}
    await send({**start, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})
