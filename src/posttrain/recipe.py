"""Read a recipe and check all of it before the base is loaded.

A recipe is TOML. Its settings are in `settings.py` and `stages/`. A stage names earlier stages. This module checks that those
exist and make the kind of artifact that the stage needs.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from posttrain.errors import RecipeError, nearest
from posttrain.reading import Unreadable, decode_text, parse_toml
from posttrain.settings import Adapter, Base, Evaluation, Name, Settings
from posttrain.stages import KINDS, Stage, data_of
from posttrain.stages.kind import Content, Earlier
from posttrain.stages.shared_settings import StageSettings

# Names that a stage may not have: words with a meaning in references, files and folders of a run, devices of Windows.
RESERVED_NAMES = frozenset(
    {
        "base",
        "init",
        "evaluate",
        "recipe.toml",
        "scorecard.json",
        "report.html",
        "tensorboard",
        "wandb",
        "mlruns",
        "judge-cache",
    }
    | {"con", "nul", "aux", "prn"}
)


class Recipe(Settings):
    """A whole run."""

    name: Name
    """Name of the run and of its folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything random: same seed, same run."""
    base: Base
    """The pretrained model."""
    adapter: Adapter = Adapter()
    """What is trained on top of it."""
    stage: tuple[Stage, ...]
    """The stages, in order."""
    evaluation: Evaluation = Evaluation()
    """What is measured."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where metrics go besides metrics.jsonl."""


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
    """Check a parsed recipe: every setting, then every reference between stages."""
    try:
        recipe = Recipe.model_validate(_tuples(raw))
    except ValidationError as error:
        raise _explain(error, raw, where) from None
    _check_references(recipe, where)
    return recipe


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML with every override applied, as the run folder stores it."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_unset=True))


def _tuples(value: Any) -> Any:
    """Convert lists of TOML to tuples, because types are checked strictly and a frozen recipe contains no list."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
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
    """Parse a TOML value. Other text is a string, so that --set sft.data=my.jsonl needs no quotes."""
    try:
        value = parse_toml(f"value = {text}")["value"]
    except Unreadable:
        return text
    return value if isinstance(value, str | bool | int | float | list | dict) else text


_TABLES: dict[str, type[BaseModel]] = {"base": Base, "adapter": Adapter, "evaluation": Evaluation}
# What is allowed, for errors that pydantic describes in its internal terms.
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
    """Turn the first error of pydantic into a RecipeError, and add the number of further mistakes."""
    mistakes: dict[tuple[int | str, ...], Any] = {}
    for mistake in error.errors(include_url=False):
        # A setting that allows several types has an error for each type. The error with the longest path is the most precise.
        setting = mistake["loc"][: 4 if mistake["loc"][:1] == ("stage",) else 2]
        if setting not in mistakes or len(mistake["loc"]) > len(mistakes[setting]["loc"]):
            mistakes[setting] = mistake
    first = next(iter(mistakes.values()))
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    place, fields, path = _place(first["loc"], raw)
    place, key = f"{where} · {place}", ".".join(path)
    if first["type"] == "extra_forbidden":
        unknown = f'unknown setting "{path[-1]}"{more}'
        return RecipeError(place, unknown, allowed=f"there is: {', '.join(fields)}", do=nearest(path[-1], fields))
    if first["type"] == "missing" or first["type"] == "union_tag_not_found":
        kinds = f"there is: {', '.join(KINDS)}" if first["type"] != "missing" else ""
        return RecipeError(place, f'"{key or "kind"}" is missing{more}', allowed=kinds, do="add it")
    if first["type"] == "union_tag_invalid":
        kind = str(first["input"].get("kind"))
        allowed = f"there is: {', '.join(KINDS)}"
        return RecipeError(place, f'kind = "{kind}"{more}', allowed=allowed, do=nearest(kind, KINDS))
    if key == "stage":
        return RecipeError(
            place, f"`stage` must be an array of tables{more}", do="write [[stage]], with two brackets, above each stage"
        )
    value = repr(first["input"]) if isinstance(first["input"], str) else str(first["input"])
    allowed = _ALLOWED.get(first["type"]) or first["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    shown = f"{key} = {value if len(value) <= 80 else value[:79] + '…'}" if key else f"{value[:80]}"
    return RecipeError(place, f"{shown}{more}", allowed=allowed)


def _place(loc: tuple[int | str, ...], raw: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """The place of an error in the recipe in words, the settings that exist there, and the path of the setting."""
    place, fields, rest = "top level", list(Recipe.model_fields), loc
    if loc[:1] == ("stage",) and len(loc) > 1:
        stages = raw["stage"]
        stage = stages[loc[1]] if isinstance(stages[int(loc[1])], dict) else {}
        place = f'stage "{stage.get("name", int(loc[1]) + 1)}"'
        kind = KINDS.get(str(stage.get("kind")))
        settings = kind.settings if kind is not None else StageSettings
        fields, rest = list(settings.model_fields), loc[3:]
        if len(rest) > 3:
            table = _table_in(settings.model_fields[str(rest[0])].annotation)
            fields = list(table.model_fields) if table is not None else []
    elif loc and loc[0] in _TABLES and len(loc) > 1:
        place, fields, rest = f"[{loc[0]}]", list(_TABLES[str(loc[0])].model_fields), loc[1:]
    # The path into a list of tables (sources, parts of a reward) is: setting, its type, number of the table, setting in it.
    return place, fields, [str(part) for part in (*rest[:1], *rest[3:4])]


def _table_in(annotation: Any) -> type[BaseModel] | None:
    """The type of the tables in a setting that is a list of tables, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((table for part in get_args(annotation) if (table := _table_in(part)) is not None), None)


