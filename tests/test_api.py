"""The Python interface: what it returns is what the commands print, and importing it loads nothing heavy."""

import json
import re
from pathlib import Path

import pytest

import posttrain
from loaded_modules import loaded_by
from posttrain.cli import main
from posttrain.errors import ArtifactError, RecipeError
from tiny_runs import SMALL, TINY, copied_run, finished_run

ROOT = Path(__file__).parents[1]


def test_importing_posttrain_loads_no_torch_and_lists_its_interface():
    loaded = loaded_by("import posttrain; posttrain.open_run")
    assert "posttrain.api" in loaded
    assert loaded & {"torch", "transformers", "datasets", "matplotlib"} == set()
    assert set(posttrain.__all__) <= set(dir(posttrain))
    with pytest.raises(AttributeError, match="no_such_name"):
        posttrain.no_such_name  # noqa: B018


def test_a_run_has_the_scores_of_its_scorecard_and_the_comparison_of_the_command(capsys: pytest.CaptureFixture[str]):
    folder = finished_run()
    run = posttrain.open_run(folder)
    assert [(s.name, s.kind, s.init) for s in run.stages] == [
        ("sft", "sft", "base"), ("dpo", "dpo", "sft"), ("rm", "reward", "sft"), ("ppo", "ppo", "sft"),
    ]  # fmt: skip
    assert run.policies == ("base", "sft", "dpo", "ppo")
    card = json.loads((folder / "scorecard.json").read_text())
    measured = {stage["name"]: stage["measures"] for stage in card["stages"]}
    assert run.scores.keys() == measured.keys()
    for policy, estimates in run.scores.items():
        for name, estimate in estimates.items():
            wanted = measured[policy][name]
            assert estimate == (wanted["value"], wanted["low"], wanted["high"], wanted["n"], wanted["unit"])
    capsys.readouterr()
    assert main(["compare", str(folder / "sft"), str(folder / "dpo"), "--json"]) == 0
    command = json.loads(capsys.readouterr().out)
    comparison = run.compare("sft", "dpo")
    assert comparison.verdict == command["verdict"]
    assert {n: (c.value, c.n, c.verdict) for n, c in comparison.changes.items()} == {
        n: (row["change"]["value"], row["n"], row["change"]["verdict"]) for n, row in command["measures"].items()
    }
    assert run.report.is_file()
    assert "sft" in run.table()


def test_a_run_generates_with_each_of_its_policies():
    run = posttrain.open_run(finished_run())
    prompts = ["Say hi.", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]]
    answers = {policy: run.generate(prompts, policy=policy, max_new_tokens=6) for policy in ("base", "sft")}
    assert [len(a) for a in answers.values()] == [2, 2]
    assert all(rollout.adapter == policy for policy, rollouts in answers.items() for rollout in rollouts)
    assert answers["sft"] == run.generate(prompts, policy="sft", max_new_tokens=6)
    sampled = run.generate(prompts, max_new_tokens=6, temperature=1.0, seed=3, completions=2)
    assert len(sampled) == 4
    assert {rollout.adapter for rollout in sampled} == {"ppo"}
    assert len({rollout.prompt_ids for rollout in sampled[:2]}) == 1


def test_run_takes_a_file_with_settings_or_a_dict_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = copied_run(tmp_path / "copy")
    recipe = folder / "recipe.toml"
    assert posttrain.run(recipe, out=folder).policies == ("base", "sft", "dpo", "ppo")
    small = [value for value in SMALL if value != "--set"]
    run = posttrain.run(TINY, out=tmp_path / "small", settings=small, until="sft")
    assert run.policies == ("base", "sft")
    table = run.recipe.model_dump(mode="json", exclude_unset=True)
    assert posttrain.run(table, out=tmp_path / "small", until="sft").scores == run.scores
    assert "resume" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda run: run.generate(["x"], policy="sfx"), RecipeError, r"sfx.*there is: base, sft, dpo, ppo"),
        (lambda run: run.generate("x"), RecipeError, "a list of prompts"),
        (lambda run: run.generate([[{"role": "bot", "content": "x"}]]), RecipeError, "prompt 1.*role 'bot'"),
        (lambda run: run.generate([[{"role": "assistant", "content": "x"}]]), RecipeError, "end with a user message"),
        (lambda run: run.compare("sft", "rm"), ArtifactError, "rm.*not evaluated.*there is: base, sft, dpo, ppo"),
        (lambda run: posttrain.open_run(run.folder / "sft"), ArtifactError, "not a run folder"),
        (lambda run: posttrain.run({"name": "x"}, settings=["a=b"]), RecipeError, "change the dict"),
        (lambda run: posttrain.run(TINY, out=run.folder, until="nope"), RecipeError, '"nope" is not a stage'),
    ],
)
def test_mistakes_are_named(call, error, text: str):
    with pytest.raises(error, match=text):
        call(posttrain.open_run(finished_run()))


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code) > 3
    copied_run(tmp_path / "runs" / "tiny")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in code:
        exec(block, names)
    printed = capsys.readouterr().out
    assert names["comparison"].verdict in printed
    for policy in ("base", "sft", "dpo", "ppo"):
        assert re.search(rf"^{policy}: \d\.\d\d \(.* n = \d+\)$", printed, re.MULTILINE), policy
        assert len(re.findall(rf"^{policy} (True|False) ", printed, re.MULTILINE)) == 2
