"""What an adapter costs a server: milliseconds until it answers, and memory against its file. Argument: a scratch folder.

Rank 16 on all linear layers of gemma3-270m, through the store that the server uses. `in memory` is asking for one that is
there; `same content` loads it again, which reads and hashes its files and finds it there; `from disk` reads one that had left
while its files are in the system's cache, `cold` after the system was asked to forget them. Memory is the growth of the process
over 19 adapters. Prints one JSON object: of each time the median of 20, the fastest and the slowest.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from ours import versions

from posttrain.models.adapter_files import save_adapter
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.lora import LoraSettings
from posttrain.serve.store import AdapterStore

MODEL = "package:gemma3-270m"
LORA = LoraSettings(16, 32.0, 0.0, "all", "standard")
COUNT, REPEATS = 20, 20


def prepare(base: BaseModel, folder: Path) -> int:
    """Write the adapters; returns the bytes of one file of weights."""
    for seed in range(COUNT):
        target = folder / f"a{seed}"
        target.mkdir(parents=True, exist_ok=True)
        adapter = base.adapters.create("made", LORA, seed=seed)
        with torch.no_grad():
            for _, b in adapter.weights.values():
                b.normal_(std=0.01)
        save_adapter(target, adapter, base)
        base.adapters.remove("made")
    return (folder / "a0" / "adapter_model.safetensors").stat().st_size


def resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget(folder: Path) -> None:
    """Ask the system to drop what it keeps of an adapter's files."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


async def timed(work: Callable[[int], Awaitable[Any]], before: Callable[[int], None] | None = None) -> dict[str, float]:
    """Milliseconds of one call; `before` runs first each time and is not counted."""
    times = []
    for turn in range(REPEATS):
        if before is not None:
            before(turn)
        started = time.perf_counter()
        await work(turn)
        times.append((time.perf_counter() - started) * 1000)
    return {"median": round(statistics.median(times), 3), "min": round(min(times), 3), "max": round(max(times), 3)}


async def measure(base: BaseModel, folder: Path, file_bytes: int) -> dict[str, Any]:
    """All figures."""
    store = AdapterStore(base, base_name=MODEL, folder=folder, budget_bytes=2**34)
    await store.load("a0", "a0")
    before = resident()
    for number in range(1, COUNT):
        await store.load(f"a{number}", f"a{number}")
    grown = (resident() - before) / (COUNT - 1)
    # Room for one: each use of the other reads it.
    small = AdapterStore(base, base_name=MODEL, folder=folder, budget_bytes=4 * file_bytes - 2**20)
    for name in ("a0", "a1"):
        await small.load(f"{name}.x", name)

    async def recall(turn: int) -> None:
        await small.use(f"a{turn % 2}.x")

    found = {
        "in memory": await timed(lambda _: store.use("a0")),
        "same content": await timed(lambda _: store.load("a0", "a0")),
        "from disk": await timed(recall),
        "cold": await timed(recall, lambda turn: forget(folder / f"a{turn % 2}")),
    }
    return {
        "milliseconds": found, "file_bytes": file_bytes, "weights_bytes": store.models()[1].bytes,
        "grown_bytes": round(grown), "memory_to_file": round(grown / file_bytes, 3), **versions(),
    }  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1])
    base = load_base(MODEL, template="gemma")
    file_bytes = prepare(base, folder)
    print(json.dumps(asyncio.run(measure(base, folder, file_bytes))))


if __name__ == "__main__":
    main()
