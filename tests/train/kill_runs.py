"""Run as a program: `posttrain run` in child processes that get signals while they train; prints JSON.

A run without signals comes first, in this process: it imports everything, and the children that are forked after it
train soon. What a child does is the whole command. A run that was hit again and again must end as the first did.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_stages import demonstrations, hashes, rows_of

from posttrain.cli import main as posttrain_main
from posttrain.train.checkpoint import checkpoint_folders, damage

RECIPE = """
name = "killed"
[base]
model = "random:tiny"
template = "gemma"
dtype = "float32"
[adapter]
rank = 2
dropout = 0.2
[[stage]]
kind = "sft"
name = "sft"
data = "{data}"
epochs = {epochs}
batch = 2
checkpoint_every = 1
validation = 0.2
validate_every = 10
keep = "best"
[evaluation]
suites = ["starter"]
limit = 1
max_new_tokens = 1
sample_tokens = 1
samples = ["Hello"]
"""


def start(folder: Path, recipe: Path, said: Path) -> int:
    """The command in a child; its output goes to a file."""
    child = os.fork()
    if child == 0:
        with said.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os._exit(posttrain_main(["run", str(recipe), "--out", str(folder)]))
    return child


def exit_code(child: int) -> int:
    """Wait; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Watched:
    """A run folder seen from outside while a child works on it."""

    def __init__(self, run: Path) -> None:
        self.partial = run / ".sft.partial"
        self.checkpoints = self.partial / "checkpoints"

    def saved(self) -> int:
        """The step of the newest checkpoint by name."""
        there = checkpoint_folders(self.checkpoints)
        return int(there[0].name[5:]) if there else 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return any(self.checkpoints.glob(".step-*.partial"))

    def wait(self, child: int, *, after: int, saving: bool) -> bool:
        """Until a step later than `after` is saved and, where asked, the next save has begun; False when the child ends."""
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if self.saved() > after and (not saving or self.saving()):
                return True
            time.sleep(0.0005)
        return False


def hit(run: Path, recipe: Path, said: Path, how: str, chance: random.Random, count: dict[str, int]) -> bool:
    """Start, wait, send the signal, look. False when the run had ended before."""
    watched = Watched(run)
    before = watched.saved()
    child = start(run, recipe, said)
    inside = chance.random() < 0.7
    if not watched.wait(child, after=before, saving=inside):
        assert exit_code(child) == 0, said.read_text()[-2000:]
        return False
    time.sleep(0 if inside else chance.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL if how == "kill" else signal.SIGTERM)
    if how == "twice":
        time.sleep(chance.uniform(0, 0.005))
        os.kill(child, signal.SIGTERM)
    code = exit_code(child)
    ended = not watched.partial.exists()
    count["tries"] += 1
    count["inside"] += watched.saving()
    count["badly ended"] += code not in {"kill": (-9,), "term": (0,), "twice": (0, 128 + signal.SIGTERM)}[how]
    if not ended:
        newest = checkpoint_folders(watched.checkpoints)[0]
        count["unusable"] += damage(newest) is not None
        if how == "term":
            count["not saved"] += int(newest.name[5:]) != rows_of(watched.partial)[-1]["step"]
    return not ended


def outcome(run: Path) -> dict[str, Any]:
    """What two runs must have in common."""
    return {"rows": rows_of(run / "sft"), "weights": hashes(load_file(run / "sft" / "adapter_model.safetensors"))}


def main(folder: Path, how: str, tries: int, epochs: int) -> None:
    """One run without signals, then runs that are hit until there were enough tries, then compare."""
    torch.set_num_threads(1)
    recipe, said = folder / "recipe.toml", folder / "said"
    recipe.write_text(RECIPE.format(data=demonstrations(folder / "d.jsonl"), epochs=epochs), encoding="utf-8")
    assert posttrain_main(["run", str(recipe), "--out", str(folder / "straight"), "--json"]) == 0
    wanted = outcome(folder / "straight")
    chance = random.Random(f"{how}{tries}")
    count = {"tries": 0, "inside": 0, "badly ended": 0, "unusable": 0, "not saved": 0, "different": 0, "runs": 0}
    while count["tries"] < tries:
        run = folder / f"run-{count['runs']}"
        while count["tries"] < tries and hit(run, recipe, said, chance.choice(how.split("+")), chance, count):
            pass
        assert exit_code(start(run, recipe, said)) == 0, said.read_text()[-2000:]
        count["different"] += outcome(run) != wanted
        count["runs"] += 1
    count["refused"] = said.read_text().count(" refused: ")
    count["steps"] = len(wanted["rows"])
    print(f"\n{json.dumps(count)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
