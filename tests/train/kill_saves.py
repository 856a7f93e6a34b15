"""Run as a program: kill a child that saves in a tight loop, look at what is left, again and again; prints JSON.

A process of its own, because it forks: the child starts in a millisecond with torch already there.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from posttrain.train.checkpoint import Checkpoint, checkpoint_folders, load_newest, save_checkpoint


def save_for_ever(folder: Path, first: int, told: int) -> None:
    """The child: each checkpoint holds its own number everywhere; a number is told once its save has returned."""
    for step in range(first, first + 10**6):
        save_checkpoint(folder, step, Checkpoint({"x": torch.full((4_000,), float(step))}, {"step": step}))
        os.write(told, f"{step}\n".encode())


def one_kill(folder: Path, first: int, saves: int, part: float) -> tuple[int, bool]:
    """Kill the child `part` of a save's time after so many saves.

    Returns the last number that it told, and whether the kill came inside a save that had begun to write.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        save_for_ever(folder, first, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        started = time.monotonic()
        told = [int(pipe.readline()) for _ in range(saves)]
        time.sleep(part * (time.monotonic() - started) / saves)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told += [int(line) for line in pipe if line.endswith("\n")]
    return told[-1], bool(list(folder.glob(".step-*.partial")))


def main(folder: Path, kills: int) -> None:
    """Kill, look, go on from what is there."""
    torch.set_num_threads(1)  # a child inherits no threads, and would wait for them
    chance = random.Random(0)
    newest = inside = unusable = lost = 0
    for _ in range(kills):
        told, within = one_kill(folder, newest + 1, chance.choice([1, 1, 1, 2]), chance.uniform(0, 1.2))
        there = checkpoint_folders(folder)
        saved = load_newest(folder)
        step = int(saved.state["step"]) if saved else 0
        whole = saved is None or bool((saved.tensors["x"] == step).all())
        unusable += bool(there) and (there[0].name != f"step-{step:08d}" or not whole)
        lost += step < max(told, newest)
        newest, inside = step, inside + within
    print(json.dumps({"kills": kills, "inside": inside, "unusable": unusable, "lost": lost, "saved": newest}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
