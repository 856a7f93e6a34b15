"""What seven callers notice of an eighth that floods the server: answers of each by itself, and beside the flood.

    python benchmarks/neighbours.py                 SmolLM2, eight adapters; --seconds, --flood
    python benchmarks/neighbours.py --words 800 --long 1        a flood of long prompts, none of which comes twice

The server is the command itself, on the first half of the cores, the callers on the others. Each of seven asks an adapter of
its own, one request after the other, for 30 seconds alone and for 30 beside the flood: `--flood` clients that ask an eighth
adapter for answers of `--long` tokens, again as soon as they are answered. Prints one JSON object: seconds of an answer at
p50, p99 and most of both, their ratios, how many answers the flood got. Exits with 1 where an answer failed.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from adapters import prepare
from overload import Wire, halves, percentiles
from run import ROOT

CALLERS = 8
TOKENS = 32


class Caller:
    """One that asks again and again, and how long each answer took."""

    def __init__(self, url: str, model: str, tokens: int, words: int = 0, *, fine: tuple[int, ...] = (200, 429)) -> None:
        """Another status than these is a failure."""
        self.url, self.words, self.fine, self.seconds, self.failed = url, words, fine, list[float](), 0
        self.body = {"model": model, "temperature": 1, "max_tokens": tokens, "min_tokens": tokens}
        self.wire = self.asking(f"Tell me something about {model}.")

    def asking(self, text: str) -> Wire:
        """With this message."""
        return Wire(self.url, {**self.body, "messages": [{"role": "user", "content": text}]})

    async def until(self, end: float) -> None:
        """Ask until then."""
        while time.monotonic() < end:
            if self.words:
                self.wire.close()
                self.wire = self.asking(" ".join(random.choices(("sea", "rain", "two", "red", "run"), k=self.words)))
            began = time.monotonic()
            status, _, _ = await self.wire.post()
            self.seconds.append(time.monotonic() - began)
            self.failed += status not in self.fine


async def hold(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """First the seven, then the seven beside the flood."""
    seconds = options.seconds
    found: dict[str, Any] = {}
    for name, clients in (("warm", 0), ("alone", 0), ("beside", options.flood)):
        callers = [Caller(url, f"a{k}", TOKENS) for k in range(1, CALLERS)]
        # 503: who waits too long is told so.
        flooding = [Caller(url, "a0", options.long, options.words, fine=(200, 429, 503)) for _ in range(clients)]
        begun = asyncio.gather(*(each.until(time.monotonic() + seconds + 5) for each in flooding))
        await asyncio.sleep(5 if clients else 0)  # until its rows are filled
        await asyncio.gather(*(each.until(time.monotonic() + (5 if name == "warm" else seconds)) for each in callers))
        await begun
        found[name] = {
            "answers": sum(len(each.seconds) for each in callers),
            "seconds_p50_p99_max": percentiles([x for each in callers for x in each.seconds]),
            "of_the_flood": sum(len(each.seconds) for each in flooding),
            "failed": sum(each.failed for each in callers + flooding),
        }
    alone, beside = (found[name]["seconds_p50_p99_max"] for name in ("alone", "beside"))
    return {**found, "ratios_p50_p99": [round(b / a, 2) for a, b in zip(alone[:2], beside[:2], strict=True)]}


def main() -> None:
    """Start the server and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--flood", type=int, default=64)
    parser.add_argument("--long", type=int, default=200, help="tokens of an answer to the flood")
    parser.add_argument("--words", type=int, default=0, help="of a prompt of the flood; 0: a short one, the same every time")
    parser.add_argument("--model", default="package:smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the public data sets")
    options = parser.parse_args()
    its, ours = halves(True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.data, CALLERS, 8)
        named = [part for k in range(CALLERS) for part in ("--adapter", f"a{k}={folder / f'a{k}'}")]
        command = [sys.executable, "-m", "posttrain.cli", "serve", options.model, "--port", "0", *named]
        os.sched_setaffinity(0, its)  # which the process inherits
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        os.sched_setaffinity(0, ours)
        try:
            assert process.stdout is not None
            url = next(found[0] for line in process.stdout if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)))
            result = asyncio.run(hold(url, options))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    print(
        json.dumps(
            {"seconds": options.seconds, "flood": options.flood, "long": options.long, "words": options.words, **result},
            indent=2,
        )
    )
    sys.exit(any(result[name]["failed"] for name in ("warm", "alone", "beside")))


if __name__ == "__main__":
    main()
