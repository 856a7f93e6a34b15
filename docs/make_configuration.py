"""Writes docs/configuration.md from the recipe models and from the command's parser: `make docs`.

The page is read off `settings.py` and `stages/` (names, types, limits, defaults, the text under each field) and `cli.py`, so
it says what the program does. `tests/test_docs.py` fails where the page on disk is another.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from posttrain.cli import build_parser
from posttrain.recipe import Recipe
from posttrain.settings import Adapter, Base, Evaluation, Source
from posttrain.stages import KINDS
from posttrain.stages.judge_settings import JudgeSettings
from posttrain.stages.reward_parts import RewardPart
from posttrain.stages.shared_settings import TrainingSettings

PAGE = Path(__file__).parent / "configuration.md"
# Heading, model, the text between them, and fields that another table holds.
Section = tuple[str, type[BaseModel], str, frozenset[str]]
_SHARED = TrainingSettings.model_fields


def _kind(name: str) -> Section:
    """The settings that only this kind has, and those whose default is another."""
    model = KINDS[name].settings
    same = {
        field
        for field, info in model.model_fields.items()
        if field == "kind" or (field in _SHARED and info.default == _SHARED[field].default)
    }
    again = [f"`{field}`" for field in model.model_fields if field in _SHARED and field not in same]
    text = f"Again because the default is another: {', '.join(again)}." if again else ""
    if missing := [f"`{field}`" for field in _SHARED if field not in model.model_fields]:
        text += f" Not there: {', '.join(missing)}."
    return f'`[[stage]]` with `kind = "{name}"`', model, text.strip(), frozenset(same)


SECTIONS: tuple[Section, ...] = (
    ("Top level", Recipe, "Above the first table of the recipe.", frozenset()),
    ("`[base]`", Base, "", frozenset()),
    ("`[adapter]`", Adapter, "", frozenset()),
    ("`[[stage]]`, every kind", TrainingSettings, "One table a stage, in order.", frozenset()),
    *map(_kind, KINDS),
    (
        "A part of `reward` or `gold`",
        RewardPart,
        'For example `reward = [{models = ["rm1", "rm2"], combine = "min"}, {function = "my_rewards:short", weight = 0.1}]`.',
        frozenset(),
    ),
    (
        "`judge` as a table",
        JudgeSettings,
        'For example `judge = {name = "http://localhost:8000/v1", model = "m", concurrency = 16}`.',
        frozenset(),
    ),
    ("A source in `data`", Source, 'For mixing: `data = ["b.jsonl", {path = "a.jsonl", weight = 0.5}, …]`.', frozenset()),
    ("`[evaluation]`", Evaluation, "", frozenset()),
)
HEAD = """<!-- written by docs/make_configuration.py: change settings.py, stages/ or cli.py and run `make docs` -->
# Configuration

A recipe is a TOML file. Every setting of it stands below; a setting that does not is an error, and so is a reference to
a stage that does not exist. All of it is checked before a weight is read. `posttrain run RECIPE --dry-run` checks a recipe and
changes nothing.

On the command line, `--set` changes one setting: `--set dpo.beta=0.2` for the stage named `dpo`, `--set adapter.rank=8` for
a table, `--set seed=1` for the top level. Values are TOML; a bare word is a text.
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD, *map(_section, SECTIONS), _commands()]
    return "\n".join(parts)


def _section(section: Section) -> str:
    heading, model, text, hidden = section
    schema = model.model_json_schema()
    rows = [_row(name, schema, model) for name in model.model_fields if name not in hidden]
    about = model.__doc__ or ""
    lines = [f"## {heading}", about if "every kind" not in heading else "", text]
    if not rows:
        return "\n".join([*(line for line in lines if line), "No settings beside those of every kind.", ""])
    head = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join(["\n".join(line for line in lines if line), "", *head, *rows, ""])


def _row(name: str, schema: dict[str, Any], model: type[BaseModel]) -> str:
    field = model.model_fields[name]
    default = "required" if field.is_required() else _default(field.default)
    kind = _words(schema["properties"][name], schema.get("$defs", {}))
    cells = (f"`{name}`", kind, default, (field.description or "").replace("\n", " "))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "the defaults of its table"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{v}"' for v in value) + "]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words."""
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(_words(s, definitions) for s in schema[word])
    if "$ref" in schema:
        return _table_name(schema["$ref"].rsplit("/", 1)[-1])
    if "enum" in schema or "const" in schema:
        return " · ".join(f'`"{v}"`' for v in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        inner = _words(schema["items"], definitions)
        return "tables" if inner.startswith("table") else f"list of {inner}"
    if schema["type"] == "string":
        return "name" if "pattern" in schema else "text"
    words = {"number": "number", "integer": "whole number", "boolean": "true or false", "null": "none"}[schema["type"]]
    return ", ".join([words, *_limits(schema)])


def _limits(schema: dict[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    for key, sign in signs.items():
        if key in schema:
            yield f"{sign} {schema[key]:g}" if abs(schema[key]) < 1e6 else f"{sign} {schema[key]}"


def _table_name(model: str) -> str:
    names = {"Base": "`[base]`", "Adapter": "`[adapter]`", "Evaluation": "`[evaluation]`", "JudgeSettings": "`judge`"}
    return "table " + names.get(model, model)


# --- commands ---------------------------------------------------------------------------------------------------------


def verbs(parser: argparse.ArgumentParser, words: str = "posttrain") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every verb that can be called, with its parser: ("posttrain data check", …)."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield words, parser
    for action in below:
        for name, child in action.choices.items():
            yield from verbs(child, f"{words} {name}")


def _commands() -> str:
    head = """## Commands

Exit codes: 0 all well (also: stopped on request, with the state saved), 2 a mistake that you can mend, 1 a defect of
posttrain, 130 Ctrl-C where nothing needed saving. Every command has `--help`. `MODEL_OR_RUN/STAGE` is `runs/quickstart/dpo`
(a stage of a run), `runs/quickstart/base` (its base), `runs/quickstart` (its last stage), or a base model as in `[base] model`.
"""
    return "\n".join([head, *(_command(words, parser) for words, parser in verbs(build_parser()))]).rstrip() + "\n"


def _command(words: str, parser: argparse.ArgumentParser) -> str:
    rows = [_option(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    about = (parser.description or "").removesuffix(".")
    example = (parser.epilog or "").removeprefix("example: ")
    lines = [f"### `{words}`", f"{about[:1].upper()}{about[1:]}.", "", "```sh", example, "```", ""]
    return "\n".join([*lines, "| argument | meaning | default |", "|---|---|---|", *rows, ""])


def _option(action: argparse.Action) -> str:
    name = action.option_strings[-1] if action.option_strings else (action.metavar or action.dest)
    if action.option_strings and action.nargs != 0:
        name = f"{name} {action.metavar or action.dest.upper()}"
    empty = action.default is None or action.default is False or action.default in ([], "")
    default = "required" if action.required else "" if empty else f"`{action.default}`"
    meaning = re.sub(r" \(default: [^()]*\)$", "", action.help or "") if default else action.help
    return f"| `{name}` | {meaning} | {default} |".replace("  ", " ")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name} written\n")
