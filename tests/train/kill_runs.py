"""Run as a program: `posttrain run` in child processes that get signals while they train; prints JSON, by stage.

A run without signals comes first, in this process: it imports everything, and the children that are forked after it
train soon. What a child does is the whole command, up to the stage in hand. A run that was hit again and again must end as
the first did.
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
from tiny_stages import demonstrations, hashes, preferences, rows_of

from posttrain.cli import main as posttrain_main
from posttrain.train.checkpoint import checkpoint_folders, damage

COMMON = """
name = "killed"
[base]
model = "random:tiny"
template = "gemma"
dtype = "float32"
[adapter]
rank = 2
dropout = 0.2
[evaluation]
suites = ["starter"]
limit = 1
max_new_tokens = 1
sample_tokens = 1
samples = ["Hello"]
"""
ON_ROWS = """
[[stage]]
kind = "{kind}"
name = "{kind}"
data = "{data}"
epochs = {size}
batch = 2
checkpoint_every = 1
validation = 0.2
validate_every = 10
keep = "best"
"""
# Two steps an iteration; an iteration's KL moves the coefficient of the next.
ON_ROLLOUTS = """
[[stage]]
kind = "ppo"
name = "ppo"
reward = "reward"
data = "{data}"
iterations = {size}
prompts = 4
minibatch = 2
ppo_epochs = 1
max_new_tokens = 4
learning_rate = 1e-3
target_kl = 0.05
kl_horizon = 30
checkpoint_every = 1
"""
# Stages that get signals, in their order.
SFT, REWARDED = ("sft",), ("reward", "ppo")
# The longest wait between a save and a signal that does not look for the next save, in seconds: a rollout, or some steps.
PAUSE = {"sft": 0.02, "reward": 0.02, "ppo": 0.1}


def write_recipe(folder: Path, stages: tuple[str, ...], size: int) -> Path:
    """A recipe of these stages: epochs of sft and reward, iterations of ppo."""
    tables = [
        (ON_ROLLOUTS if kind == "ppo" else ON_ROWS).format(
            kind=kind, size=size, data=(demonstrations if kind == "sft" else preferences)(folder / f"{kind}.jsonl")
        )
        for kind in stages
    ]
    recipe = folder / "recipe.toml"
    recipe.write_text(COMMON + "".join(tables), encoding="utf-8")
    return recipe


def start(folder: Path, recipe: Path, said: Path, stage: str) -> int:
    """The command in a child, up to a stage; its output goes to a file."""
    child = os.fork()
    if child == 0:
        with said.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os._exit(posttrain_main(["run", str(recipe), "--out", str(folder), "--until", stage]))
    return child


def exit_code(child: int) -> int:
    """Wait; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Watched:
    """A stage in a run folder seen from outside while a child works on it."""

    def __init__(self, run: Path, stage: str) -> None:
        self.partial = run / f".{stage}.partial"
        self.checkpoints = self.partial / "checkpoints"
        self.rollouts = self.checkpoints / "rollouts"

    def saved(self) -> int:
        """The step of the newest checkpoint by name."""
        there = checkpoint_folders(self.checkpoints)
        return int(there[0].name[5:]) if there else 0

    def saving(self) -> bool:
        """Whether a checkpoint or an iteration's rollouts are being written at this moment."""
        return any(any(folder.glob(".step-*.partial")) for folder in (self.checkpoints, self.rollouts))

    def sampling(self) -> bool:
        """Whether the next step needs rollouts that are not there yet."""
        iteration, inside = divmod(self.saved(), 2)
        return self.rollouts.exists() and not inside and not (self.rollouts / f"step-{iteration:08d}").exists()

    def unusable(self) -> bool:
        """Whether the newest checkpoint, or the newest rollouts, cannot be gone on from."""
        newest = [checkpoint_folders(folder)[:1] for folder in (self.checkpoints, self.rollouts)]
        return any(damage(found) is not None for (found,) in filter(None, newest))

    def wait(self, child: int, *, after: int, saving: bool) -> bool:
        """Until a step later than `after` is saved and, where asked, the child is held inside of a later save.

        False when the child ends.
        """
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if self.saved() > after and (not saving or self.held(child)):
                return True
            time.sleep(0.0005)
        return False

    def held(self, child: int) -> bool:
        """Stop the child if it is inside of a save, so that a busy machine does not let it slip away; whether it was."""
        if not self.saving():
            return False
        os.kill(child, signal.SIGSTOP)
        os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if not self.saving():
            os.kill(child, signal.SIGCONT)
            return False
        return True


