"""A server under random clients for a while: answers, aborts, adapters that come, change and go, nonsense.

    python benchmarks/soak.py --seconds 3600        on random:tiny, or --model

The server is the command itself in a process of its own. Sixteen clients choose by a seed what to do next. At the end nothing
may be in flight, and SIGTERM must end it with 0. Every greedy answer of weights that stay is compared with its first one, up to
where two tokens are as good as equally likely: in bfloat16 the company of a row then decides.
Prints one JSON object and exits with 1 where something broke: a status of 500 or more, a reset connection, an answer that
changed, a row left in flight, another exit code, or, in five minutes or more, memory beside the cache of prompts that grew by
more than a tenth in the second half. The library keeps the products that it compiled, up to 0.5 GiB of them; here it may keep
few, or they would hide what leaks.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

CLIENTS, KEPT, SWAPPED = 16, 4, 4
GROWTH = 1.10
# Memory is judged in soaks of so many seconds; before, libraries and caches are still warming up.
SETTLED = 300
# Two likeliest tokens closer than this, in nats, may change places by rounding.
TIE = 0.25
ENVIRONMENT = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


def write_adapters(folder: Path, model: str, template: str) -> None:
    """Adapters that stay, and two contents for each that is swapped."""
    import torch

    from posttrain.models.adapter_files import save_adapter
    from posttrain.models.base_model import load_base
    from posttrain.models.lora import LoraSettings

    base = load_base(model, template=template)
    names = [f"kept{i}" for i in range(KEPT)] + [f"swapped{i}-{side}" for i in range(SWAPPED) for side in "ab"]
    for seed, name in enumerate(names):
        adapter = base.adapters.create("made", LoraSettings(4 + 4 * (seed % 3), 16.0, 0.0, "all", "standard"), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, b in adapter.weights.values():
                b.normal_(std=0.1, generator=generator)
        (folder / name).mkdir()
        save_adapter(folder / name, adapter, base)
        base.adapters.remove("made")


class Soak:
    """The clients and what they saw."""

    def __init__(self, url: str, base: str, seconds: float, seed: int) -> None:
        self.url, self.base, self.end = url, base, time.monotonic() + seconds
        self.chance = random.Random(seed)
        self.statuses: Counter[str] = Counter()
        self.did: Counter[str] = Counter()
        self.broken: list[str] = []
        self.first: dict[str, list[str]] = {}
        self.seconds: list[tuple[float, float]] = []

    async def run(self) -> None:
        """All clients to the end of the time."""
        limits = httpx.Limits(max_connections=4 * CLIENTS)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(self.client(http) for _ in range(CLIENTS)))

    async def client(self, http: httpx.AsyncClient) -> None:
        """One client: one thing after the other."""
        acts = {self.ask: 50, self.stream: 20, self.abort: 15, self.swap: 5, self.unload: 3, self.nonsense: 5, self.look: 2}
        while time.monotonic() < self.end:
            (act,) = self.chance.choices(list(acts), list(acts.values()))
            self.did[act.__name__] += 1
            try:
                await act(http)
            except httpx.HTTPError as error:
                self.broken.append(f"{act.__name__}: {type(error).__name__} {error}")

    def body(self) -> dict[str, Any]:
        """A request for some policy; one in two greedy and from few prompts, so that answers repeat."""
        names = [self.base, *(f"kept{i}" for i in range(KEPT)), *(f"swapped{i}" for i in range(SWAPPED))]
        text = " ".join(self.chance.choices(["why", "sea", "two", "red", "run"], k=self.chance.choice((1, 3, 40))))
        greedy = self.chance.random() < 0.5
        return {
            "model": self.chance.choice(names), "max_tokens": self.chance.choice((1, 8, 40)), "temperature": 0 if greedy else 1,
            "messages": [{"role": "user", "content": self.chance.choice(["Hi", "What is rain?"]) if greedy else text}],
        }  # fmt: skip

    def note(self, response: httpx.Response) -> None:
        """A status; swapped adapters may be away, and a full queue may say so."""
        self.statuses[str(response.status_code)] += 1
        if response.status_code >= 500:
            self.broken.append(f"{response.status_code}: {response.text[:200]}")

    async def ask(self, http: httpx.AsyncClient) -> None:
        """A whole answer; a greedy one of weights that stay must be what it was."""
        body, began = self.body(), time.monotonic()
        stays = body["temperature"] == 0 and not body["model"].startswith("swapped")
        if stays:
            body |= {"logprobs": True, "top_logprobs": 2}
        response = await http.post("/v1/chat/completions", json=body)
        self.note(response)
        if response.status_code == 200:
            self.seconds.append((began, time.monotonic() - began))
            if stays:
                tokens = sure(response.json()["choices"][0]["logprobs"]["content"])
                first = self.first.setdefault(json.dumps(body), tokens)
                if any(a != b for a, b in zip(first, tokens, strict=False)):
                    self.broken.append(f"{body['model']} answered otherwise than before")

    async def stream(self, http: httpx.AsyncClient, *, leave_after: int | None = None) -> None:
        """A stream to its end, or left behind."""
        async with http.stream("POST", "/v1/chat/completions", json={**self.body(), "stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
                self.note(response)
                return
            self.statuses["200"] += 1
            count, last = 0, ""
            async for line in response.aiter_lines():
                last = line or last
                count += line.startswith("data:")
                if leave_after is not None and count > leave_after:
                    return
            if last != "data: [DONE]":
                self.broken.append(f"a stream ended with {last[:200]}")

    async def abort(self, http: httpx.AsyncClient) -> None:
        """Leave in the middle."""
        await self.stream(http, leave_after=self.chance.randrange(6))

    async def swap(self, http: httpx.AsyncClient) -> None:
        """Load an adapter, over itself or another content of its name."""
        number, side = self.chance.randrange(SWAPPED), self.chance.choice("ab")
        body = {"lora_name": f"swapped{number}", "lora_path": f"swapped{number}-{side}", "load_inplace": True}
        self.note(await http.post("/v1/load_lora_adapter", json=body))

    async def unload(self, http: httpx.AsyncClient) -> None:
        """Take one away, which may be away already."""
        self.note(await http.post("/v1/unload_lora_adapter", json={"lora_name": f"swapped{self.chance.randrange(SWAPPED)}"}))

    async def nonsense(self, http: httpx.AsyncClient) -> None:
        """What no server should take."""
        bodies = [
            b"",
            b"{",
            b'{"model": 3}',
            b"[" * 5000,
            json.dumps({**self.body(), "max_tokens": 10**9}).encode(),
            b"\xff" * 99,
        ]
        path = self.chance.choice(["/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/load_lora_adapter"])
        headers = {"content-type": "application/json"}
        self.note(await http.post(path, content=self.chance.choice(bodies), headers=headers))

    async def look(self, http: httpx.AsyncClient) -> None:
        """What a monitor asks."""
        for path in ("/health", "/metrics", "/v1/models"):
            self.note(await http.get(path))


def sure(entries: list[dict[str, Any]]) -> list[str]:
    """The tokens before the first one that might have been another."""
    tops = [[top["logprob"] for top in entry["top_logprobs"]] for entry in entries]
    tie = next((i for i, (first, second) in enumerate(tops) if first - second < TIE), len(tops))
    return [entry["token"] for entry in entries[:tie]]


def resident(process: subprocess.Popen[str]) -> float:
    """MiB of the server."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024


