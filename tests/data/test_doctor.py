"""`posttrain data check`: what training would see of a file, as text and as JSON; a user's mistake exits with 2."""
# ruff: noqa: E501 - what is printed stands here as it is printed

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.data.sources import STARTER, read_rows
from posttrain.recipe import load_recipe

RECIPES = STARTER.parents[2] / "recipes"
RECIPE = """
name = "mine"
[base]
model = "random:tiny"
template = "chatml"
[[stage]]
kind = "sft"
name = "short"
data = "starter/demonstrations.jsonl"
max_tokens = 64
[[stage]]
kind = "sft"
name = "long"
data = "starter/demonstrations.jsonl"
max_tokens = 512
[evaluation]
suites = []
"""


def rows(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    return str(path)


def talks(count: int) -> list[dict[str, Any]]:
    return [{"id": f"t{i}", "prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(count)]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]):
    def run(*options: str, code: int = 0) -> str:
        assert main(["data", "check", *options]) == code
        out, err = capsys.readouterr()
        assert (err == "") is (code == 0)
        return out if code == 0 else err

    return run


def test_demonstrations_as_text(tmp_path: Path, check):
    file = rows(tmp_path / "d.jsonl", [*talks(40), talks(1)[0], {"prompt": "Nothing said", "completion": ""}])
    said = check(file)
    assert said.startswith("demonstrations as random:tiny (gemma template) would train on them\n")
    for line in (
        f"source       {file}: 42 rows · prompt+completion · sha256 ",
        "dropped      1 rows\n             1 empty text: row 42",
        "contaminated 0 rows with an evaluation prompt (excluded)",
        "duplicates   1 rows",
        "turns end    100.0% of the uncut rows end in a trained end-of-turn token",
        "truncated    0 rows at 1,024 tokens",
        "tokens per row\n",
        "three training rows; ⟦…⟧ is trained\n\n--- t0\n<bos><start_of_turn>user\nWhat is 0 plus 0?<end_of_turn>\n"
        "<start_of_turn>model\n⟦It is 0.<end_of_turn>⟧",
        "warning: 1 of 42 rows dropped; training refuses more than 1%",
    ):
        assert line in said


def test_pairs_as_text(tmp_path: Path, check):
    file = rows(
        tmp_path / "p.jsonl",
        [{"id": f"p{i}", "prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "No, I won't."} for i in range(9)],
    )
    said = check(file)
    assert said.startswith("preference pairs as random:tiny (gemma template) would train on them\n")
    assert "lengths      chosen 2 and rejected 13 tokens on average; chosen is longer in 0%" in said
    assert (
        "[prompt] <bos><start_of_turn>user\nSay 0.<end_of_turn>\n<start_of_turn>model\n\n[chosen] ⟦0<end_of_turn>⟧\n[rejected] ⟦No, I won't.<end_of_turn>⟧"
        in said
    )
    assert "warning" not in said


def test_prompts_without_answers_as_text(check):
    """A ppo stage reads prompts too, but cannot be made from data alone: the check takes a kind that can."""
    text = check("starter/red_team.jsonl")
    assert "source       starter/red_team.jsonl: 160 rows · prompt · sha256 " in text
    assert "rows         160 for training, 0 for validation" in text
    assert "dropped      0 rows" in text


def test_what_is_not_read_is_said_first(tmp_path: Path, check):
    labelled = [{**talk, "label": number % 3 > 0} for number, talk in enumerate(talks(30))]
    file = rows(tmp_path / "kto.jsonl", [*labelled, {**talks(1)[0], "tools": [{"name": "add"}]}])
    first = "warning: 11 of 31 rows are dropped because of unsupported fields (10 with label = false, 1 with tools)"
    assert check(file).startswith(first + "\n\ndemonstrations as random:tiny")
    report = json.loads(check(file, "--json"))
    assert report["warnings"] == [first.removeprefix("warning: ")]
    assert report["train_rows"] + report["validation_rows"] == 20
    assert sum(report["dropped"].values()) == 11
    assert report["dropped"]["tools: not supported, and without it the row means something else"] == 1


def test_rows_beyond_the_context_of_the_base_are_cut_there_and_said(tmp_path: Path, check):
    (tmp_path / "r.toml").write_text(RECIPE.replace("max_tokens = 64", "max_tokens = 8192"), encoding="utf-8")
    file = rows(tmp_path / "d.jsonl", [*talks(3), {"prompt": "q", "completion": "a" * 3000}])
    said = check(file, "--recipe", str(tmp_path / "r.toml"))
    assert said.startswith("warning: max_tokens = 8,192 exceeds the base's context of 2,048 tokens: 1 rows are truncated\n")
    assert "truncated    1 rows at 2,048 tokens" in said
    assert "warning" not in check(rows(tmp_path / "short.jsonl", talks(3)), "--recipe", str(tmp_path / "r.toml"))


def test_json_says_the_same(tmp_path: Path, check):
    file = rows(tmp_path / "d.jsonl", talks(40))
    report = json.loads(check(file, "--json"))
    assert (report["kind"], report["rows"], report["train_rows"] + report["validation_rows"]) == ("sft", 40, 40)
    assert (report["dropped"], report["contaminated"], report["ends_trained"]) == ({}, 0, 1.0)
    assert len(report["examples"]) == 3
    assert sum(b["rows"] for b in report["length_histogram"]) == 40


def test_a_recipe_gives_the_template_the_limits_and_the_stage(tmp_path: Path, check):
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    file = rows(tmp_path / "d.jsonl", [{"prompt": "q" * 20, "completion": "a" * 100}])
    reports = [
        json.loads(check(file, "--json", "--recipe", str(tmp_path / "r.toml"), *more)) for more in ([], ["--stage", "long"])
    ]
    assert [(r["max_tokens"], r["truncated"]) for r in reports] == [(64, 1), (512, 0)]
    assert reports[0]["examples"][0]["pieces"][0]["text"].startswith("<|im_start|>user\nqqq")


def test_a_row_that_the_starter_suite_asks_is_named(tmp_path: Path, check):
    asked = read_rows("starter/evaluation/instructions.jsonl")[0].value["prompt"]
    file = rows(tmp_path / "d.jsonl", [*talks(5), {"id": "leak", "prompt": asked, "completion": "x"}])
    assert "contaminated 1 rows with an evaluation prompt (excluded): leak" in check(file)


@pytest.mark.parametrize(
    "file, options, message",
    [
        ("gone.jsonl", [], "there is no such file"),
        ("odd.jsonl", [], "columns question, answer · messages · prompt+completion"),
        ("empty.jsonl", [], "no rows · give a file with at least one row"),
        ("silent.jsonl", [], "no row left to train on (1 rows: empty text (first: row 1))"),
        ("good.jsonl", ["--template", "llama3"], "templates that fit: gemma, chatml, plain"),
        ("good.jsonl", ["--model", "random:big"], 'no random model "big"'),
        ("good.jsonl", ["--recipe", "gone.toml"], "gone.toml"),
        (
            "good.jsonl",
            ["--recipe", "r.toml", "--stage", "rl"],
            '--stage · "rl" for a file of demonstrations · there is: short, long',
        ),
        (
            "pairs.jsonl",
            ["--recipe", "r.toml"],
            "no dpo or reward stage in the recipe for a file of preference pairs · there is: no dpo or reward stage",
        ),
    ],
)
def test_a_mistake_exits_with_2(tmp_path: Path, monkeypatch, check, file: str, options: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    rows(tmp_path / "odd.jsonl", [{"question": "a", "answer": "b"}])
    rows(tmp_path / "empty.jsonl", [])
    rows(tmp_path / "silent.jsonl", [{"prompt": "a", "completion": ""}])
    rows(tmp_path / "good.jsonl", talks(3))
    rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    said = check(file, *options, code=2)
    assert message in said
    assert "Traceback" not in said


def test_the_report_of_the_starter_files_under_the_tiny_recipe(check):
    recipe = str(RECIPES / "tiny.toml")
    assert {s.kind for s in load_recipe(Path(recipe)).stage} >= {"sft", "dpo"}
    for file in ("starter/demonstrations.jsonl", "starter/preferences.jsonl"):
        report = json.loads(check(file, "--recipe", recipe, "--json"))
        assert report["contaminated"] == 0
        assert report["duplicates"] == 0
        assert report["ends_trained"] == 1.0
