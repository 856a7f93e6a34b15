"""A server that is asked for ten times what it can answer, for minutes: 200 and 429 and nothing else, in bounded memory.

    python benchmarks/overload.py --seconds 300     on random:tiny, or --model

The server is the command itself in a process of its own, on the first half of the cores; the clients have the others, as if
they had a machine of their own (`--no-apart`: both have all). First as many clients as it computes rows at once ask one after
the other: that is its capacity. Then as many as it takes at all, rows and queue: it is saturated. Then requests come by the
clock at `--load` times its capacity, whatever has been answered. Prints one JSON object: answers by status, times to answer,
the time to the first token by the server's own histogram (straight between the edges of a bucket), tokens a second after the
rows have filled up and their share of the best rate before, memory at 40 times, what /metrics says at the end. Exits with 1
where something broke: another status, a reset connection, a 429 without its body or `Retry-After`, an answer that is cut,
memory that grew by more than a twentieth after the first fifth, a row left in flight, or another exit code.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any

import httpx
from soak import ENVIRONMENT, watch

from posttrain.generate.engine import ROWS

GROWTH = 1.05
CHAT = "/v1/chat/completions"
NAME = "the-base"


class Wire:
    """Posts one body over kept connections, with as little of Python as can be: clients must not be slower than the server."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port, self._idle = int(port), list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        self._bytes = head.encode() + b"\r\n\r\n" + content

    async def post(self) -> tuple[int, bytes, bytes]:
        """Status, headers and body. Raises OSError or IncompleteReadError where the connection breaks."""
        pair = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        reader, writer = pair
        writer.write(self._bytes)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        self._idle.append(pair)
        return int(head[9:12]), head, body

    def close(self) -> None:
        """All connections."""
        for _, writer in self._idle:
            writer.close()


class Load:
    """The requests and what came of them."""

    def __init__(self, url: str, tokens: int) -> None:
        ask = {"role": "user", "content": "Hi"}
        self.body = {"model": NAME, "messages": [ask], "temperature": 0, "max_tokens": tokens, "min_tokens": tokens}
        self.tokens, self.wire = tokens, Wire(url, self.body)
        self.statuses: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.seconds: dict[int, list[float]] = {200: [], 429: []}

    async def ask(self) -> None:
        """One request."""
        began = time.monotonic()
        try:
            status, head, body = await self.wire.post()
        except (OSError, asyncio.IncompleteReadError) as error:
            self.broken[f"{type(error).__name__} {error}"] += 1
            return
        self.statuses[str(status)] += 1
        if status == 200:
            good = json.loads(body)["usage"]["completion_tokens"] == self.tokens
        else:
            good = status == 429 and b"\r\nretry-after: 1\r\n" in head
            good = good and json.loads(body)["error"]["code"] == "queue_full"
        if not good:
            self.broken[f"{status}: {body[:200]!r}"] += 1
        self.seconds.setdefault(status, []).append(time.monotonic() - began)

    async def capacity(self, http: httpx.AsyncClient, seconds: float, clients: int) -> float:
        """Tokens a second with so many clients, each of which asks again when it is answered."""
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self.ask()

        found, *_ = await asyncio.gather(tokens_a_second(http, seconds), *(client() for _ in range(clients)))
        return found

    async def offer(self, rate: float, seconds: float) -> int:
        """Requests by the clock; returns how many there were, when all are answered."""
        began, count = time.monotonic(), int(rate * seconds)
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                group.create_task(self.ask())
        return count


async def tokens_a_second(http: httpx.AsyncClient, seconds: float) -> float:
    """What the server makes in the last two thirds of so many seconds: until then its rows fill up."""
    await asyncio.sleep(seconds / 3)
    times, counts = [], []
    for wait in (2 * seconds / 3, 0.0):
        page = (await http.get("/metrics")).text
        times.append(time.monotonic())
        counts.append(sum(float(n) for n in re.findall(r"^posttrain_completion_tokens_total\S* (\S+)$", page, re.MULTILINE)))
        await asyncio.sleep(wait)
    return (counts[1] - counts[0]) / (times[1] - times[0])


