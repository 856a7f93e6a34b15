"""Control characters of data, names, manifests and errors are spelled where they go to a person, in a pipe as on a terminal."""

import json
import unicodedata
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.terminal import printable

# Clears the screen, renames the window, turns the text around, ends the line.
EVIL = "\x1b[2J\x1b]0;gone\x07\x9b31m\u202egnp.exe\u2066\r\x08\x7f"


def controls(text: str) -> list[str]:
    """What may do something to a terminal."""
    return [
        c
        for c in text
        if c not in "\n\t"
        and (unicodedata.category(c) in ("Cc", "Zl", "Zp") or c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    ]


def test_every_control_character_is_spelled_and_the_rest_stays():
    every = "".join(map(chr, range(0x3000)))
    assert controls(printable(every)) == []
    assert printable("é 漢 🙂\tone\ntwo \\u001b") == "é 漢 🙂\tone\ntwo \\u001b"
    assert printable("\x1b[0m") == "\\u001b[0m"
    assert json.loads(printable(json.dumps({"a": every}, ensure_ascii=False))) == {"a": every}


def rows(path: Path, values: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    return str(path)


def test_examples_ids_columns_and_names_of_files_reach_nobody_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good = [{"id": f"{n}{EVIL}", "prompt": f"{n}{EVIL}", "completion": f"a{EVIL}"} for n in range(9)]
    odd = rows(tmp_path / "odd\x1b[31m.jsonl", [{f"column{EVIL}": 1}])
    for arguments, code in (
        (["data", "check", rows(tmp_path / "d.jsonl", [*good, {**good[0], "completion": ""}])], 0),
        (["data", "check", rows(tmp_path / "d.jsonl", good), "--json"], 0),
        (["data", "check", odd], 2),
        (["data", "check", f"gone{EVIL}.jsonl"], 2),
        (["show", f"gone{EVIL}"], 2),
        (["run", f"gone{EVIL}.toml"], 2),
    ):
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert out + err
        assert controls(out + err) == []
    assert main(["data", "check", str(tmp_path / "d.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"][0]["id"][1:] == EVIL


def test_a_manifest_reaches_nobody_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "sft").mkdir()
    (tmp_path / "recipe.toml").write_text(
        'name = "r"\n[base]\nmodel = "random:tiny"\n[[stage]]\nkind = "sft"\nname = "sft"\ndata = "d.jsonl"\n', encoding="utf-8"
    )
    manifest = {
        "fingerprint": "0" * 16, "name": "sft", "kind": "adapter", "stage": "sft", "settings": {"stage": {"data": EVIL}},
        "warnings": [f"warned{EVIL}"], "inputs": {}, "data": {EVIL: "0" * 64}, "base": {"model": EVIL},
    }  # fmt: skip
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for more in ([], ["--json"]):
        assert main(["show", str(tmp_path / "sft"), *more]) == 0
        assert controls(capsys.readouterr().out) == []
