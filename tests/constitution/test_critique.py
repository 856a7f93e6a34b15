"""The critique stage: draws, drop rules, rounds, the gate, and a stop inside a round."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifacts import partial_folder, read_recipe
from posttrain.cli import main
from posttrain.constitution import critique as module
from posttrain.constitution.critique import draw_principle
from posttrain.constitution.principles import Principle, load_constitution
from posttrain.constitution.revision_faults import fault_of
from posttrain.constitution.trail import open_trail, summary, trace
from posttrain.evaluate.stats import wilson

# A random model ends an answer once in some hundred tokens, so most revisions are truncated and a few are kept.
RECIPE = """
name = "revised"
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
kind = "critique"
name = "revisions"
data = "prompts.jsonl"
constitution = "two.toml"
judge = "rule:{rule}"
detection = 0.0
max_new_tokens = 200
critique_tokens = 8
{more}

[[stage]]
kind = "sft"
name = "sl-cai"
data = "stage:revisions"
epochs = 0.1
validation = 0.0
"""
CONSTITUTION = """
name = "two"
version = "1"
[[principle]]
id = "short"
title = "Answer in one sentence"
critique = "Is it too long?"
revision = "Make it shorter."
comparison = "Which is shorter?"
weight = 3.0
tags = ["form"]
[[principle]]
id = "polite"
title = "Begin with a greeting"
critique = "Does a greeting lack?"
revision = "Add a greeting."
comparison = "Which greets?"
"""
RULES = """
def {name}(prompts, completions, **_):
    return [{value} for text in completions]
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with prompts, a constitution and rules; parts are small, so that a stop falls between two of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "PART", 5)
    categories = ["harm", ""]
    lines = [json.dumps({"id": f"p{i}", "prompt": f"Say {i}", "category": categories[i % 2]}) for i in range(8)]
    Path("prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    Path("two.toml").write_text(CONSTITUTION, encoding="utf-8")
    rules = {"shorter": "-float(len(text))", "longer": "float(len(text))", "same": "1.0"}
    text = "\n".join(RULES.format(name=name, value=value) for name, value in rules.items())
    Path("critique_rules.py").write_text(text, encoding="utf-8")


def write(more: str = "", rule: str = "critique_rules:shorter", constitution: str = "two.toml") -> str:
    text = RECIPE.format(more=more, rule=rule).replace("two.toml", constitution)
    Path("recipe.toml").write_text(text, encoding="utf-8")
    return "recipe.toml"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_principles_are_drawn_by_weight_and_independently_in_each_round() -> None:
    principles = (Principle(id="a", title="A", weight=3.0), Principle(id="b", title="B"))
    count = 4000
    draws = [
        (draw_principle(principles, f"row-{i}", 1, 7).id, draw_principle(principles, f"row-{i}", 2, 7).id) for i in range(count)
    ]
    both = Counter(draws)
    for first, share in (("a", 0.75), ("b", 0.25)):
        for second, other in (("a", 0.75), ("b", 0.25)):
            expected = share * other
            assert abs(both[first, second] / count - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    assert draw_principle(principles, "row-5", 1, 7) == draw_principle(principles, "row-5", 1, 7)
    assert [draw_principle(principles, f"row-{i}", 1, 8).id for i in range(50)] != [first for first, _ in draws[:50]]


@pytest.mark.parametrize(
    ("revision", "ended", "fault"),
    [
        ("", True, "empty"),
        ("Bread needs yeast", False, "truncated"),
        ("bread is made of FLOUR.", True, "copied"),
        ("Nothing to change.", True, "a critique instead of a revision"),
        ("The answer is too long and leaves out the yeast.", True, "a critique instead of a revision"),
        ("The response does not say why.", True, "a critique instead of a revision"),
        ("The answer is 42.", True, ""),
        ("The statement is false: bread needs yeast.", True, ""),
        ("Critique: it lacks yeast", True, "a critique instead of a revision"),
        ("It leaves out the yeast and the salt.", True, "a critique instead of a revision"),
        ("Bread is made of flour, water, salt and yeast.", True, ""),
        ("The answerphone is broken.", True, ""),
        ("Nothing.", True, ""),
    ],
)
def test_a_revision_is_dropped_for_a_reason(revision: str, ended: bool, fault: str) -> None:
    critique = "It leaves out the yeast and the salt."
    assert fault_of(revision, "Bread is made of flour", critique, ended=ended) == fault


def test_rounds_follow_each_other_and_a_policy_trains_on_the_revisions() -> None:
    assert main(["run", write('gate = "report"'), "--out", "run"]) == 0
    folder = Path("run/revisions")
    rounds, rows = lines(folder / "rounds.jsonl"), lines(folder / "rows.jsonl")
    assert [row["round"] for row in rounds] == [1] * 8 + [2] * 8
    for before, after in zip(rounds[:8], rounds[8:], strict=True):
        assert before["prompt_id"] == after["prompt_id"]
        assert after["answer"] == (before["revision"] if before["outcome"] == "revised" else before["answer"])
    revised = [row for row in rounds if row["outcome"] == "revised"]
    assert [(row["id"], row["completion"]) for row in rows] == [(row["id"], row["revision"]) for row in revised]
    assert {row["principle"] for row in rounds} == {"short", "polite"}
    assert {row["category"] for row in rounds} == {"harm", ""}
    manifest, trained = (json.loads(Path(f"run/{name}/manifest.json").read_text()) for name in ("revisions", "sl-cai"))
    counts = manifest["rounds"]
    assert counts["revised"] + counts["nothing found"] + sum(counts["dropped"].values()) == 16
    assert counts["revised"] == len(rows) == trained["rows"]["stage:revisions"]
    gate = manifest["gate"]
    compared = [row for row in revised if row["answer_ended"]]
    assert gate["asked"] == len(compared) >= 1
    shorter = [row["id"] for row in compared if len(row["revision"]) < len(row["answer"])]
    assert [row["id"] for row in revised if row["gate"] == 1.0] == shorter
    assert gate["preferred"] == len(shorter)
    interval = wilson(len(shorter), gate["decided"])
    assert (gate["low"], gate["high"]) == (round(interval.low, 4), round(interval.high, 4))
    assert gate["passes"] == (gate["decided"] >= 10 and interval.low > 0.5)
    assert manifest["prompts_by_source"] == {"prompts.jsonl": 8}
    assert manifest["constitution"]["fingerprint"] == load_constitution("two.toml").fingerprint
    trail = open_trail(Path("run"), read_recipe(Path("run"))[0])
    for row in rows:
        (made,) = trace(trail, row["id"])["made"]
        (asked,) = [entry for entry in made["rows"] if entry["asked"]]
        assert (asked["id"], asked["revision"], asked["principle"]) == (row["id"], row["completion"], row["principle"])
        assert [(reader["stage"], reader["use"]) for reader in asked["read_by"]] == [("sl-cai", "trained on it")]
    (stage,) = summary(trail)["stages"]
    assert stage["revisions"]["total"]["changed"]["value"] == pytest.approx(len(rows) / 16, abs=1e-6)
    assert stage["revisions"]["dropped"] == counts["dropped"]


def test_a_stop_inside_a_round_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write('gate = "report"')
    assert main(["run", recipe, "--out", "whole", "--until", "revisions"]) == 0
    generate, calls = module.generate, [0]

    def counted(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        return generate(*arguments, **more)

    monkeypatch.setattr(module, "generate", counted)
    revise = module.CritiqueRounds._revise

    def stops(self: Any, part: Any, number: int) -> Any:
        self.context.stop.asked = part[0]["round"] == 1 and number == 0
        return revise(self, part, number)

    monkeypatch.setattr(module.CritiqueRounds, "_revise", stops)
    assert main(["run", recipe, "--out", "stopped", "--until", "revisions"]) == 0
    assert not Path("stopped/revisions").exists()
    assert calls[0] == 2, "two parts of answers; the first part of the round was stopped before its critiques"
    monkeypatch.setattr(module.CritiqueRounds, "_revise", revise)
    assert main(["run", recipe, "--out", "stopped", "--until", "revisions"]) == 0
    assert calls[0] == 10, "no part is sampled twice"
    for name in ("rows.jsonl", "rounds.jsonl"):
        assert Path("stopped/revisions", name).read_bytes() == Path("whole/revisions", name).read_bytes()


def test_revisions_that_the_judge_does_not_prefer_stop_the_run_and_finished_rounds_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", write(rule="critique_rules:same"), "--out", "run"]
    assert main(run) == 2
    told = capsys.readouterr().err
    assert 'stage "revisions" · the revisions did not pass the gate: the judge decided 0 of ' in told
    assert not Path("run/sl-cai").exists()
    assert partial_folder(Path("run/revisions")).exists()
    monkeypatch.setattr(module, "generate", None)  # nothing is sampled again
    write('gate = "report"', rule="critique_rules:same")
    assert main([*run, "--until", "revisions"]) == 0
    assert "did not pass the gate" in capsys.readouterr().err
    assert not json.loads(Path("run/revisions/manifest.json").read_text())["gate"]["passes"]
    write(rule="critique_rules:same")
    capsys.readouterr()
    assert main([*run, "--dry-run", "--json"]) == 0
    step = {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}["revisions"]
    assert (step["status"], step["why"]) == ("due", 'its revisions did not pass the gate, and gate is "stop"')


@pytest.mark.parametrize(
    ("more", "constitution", "message"),
    [
        ("", "lacking.toml", 'constitution lacking.toml · principle "polite" has no comparison'),
        ('leave_out = ["rude"]', "two.toml", 'leave_out = "rude" is neither an id nor a tag · there is: short, polite, form'),
        ('leave_out = ["polite", "form"]', "two.toml", "leave_out removes every principle"),
        ("rounds = 0", "two.toml", "rounds = 0"),
        ("max_prompt_tokens = 2", "two.toml", "no prompt of at most 2 tokens"),
    ],
)
def test_mistakes_are_told_before_weights_load(
    capsys: pytest.CaptureFixture[str], more: str, constitution: str, message: str
) -> None:
    Path("lacking.toml").write_text(CONSTITUTION.replace('comparison = "Which greets?"', ""), encoding="utf-8")
    assert main(["run", write(more, constitution=constitution), "--out", "run"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "loading" not in told
    assert not Path("run").exists()


def test_an_empty_file_of_prompts_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text("", encoding="utf-8")
    assert main(["run", write(), "--out", "run"]) == 2
    assert "prompts.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judge", "found"),
    [
        ("policy:nobody", 'judge = "nobody" is not an earlier policy stage · there is: base'),
        ("reward:nobody", 'judge = "reward:nobody" is not an earlier reward stage · there is none'),
        ("rule:nothing", 'judge = "rule:nothing" does not name a function · rule:package.module:function'),
        ("http://localhost:1/v1", 'judge = "http://localhost:1/v1" without the name of a model'),
    ],
)
def test_a_judge_that_cannot_be_is_named(capsys: pytest.CaptureFixture[str], judge: str, found: str) -> None:
    recipe = write()
    Path(recipe).write_text(Path(recipe).read_text().replace("rule:critique_rules:shorter", judge), encoding="utf-8")
    assert main(["run", recipe, "--out", "run"]) == 2
    assert found in capsys.readouterr().err