def percentiles(seconds: list[float]) -> list[float]:
    """The median, the 99th of a hundred and the longest."""
    found = sorted(seconds)
    return [round(found[len(found) * part // 100], 4) for part in (50, 99)] + [round(found[-1], 4)] if found else []


def first_tokens(before: str, after: str, share: float) -> float:
    """Within how many seconds this share of the answers that began between two pages had their first token."""
    line = r'^posttrain_time_to_first_token_seconds_bucket\{le="([^"]+)".* (\S+)$'
    old, new = (re.findall(line, page, re.MULTILINE) for page in (before, after))
    counts = [float(now) - float(then) for (_, now), (_, then) in zip(new, old or [("", "0")] * len(new), strict=True)]
    place = next(n for n, count in enumerate(counts) if count >= share * counts[-1])
    low, fewer = (float(new[place - 1][0]), counts[place - 1]) if place else (0.0, 0.0)
    inside = (share * counts[-1] - fewer) / max(counts[place] - fewer, 1.0)
    return round(low + inside * (float(new[place][0]) - low), 3)


def halves(apart: bool) -> tuple[set[int], set[int]]:
    """The cores of the server and those of the clients."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return (set(cores[:half]), set(cores[half:])) if apart and half else (set(cores), set(cores))


async def hold(process: "subprocess.Popen[str]", url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Capacity, overload, and what /metrics says when all is answered."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        first, full, load = (Load(url, options.tokens) for _ in range(3))
        capacity = await first.capacity(http, options.seconds / 3, ROWS["cpu"])
        pages = [(await http.get("/metrics")).text]
        saturated = await full.capacity(http, options.seconds / 3, ROWS["cpu"] + options.queue)
        pages.append((await http.get("/metrics")).text)
        rate = options.load * capacity / options.tokens
        watched, count, goodput = await asyncio.gather(
            watch(process, url, options.seconds),
            load.offer(rate, options.seconds),
            tokens_a_second(http, options.seconds),
        )
        memory = [round(whole - kept, 1) for whole, kept in watched]  # the cache of prompts fills up to its limit
        pages.append(metrics := (await http.get("/metrics")).text)
    for each in (first, full, load):
        each.wire.close()
    told = dict(re.findall(r"^(posttrain_(?:requests_total|completions)\S*) (\S+)$", metrics, re.MULTILINE))
    broken = first.broken + full.broken + load.broken
    if any(float(value) for name, value in told.items() if name.startswith("posttrain_completions_open")):
        broken["completions were still open at the end"] += 1
    turned_away = float(told.get('posttrain_requests_total{model="unknown",status="429"}', "0"))
    if turned_away != sum(each.statuses["429"] for each in (first, full, load)):
        broken[f"/metrics counts {turned_away} requests that were turned away"] += 1
    begin, end = statistics.median(memory[8:13]), statistics.median(memory[-5:])
    if end > GROWTH * begin:
        broken[f"memory grew from {begin} to {end} MiB"] += 1
    return {
        "tokens_per_second": {"at capacity": round(capacity), "saturated": round(saturated), "overloaded": round(goodput)},
        "goodput": round(goodput / max(capacity, saturated), 3), "offered_per_second": round(rate, 1), "requests": count,
        "statuses": dict(load.statuses), "broken": dict(broken),
        "seconds_p50_p99_max": {str(status): percentiles(found) for status, found in load.seconds.items()},
        "first_token_p50_p99": {
            name: [first_tokens(*pair, share) for share in (0.5, 0.99)]
            for name, pair in {"at capacity": ("", pages[0]), "saturated": pages[:2], "overloaded": pages[1:]}.items()
        },
        "memory_mib": {"first_fifth": begin, "end": end, "all": memory}, "metrics": told,
    }  # fmt: skip


def main() -> None:
    """Start the server, ask too much of it, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--load", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=400, help="of each answer: long ones, so that few can be answered")
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--model", default="random:tiny")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--apart", action=argparse.BooleanOptionalAction, default=True, help="clients on cores of their own")
    options = parser.parse_args()
    command = [
        sys.executable, "-m", "posttrain.cli", "serve", options.model, "--template", options.template, "--name", NAME,
        "--port", "0", "--queue", str(options.queue),
    ]  # fmt: skip
    its, ours = halves(options.apart)
    with tempfile.TemporaryFile("w+") as log:
        os.sched_setaffinity(0, its)  # which the process inherits
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT)
        os.sched_setaffinity(0, ours)
        try:
            assert process.stdout is not None
            url = next(found[0] for line in process.stdout if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)))
            found = asyncio.run(hold(process, url, options))
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
        log.seek(0)
        trace = log.read()
    if code or "Traceback" in trace:
        found["broken"][f"exit code {code}: {trace[-500:]}"] = 1
    print(json.dumps({"seconds": options.seconds, "model": options.model, **found}, indent=2))
    sys.exit(bool(found["broken"]))


if __name__ == "__main__":
    main()
