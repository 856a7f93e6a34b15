"""The command `posttrain constitution`. Heavy imports happen inside its functions."""

import argparse
import json
from typing import Any

from posttrain.terminal import show_text

EXAMPLE = "posttrain constitution check starter"


def add_options(verb: argparse.ArgumentParser) -> None:
    """Options of `posttrain constitution check`."""
    verb.add_argument("name", metavar="NAME_OR_FILE", help="a built-in constitution or a file (.toml)")
    verb.add_argument("--prompt", help="an example prompt to insert")
    verb.add_argument("--answer", help="an example answer to insert")
    verb.add_argument("--model", help="render the prompts with this model's chat template")
    verb.add_argument("--template", default="auto", help="chat template for a model without one")
    verb.add_argument("--json", action="store_true", help="print JSON")


def check(options: argparse.Namespace) -> int:
    """Print a constitution and the exact prompts made from it. Raises RecipeError for an invalid file."""
    from posttrain.constitution.check import ANSWER, PROMPT, describe
    from posttrain.constitution.principles import load_constitution
    from posttrain.models.base_model import load_chat
    from posttrain.models.source import locate_base

    constitution = load_constitution(options.name)
    chat = None if options.model is None else load_chat(locate_base(options.model), options.template)
    data: dict[str, Any]
    data, text = describe(constitution, prompt=options.prompt or PROMPT, answer=options.answer or ANSWER, chat=chat)
    show_text(json.dumps(data, indent=2, ensure_ascii=False) if options.json else text)
    return 0
