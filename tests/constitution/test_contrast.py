"""The contrast stage: pairs from a constitution without a judge, and a policy that is trained on them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.constitution import contrast_pairs as module
from posttrain.constitution.contrast_pairs import draw_principles
from posttrain.constitution.principles import load_constitution
from posttrain.data.prompts import PromptRow
from posttrain.models.base_model import load_base
from posttrain.records import Message

# A random model ends an answer once in some hundred tokens.
RECIPE = """
name = "contrasted"
seed = 3

[base]
model = "random:tiny"
template = "gemma"
dtype = "float32"

[adapter]
rank = 4

[evaluation]
limit = 2
samples = ["Hi"]
max_new_tokens = 8

[[stage]]
kind = "contrast"
name = "pairs"
data = [{{path = "starter/preferences.jsonl", weight = 0.05}}]
max_prompt_tokens = 100
max_new_tokens = 240
{more}

[[stage]]
kind = "dpo"
name = "dpo"
data = "stage:pairs"
epochs = 0.2
validation = 0.0
"""
CONSTITUTION = """
name = "two"
version = "1"
[[principle]]
id = "short"
title = "Answer in one sentence"
[[principle]]
id = "polite"
title = "Begin with a greeting"
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a stop falls between two of them."""
    monkeypatch.setattr(module, "PART", 4)


def write(folder: Path, more: str = "") -> str:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(more=more), encoding="utf-8")
    return str(path)


def rows(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "pairs" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def prompts(count: int) -> list[PromptRow]:
    return [PromptRow(f"row-{i}", [1, 2], "Hi", (Message("user", "Hi"),)) for i in range(count)]


def test_principles_are_drawn_by_weight_and_by_the_seed_and_the_prompt_alone(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(CONSTITUTION.replace('id = "short"', 'id = "short"\nweight = 3.0'))
    chat = load_base("random:tiny", template="gemma").chat
    two = load_constitution(str(tmp_path / "c.toml"))
    drawn = draw_principles(two, prompts(2000), chat, count=1, seed=1)
    share = Counter(d.principles[0].id for d in drawn)["short"] / 2000
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    again = draw_principles(two, prompts(2000)[1000:], chat, count=1, seed=1)
    assert [d.principles for d in again] == [d.principles for d in drawn[1000:]]
    other = draw_principles(two, prompts(50), chat, count=1, seed=2)
    assert [d.principles for d in other] != [d.principles for d in drawn[:50]]
    every = draw_principles(two, prompts(3), chat, count=0, seed=1)
    assert all({p.id for p in d.principles} == {"short", "polite"} for d in every)
    text = chat.decode(drawn[0].ids)
    assert drawn[0].principles[0].title in text


def test_a_policy_is_trained_on_pairs_that_name_their_principles(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["run", write(tmp_path), "--out", str(run)]) == 0
    made = rows(run)
    assert len(made) >= 1
    assert all(len(set(row["principles"])) == 3 and row["chosen"] != row["rejected"] for row in made)
    manifest, trained = (json.loads((run / name / "manifest.json").read_text()) for name in ("pairs", "dpo"))
    assert manifest["items"] == len(made)
    assert manifest["data"]["constitution starter"] == load_constitution("starter").fingerprint
    assert trained["rows"]["stage:pairs"] == len(made)
    assert trained["inputs"]["pairs"] == manifest["fingerprint"]


def test_a_stop_between_two_parts_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    recipe = write(tmp_path)
    assert main(["run", recipe, "--out", str(whole), "--until", "pairs"]) == 0
    made = json.loads((whole / "pairs" / "manifest.json").read_text())
    parts = -(-(made["items"] + sum(made["pairs_dropped"].values())) // 4)
    answer, calls = module._answer, [0]

    def stops(context: object, *arguments: object) -> object:
        calls[0] += 1
        context.stop.asked = calls[0] == 2  # type: ignore[attr-defined]
        return answer(context, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_answer", stops)
    assert main(["run", recipe, "--out", str(stopped), "--until", "pairs"]) == 0
    assert not (stopped / "pairs").exists()
    assert main(["run", recipe, "--out", str(stopped), "--until", "pairs"]) == 0
    assert calls[0] == parts, "no part is answered twice"
    assert (stopped / "pairs" / "rows.jsonl").read_bytes() == (whole / "pairs" / "rows.jsonl").read_bytes()


def test_another_constitution_makes_the_pairs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(CONSTITUTION)
    recipe = write(tmp_path, f'constitution = "{tmp_path / "c.toml"}"')
    run = ["run", recipe, "--out", str(tmp_path / "run")]
    assert main([*run, "--until", "pairs"]) == 0
    (tmp_path / "c.toml").write_text(CONSTITUTION.replace("one sentence", "two sentences"))
    capsys.readouterr()
    assert main([*run, "--dry-run", "--json"]) == 0
    steps = {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    assert steps["pairs"]["status"] == "due"
    assert "constitution" in steps["pairs"]["why"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('constitution = "nowhere.toml"', 'constitution "nowhere.toml" · there is no such file · there is: starter'),
        ('constitution = ""', 'stage "pairs" · constitution is empty'),
        ("principles = -1", "principles = -1"),
        ("max_new_tokens = 8192\nseed = 1", "together at most"),
    ],
)
def test_mistakes_are_told_before_weights_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    recipe = write(tmp_path, more)
    text = Path(recipe).read_text()
    if "8192" in more:
        Path(recipe).write_text(text.replace("max_new_tokens = 240\n", ""))
    assert main(["run", recipe, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "loading" not in told
    assert not (tmp_path / "run").exists()
