"""A tiny HTTP server that speaks as much of the streaming protocol as a page needs, and writes down what it was asked."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

PAGE = (files("posttrain") / "serve" / "playground.html").read_text(encoding="utf-8")
# The bytes of an answer, or its status, headers and body.
Reply = Iterable[bytes] | tuple[int, dict[str, str], bytes]


def hashed(tag: str) -> str:
    """The source expression for the one element of a kind."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def sse(*chunks: object) -> bytes:
    """Server-sent events; a text stands as it is."""
    return b"".join(b"data: " + (c.encode() if isinstance(c, str) else json.dumps(c).encode()) + b"\n\n" for c in chunks)


def piece(text: str) -> dict[str, Any]:
    """A chunk with some text of an answer."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def whole(text: str, *, finish: str = "stop", tokens: int = 5, size: int = 7) -> Iterator[bytes]:
    """An answer in the order of the protocol, its text in two pieces, its bytes in parts that cut through characters."""
    half = len(text) // 2
    chunks = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        piece(text[:half]), piece(text[half:]), {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}}, "[DONE]",
    ]  # fmt: skip
    data = sse(*chunks)
    if len(data) > 2000:
        size = 1001
    yield from (data[i : i + size] for i in range(0, len(data), size))


class StandIn(ThreadingHTTPServer):
    """`reply` makes the answer to the body of a request; `asked` holds (path, headers, body) of each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: list[str] | tuple[int, dict[str, str], bytes] = ["base", "sft"]
        self.parents: dict[str, str] = {}
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: whole("Hello")
        self.policy: str | None = POLICY
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *arguments: object) -> None:
        """Nothing on standard error."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers), None))
        if self.path == "/":
            headers = {"Content-Type": "text/html; charset=utf-8"}
            self.send(
                200, headers | ({"Content-Security-Policy": self.server.policy} if self.server.policy else {}), PAGE.encode()
            )
        elif self.path == "/v1/models":
            models = self.server.models
            if isinstance(models, tuple):
                self.send(*models)
            else:
                rows = [{"id": name, "object": "model", "parent": self.server.parents.get(name)} for name in models]
                self.send(200, {"Content-Type": "application/json"}, json.dumps({"object": "list", "data": rows}).encode())
        else:
            self.send(204 if self.path == "/favicon.ico" else 404, {}, b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        reply = self.server.reply(body)
        if isinstance(reply, tuple):
            self.send(*reply)
            return
        self.send(200, {"Content-Type": "text/event-stream"}, b"")
        try:
            for part in reply:
                self.wfile.write(part)
                self.wfile.flush()
        except OSError:  # whoever asked has gone
            self.server.left.set()

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """A whole response; the connection ends it."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """A server for the length of a block."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
