"""`posttrain evaluate RUN/rm --pairs FILE`, and what a run says of its reward model."""

import json
import shutil
from pathlib import Path

import numpy
import pytest

from posttrain.cli import main
from posttrain.errors import ArtifactError
from posttrain.evaluate.best_of import measure_best_of
from posttrain.report.render import render
from posttrain.report.run import load_run
from tiny_runs import command, copied_run, finished_run


def test_a_reward_model_is_measured_on_any_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"id": f"p{i}", "prompt": f"Say {i}.", "chosen": "yes", "rejected": "no " * (i + 1)} for i in range(6)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    run = finished_run()
    capsys.readouterr()
    assert main(["evaluate", str(run / "rm"), "--pairs", str(file), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 6
    assert found == json.loads((out / "reward.json").read_text())
    scored = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [row["id"] for row in scored] == [f"p{i}" for i in range(6)]
    right = sum(row["chosen_score"] > row["rejected_score"] for row in scored)
    assert found["accuracy"]["value"] == pytest.approx(right / 6)


def test_a_second_reward_model_on_the_same_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Against itself it agrees everywhere; rows of LLMBar are pairs, and their category is what accuracy is told by."""
    rows = [
        {"input": f"Say {i}.", "output_1": "yes", "output_2": "no", "label": 1 + i % 2, "category": "ab"[i % 2]}
        for i in range(6)
    ]
    file = tmp_path / "llmbar.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(finished_run() / "rm")
    capsys.readouterr()
    assert main(["evaluate", model, "--pairs", str(file), "--against", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    other = found["against"]
    assert other["agreement"]["alike"]["value"] == 1
    assert other["accuracy"] == found["accuracy"]
    assert {name: one["n"] for name, one in found["by_category"].items()} == {"a": 3, "b": 3}
    assert main(["evaluate", model, "--pairs", str(file), "--against", model]) == 0
    assert f"agrees with {model} on 100.0% of 6 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "target, message",
    [
        ("sft", "not a finished reward stage · there is: rm"),
        ("nope", "not a finished reward stage · there is: rm"),
        ("../nowhere/rm", "not a reward stage of a run · give RUN/STAGE"),
    ],
)
def test_what_is_no_reward_model_is_told(target: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(finished_run() / target), "--pairs", "starter/preferences.jsonl"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["chat"], ["merge", "--out", "new"], ["evaluate"]])
def test_a_reward_model_answers_nothing(verb: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([verb[0], str(finished_run() / "rm"), *verb[1:]]) == 2
    assert "is a reward model: it scores answers and writes none · there is: base, sft, dpo, ppo" in capsys.readouterr().err


def test_the_report_says_what_the_reward_model_is_worth():
    run = finished_run()
    found = json.loads((run / "evaluate/rm/reward.json").read_text())
    page = (run / "report.html").read_text()
    assert f"of {found['pairs']} pairs" in page
    perfect = found["calibration_error_if_perfect"]
    assert f"{found['calibration_error']:.3f}; perfect calibration gives {perfect['mean']:.3f}" in page


def test_without_held_out_pairs_nothing_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert main(command(run, "--set", "rm.validation=0.0", "--until", "rm")) == 0
    assert json.loads((run / "evaluate/rm/reward.json").read_text()) == {"pairs": 0}
    assert "No pair was held out" in (run / "report.html").read_text()
    assert "pairs right" not in capsys.readouterr().err


def test_the_report_draws_how_sure_it_is_where_it_is_right_and_best_of_n(tmp_path: Path):
    """Two reward stages on the same held-out pairs are set beside each other; best-of-n is drawn where it was left."""
    run = copied_run(tmp_path / "run")
    recipe = (run / "recipe.toml").read_text()
    table = next(part for part in recipe.split("[[stage]]") if 'name = "rm"' in part).split("[evaluation]")[0]
    (run / "recipe.toml").write_text(
        recipe.replace("[evaluation]", "[[stage]]" + table.replace('"rm"', '"rm2"') + "\n[evaluation]")
    )
    for folder in ("rm", "evaluate/rm"):
        shutil.copytree(run / folder, run / folder.replace("rm", "rm2"))
    score_PN = numpy.arange(12.0).reshape(3, 4)
    found = {"policy": "sft", "reward": "rm", "gold": "other", **measure_best_of(score_PN, -score_PN)}
    (run / "best-of/sft").mkdir(parents=True)
    (run / "best-of/sft/best_of.json").write_text(json.dumps(found))
    page = render(load_run(run))
    assert "rm and rm2 on the same pairs" in page
    assert page.count(": reliability") == 2
    assert "best of 4" in page
    assert "judged by other" in page
    (run / "best-of/sft/best_of.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a result of best-of-n"):
        load_run(run)