async def watch(process: subprocess.Popen[str], url: str, seconds: float) -> list[tuple[float, float]]:
    """Memory at 40 times, and what of it is the cache of prompts, which fills up to its limit."""
    found = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for _ in range(40):
            await asyncio.sleep(seconds / 40)
            text = (await http.get("/metrics")).text
            kept = float(re.findall(r"^posttrain_prefix_bytes (\S+)$", text, re.M)[0]) / 2**20
            found.append((round(resident(process), 1), round(kept, 1)))
    return found


async def hold(process: subprocess.Popen[str], soak: Soak, seconds: float) -> tuple[list[tuple[float, float]], float]:
    """The whole time; memory on the way, and completions that are open at the end."""
    memory, _ = await asyncio.gather(watch(process, soak.url, seconds), soak.run())
    async with httpx.AsyncClient(base_url=soak.url, timeout=60) as http:
        for _ in range(100):
            text = (await http.get("/metrics")).text
            still = sum(map(float, re.findall(r"^posttrain_completions_open\S* (\S+)$", text, re.M)))
            if not still:
                break
            await asyncio.sleep(0.1)
    return memory, still


def main() -> None:
    """Start the server, soak it, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--model", default="random:tiny")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(folder, options.model, options.template)
        named = [part for i in range(KEPT) for part in ("--adapter", f"kept{i}={folder / f'kept{i}'}")]
        command = [
            sys.executable,
            "-m",
            "posttrain.cli",
            "serve",
            options.model,
            "--template",
            options.template,
            "--name",
            "the-base",
        ]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--name", "the-base", "--port", "0", "--adapters-dir", name, *named],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=ENVIRONMENT,
            )
            assert process.stdout is not None
            url = next(found[0] for line in process.stdout if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)))
            soak = Soak(url, "the-base", options.seconds, options.seed)
            try:
                memory, still = asyncio.run(hold(process, soak, options.seconds))
            finally:
                process.send_signal(signal.SIGTERM)
                code = process.wait(60)
        trace = (folder / "log").read_text()
    found = summary(soak, options.seconds, memory, still, code, trace)
    print(json.dumps({"seconds": options.seconds, "model": options.model, **found}, indent=2))
    sys.exit(bool(found["broken"]))


def summary(
    soak: Soak, seconds: float, memory: list[tuple[float, float]], still: float, code: int, trace: str
) -> dict[str, Any]:
    """What is reported, and what of it is broken."""
    broken = Counter(soak.broken)
    if still:
        broken[f"{still} completions were still open"] += 1
    if code:
        broken[f"the exit code was {code}"] += 1
    if "Traceback" in trace:
        broken[f"the server wrote {trace[-500:]}"] += 1
    beside = [whole - kept for whole, kept in memory]
    half_way, end = statistics.median(beside[18:23]), statistics.median(beside[-5:])
    if seconds >= SETTLED and end > GROWTH * half_way:
        broken[f"memory beside the cache of prompts grew from {half_way:.1f} to {end:.1f} MiB"] += 1
    half = soak.end - (soak.end - min((began for began, _ in soak.seconds), default=soak.end)) / 2
    times = [sorted(s for began, s in soak.seconds if (began >= half) == late) for late in (False, True)]
    return {
        "broken": dict(broken), "did": dict(soak.did), "statuses": dict(soak.statuses), "repeated_answers": len(soak.first),
        "memory_mib": {"beside_half_way": half_way, "beside_end": end, "whole_and_cache": memory},
        "seconds_p50_p99": [[round(s[len(s) // 2], 3), round(s[len(s) * 99 // 100], 3)] if s else [] for s in times],
    }  # fmt: skip


if __name__ == "__main__":
    main()
