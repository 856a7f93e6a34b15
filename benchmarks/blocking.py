"""How long one request can hold the server's event loop: no step of it may take more than 100 ms.

    python benchmarks/blocking.py

A server on random:tiny runs in this process; each request of a list that is meant to be heavy is sent alone, and of every
step of the loop the processor time of its thread is taken, which says the same on a busy machine. Prints one JSON object
(milliseconds of the longest step for each request, with its status) and exits with 1 where one is longer than `LONGEST`.
"""

import asyncio
import gc
import json
import sys
import threading
import time
from typing import Any

import httpx

from posttrain.models.base_model import load_base
from posttrain.serve.app import build_app
from posttrain.serve.limits import Limits
from posttrain.serve.run import LOOPBACK, bind, listen
from posttrain.serve.service import Service
from posttrain.serve.store import AdapterStore

LONGEST = 100.0
NAME, CHAT, TEXT = "the-base", "/v1/chat/completions", "/v1/completions"
# With room for the rest of a request below the largest body.
FULL = 2**20 - 2**12


class Steps:
    """Processor milliseconds of the longest step of the loop since `restart`."""

    def __init__(self) -> None:
        self.longest = 0.0
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            run(handle)
            self.longest = max(self.longest, 1000 * (time.thread_time() - began))

        asyncio.Handle._run = timed  # type: ignore[method-assign]


def requests() -> dict[str, tuple[str, bytes]]:
    """What is heavy to read, to check, to compute or to write down, by a name."""

    def chat(**more: Any) -> tuple[str, bytes]:
        return CHAT, json.dumps({"model": NAME, "messages": [{"role": "user", "content": "Hi"}], **more}).encode()

    def text(**more: Any) -> tuple[str, bytes]:
        return TEXT, json.dumps({"model": NAME, "prompt": "Hi", "max_tokens": 1, **more}).encode()

    turn = {"role": "user", "content": "word " * 200}
    long = {"max_tokens": 1500, "min_tokens": 1500, "temperature": 1, "seed": 1, "n": 16}
    scored = {"prompt": [list(range(7, 207)) * 10] * 16, "echo": True, "logprobs": 20, "max_tokens": 0}
    return {
        "1 MiB of letters": text(prompt="x" * FULL), "262,144 letters": text(prompt="x" * 2**18),
        "262,144 characters of four bytes": text(prompt="\U0001f642" * (FULL // 12)),
        "350,000 token ids": text(prompt=[1] * (FULL // 3)), "200,000 lists of an id": text(prompt=[[1]] * (FULL // 5)),
        "200,000 texts": text(prompt=["x"] * (FULL // 5)), "256 messages": chat(messages=[turn] * 256),
        "20,000 messages": chat(messages=[{"role": "user", "content": "x"}] * 20_000),
        "16,000 parts": chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 256}] * 120),
        "1,024 biases": text(logit_bias={str(i % 250 + 7).zfill(3 + i // 250): 1 for i in range(1024)}),
        "60,000 biases": text(logit_bias={str(i): 1 for i in range(60_000)}),
        "60,000 wrong biases": text(logit_bias={str(i): "x" for i in range(60_000)}),
        "60,000 fields": text(**{f"f{i}": 1 for i in range(60_000)}), "brackets": (TEXT, b"[" * FULL),
        "nested objects": (TEXT, b'{"a":' * (FULL // 5)), "a number of 1 MiB": (TEXT, b'{"model": 1' + b"0" * FULL + b"}"),
        "16 long answers with stops": chat(**long, stop=[chr(97 + i) * 256 for i in range(16)]),
        "16 long answers with log-probabilities": chat(**long, logprobs=True, top_logprobs=20),
        "16 long prompts scored": text(**scored), "16 long prompts scored, streamed": text(**scored, stream=True),
        "65,536 ids to text": ("/detokenize", json.dumps({"tokens": [70] * 2**16}).encode()),
        "262,144 letters to ids": ("/tokenize", json.dumps({"prompt": "x" * 2**18}).encode()),
    }  # fmt: skip


def send(url: str, steps: Steps) -> dict[str, Any]:
    """Each request, after one that warms the server up."""
    found: dict[str, Any] = {}
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=url, timeout=900, headers=headers) as http:
        http.post(TEXT, json={"model": NAME, "prompt": "Hi", "max_tokens": 2})
        for name, (path, body) in requests().items():
            steps.longest = 0.0
            status = http.post(path, content=body).status_code
            http.get("/health")  # the step that ended the answer is over
            found[name] = [status, round(steps.longest, 1)]
    return found


async def main() -> dict[str, Any]:
    """A server for as long as the requests take."""
    base = load_base("random:tiny", template="plain", dtype="float32")
    service = Service(base, AdapterStore(base, base_name=NAME, folder=None, budget_bytes=0), Limits())
    steps, asked, found = Steps(), asyncio.Semaphore(0), {}
    loop = asyncio.get_running_loop()

    def work(url: str) -> None:
        try:
            found.update(send(url, steps))
        finally:
            loop.call_soon_threadsafe(asked.release)

    def started(url: str) -> None:
        threading.Thread(target=work, args=(url,)).start()

    gate = build_app(service, keys=None, hosts=LOOPBACK)
    gc.collect()  # as the command does
    gc.freeze()
    await listen(gate, service, bind("127.0.0.1", 0), asked, started)
    return found


if __name__ == "__main__":
    told = asyncio.run(main())
    print(json.dumps(told, indent=2))
    sys.exit(not told or any(longest > LONGEST for _, longest in told.values()))
