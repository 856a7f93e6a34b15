"""A model's own chat template is found wherever it may be: in the tokenizer's config, beside it, or among named ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from posttrain.data.chat import ChatFormat
from posttrain.errors import ModelError
from posttrain.models.base_model import load_chat, load_tokenizer
from posttrain.models.obtain import fetch_from_hub
from posttrain.models.source import BaseModelFolder, locate_base
from posttrain.plan import _base_identity
from posttrain.recipe import Recipe
from posttrain.records import Message

OWN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = [Message("user", "Hello")]


@pytest.fixture
def folder(own_cache: None, tmp_path: Path) -> Path:
    """The tokenizer of random:tiny, without a template."""
    source = locate_base("random:tiny").folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def in_config(folder: Path, template: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def beside(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)


def among_others(folder: Path) -> None:
    beside(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")


WAYS: dict[str, Callable[[Path], None]] = {
    "in the config": lambda folder: in_config(folder, OWN),
    "named in the config": lambda folder: in_config(
        folder, [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": OWN}]
    ),
    "beside": beside,
    "beside, among others": among_others,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_models_own_template_is_used(folder: Path, way: str):
    WAYS[way](folder)
    chat = ChatFormat(load_tokenizer(folder))
    assert chat.template == OWN
    assert chat.decode(chat.encode_prompt(ASK), special=True) == "<|im_start|>user\nHello<|im_end|>\n"


def test_named_templates_without_a_default_are_told(folder: Path):
    in_config(folder, [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}])
    with pytest.raises(ModelError) as error:
        ChatFormat(load_tokenizer(folder))
    assert str(error.value) == (
        'chat template · the model has the templates rag, tool_use · one named "default", or one in chat_template.jinja · '
        "copy one there, or set [base] template"
    )
    assert ChatFormat(load_tokenizer(folder), "chatml").template_name == "chatml"


def test_a_hub_repository_is_fetched_with_its_templates_and_without_copies_of_the_weights(monkeypatch: pytest.MonkeyPatch):
    files = [
        "model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json",
        "vocab.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    others = [
        "onnx/model.safetensors",
        "original/consolidated.safetensors",
        "consolidated.safetensors",
        "model.bin",
        "README.md",
    ]
    fetched: list[str] = []

    def download(_: str, **patterns: object) -> str:
        chosen = {key: value for key, value in patterns.items() if key.endswith("_patterns")}
        fetched.extend(filter_repo_objects([*files, *others], **chosen))
        return "."

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    fetch_from_hub("org/name")
    assert fetched == files


def test_a_template_beside_a_base_is_part_of_what_a_run_depends_on(folder: Path):
    recipe = Recipe.model_validate({"name": "r", "base": {"model": "x"}, "stage": ()})
    source = BaseModelFolder("x", folder, "w", "t")
    before = _base_identity(recipe, source)
    beside(folder)
    assert _base_identity(recipe, source) != before
    assert load_chat(source, "auto").template == OWN
