"""The audit of judges whose faults are known: each figure by hand, and who may label."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.errors import DataError
from posttrain.evaluate.stats import wilson
from posttrain.judge.audit import JudgedPair, audit, figures, read_gold
from posttrain.judge.injections import INJECTIONS
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, Reply, Verdict, combine
from posttrain.records import PreferencePair

GOLD = read_gold("starter")
BETTER = {pair.chosen[-1].content for pair in GOLD}


class KnownJudge:
    """A judge that follows one rule: the probability that the answer shown first is better."""

    name = "known"

    def __init__(self, rule: Callable[[str, str], float]) -> None:
        self.rule = rule

    def identity(self) -> dict[str, str]:
        return {"judge": self.name, "kind": "rule"}

    def compare(self, asked: Sequence[ComparisonRequest]) -> list[Verdict]:
        return [combine(Reply(self.rule(one.a, one.b)), Reply(self.rule(one.b, one.a))) for one in asked]

    def grade(self, asked: Sequence[GradingRequest]) -> list[Reply]:
        return [Reply(0.9 if one.answer in BETTER else 0.2) for one in asked]


def gold(first: str, second: str) -> float:
    """Sees the better answer, also where something is appended to an answer."""
    return 0.5 if first == second else 0.9 if first.split("\n\n")[0] in BETTER else 0.1


def longer(first: str, second: str) -> float:
    return 0.5 if len(first) == len(second) else 0.8 if len(first) > len(second) else 0.2


def obedient(first: str, second: str) -> float:
    for text, p in ((first, 0.9), (second, 0.1)):
        if any(text.endswith(injection) for injection in INJECTIONS):
            return p
    return gold(first, second)


def test_the_gold_set_has_40_pairs_of_7_kinds_whose_better_answer_is_mostly_not_the_longer_one():
    assert len(GOLD) == 40
    assert {pair.category for pair in GOLD} == {"facts", "form", "useful", "harmless", "harmful", "honest", "kind"}
    assert sum(len(pair.chosen[-1].content) > len(pair.rejected[-1].content) for pair in GOLD) == 18
    assert len(set(INJECTIONS)) == 50


def test_a_judge_that_knows_passes():
    found = audit(KnownJudge(gold), GOLD)
    assert found["passes"]
    assert found["accuracy"] == {"value": 1.0, "low": 0.9124, "high": 1.0, "n": 40}
    assert found["consistency"]["value"] == 1.0
    assert (found["first"]["value"], found["first"]["n"]) == (0.5, 80)
    assert (found["identical"]["value"], found["identical"]["n"]) == (0.5, 80)
    assert (found["injections"]["changed"], found["injections"]["n"], found["injections"]["passes"]) == (0, 50, True)
    assert (found["detection"]["value"], found["detection"]["n"]) == (1.0, 80)
    assert found["prefers_longer"]["value"] == pytest.approx(found["gold_longer"], abs=1e-3)


def test_a_judge_that_takes_the_first_answer_decides_nothing_and_does_not_pass():
    found = audit(KnownJudge(lambda first, second: 0.7), GOLD)
    assert not found["passes"]
    assert (found["decided"], found["accuracy"]) == (0, None)
    assert found["abstained"] == {"the orders contradict each other": 40}
    assert (found["each_order"]["value"], found["consistency"]["value"], found["first"]["value"]) == (0.5, 0.0, 1.0)
    assert found["injections"] is None


def test_a_judge_of_length_is_consistent_and_does_not_pass():
    found = audit(KnownJudge(longer), GOLD)
    assert (found["consistency"]["value"], found["prefers_longer"]["value"], found["gold_longer"]) == (0.9, 1.0, 0.5)
    assert found["accuracy"]["value"] == 0.5  # four pairs of equal length are ties
    assert not found["passes"]


def test_a_judge_that_obeys_an_answer_is_found_out():
    found = audit(KnownJudge(obedient), GOLD)
    assert found["passes"]
    assert (found["injections"]["changed"], found["injections"]["passes"]) == (50, False)


def test_chance_is_let_through_in_few_of_a_thousand_audits():
    """The rule asks that the lower end of a 95 % interval lies above one half: chance passes in about one of forty."""
    rng = random.Random(0)
    passed = 0
    for _ in range(1000):
        sides = [0.9 if rng.random() < 0.5 else 0.1 for _ in range(100)]
        passed += figures([JudgedPair("", "", None, Verdict(p, p, p)) for p in sides])["passes"]
    assert passed <= 40, passed


def test_figures_of_a_hand_worked_table():
    """Five pairs: right twice in both orders, wrong once in both, once by the order, once unread in one order."""
    verdicts = [
        combine(Reply(0.9), Reply(0.2)), combine(Reply(0.6), Reply(0.4)), combine(Reply(0.3), Reply(0.8)),
        combine(Reply(0.7), Reply(0.9)), combine(Reply(0.8), Reply(None, "unread")),
    ]  # fmt: skip
    found = figures([JudgedPair(str(n), "one", n == 0, verdict) for n, verdict in enumerate(verdicts)])
    assert (found["pairs"], found["decided"]) == (5, 3)
    assert found["abstained"] == {"the orders contradict each other": 1, "unread": 1}
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (0.6667, 3)
    # Single orders, A's side: .9 .8 | .6 .6 | .3 .2 | .7 .1 | .8: six of nine are right.
    assert (found["each_order"]["value"], found["each_order"]["n"]) == (0.6667, 9)
    assert (found["consistency"]["value"], found["consistency"]["n"]) == (0.75, 4)
    assert (found["accuracy_if_consistent"]["value"], found["accuracy_if_consistent"]["n"]) == (0.6667, 3)
    # Shown first preferred: .9 yes, .2 no | .6 yes, .4 no | .3 no, .8 yes | .7 yes, .9 yes | .8 yes.
    assert (found["first"]["value"], found["first"]["n"]) == (round(6 / 9, 4), 9)
    assert found["accuracy"]["low"] == round(wilson(2, 3).low, 4)


def test_the_command_says_who_may_not_label(capsys: pytest.CaptureFixture[str]):
    command = ["judge", "audit", "random:tiny", "--template", "gemma", "--limit", "4"]
    assert main(command) == 1
    text = capsys.readouterr().out
    assert "failed: the interval of its accuracy" in text
    assert "abstained on 4" in text
    assert main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["pairs"] == 4


def test_files_without_pairs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert main(["judge", "audit", "random:tiny", "--pairs", str(tmp_path / "d.jsonl")]) == 2
    assert "error: " in capsys.readouterr().err
    (tmp_path / "same.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "c"}\n')
    with pytest.raises(DataError, match="no preference pairs"):
        read_gold(str(tmp_path / "same.jsonl"))
    assert isinstance(GOLD[0], PreferencePair)
