"""One reader for data, suites and recipes: what is valid is read alike everywhere, what is not is an error with its line."""

import json
from pathlib import Path

import pytest

from posttrain.data.formats import read_demonstrations
from posttrain.errors import DataError, PosttrainError, RecipeError
from posttrain.evaluate.suites import load_suites
from posttrain.reading import MAX_DEPTH, Unreadable, decode_text, json_lines, parse_json, parse_toml, unusable
from posttrain.recipe import load_recipe

BOM = b"\xef\xbb\xbf"
SUITE = 'name = "s"\n[[task]]\nname = "t"\nanswer = "perplexity"\nitems = "items.jsonl"\n'
RECIPE = 'name = "r"\n[base]\nmodel = "random:tiny"\n[[stage]]\nkind = "sft"\nname = "sft"\ndata = "d.jsonl"\n'
# What valid JSON lines may hold.
TEXTS = ["plain", "line\u2028separator", "paragraph\u2029separator", "next\u0085line", "form\x0cfeed", "file\x1cseparator"]


@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "with a byte-order mark"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["newline", "carriage return"])
def test_data_and_suites_read_the_same_lines(tmp_path: Path, mark: bytes, ends: str):
    rows = [{"id": f"i{n}", "text": text, "prompt": "q", "completion": text} for n, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row, ensure_ascii=False).replace("\f", "\\f").replace("\x1c", "\\u001c") + ends for row in rows)
    (tmp_path / "items.jsonl").write_bytes(mark + lines.encode())
    (tmp_path / "suite.toml").write_bytes(mark + SUITE.replace("\n", ends).encode())
    (task,) = load_suites([str(tmp_path / "suite.toml")])
    assert [item["text"] for item in task.items] == TEXTS
    read = read_demonstrations(str(tmp_path / "items.jsonl"), seed=0)
    assert [record.messages[1].content for record in read.records] == TEXTS


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "r.toml").write_bytes(BOM + RECIPE.encode())
    assert load_recipe(tmp_path / "r.toml").name == "r"


BAD_ITEMS = {
    "half of a character": ('{"id": "a", "text": "Hi \\ud83d there"}', "half of a character (a lone surrogate)"),
    "half of a character in a name": ('{"id": "a", "text": "x", "\\udc00": 1}', "half of a character"),
    "endless brackets": ("[" * 200_000, "not JSON (maximum recursion depth exceeded"),
    "deep nesting": ('{"id": "a", "text": "x", "n": ' + "[" * 200 + "]" * 200 + "}", "lists or tables nested deeper than 32"),
    "5,000 digits": ('{"id": "a", "text": "x", "n": ' + "9" * 5000 + "}", "not JSON (Exceeds the limit (4300 digits)"),
    "400 digits": ('{"id": "a", "text": "x", "n": ' + "9" * 400 + "}", "a number that is not finite, or has more than 64 bits"),
    "NaN": ('{"id": "a", "text": "x", "n": NaN}', "a number that is not finite"),
    "1e999": ('{"id": "a", "text": "x", "n": -1e999}', "a number that is not finite"),
    "one name twice": ('{"id": "a", "text": "x", "text": "y"}', 'two values named "text" · keep one of them'),
    "a list": ("[1]", "a list · a JSON object · correct the line"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_a_bad_item_is_refused_with_its_line(tmp_path: Path, name: str):
    line, message = BAD_ITEMS[name]
    (tmp_path / "items.jsonl").write_text('{"id": "ok", "text": "One."}\n\n' + line + "\n", encoding="utf-8")
    (tmp_path / "suite.toml").write_text(SUITE, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_suites([str(tmp_path / "suite.toml")])
    assert str(error.value).startswith('suite suite.toml · task "t" · items.jsonl line 3 · ' + message)


DEEP_TOML = "x = " + "[" * 5000 + "]" * 5000
BAD_TOML = {
    "endless brackets": ("x = " + "[" * 200_000, "not TOML"),
    "closed brackets": (DEEP_TOML, "not TOML: nested too deeply"),
    "a long path": (".".join("a" * 3000) + " = 1", "nested deeper than 32"),
    "5,000 digits": ("x = " + "9" * 5000, "not TOML: Exceeds the limit (4300 digits)"),
    "no UTF-8": ("caf\xe9 = 1", "not UTF-8 text (byte 3)"),
}


@pytest.mark.parametrize("name", BAD_TOML)
def test_a_bad_table_is_refused_as_recipe_and_as_suite(tmp_path: Path, name: str):
    text, message = BAD_TOML[name]
    (tmp_path / "x.toml").write_bytes(text.encode("latin-1"))
    for read in (lambda: load_recipe(tmp_path / "x.toml"), lambda: load_suites([str(tmp_path / "x.toml")])):
        with pytest.raises(RecipeError) as error:
            read()
        assert message in str(error.value)


def test_an_override_may_be_anything(tmp_path: Path):
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    for value in ("9" * 5000, "[" * 5000, "nan", "-inf", "1e308", "{" * 3000):
        with pytest.raises(PosttrainError):
            load_recipe(tmp_path / "r.toml", (f"sft.epochs={value}",))


def test_lines_are_counted_with_blank_ones():
    assert list(json_lines("\n 1\n\n2")) == [(2, 1), (4, 2)]
    with pytest.raises(Unreadable) as bad:
        list(json_lines("1\n\n{"))
    assert bad.value.line == 3


def test_a_byte_is_told_by_its_place_in_the_file():
    for mark in (b"", BOM):
        with pytest.raises(Unreadable) as bad:
            decode_text(mark + b"ab\ncd\xff")
        assert (bad.value.found, bad.value.line) == (f"not UTF-8 text (byte {len(mark) + 5})", 2)


def test_what_can_be_kept_is_kept():
    deep: object = 0
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert unusable({"a": deep, "b": 2**63 - 1, "c": -1.5e308, "d": None}) is None
    assert unusable([[deep]]) == f"lists or tables nested deeper than {MAX_DEPTH}"
    assert parse_toml('x = nan\ny = "é"')["y"] == "é"
    assert parse_json('{"a": {"b": 1}, "c": {"b": 2}}') == {"a": {"b": 1}, "c": {"b": 2}}


def test_a_name_twice_in_a_row_of_data_is_refused_with_its_line(tmp_path: Path):
    for name in ("d.jsonl", "d.json"):
        (tmp_path / name).write_text('{"prompt": "q", "completion": "FIRST", "completion": "SECOND"}\n', encoding="utf-8")
        with pytest.raises(DataError, match='line 1 · two values named "completion" · keep one of them'):
            read_demonstrations(str(tmp_path / name), seed=0)
