"""docs/extending.md, done to a copy of the package: a variant of a loss, a kind of stage that makes rows, and a run of both."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(\w+)\n# (\S+)\n(.*?)```", re.DOTALL)
UNCHANGED = ("pipeline.py", "plan.py", "recipe.py", "estimate.py", "data/doctor.py", "report/training.py", "train/dpo.py")


class Extended(NamedTuple):
    """A folder with the changed package and the page's recipe."""

    folder: Path

    def posttrain(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        env = {**os.environ, "PYTHONPATH": str(self.folder / "src")}
        command = [sys.executable, "-m", "posttrain.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=self.folder)


def changed(before: str, diff: str) -> str:
    """A text with the lines that a diff removes replaced by those that it adds."""
    lines = diff.splitlines()
    removed = "\n".join(line[1:] for line in lines if line.startswith("-"))
    added = "\n".join(line[1:] for line in lines if line.startswith("+"))
    assert before.count(removed + "\n") == 1 or before.count("\n" + removed) == 1, removed
    return before.replace(removed, added)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Extended:
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src" / "posttrain", folder / "src" / "posttrain", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall(PAGE)
    assert [language for language, _, _ in blocks] == ["diff", "diff", "python", "python", "diff", "diff", "toml"]
    for language, name, text in blocks:
        path = folder / name
        assert path.exists() == (language == "diff")
        path.write_text(changed(path.read_text(encoding="utf-8"), text) if language == "diff" else text, encoding="utf-8")
    return Extended(folder)


@pytest.fixture(scope="module")
def run(extended: Extended) -> Path:
    done = extended.posttrain("run", "recipe.toml", "--out", "run")
    assert done.returncode == 0, done.stderr[-2000:]
    return extended.folder / "run"


def test_a_loss_touches_one_file_and_a_kind_two_and_the_table():
    names = {name.removeprefix("src/posttrain/") for _, name, _ in BLOCK.findall(PAGE)} - {"recipe.toml"}
    assert names == {"losses/dpo_variants.py", "stages/answers.py", "train/answers.py", "stages/__init__.py"}


def test_the_rows_of_a_stage_are_trained_on_and_traced(run: Path, extended: Extended):
    rows = [json.loads(line) for line in (run / "answered" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    made, trained = (json.loads((run / name / "manifest.json").read_text()) for name in ("answered", "distilled"))
    assert made["kind"] == "rows"
    assert made["items"] == len(rows) >= 1
    assert trained["inputs"]["answered"] == made["fingerprint"]
    assert trained["rows"]["stage:answered"] == len(rows)
    assert trained["data"]["stage:answered"] == made["files"]["rows.jsonl"]
    shown = extended.posttrain("show", "run/distilled")
    assert shown.returncode == 0, shown.stderr
    assert f"data stage:answered: {len(rows):,} rows" in shown.stdout
    assert "answered (answers)" in shown.stdout
    assert not (run / "evaluate" / "answered").exists()
    assert "answered" in (run / "report.html").read_text(encoding="utf-8")


def test_the_new_loss_is_the_one_that_was_trained_with(run: Path):
    settings = json.loads((run / "squared" / "manifest.json").read_text())["settings"]["stage"]
    assert settings["loss"] == "squared_hinge"
    first = json.loads((run / "squared" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["dpo/loss"] == pytest.approx(1.0, abs=1e-4)  # (1 - 0)^2 where policy and reference are the same


def test_a_reward_model_is_centred_on_rows_that_a_stage_made(run: Path, extended: Extended, tmp_path: Path):
    """Its scores are shifted by the demonstrations of the sft stage behind it, and those are rows of this run."""
    reward = """
[[stage]]
kind = "reward"
name = "rm"
init = "distilled"
data = "starter/preferences.jsonl"
epochs = 0.05
"""
    recipe = tmp_path / "reward.toml"
    recipe.write_text((extended.folder / "recipe.toml").read_text(encoding="utf-8") + reward, encoding="utf-8")
    done = extended.posttrain("run", str(recipe), "--out", str(shutil.copytree(run, tmp_path / "run")))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "rm" / "manifest.json").read_text())["kind"] == "reward"


def test_a_second_run_does_nothing_and_changed_rows_are_made_again(run: Path, extended: Extended):
    again = extended.posttrain("run", "recipe.toml", "--out", "run", "--dry-run", "--json")
    assert {step["status"] for step in json.loads(again.stdout)["steps"]} == {"done"}
    changed = extended.posttrain(
        "run", "recipe.toml", "--out", "run", "--dry-run", "--json", "--set", "answered.max_new_tokens=9"
    )
    steps = {step["step"]: step for step in json.loads(changed.stdout)["steps"]}
    assert [name for name, step in steps.items() if step["status"] != "done"] == [
        "answered", "distilled", "evaluate distilled", "squared", "evaluate squared",
    ]  # fmt: skip
    assert "its rows are made by answered" in steps["distilled"]["unknown"]


def test_changed_rows_on_disk_are_refused(run: Path, extended: Extended):
    copy = shutil.copytree(run, extended.folder / "changed")
    with (copy / "answered" / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    done = extended.posttrain("run", "recipe.toml", "--out", "changed", "--set", "distilled.epochs=0.2")
    assert done.returncode == 2
    assert "rows.jsonl · was changed after it was made" in done.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            'distilled.data="stage:anwered"',
            '"stage:anwered" is not an earlier stage that makes demonstrations · there is: answered',
        ),
        ('squared.data="stage:answered"', 'data = "stage:answered" makes demonstrations, not preferences'),
        ('distilled.data="stage:squared"', '"stage:squared" is not an earlier stage that makes demonstrations'),
        ('distilled.init="answered"', 'init = "answered" is not an earlier policy stage'),
        ('squared.loss="squared_hing"', "'squared_hinge'"),
        ("squared.label_smoothing=0.1", "label_smoothing with loss"),
    ],
)
def test_wrong_references_are_refused_before_weights_load(extended: Extended, setting: str, message: str):
    done = extended.posttrain("run", "recipe.toml", "--out", "refused", "--set", setting)
    assert done.returncode == 2
    assert message in done.stderr
    assert "loading" not in done.stderr
    assert not (extended.folder / "refused").exists()


def test_generic_files_are_the_same_in_the_copy(extended: Extended):
    for name in UNCHANGED:
        assert (extended.folder / "src" / "posttrain" / name).read_bytes() == (ROOT / "src" / "posttrain" / name).read_bytes()
