"""The parts of a score: reward models and functions, written as a name or as a list of parts."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from posttrain.errors import RecipeError, nearest
from posttrain.settings import Name, Settings


class RewardPart(Settings):
    """One part of the reward of a ppo stage; the parts are added."""

    models: tuple[Name, ...] = ()
    """Reward stages whose models score a completion; several are an ensemble."""
    function: str = ""
    """A Python function `package.module:function` of `(prompts, completions)` instead of models. It is run."""
    combine: Literal["mean", "min", "mean_minus_variance"] = "mean"
    """How the scores of an ensemble are combined."""
    variance_weight: Annotated[float, Field(ge=0)] = 0.1
    """The factor of the ensemble's variance in `mean_minus_variance`."""
    weight: float = 1.0
    """The factor of the part; a negative factor makes it a cost."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that a call of the function, or importing it, may take."""


def reward_parts(written: str | tuple[RewardPart, ...]) -> tuple[RewardPart, ...]:
    """`reward` or `gold` as a list of parts: a text with a colon names a function, any other a reward stage."""
    if isinstance(written, tuple):
        return written
    return (RewardPart(function=written) if ":" in written else RewardPart(models=(written,)),) if written else ()


def part_name(part: RewardPart) -> str:
    """The name of a part in metrics: its models or its function, in characters that every tracker accepts."""
    return part.function.replace(":", ".") or "-".join(part.models)


def check_parts(place: str, field: str, parts: Sequence[RewardPart], reward_models: Sequence[str]) -> None:
    """Check that the parts name earlier reward stages and functions, each once. Raises RecipeError."""
    seen: list[str] = []
    for part in parts:
        _check_part(place, field, part, reward_models)
        for name in (*part.models, *([part.function] if part.function else [])):
            if name in seen:
                raise RecipeError(place, f'{field} names "{name}" twice', allowed="each once", do="change the weight instead")
            seen.append(name)
    names = [part_name(part) for part in parts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        found = f'{field} has two parts with the name "{twice}" in metrics'
        raise RecipeError(place, found, allowed="different names", do="give a reward stage another name")


def _check_part(place: str, field: str, part: RewardPart, reward_models: Sequence[str]) -> None:
    if bool(part.models) == bool(part.function):
        found = f"a part of {field} with {'both models and function' if part.function else 'neither models nor function'}"
        raise RecipeError(place, found, allowed="one of the two", do="make it two parts" if part.function else "name one")
    for name in part.models:
        if name not in reward_models:
            there = f"there is: {', '.join(reward_models)}" if reward_models else "there is none"
            found = f'{field} = "{name}" is not an earlier reward stage'
            do = (
                nearest(name, reward_models)
                if reward_models
                else "add one above, or name a function as package.module:function"
            )
            raise RecipeError(place, found, allowed=there, do=do)
    module, colon, function = part.function.partition(":")
    if part.function and not (colon and all(map(str.isidentifier, [*module.split("."), function]))):
        found = f'{field} = "{part.function}" is not the name of a function'
        raise RecipeError(place, found, allowed="package.module:function")
    if len(part.models) < 2 and part.combine != "mean":
        found = f'combine = "{part.combine}" of {len(part.models)} models'
        raise RecipeError(place, found, allowed="two or more", do="remove it")
    if part.weight == 0:
        raise RecipeError(place, f"a part of {field} with weight = 0", allowed="any other number", do="remove the part")
