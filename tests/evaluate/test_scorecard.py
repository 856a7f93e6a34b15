"""The scorecard: measures, paired changes, the tax, and the table drawn of it."""

import json
import subprocess
import sys

import pytest

from posttrain.evaluate.scorecard import StageScores, build_scorecard, format_table, measure_values
from posttrain.evaluate.suites import Measure, all_measures, load_suites
from posttrain.records import Score

TASKS = load_suites(("starter",), limit=20)


def answers(policy: str, *, right: int, ended: bool = True, nats: float = 3.0, tokens: float = 20.0) -> list[Score]:
    """A policy that gets the first `right` items of every task."""
    scores = []
    for task in TASKS:
        for index, item in enumerate(task.items):
            value = nats + index / 100 if task.answer == "perplexity" else float(index < right)
            detail: dict[str, float | str | bool] = {"ended": ended, "tokens": tokens} if task.answer == "generate" else {}
            scores.append(Score(item["id"], task.name, task.name, policy, value, detail=detail))
    return scores


STAGES = [
    StageScores("base", "base", None, answers("base", right=2, ended=False, tokens=64.0)),
    StageScores("sft", "sft", "base", answers("sft", right=14, nats=3.1)),
    StageScores("dpo", "dpo", "sft", answers("dpo", right=15, nats=3.1)),
]
CARD = build_scorecard("quickstart", STAGES, TASKS)
MEASURES = {stage["name"]: stage["measures"] for stage in CARD["stages"]}


def change(stage: str, measure: str, against: str) -> dict[str, object]:
    return next(c for c in MEASURES[stage][f"starter/{measure}"]["changes"] if c["against"] == against)


def test_the_scorecard_has_the_promised_shape_and_is_json():
    assert json.loads(json.dumps(CARD, allow_nan=False)) == CARD
    assert (CARD["run"], [s["name"] for s in CARD["stages"]]) == ("quickstart", ["base", "sft", "dpo"])
    for measures in MEASURES.values():
        assert list(measures) == [m.name for m in all_measures(TASKS)]
        for entry in measures.values():
            assert entry["low"] <= entry["value"] <= entry["high"]
            assert entry["better"] in ("higher", "lower")
            assert {c["verdict"] for c in entry["changes"]} <= {"better", "worse", "not shown"}


def test_values_and_counts_are_those_of_the_items():
    sft = MEASURES["sft"]
    assert (sft["starter/facts"]["value"], sft["starter/facts"]["n"]) == (0.7, 20)
    assert (sft["starter/capability"]["value"], sft["starter/capability"]["n"]) == (0.7, 60)
    assert (sft["starter/stops"]["value"], sft["starter/stops"]["n"]) == (1.0, 60)
    assert sft["starter/prose"]["value"] == pytest.approx(3.195)
    assert sft["starter/length"]["value"] == 20.0


def test_changes_are_against_the_stage_before_and_the_base_and_each_once():
    against = {name: [c["against"] for c in MEASURES[name]["starter/facts"]["changes"]] for name in MEASURES}
    assert against == {"base": [], "sft": ["base"], "dpo": ["sft", "base"]}


def test_verdicts_follow_the_direction_of_the_measure():
    assert change("sft", "instruction_following", "base")["verdict"] == "better"
    assert change("sft", "refusal", "base")["verdict"] == "better"
    assert change("sft", "over_refusal", "base")["verdict"] == "worse"
    assert change("sft", "prose", "base")["verdict"] == "worse"
    assert change("sft", "length", "base")["verdict"] == "better"
    assert change("dpo", "facts", "sft")["verdict"] == "not shown"
    assert change("dpo", "facts", "base")["verdict"] == "better"


def test_changes_are_paired_by_item_not_by_place():
    shuffled = [STAGES[0], STAGES[1]._replace(scores=list(reversed(STAGES[1].scores)))]
    card = build_scorecard("quickstart", shuffled, TASKS)
    assert card["stages"][1]["measures"]["starter/facts"] == MEASURES["sft"]["starter/facts"]


def test_only_items_that_both_answered_are_compared():
    fewer = [score for score in STAGES[1].scores if score.item != TASKS[3].items[0]["id"]]
    card = build_scorecard("quickstart", [STAGES[0], STAGES[1]._replace(scores=fewer)], TASKS)
    entry = card["stages"][1]["measures"]["starter/facts"]
    assert entry["n"] == 19
    assert entry["changes"][0]["value"] == pytest.approx(12 / 19, abs=1e-6)


def test_a_share_of_refusals_comes_with_its_judge():
    judged = {name for name, entry in MEASURES["sft"].items() if "judge" in entry}
    assert judged == {"starter/refusal", "starter/over_refusal"}
    judge = MEASURES["sft"]["starter/refusal"]["judge"]
    assert judge["lowest_sensitivity"] <= judge["sensitivity"]["value"] <= 1


def test_tax_is_capability_before_minus_after():
    row = next(r for r in CARD["tax"] if (r["stage"], r["against"]) == ("sft", "base"))
    assert row["tax"]["starter/facts"]["value"] == pytest.approx(-0.6)  # it learned: a negative tax
    assert row["tax"]["starter/prose"]["value"] == pytest.approx(0.1)  # nats a token rose: a cost
    assert row["tax"]["starter/prose"]["shown"]
    assert row["gain"]["starter/instruction_following"]["value"] == pytest.approx(0.6)
    assert set(row["tax"]) == {f"starter/{name}" for name in ("capability", "facts", "arithmetic", "grammar", "prose")}
    for entry in (*row["tax"].values(), *row["gain"].values()):
        assert entry["low"] <= entry["value"] <= entry["high"]


def test_tax_interval_is_the_mirrored_interval_of_the_change():
    row = next(r for r in CARD["tax"] if (r["stage"], r["against"]) == ("dpo", "sft"))
    moved = change("dpo", "facts", "sft")
    tax = row["tax"]["starter/facts"]
    assert (tax["low"], tax["high"]) == (-float(str(moved["high"])), -float(str(moved["low"])))


def test_pooled_measures_keep_items_of_different_tasks_apart():
    measure = Measure("mine/all", ("mine/a", "mine/b"), "score", "share", "higher")
    scores = [Score("1", "mine/a", "mine/a", "p", 1.0), Score("1", "mine/b", "mine/b", "p", 0.0)]
    assert measure_values(measure, scores) == {("mine/a", "1"): 1.0, ("mine/b", "1"): 0.0}


@pytest.mark.parametrize("width", [80, 100, 120, 140])
def test_the_table_fits_and_marks_every_change(width: int):
    text = format_table(CARD, width=width)
    table, legend = text.split("Below each value", 1)
    assert max(map(len, table.splitlines())) <= width
    assert table.count("▲ better") + table.count("▼ worse") + table.count("· not shown") == 2 * len(MEASURES["sft"])
    assert "sensitivity" in legend


def test_the_table_of_a_base_alone_has_no_changes():
    text = format_table(build_scorecard("quickstart", STAGES[:1], TASKS))
    assert "10.0 %" in text
    assert "▲ better +" not in text


def test_scorecard_and_suites_import_without_torch():
    code = "import sys, posttrain.evaluate.scorecard, posttrain.evaluate.suites; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
