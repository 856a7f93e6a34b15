"""The gate on revisions: a judge must prefer them to the answers before them, more often than chance.

    passes  ⇔  MIN_DECIDED pairs are decided, and Wilson's 95 % interval of the share of preferred revisions is above 1/2

An answer that was cut off is not compared, because its revision would win by its end alone. Self-critique may make answers
worse, and then training makes the policy worse. Nothing trains on revisions that do not pass, unless the recipe says
`gate = "report"`.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from posttrain.constitution.principles import Constitution
from posttrain.data.made_rows import messages_of_row
from posttrain.errors import JudgeError
from posttrain.evaluate.stats import wilson
from posttrain.judge.audit import MIN_DECIDED
from posttrain.judge.prompts import conversation_text
from posttrain.judge.verdict import ComparisonRequest, PairwiseJudge, preference_score

GATE_FILE = "gate.json"


class RevisionGate(NamedTuple):
    """How many revisions the judge saw, decided and preferred, and the interval of the preferred share."""

    asked: int
    decided: int
    preferred: float
    low: float
    high: float
    passes: bool

    @property
    def text(self) -> str:
        """The figures in words."""
        if not self.asked:
            return "there is no revision of an answer that ends"
        if self.decided < MIN_DECIDED:
            return f"the judge decided {self.decided} of {self.asked} comparisons, and {MIN_DECIDED} are needed"
        share = self.preferred / self.decided
        return (
            f"the judge prefers {share:.1%} of the revisions ({self.low:.1%}–{self.high:.1%}, {self.decided} decided of "
            f"{self.asked})"
        )


def gate_revisions(
    judge: PairwiseJudge, rows: Sequence[dict[str, Any]], constitution: Constitution, *, pairs: int, seed: int
) -> RevisionGate:
    """Ask the judge about at most `pairs` random revisions. Adds its probabilities to the rows."""
    questions = {principle.id: principle.comparison for principle in constitution.principle}
    revised = [row for row in rows if row["outcome"] == "revised" and row["answer_ended"]]
    asked = random.Random(f"{seed}|gate").sample(revised, min(pairs, len(revised)))
    requests = [
        ComparisonRequest(
            conversation_text(messages_of_row(row)), row["revision"], row["answer"],
            questions[row["principle"]] or "",
        )
        for row in asked
    ]  # fmt: skip
    preferred, decided = 0.0, 0
    for row, verdict in zip(asked, judge.compare(requests), strict=True):
        if verdict.probability is not None:
            row["gate"] = round(verdict.probability, 6)
            decided += 1
            preferred += preference_score(verdict.probability)
    interval = wilson(preferred, decided) if decided else None
    low, high = (round(interval.low, 4), round(interval.high, 4)) if interval else (0.0, 1.0)
    return RevisionGate(len(asked), decided, preferred, low, high, decided >= MIN_DECIDED and low > 0.5)


def refuse_revisions(gate: RevisionGate, where: str) -> None:
    """Raises JudgeError if the revisions did not pass."""
    if not gate.passes:
        raise JudgeError(
            where, f"the revisions did not pass the gate: {gate.text}", allowed="the interval above 50 %",
            do='use a stronger policy or judge, a contrast stage, or gate = "report" to go on (rounds are kept)',
        )  # fmt: skip
