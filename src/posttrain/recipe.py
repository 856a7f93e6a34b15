"""A recipe: read, and checked as a whole before the base is loaded.

A recipe is TOML. Its settings stand in `settings.py`; a stage names earlier stages, and the kind of artifact it needs is
checked here.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from posttrain.errors import RecipeError
from posttrain.reading import Unreadable, decode_text, parse_toml
from posttrain.settings import (
    STAGE_KINDS,
    VALUE_WORDS,
    Adapter,
    Base,
    DpoStage,
    Evaluation,
    PpoStage,
    Recipe,
    RewardPart,
    RewardStage,
    SftStage,
    Source,
    part_name,
    reward_parts,
)

# What a stage may not be called: words with a meaning in references, files and folders of a run, devices of Windows.
RESERVED_NAMES = frozenset(
    {"base", "init", "evaluate", "recipe.toml", "scorecard.json", "report.html", "tensorboard", "wandb", "mlruns"}
    | {"con", "nul", "aux", "prn"}
)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are `stage.field=value` or `table.field=value` with TOML values.

    Raises RecipeError naming the place, what was found, what is allowed and what to do.
    """
    where = path.name or str(path)
    give = "give the path of a recipe (.toml)"
    try:
        raw = parse_toml(decode_text(path.read_bytes()))
    except FileNotFoundError:
        raise RecipeError(where, f"there is no file {path}", do=give) from None
    except IsADirectoryError:
        raise RecipeError(where, f"{path} is a folder", do=give) from None
    except OSError as error:
        raise RecipeError(where, f"{path} cannot be read ({error.strerror or error})", do=give) from None
    except Unreadable as bad:
        raise RecipeError(where, bad.found, do=bad.do) from None
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, where)


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe that is already a table: every setting, then every reference between stages."""
    try:
        recipe = Recipe.model_validate(_tuples(raw))
    except ValidationError as error:
        raise _explain(error, raw, where) from None
    _check_references(recipe, where)
    return recipe


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML with every override applied: what a run folder keeps."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_unset=True))


def nearest(name: str, there: Iterable[str]) -> str:
    """What to do about a misspelt name, or nothing where no name is near."""
    found = difflib.get_close_matches(name, list(there), 1)
    return f'did you mean "{found[0]}"?' if found else ""


def _tuples(value: Any) -> Any:
    """TOML's lists as tuples: types are checked strictly, and a frozen recipe holds no list."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError("--set", f'"{override}"', allowed="STAGE.FIELD=VALUE", do="for instance --set dpo.beta=0.2")
    target: Any = raw
    stages = raw.get("stage", [])
    names = [str(s.get("name")) for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
    if len(keys) > 1 and keys[0] in names:
        target, keys = stages[[s.get("name") for s in stages].index(keys[0])], keys[1:]
    elif len(keys) > 1 and (keys[0] not in Recipe.model_fields or keys[0] == "stage"):
        there = [*names, *_TABLES]
        found = f'"{keys[0]}" is neither a stage nor a table'
        raise RecipeError("--set", found, allowed=f"there is: {', '.join(there)}", do=nearest(keys[0], there))
    for key in keys[:-1]:
        target = target.setdefault(key, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise RecipeError("--set", f'"{path}" does not lead to a setting', allowed="STAGE.FIELD=VALUE")
    target[keys[-1]] = _override_value(text)


def _override_value(text: str) -> Any:
    """A TOML value; whatever is none is a string, so that --set sft.data=my.jsonl needs no quotes."""
    try:
        value = parse_toml(f"value = {text}")["value"]
    except Unreadable:
        return text
    return value if isinstance(value, str | bool | int | float | list | dict) else text


_TABLES: dict[str, type[BaseModel]] = {"base": Base, "adapter": Adapter, "evaluation": Evaluation}
# Words for complaints that pydantic tells in terms of its own.
_ALLOWED = {
    "string_pattern_mismatch": "lower-case letters, digits, _ . -, at most 64, a letter or digit first",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "tuple_type": "a list",
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
}


def _explain(error: ValidationError, raw: dict[str, Any], where: str) -> RecipeError:
    """Turn pydantic's first complaint into the error formula; say how many more mistakes there are."""
    mistakes: dict[tuple[int | str, ...], Any] = {}
    for found in error.errors(include_url=False):
        # A setting of several types complains once a type: the complaint that went deepest into it is the one to tell.
        setting = found["loc"][: 4 if found["loc"][:1] == ("stage",) else 2]
        if setting not in mistakes or len(found["loc"]) > len(mistakes[setting]["loc"]):
            mistakes[setting] = found
    first = next(iter(mistakes.values()))
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    place, fields, path = _place(first["loc"], raw)
    place, key = f"{where} · {place}", ".".join(path)
    if first["type"] == "extra_forbidden":
        found_name = f'unknown setting "{path[-1]}"{more}'
        return RecipeError(place, found_name, allowed=f"there is: {', '.join(fields)}", do=nearest(path[-1], fields))
    if first["type"] == "missing" or first["type"] == "union_tag_not_found":
        kinds = f"there is: {', '.join(STAGE_KINDS)}" if first["type"] != "missing" else ""
        return RecipeError(place, f'"{key or "kind"}" is missing{more}', allowed=kinds, do="add it")
    if first["type"] == "union_tag_invalid":
        kind = str(first["input"].get("kind"))
        allowed = f"there is: {', '.join(STAGE_KINDS)}"
        return RecipeError(place, f'kind = "{kind}"{more}', allowed=allowed, do=nearest(kind, STAGE_KINDS))
    if key == "stage":
        return RecipeError(
            place, f"stage is no list of tables{more}", do="write [[stage]], with two brackets, above each stage"
        )
    value = repr(first["input"]) if isinstance(first["input"], str) else str(first["input"])
    allowed = _ALLOWED.get(first["type"]) or first["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    shown = f"{key} = {value if len(value) <= 80 else value[:79] + '…'}" if key else f"{value[:80]}"
    return RecipeError(place, f"{shown}{more}", allowed=allowed)


def _place(loc: tuple[int | str, ...], raw: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """Words for where in the recipe a complaint lies, the settings that exist there, and the path of the setting there."""
    place, fields, rest = "top level", list(Recipe.model_fields), loc
    if loc[:1] == ("stage",) and len(loc) > 1:
        stages = raw["stage"]
        stage = stages[loc[1]] if isinstance(stages[int(loc[1])], dict) else {}
        place = f'stage "{stage.get("name", int(loc[1]) + 1)}"'
        fields = list(STAGE_KINDS.get(str(stage.get("kind")), SftStage).model_fields)
        rest = loc[3:]
        if len(rest) > 3:
            fields = list((Source if rest[0] == "data" else RewardPart).model_fields)
    elif loc and loc[0] in _TABLES and len(loc) > 1:
        place, fields, rest = f"[{loc[0]}]", list(_TABLES[str(loc[0])].model_fields), loc[1:]
    # Tables inside a setting are mixed sources and parts of a reward: (data, its type, number of the source, its setting).
    return place, fields, [str(part) for part in (*rest[:1], *rest[3:4])]


def _check_references(recipe: Recipe, where: str) -> None:
    if not recipe.stage:
        raise RecipeError(where, "no stage", do="add a [[stage]] table")
    seen: list[str] = []
    policies: list[str] = []
    for stage in recipe.stage:
        place = f'{where} · stage "{stage.name}"'
        if stage.name in RESERVED_NAMES:
            raise RecipeError(place, f'the name "{stage.name}" is reserved', do="choose another name")
        if stage.name in seen:
            raise RecipeError(place, "a second stage of that name", do="give each stage a name of its own")
        _check_policy(place, "init", stage.init, ("base",), policies)
        if isinstance(stage, PpoStage) and recipe.adapter.kind == "full":
            _check_full(place, stage)
        if isinstance(stage, PpoStage):
            _check_ppo(place, stage, policies, [name for name in seen if name not in policies])
        if isinstance(stage, DpoStage):
            _check_policy(place, "reference", stage.reference, ("init", "base"), policies)
            if stage.label_smoothing and stage.loss not in ("sigmoid", "robust"):
                raise RecipeError(
                    place, f'label_smoothing with loss = "{stage.loss}"', allowed="sigmoid or robust", do="remove it"
                )
            if stage.loss == "robust" and not stage.label_smoothing:
                raise RecipeError(
                    place, 'loss = "robust" without label_smoothing', allowed="0 < label_smoothing < 0.5", do="set it"
                )
        seen.append(stage.name)
        if not isinstance(stage, RewardStage):
            policies.append(stage.name)
    if recipe.adapter.kind == "full" and recipe.adapter.train_tokens:
        raise RecipeError(f"{where} · [adapter]", 'train_tokens with kind = "full"', do="remove it: every row is trained")


# Settings of a ppo stage that only its value function reads.
_OF_GAE = frozenset(
    {"value", "value_init", "value_coef", "value_learning_rate", "value_clip", "gamma", "lam", "whiten_rewards"}
)


def _check_ppo(place: str, stage: PpoStage, policies: list[str], rewards: list[str]) -> None:
    _check_policy(place, "reference", stage.reference, ("init", "base"), policies)
    if not stage.reward:
        raise RecipeError(place, "reward has no part", allowed="a reward stage, a function or a list of parts", do="give one")
    _check_parts(place, "reward", reward_parts(stage.reward), rewards)
    _check_parts(place, "gold", reward_parts(stage.gold), rewards)
    if stage.gold and not stage.validation:
        raise RecipeError(place, "gold with validation = 0", allowed="0 < validation < 0.5", do="gold needs held-out prompts")
    if stage.gold_compare and not stage.gold:
        raise RecipeError(place, "gold_compare without gold", do="set gold, or remove it")
    for name in stage.gold_compare:
        _check_policy(place, "gold_compare", name, (), policies)
    if stage.estimator != "gae" and stage.completions < 2:
        found = f'estimator = "{stage.estimator}" with completions = {stage.completions}'
        raise RecipeError(place, found, allowed="at least 2 completions of a prompt", do="raise completions, or use gae")
    only_gae = sorted(_OF_GAE & stage.model_fields_set)
    if stage.estimator != "gae" and only_gae:
        found = f'{", ".join(only_gae)} with estimator = "{stage.estimator}"'
        raise RecipeError(place, found, allowed='estimator = "gae"', do="remove it")
    if stage.target_kl and not stage.kl_coef:
        found = f"target_kl = {stage.target_kl:g} with kl_coef = 0, which no factor moves"
        raise RecipeError(place, found, allowed="kl_coef above 0", do="set kl_coef to where it starts")
    if "kl_horizon" in stage.model_fields_set and not stage.target_kl:
        found = "kl_horizon without target_kl, which it follows"
        raise RecipeError(place, found, allowed="target_kl above 0", do="set target_kl, or remove kl_horizon")
    if bool(stage.ptx_coef) != bool(stage.ptx_data):
        found = f"ptx_coef = {stage.ptx_coef:g} without ptx_data" if stage.ptx_coef else "ptx_data with ptx_coef = 0"
        raise RecipeError(place, found, allowed="both or neither", do="set both, or remove both")
    _check_value(place, stage, rewards)


def _check_full(place: str, stage: PpoStage) -> None:
    """One set of weights is in memory: what is trained beside the policy must stand on it."""
    if stage.value == "own" or stage.value_init not in ("auto", "policy"):
        found = f'value = "{stage.value}", value_init = "{stage.value_init}" with [adapter] kind = "full"'
        raise RecipeError(place, found, allowed='value = "shared", a head on the policy', do="remove both settings")


def _check_value(place: str, stage: PpoStage, rewards: list[str]) -> None:
    if stage.value == "shared" and stage.value_init not in ("auto", "policy"):
        found = f'value_init = "{stage.value_init}" with value = "shared"'
        raise RecipeError(place, found, allowed="auto or policy: it stands on the policy's adapter", do="remove it")
    models = [name for part in reward_parts(stage.reward) for name in part.models]
    there = ["auto", *(["reward"] if models else []), "policy", *rewards]
    if stage.value_init not in there:
        found = f'value_init = "{stage.value_init}" is not an earlier reward stage'
        raise RecipeError(place, found, allowed=f"there is: {', '.join(there)}", do=nearest(stage.value_init, there))
    said, meant = "value_init" in stage.model_fields_set, models[:1] if stage.value_init == "reward" else []
    if said and stage.value_init in VALUE_WORDS and stage.value_init in rewards and meant != [stage.value_init]:
        found = f'value_init = "{stage.value_init}" is a word of its own and a reward stage'
        raise RecipeError(place, found, do="give the stage another name")


def _check_parts(place: str, field: str, parts: Sequence[RewardPart], rewards: list[str]) -> None:
    """What a score is made of: earlier reward stages and functions, each once."""
    seen: list[str] = []
    for part in parts:
        if bool(part.models) == bool(part.function):
            found = f"a part of {field} with {'both models and function' if part.function else 'neither models nor function'}"
            raise RecipeError(place, found, allowed="either of them", do="make it two parts" if part.function else "name one")
        for name in part.models:
            if name not in rewards:
                there = f"there is: {', '.join(rewards)}" if rewards else "there is none"
                found = f'{field} = "{name}" is not an earlier reward stage'
                do = nearest(name, rewards) if rewards else "add one above, or name a function as package.module:function"
                raise RecipeError(place, found, allowed=there, do=do)
        module, colon, function = part.function.partition(":")
        if part.function and not (colon and all(map(str.isidentifier, [*module.split("."), function]))):
            raise RecipeError(place, f'{field} = "{part.function}" names no function', allowed="package.module:function")
        if len(part.models) < 2 and part.combine != "mean":
            raise RecipeError(
                place, f'combine = "{part.combine}" of {len(part.models)} models', allowed="two or more", do="remove it"
            )
        if part.weight == 0:
            raise RecipeError(place, f"a part of {field} with weight = 0", allowed="any other number", do="remove the part")
        for name in (*part.models, *([part.function] if part.function else [])):
            if name in seen:
                raise RecipeError(place, f'{field} names "{name}" twice', allowed="each once", do="change the weight instead")
            seen.append(name)
    names = [part_name(part) for part in parts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        found = f'{field} has two parts that metrics call "{twice}"'
        raise RecipeError(place, found, allowed="a name of its own each", do="give a reward stage another name")


def _check_policy(place: str, field: str, name: str, special: tuple[str, ...], policies: list[str]) -> None:
    if name not in special and name not in policies:
        there = ", ".join([*special, *policies])
        found = f'{field} = "{name}" is not an earlier policy stage'
        raise RecipeError(place, found, allowed=f"there is: {there}", do=nearest(name, [*special, *policies]))