def hit(run: Path, recipe: Path, said: Path, stage: str, how: str, chance: random.Random, count: dict[str, int]) -> bool:
    """Start, wait, send the signal, look. False when the stage had ended before."""
    watched = Watched(run, stage)
    before = watched.saved()
    child = start(run, recipe, said, stage)
    inside = chance.random() < 0.7
    if not watched.wait(child, after=before, saving=inside):
        assert exit_code(child) == 0, said.read_text()[-2000:]
        return False
    time.sleep(0 if inside else chance.uniform(0, PAUSE[stage]))
    os.kill(child, signal.SIGKILL if how == "kill" else signal.SIGTERM)
    os.kill(child, signal.SIGCONT)
    if how == "twice":
        time.sleep(chance.uniform(0, 0.005))
        os.kill(child, signal.SIGTERM)
    code = exit_code(child)
    ended = not watched.partial.exists()
    count["tries"] += 1
    count["inside"] += watched.saving()
    count["badly ended"] += code not in {"kill": (-9,), "term": (0,), "twice": (0, 128 + signal.SIGTERM)}[how]
    if not ended:
        count["sampling"] += watched.sampling()
        count["unusable"] += watched.unusable()
        if how == "term":
            count["not saved"] += watched.saved() != rows_of(watched.partial)[-1]["step"]
    return not ended


def outcome(folder: Path) -> dict[str, Any]:
    """What a stage must have in common in two runs."""
    samples = folder / "samples.jsonl"
    shown = samples.read_text() if samples.exists() else ""
    return {"rows": rows_of(folder), "weights": hashes(load_file(folder / "adapter_model.safetensors")), "samples": shown}


def hit_run(folder: Path, recipe: Path, stages: dict[str, dict[str, int]], how: str, tries: int, chance: random.Random) -> None:
    """One run that is hit in each of its stages in turn, until there were enough tries, and is then left to end."""
    turns = how.split("+")
    run = folder / f"run-{stages[next(iter(stages))]['runs']}"
    for stage, count in stages.items():
        said = folder / f"said-{stage}"
        while count["tries"] < tries and hit(run, recipe, said, stage, turns[count["tries"] % len(turns)], chance, count):
            pass
        assert exit_code(start(run, recipe, said, stage)) == 0, said.read_text()[-2000:]
        count["different"] += outcome(run / stage) != outcome(folder / "straight" / stage)
        count["runs"] += 1
        count["refused"] = said.read_text().count(" refused: ")


def main(folder: Path, how: str, tries: int, size: int, names: tuple[str, ...]) -> None:
    """One run without signals, then runs that are hit until there were enough tries at every stage."""
    torch.set_num_threads(1)
    recipe = write_recipe(folder, names, size)
    assert posttrain_main(["run", str(recipe), "--out", str(folder / "straight"), "--json"]) == 0
    counted = ("tries", "inside", "sampling", "badly ended", "unusable", "not saved", "different", "runs")
    stages = {name: dict.fromkeys(counted, 0) for name in names}
    chance = random.Random(f"{how}{tries}")
    while min(count["tries"] for count in stages.values()) < tries:
        hit_run(folder, recipe, stages, how, tries, chance)
    print(f"\n{json.dumps(stages)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), tuple(sys.argv[5:]))
