"""A run with label stages of every form on the tiny model: made once, and shared by the tests that only read it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "old",
    "new",
    "fast",
    "slow",
    "warm",
    "cold",
    "north",
    "south",
    "east",
    "west",
]
CONSTITUTION = """
name = "two"
version = "1"
[[principle]]
id = "full"
title = "Say much"
comparison = "Which answer says more?"
[[principle]]
id = "useful"
title = "Be useful"
comparison = "Which answer is more useful?"
weight = 3.0
tags = ["help"]
"""
# Answers of the trained policies are a few words; three gold pairs are too few for any judge to pass.
RECIPE = """
name = "labelled"
seed = 3

[base]
model = "random:tiny"
template = "gemma"
dtype = "float32"

[adapter]
rank = 8

[evaluation]
suites = ["{folder}/suite.toml"]
samples = ["Hi"]
sample_tokens = 4

[[stage]]
kind = "sft"
name = "sft"
data = "{folder}/d.jsonl"
epochs = 40
batch = 20
learning_rate = 0.01
validation = 0.0

[[stage]]
kind = "sft"
name = "other"
init = "sft"
data = "{folder}/d.jsonl"
epochs = 2
batch = 20
learning_rate = 0.01
validation = 0.0
seed = 9

[[stage]]
kind = "reward"
name = "rm"
init = "sft"
data = "{folder}/human.jsonl"
epochs = 1
batch = 8
validation = 0.0
"""
LABEL = """
[[stage]]
kind = "label"
name = "{name}"
init = "sft"
data = "{folder}/{data}"
constitution = "{folder}/two.toml"
max_prompt_tokens = 60
max_new_tokens = 60
temperature = 0.7
gold = "{folder}/gold.jsonl"
{more}
"""
RULE = 'judge = "rule:label_rules:words"'
LABELS = {
    "ai": RULE,
    "three": f"{RULE}\nanswers = 3\nprinciples = 1",
    "both": f'{RULE}\nanswers = 1\npolicies = ["other"]',
    "human": f"{RULE}\nanswers = 0",
    "weak": 'judge = "reward:rm"\nallow_weak_judge = true',
    "contrasted": 'judge = "policy:base"\nif_judge_refused = "contrast"',
}
TRAINED = """
[[stage]]
kind = "reward"
name = "rm-ai"
init = "sft"
data = ["stage:ai", "{folder}/human.jsonl"]
epochs = 1
batch = 8
validation = 0.0

[[stage]]
kind = "dpo"
name = "dpo"
init = "sft"
data = ["stage:ai", "{folder}/human.jsonl"]
epochs = 1
batch = 8
validation = 0.0
"""


def worker_path() -> str:
    """PYTHONPATH with the folder of `label_rules`."""
    return os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs(folder: Path) -> None:
    """All files that the recipe names."""
    asks = [f"{word} {number}?" for number, word in enumerate(WORDS)]
    write_lines(
        folder / "d.jsonl",
        [{"prompt": ask, "completion": " ".join(WORDS[: 1 + n % 4])} for n, ask in enumerate(asks)],
    )
    write_lines(folder / "p.jsonl", [{"id": f"p{n}", "prompt": ask, "category": "words"} for n, ask in enumerate(asks[:9])])
    human = [
        {"id": f"h{n}", "prompt": ask, "chosen": "old and new", "rejected": "old", "probability": 1.0 if n % 2 else 0.8}
        for n, ask in enumerate(asks[:6])
    ]
    human += [{"id": "h6", "prompt": asks[6], "chosen": "old", "rejected": "old and new"}]
    human += [{"id": "h7", "prompt": asks[7], "chosen": "cold", "rejected": "warm"}]
    write_lines(folder / "human.jsonl", human)
    write_lines(
        folder / "gold.jsonl",
        [{"input": f"{n}?", "output_1": "yes", "output_2": "no no", "label": 1 + n % 2} for n in range(3)],
    )
    (folder / "two.toml").write_text(CONSTITUTION, encoding="utf-8")
    (folder / "suite.toml").write_text(
        'name = "one"\n[[task]]\nname = "q"\nanswer = "choices"\nitems = "q.jsonl"\n', encoding="utf-8"
    )
    write_lines(folder / "q.jsonl", [{"id": "q", "question": "a", "choices": [" b", " c"], "answer": 0}])


def recipe_text(folder: Path, labels: dict[str, str], *, trained: bool = False) -> str:
    """A recipe with the stages that train policies and a reward model, and the label stages by name."""
    stages = [
        LABEL.format(folder=folder, name=name, more=more, data="human.jsonl" if name == "human" else "p.jsonl")
        for name, more in labels.items()
    ]
    return RECIPE.format(folder=folder) + "".join(stages) + (TRAINED.format(folder=folder) if trained else "")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(run: Path, stage: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / stage / "manifest.json").read_text(encoding="utf-8"))
    return loaded
