"""Who may label: a judge at chance is refused with its figures, a rule is exempt, and a resumed stage asks nothing again."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from posttrain.errors import JudgeError
from posttrain.judge.audit import read_gold
from posttrain.judge.injections import INJECTIONS
from posttrain.judge.trust import audit_before_use
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, Reply, Verdict, combine

BETTER = {pair.chosen[-1].content for pair in read_gold("starter")}


class SuretyJudge:
    """Prefers the better answer for the first `right` prompts, the other one for the rest. Two pairs share a prompt."""

    name = "tested"

    def __init__(self, right: int, kind: str = "local") -> None:
        self.right, self.kind, self.compared = right, kind, 0
        self.seen: dict[str, int] = {}

    def identity(self) -> dict[str, str]:
        return {"judge": self.name, "kind": self.kind}

    def compare(self, requests: Sequence[ComparisonRequest]) -> list[Verdict]:
        self.compared += len(requests)
        return [combine(Reply(self._first(r.prompt, r.a, r.b)), Reply(self._first(r.prompt, r.b, r.a))) for r in requests]

    def _first(self, prompt: str, first: str, second: str) -> float:
        number = self.seen.setdefault(prompt, len(self.seen))
        sides = [any(text.startswith(better) for better in BETTER) for text in (first, second)]
        if sides[0] == sides[1]:
            return 0.5
        return 0.9 if sides[0] == (number < self.right) else 0.1

    def grade(self, requests: Sequence[GradingRequest]) -> list[Reply]:
        return [Reply(0.9) for _ in requests]


def test_a_judge_at_chance_is_refused_with_its_figures_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(JudgeError) as error:
        audit_before_use(SuretyJudge(20), gold="starter", allow_weak=False, where='stage "labels"', folder=tmp_path)
    text = str(error.value)
    assert text.startswith('stage "labels" · the judge "tested" prefers the better answer in 52.5% of 40 decided gold pairs ')
    assert '(95 % interval 37.5% to 67.1%; 0 abstentions; gold "starter")' in text
    assert "contrast" in text
    assert "allow_weak_judge = true" in text
    stored = json.loads((tmp_path / "judge_audit.json").read_text())
    assert (stored["passes"], stored["accuracy"]["value"]) == (False, 0.525)


def test_a_judge_that_decides_nothing_is_refused(tmp_path: Path) -> None:
    judge = SuretyJudge(0)
    judge._first = lambda prompt, first, second: 0.8  # type: ignore[method-assign]
    with pytest.raises(JudgeError, match=r"decided none of 40 gold pairs \(40: the orders contradict each other\)"):
        audit_before_use(judge, gold="starter", allow_weak=False, where="s", folder=tmp_path)


def test_a_weak_judge_may_be_allowed_and_is_not_said_to_pass(tmp_path: Path) -> None:
    judge = SuretyJudge(20)
    trust = audit_before_use(judge, gold="starter", allow_weak=True, where="s", folder=tmp_path)
    assert (trust.passes, trust.figures["passes"]) == (False, False)
    assert trust.figures["gold"]["pairs"] == 40


def test_a_resumed_stage_reads_the_audit_and_another_judge_or_gold_is_audited(tmp_path: Path) -> None:
    first = SuretyJudge(38)
    trust = audit_before_use(first, gold="starter", allow_weak=False, where="s", folder=tmp_path)
    assert trust.passes
    # 40 pairs, the same answer twice 40 times, 50 injections.
    assert first.compared == 40 + 40 + len(INJECTIONS) == 130
    again = SuretyJudge(38)
    assert audit_before_use(again, gold="starter", allow_weak=False, where="s", folder=tmp_path) == trust
    assert again.compared == 0
    other = SuretyJudge(38)
    other.name = "another"
    audit_before_use(other, gold="starter", allow_weak=False, where="s", folder=tmp_path)
    assert other.compared == 130
    pairs = tmp_path / "gold.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": min(BETTER), "rejected": "no"}) + "\n")
    audit_before_use(other, gold=str(pairs), allow_weak=True, where="s", folder=tmp_path)
    assert other.compared > 130
    (tmp_path / "judge_audit.json").write_text("{")
    damaged = SuretyJudge(38)
    audit_before_use(damaged, gold="starter", allow_weak=False, where="s", folder=tmp_path)
    assert damaged.compared == 130


def test_a_failed_audit_is_not_repeated_and_still_refuses(tmp_path: Path) -> None:
    for expected in (130, 0):
        judge = SuretyJudge(20)
        with pytest.raises(JudgeError):
            audit_before_use(judge, gold="starter", allow_weak=False, where="s", folder=tmp_path)
        assert judge.compared == expected


def test_a_rule_is_exempt(tmp_path: Path) -> None:
    judge = SuretyJudge(0, kind="rule")
    trust = audit_before_use(judge, gold="starter", allow_weak=False, where="s", folder=tmp_path)
    assert (trust.passes, trust.figures["exempt"], judge.compared) == (True, "a rule is its own definition", 0)
    assert json.loads((tmp_path / "judge_audit.json").read_text()) == trust.figures
