"""A recipe of stages that train full weights."""

from pathlib import Path
from typing import Any

from tiny_stages import preferences

from posttrain.recipe import Recipe, parse_recipe


def recipe_of(folder: Path, **ppo: Any) -> Recipe:
    data = str(preferences(folder / "p.jsonl", rows=20))
    rm = {"kind": "reward", "name": "rm", "data": data, "epochs": 4, "batch": 8, "validation": 0.0, "learning_rate": 1e-3}
    ppo = {
        "kind": "ppo", "name": "ppo", "reward": "rm", "data": data, "iterations": 3, "prompts": 6, "minibatch": 3,
        "max_new_tokens": 6, "learning_rate": 1e-4, **ppo,
    }  # fmt: skip
    raw = {"name": "t", "base": {"model": "random:tiny"}, "adapter": {"kind": "full"}, "stage": [rm, ppo], "seed": 3}
    return parse_recipe(raw)
