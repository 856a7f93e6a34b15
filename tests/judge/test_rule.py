"""A function of the user as a judge: certain where its scores differ, silent where they are equal."""

import os
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.errors import RecipeError, TrainingError
from posttrain.judge import rule as rule_file
from posttrain.judge.function_source import source_hash
from posttrain.judge.open import JudgeContext, open_judge
from posttrain.judge.verdict import ComparisonRequest, GradingRequest
from posttrain.stages.judge_settings import JudgeSettings

PAIRS = [
    ComparisonRequest("p", "Yes, please.", "Yes.", "ignored"), ComparisonRequest("p", "No.", "Please, no.", "ignored"),
    ComparisonRequest("p", "One.", "Two.", "ignored"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_the_higher_score_is_better_and_equal_scores_abstain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_file, "CALL", 2)
    context = JudgeContext(None, None, tmp_path)
    with open_judge(JudgeSettings(name="rule:planted_rules:polite"), context) as judge:
        verdicts = judge.compare(PAIRS)
        assert [v.probability for v in verdicts] == [1.0, 0.0, None]
        assert [(v.first, v.second) for v in verdicts] == [(1.0, 1.0), (0.0, 0.0), (None, None)]
        assert verdicts[2].why == "the rule gives both answers the same score"
        assert [r.probability for r in judge.grade([GradingRequest("p", pair.a, "") for pair in PAIRS])] == [1.0, 0.0, 0.0]
        identity = judge.identity()
        assert (identity["kind"], identity["source"]) == ("rule", source_hash("planted_rules:polite"))
    with open_judge(JudgeSettings(name="rule:planted_rules:shorter"), context) as judge:
        reply = judge.grade([GradingRequest("p", "four", "")])[0]
        assert reply.probability is None
        assert "its score -4 is no probability" in reply.why


def test_an_edited_rule_and_one_that_fails_are_errors(tmp_path: Path) -> None:
    planned = {"planted_rules:polite": source_hash("planted_rules:polite"), "planted_rules:shorter": "another hash"}
    context = JudgeContext(None, None, tmp_path, functions=planned, where='stage "labels"')
    with open_judge(JudgeSettings(name="rule:planted_rules:polite"), context) as judge:
        assert judge.compare(PAIRS[:1])[0].probability == 1.0
    with pytest.raises(RecipeError, match=r'stage "labels" .* was edited after this run was planned'):
        with open_judge(JudgeSettings(name="rule:planted_rules:shorter"), context):
            pass
    with open_judge(JudgeSettings(name="rule:planted_rules:raises"), context) as judge:
        with pytest.raises(TrainingError, match=r"raised ValueError at planted_rules\.py") as error:
            judge.compare(PAIRS)
    assert "repeat" not in str(error.value)


def test_the_command_audits_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", "audit", "rule:planted_rules:shorter"]) == 1
    text = capsys.readouterr().out
    # In 18 of the 40 gold pairs the better answer is the longer one, and in 4 both have the same length.
    assert "accuracy of decided pairs            50.0% (34.5%–65.5%) n 36" in text
    assert "prefers the longer answer            0.0%" in text
    assert "abstained on 4: the rule gives both answers the same score" in text
    assert main(["judge", "audit", "rule:planted_rules"]) == 2
    assert "does not name a function" in capsys.readouterr().err
    assert main(["judge", "audit", "policy:sft"]) == 2
    assert '"policy:sft" outside of a run' in capsys.readouterr().err
