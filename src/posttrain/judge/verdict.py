"""Requests to a judge and its verdicts, and how the two orders of a pair are combined.

    p = (p(A | A is shown first) + p(A | A is shown second)) / 2

A judge that prefers A in one order and B in the other abstains, because it followed the order and not the answers. It also
abstains if a reply is unreadable. The average alone would give such pairs labels near 1/2 that look like judgements.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class ComparisonRequest(NamedTuple):
    """One question about two answers to a prompt."""

    prompt: str
    a: str
    b: str
    question: str


class GradingRequest(NamedTuple):
    """A yes-or-no question about one answer to a prompt."""

    prompt: str
    answer: str
    question: str


class Reply(NamedTuple):
    """One reply: the probability of the first option (the answer shown first, or yes), or None and the reason."""

    probability: float | None
    why: str = ""


class Verdict(NamedTuple):
    """The `probability` that A is better, or None if the judge abstains, with the reason in `why`.

    `first` and `second` are the probabilities of A when it is shown first and second.
    """

    probability: float | None
    first: float | None
    second: float | None
    why: str = ""

    @property
    def shown_first(self) -> tuple[float, ...]:
        """For each order with a reply, the probability of the answer shown first."""
        return tuple(p for p in (self.first, None if self.second is None else 1 - self.second) if p is not None)


class PairwiseJudge(Protocol):
    """A judge that compares and grades answers. `identity` goes into manifests."""

    @property
    def name(self) -> str:
        """The name in messages."""
        ...

    def identity(self) -> dict[str, str]:
        """Kind, model and fingerprints."""
        ...

    def compare(self, requests: Sequence[ComparisonRequest]) -> list[Verdict]:
        """A verdict for each request, in order. Both orders are judged."""
        ...

    def grade(self, requests: Sequence[GradingRequest]) -> list[Reply]:
        """The probability of yes for each request, in order."""
        ...


def combine(a_first: Reply, b_first: Reply) -> Verdict:
    """Combine the replies of two orders. A is shown first in `a_first`, B in `b_first`."""
    first = a_first.probability
    second = None if b_first.probability is None else 1 - b_first.probability
    if first is None or second is None:
        return Verdict(None, first, second, a_first.why or b_first.why)
    if (first - 0.5) * (second - 0.5) < 0:
        return Verdict(None, first, second, "the orders contradict each other")
    return Verdict((first + second) / 2, first, second)


def preference_score(probability: float | None) -> float:
    """1 if A is preferred, 1/2 for a tie, else 0. The verdict must have a probability."""
    assert probability is not None
    return 1.0 if probability > 0.5 else 0.5 if probability == 0.5 else 0.0
