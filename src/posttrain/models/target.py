"""The target of a command: a stage of a run (`runs/quickstart/dpo`, `runs/quickstart/base`) or any base model.

A run folder records its base, template and adapters, so a command needs no further options, and the folder can be copied. The
base is located by its name and verified by its hash.
"""

from pathlib import Path
from typing import NamedTuple

from posttrain.artifacts import read_manifest, verify_files
from posttrain.errors import ArtifactError
from posttrain.models.adapter_config import ADAPTER_CONFIG
from posttrain.models.adapter_files import ADAPTER_WEIGHTS, Policies, load_adapter
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.source import pinned
from posttrain.recipe import Recipe, load_recipe
from posttrain.stages import makes
from posttrain.stages.shared_settings import TrainingSettings


class Target(NamedTuple):
    """A loaded base and the policies that can answer on it."""

    base: BaseModel
    policies: Policies
    policy: str
    names: tuple[str, ...]
    recipe: Recipe | None


def split_target(target: str) -> tuple[Path, str] | None:
    """The run folder and stage that `target` names, or None if it names a model."""
    path = Path(target)
    if ":" in path.name:  # a scheme; no stage has such a name
        return None
    if (path / "recipe.toml").is_file():
        names = finished_policies(path)
        return path, names[-1]
    if (path.parent / "recipe.toml").is_file():
        recipe = load_recipe(path.parent / "recipe.toml")
        names = _finished(path.parent, recipe)
        if path.name not in (s.name for s in recipe.stage) and (path / "config.json").is_file():
            return None  # a model in the run's folder
        if path.name in (s.name for s in recipe.stage if makes(s.kind) == "reward model"):
            raise ArtifactError(
                str(path), "is a reward model: it scores answers and writes none", allowed=f"there is: {', '.join(names)}",
                do="measure it with `posttrain evaluate RUN/STAGE --pairs FILE`",
            )  # fmt: skip
        if path.name not in names:
            raise ArtifactError(
                str(path), "no finished stage", allowed=f"there is: {', '.join(names)}", do="run the recipe first"
            )
        return path.parent, path.name
    return None


def finished_policies(run: Path) -> list[str]:
    """The policies of a run in the order of its recipe, after the base. Raises ArtifactError if `run` is not a run folder."""
    if not (run / "recipe.toml").is_file():
        raise ArtifactError(str(run), "not a run folder", do="give a folder that `posttrain run` made")
    return _finished(run, load_recipe(run / "recipe.toml"))


def _finished(run: Path, recipe: Recipe) -> list[str]:
    stages = [s.name for s in recipe.stage if makes(s.kind) == "policy"]
    return ["base", *(name for name in stages if read_manifest(run / name) is not None)]


class RewardTarget(NamedTuple):
    """A loaded base, the name of the reward model's adapter on it, and the recipe and stage that made it."""

    base: BaseModel
    adapter: str
    recipe: Recipe
    stage: TrainingSettings


def open_reward_model(target: str) -> RewardTarget:
    """Load the reward model `RUN/STAGE`. Raises ArtifactError if it does not exist."""
    recipe, stage = _reward_stage(target)
    settings = recipe.base
    full = recipe.adapter.kind == "full"
    path = Path(target)
    model = pinned(settings.model, path.parent)
    base = load_base(model, template=settings.template, dtype=settings.dtype, device=settings.device, full=full)
    adapter = Policies(base, path.parent).activate(path.name) if full else reward_model_on(base, target)
    return RewardTarget(base, adapter, recipe, stage)


def reward_model_on(base: BaseModel, target: str) -> str:
    """Load the reward model `RUN/STAGE` beside what is there; returns the name of its adapter.

    Raises ArtifactError where there is none of that name, AdapterError where it was trained on another base.
    """
    recipe, _ = _reward_stage(target)
    if recipe.adapter.kind == "full":
        raise ArtifactError(
            target, "has weights of its own, not an adapter", allowed='a reward model with [adapter] kind = "lora"'
        )
    name = f"reward {Path(target).resolve()}"
    if name not in base.adapters:
        verify_files(Path(target), (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
        load_adapter(Path(target), name, base)
    return name


def _reward_stage(target: str) -> tuple[Recipe, TrainingSettings]:
    path = Path(target)
    if not (path.parent / "recipe.toml").is_file():
        raise ArtifactError(target, "not a reward stage of a run", do="give RUN/STAGE")
    recipe = load_recipe(path.parent / "recipe.toml")
    made = [s for s in recipe.stage if makes(s.kind) == "reward model" and read_manifest(path.parent / s.name) is not None]
    stages = {s.name: s for s in made if isinstance(s, TrainingSettings)}
    if path.name not in stages:
        there = f"there is: {', '.join(stages)}" if stages else "this run has none"
        raise ArtifactError(target, "not a finished reward stage", allowed=there)
    return recipe, stages[path.name]


def open_target(target: str, *, template: str = "auto") -> Target:
    """Load what `target` names. Raises PosttrainError where it is neither a run's stage nor a model."""
    stage = split_target(target)
    if stage is None:
        base = load_base(target, template=template)
        return Target(base, Policies(base, Path(".")), "base", ("base",), None)
    run, policy = stage
    recipe = load_recipe(run / "recipe.toml")
    full = recipe.adapter.kind == "full"
    settings = recipe.base
    model = pinned(settings.model, run)
    base = load_base(model, template=settings.template, dtype=settings.dtype, device=settings.device, full=full)
    return Target(base, Policies(base, run), policy, tuple(_finished(run, recipe)), recipe)
