"""What a command is pointed at: a stage of a run (`runs/quickstart/dpo`, `runs/quickstart/base`) or any base model.

A run folder knows its base, template and adapters, so it needs no options and works wherever it is copied; the base
itself is found again by its name and verified by its hash.
"""

from pathlib import Path
from typing import NamedTuple

from posttrain.artifacts import read_manifest
from posttrain.errors import ArtifactError
from posttrain.models.files import Policies
from posttrain.models.load import BaseModel, load_base
from posttrain.recipe import Recipe, load_recipe


class Target(NamedTuple):
    """A loaded base and the policies that can answer on it."""

    base: BaseModel
    policies: Policies
    policy: str
    names: tuple[str, ...]
    recipe: Recipe | None


def split_target(target: str) -> tuple[Path, str] | None:
    """Run folder and stage where `target` names them, or None where it names a model."""
    path = Path(target)
    if (path / "recipe.toml").is_file():
        names = finished_policies(path)
        return path, names[-1]
    if (path.parent / "recipe.toml").is_file():
        names = finished_policies(path.parent)
        if path.name not in names:
            raise ArtifactError(
                str(path), "no finished stage", allowed=f"there is: {', '.join(names)}", do="run the recipe first"
            )
        return path.parent, path.name
    return None


def finished_policies(run: Path) -> list[str]:
    """The policies of a run in the order of its recipe, the base first. Raises ArtifactError where there is no run."""
    if not (run / "recipe.toml").is_file():
        raise ArtifactError(str(run), "not a run folder", do="give a folder that `posttrain run` made")
    recipe = load_recipe(run / "recipe.toml")
    return ["base", *(s.name for s in recipe.stage if read_manifest(run / s.name) is not None)]


def open_target(target: str, *, template: str = "auto") -> Target:
    """Load what `target` names. Raises PosttrainError where it is neither a run's stage nor a model."""
    found = split_target(target)
    if found is None:
        base = load_base(target, template=template)
        return Target(base, Policies(base, Path(".")), "base", ("base",), None)
    run, policy = found
    recipe = load_recipe(run / "recipe.toml")
    full = recipe.adapter.kind == "full"
    settings = recipe.base
    base = load_base(settings.model, template=settings.template, dtype=settings.dtype, device=settings.device, full=full)
    return Target(base, Policies(base, run), policy, tuple(finished_policies(run)), recipe)
