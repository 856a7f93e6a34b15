"""A rule as a judge: a Python function `package.module:function` that scores answers, as a reward function does.

    compare   p(A) = 1 if score(A) > score(B), 0 if it is less; the judge abstains if the scores are equal
    grade     the score itself, if it is between 0 and 1

The function runs in a process of its own (`judge/functions.py`). It sees the prompt and one answer at a time, so the order of
the answers does not matter, and it ignores the question.
"""

from collections.abc import Sequence

from posttrain.judge.functions import FunctionWorker
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, Reply, Verdict

# Answers that are scored in one call. It is even: both answers of a pair are in one call.
CALL = 512


class RuleJudge:
    """A function that runs in `worker`, which the caller closes. `source` is the hash of its source."""

    def __init__(self, worker: FunctionWorker, name: str, *, source: str, where: str) -> None:
        self.name = name
        self._worker, self._source, self._where = worker, source, where

    def identity(self) -> dict[str, str]:
        """Kind, name and the hash of the function's source."""
        return {"judge": self.name, "kind": "rule", "source": self._source}

    def compare(self, requests: Sequence[ComparisonRequest]) -> list[Verdict]:
        """Certainty for the answer with the higher score. Raises TrainingError if the function fails."""
        scores = self._scores([(request.prompt, answer) for request in requests for answer in (request.a, request.b)])
        return [_verdict(a, b) for a, b in zip(scores[::2], scores[1::2], strict=True)]

    def grade(self, requests: Sequence[GradingRequest]) -> list[Reply]:
        """The score as the probability of yes. Raises TrainingError if the function fails."""
        scores = self._scores([(request.prompt, request.answer) for request in requests])
        outside = "its score {:g} is no probability: a rule that grades returns numbers between 0 and 1"
        return [Reply(score) if 0 <= score <= 1 else Reply(None, outside.format(score)) for score in scores]

    def _scores(self, answers: Sequence[tuple[str, str]]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(answers), CALL):
            part = answers[start : start + CALL]
            scores += self._worker.score([prompt for prompt, _ in part], [answer for _, answer in part], where=self._where)
        return scores


def _verdict(a: float, b: float) -> Verdict:
    if a == b:
        return Verdict(None, None, None, "the rule gives both answers the same score")
    p = float(a > b)
    return Verdict(p, p, p)