def _check_references(recipe: Recipe, where: str) -> None:
    if not recipe.stage:
        raise RecipeError(where, "no stage", do="add a [[stage]] table")
    seen: list[str] = []
    policies: list[str] = []
    reward_models: list[str] = []
    rows: dict[str, Content] = {}
    for stage in recipe.stage:
        kind, place = KINDS[stage.kind], f'{where} · stage "{stage.name}"'
        if stage.name in RESERVED_NAMES:
            raise RecipeError(place, f'the name "{stage.name}" is reserved', do="choose another name")
        if stage.name in seen:
            raise RecipeError(place, "a second stage of that name", do="give each stage a different name")
        earlier = Earlier(place, recipe.adapter.kind == "full", tuple(policies), tuple(reward_models), rows)
        earlier.check_policy("init", stage.init, "base")
        _check_rows(stage, earlier)
        kind.check(stage, earlier)
        seen.append(stage.name)
        if kind.makes == "policy":
            policies.append(stage.name)
        elif kind.makes == "reward model":
            reward_models.append(stage.name)
        elif kind.content is not None:
            rows[stage.name] = kind.content
    if recipe.adapter.kind == "full" and recipe.adapter.train_tokens:
        raise RecipeError(f"{where} · [adapter]", 'train_tokens with kind = "full"', do="remove it: every row is trained")


def _check_rows(stage: Stage, earlier: Earlier) -> None:
    """Check that every source `stage:NAME` is an earlier stage that makes rows which this stage can read."""
    contents = {entry.field: entry.contents for entry in KINDS[stage.kind].inputs}
    for field, sources in data_of(stage).items():
        for name in (source.stage for source in sources if source.stage is not None):
            fitting = [made for made, content in earlier.rows.items() if content in contents[field]]
            if name in fitting:
                continue
            found = f'{field} = "stage:{name}" is not an earlier stage that makes {" or ".join(contents[field])}'
            if name in earlier.rows:
                found = f'{field} = "stage:{name}" makes {earlier.rows[name]}, not {" or ".join(contents[field])}'
            there = f"there is: {', '.join(fitting)}" if fitting else "there is none"
            do = nearest(name, fitting) or "name a stage above that makes such rows, or a file"
            raise RecipeError(earlier.place, found, allowed=there, do=do)
