"""A server that listens on a free port of this machine, run in a thread for the length of a block."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from posttrain.generate.engine import generate
from posttrain.generate.sampling import SamplingSettings
from posttrain.models.base_model import BaseModel
from posttrain.records import Message
from posttrain.serve.app import build_app
from posttrain.serve.keys import KeyFile
from posttrain.serve.limits import Limits
from posttrain.serve.middleware import Middleware
from posttrain.serve.run import LOOPBACK, bind, listen
from posttrain.serve.service import Service
from posttrain.serve.store import AdapterStore

BASE = "random:tiny"


class Listening:
    """The address of a running server, and what runs behind it."""

    def __init__(self, service: Service, gate: Middleware) -> None:
        self.service, self.gate = service, gate
        self.url = ""
        self._asked = asyncio.Semaphore(0)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server under test")
        self._thread.start()
        assert self._started.wait(30)

    @property
    def routes(self) -> list[Any]:
        """Every route that the application has."""
        return list(self.gate.app.routes)  # type: ignore[attr-defined]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(listen(self.gate, self.service, bind("127.0.0.1", 0), self._asked, self._begin))
        self._loop.close()

    def _begin(self, address: str) -> None:
        self.url = address
        self._started.set()

    def stop(self) -> None:
        """What SIGTERM does."""
        self._loop.call_soon_threadsafe(self._asked.release)

    def settle(self) -> None:
        """Wait until nobody is inside and the engine has nothing to do."""
        for _ in range(1500):
            if not self.gate.admitted and self.service.idle:
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.gate.admitted} requests are still inside, the engine is idle: {self.service.idle}")

    def end(self) -> None:
        """Stop at once and wait for the thread."""
        if self._thread.is_alive():
            self.stop()
            self.stop()
            self._thread.join(30)
        assert not self._thread.is_alive()

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **more.pop("headers", {})}
        return httpx.post(self.url + path, content=content, headers=headers, timeout=60, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)


@contextmanager
def listening(
    base: BaseModel, *, limits: Limits | None = None, keys: KeyFile | None = None, folder: Path | None = None,
    adapters: dict[str, Path] | None = None,
) -> Iterator[Listening]:  # fmt: skip
    """A server on a base and adapters."""
    store = AdapterStore(base, base_name=BASE, folder=folder, budget_bytes=2**30)
    for name, path in (adapters or {}).items():
        store.offer(name, path)
    service = Service(base, store, limits or Limits())
    running = Listening(service, build_app(service, keys=keys, hosts=LOOPBACK))
    try:
        yield running
    finally:
        running.end()


def alone(base: BaseModel, text: str, tokens: int, adapter: str = "base") -> str:
    """The greedy answer to one message, by an engine of its own. For when no server computes on the same base."""
    prompt = base.chat.encode_prompt([Message("user", text)])
    return generate(base, [prompt], SamplingSettings(tokens), adapter)[0].text


def chat(text: str, *, model: str = BASE, tokens: int = 8, **more: Any) -> dict[str, Any]:
    """The body of a greedy chat request."""
    asked = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": tokens}
    return {**asked, **more}
