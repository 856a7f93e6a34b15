"""What another busy process costs: LoRA training and one stream of text, quiet and beside a process that computes, each with
OpenMP threads that spin while they wait and with threads that sleep.

    .venv/bin/python benchmarks/busy.py            # all twelve figures, in turn, three rounds

Prints one JSON object: tokens a second by work, neighbour and waiting (medians of the rounds, and every round).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

WAITING = {
    "spin": {"OMP_WAIT_POLICY": "active"},
    "library": {},  # what libgomp does when nobody says anything
    "sleep": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
}
ROWS, LENGTH, STEPS, ANSWER = 16, 128, 4, 96


def train() -> float:
    """Tokens a second of LoRA steps over packed rows, SmolLM2."""
    import torch
    from growth import LORA, ids, training_step

    from posttrain.models.base_model import load_base

    base = load_base("package:smollm2-135m-instruct")
    base.adapters.create("a0", LORA, seed=0).requires_grad_(True)
    batch = [ids(LENGTH, i) for i in range(ROWS)]
    optimizer = torch.optim.AdamW(base.adapters.get("a0").parameters().values(), lr=1e-4, foreach=True)
    training_step(base, batch, 2048)
    started = time.perf_counter()
    for _ in range(STEPS):
        training_step(base, batch, 2048)
        optimizer.step()
        optimizer.zero_grad()
    return STEPS * ROWS * LENGTH / (time.perf_counter() - started)


def stream() -> float:
    """Tokens a second of one answer after another, SmolLM2."""
    from growth import ids

    from posttrain.generate.engine import SamplingSettings, generate
    from posttrain.models.base_model import load_base

    base = load_base("package:smollm2-135m-instruct")
    settings = SamplingSettings(max_new_tokens=ANSWER, temperature=1.0)
    generate(base, [ids(32, 0)], settings, "base")
    started = time.perf_counter()
    tokens = sum(len(generate(base, [ids(32, 1 + i)], settings, "base")[0].completion_ids) for i in range(4))
    return tokens / (time.perf_counter() - started)


def measure(work: str, neighbour: bool, waiting: str) -> float:
    """One figure in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= WAITING[waiting] | {"HF_HUB_OFFLINE": "1"}
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if neighbour else None
    try:
        out = subprocess.run(
            [sys.executable, __file__, "--one", work], env=environment, capture_output=True, text=True, check=True
        )
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    return float(out.stdout.split()[-1])


def main() -> None:
    """All figures, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=("train", "stream"))
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.one:
        print(train() if asked.one == "train" else stream())
        return
    found: dict[str, list[float]] = {}
    for _ in range(asked.rounds):
        for work in ("train", "stream"):
            for neighbour in (False, True):
                for waiting in WAITING:
                    name = f"{work}, {'busy' if neighbour else 'quiet'}, {waiting}"
                    found.setdefault(name, []).append(round(measure(work, neighbour, waiting), 1))
                    print(name, found[name][-1], file=sys.stderr, flush=True)
    result: dict[str, Any] = {name: {"median": statistics.median(rates), "rounds": rates} for name, rates in found.items()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
