"""Runs of the ppo stage on the tiny model: recipes, adapters and reward models made without training, first gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stages import StopAt, newest, preferences
from torch import Tensor

from posttrain.errors import Interrupted
from posttrain.models.adapter_files import Policies
from posttrain.models.base_model import BaseModel
from posttrain.models.heads import new_head
from posttrain.models.lora import LoraAdapter, LoraSettings
from posttrain.progress import Tracker
from posttrain.recipe import Recipe, parse_recipe
from posttrain.train.ppo import train_ppo
from posttrain.train.stage import StageContext, StageResult

SMALL: dict[str, Any] = {
    "iterations": 3, "prompts": 6, "minibatch": 3, "max_new_tokens": 8, "learning_rate": 1e-3, "missing_eos_penalty": 0.0,
}  # fmt: skip


def recipe_of(data: Path, *, dropout: float = 0.0, recompute: bool = False, **stage: Any) -> Recipe:
    rm = {"kind": "reward", "name": "rm", "data": str(data), "epochs": 6, "batch": 8, "validation": 0.0, "learning_rate": 1e-3}
    sft = {"kind": "sft", "name": "sft", "data": str(data)}
    ppo = {"kind": "ppo", "name": "ppo", "reward": "rm", "data": str(data), **SMALL, **stage}
    stages = [rm, {**rm, "name": "rm2"}, sft, ppo]
    adapter, base = {"rank": 4, "dropout": dropout}, {"model": "random:tiny", "recompute": recompute}
    return parse_recipe({"name": "t", "base": base, "adapter": adapter, "stage": stages, "seed": 3})


def random_adapter(base: BaseModel, name: str, *, seed: int = 1) -> LoraAdapter:
    """An adapter in memory that is not the base, made without training."""
    adapter = base.adapters.create(name, LoraSettings(4, 8.0, 0.0, "all", "standard"), seed=0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters().values():
        parameter.data.normal_(std=0.05, generator=generator)
    return adapter


def random_reward_model(base: BaseModel, name: str = "rm", *, seed: int = 1) -> None:
    """A reward model in memory whose scores differ, made without training."""
    random_adapter(base, name, seed=seed).head = new_head(64, seed=seed, device=base.device)


def run_ppo(
    base: BaseModel,
    folder: Path,
    *,
    stop_at: int = 0,
    data: Path | None = None,
    trackers: tuple[Tracker, ...] = (),
    **stage: Any,
) -> StageResult:
    """Train against the reward model in memory, resuming what is in the folder."""
    recipe = recipe_of(data or preferences(folder.parent / "p.jsonl", rows=20), **stage)
    if "rm" not in base.adapters:
        random_reward_model(base)
    folder.mkdir(parents=True, exist_ok=True)
    stopper = StopAt(stop_at)
    context = StageContext(base, Policies(base, folder.parent), recipe, folder, stopper.stop, (stopper, *trackers))
    return train_ppo(context, recipe.stage[-1])  # type: ignore[arg-type]


def first_gradient(base: BaseModel, folder: Path, **stage: Any) -> dict[str, Tensor]:
    """The gradient of a run's first step, read off Adam's first moment; the policy starts at an adapter with a life of its own.

    The adapter called "sft" is left under the name "reference", since the stage forgets what it trained.
    """
    if "sft" not in base.adapters:
        random_adapter(base, "sft")
        base.adapters.copy("sft", "reference")
    with pytest.raises(Interrupted):
        run_ppo(base, folder, stop_at=1, init="sft", clip=0.0, **stage)
    tensors = newest(folder).tensors
    return {name[len("adam/exp_avg/") :]: t / 0.1 for name, t in tensors.items() if name.startswith("adam/exp_avg/")}
