"""Questions and verdicts: what is asked of a judge, and how two orders become one probability.

    p = (p(A | A is shown first) + p(A | A is shown second)) / 2

A judge that prefers A in one order and B in the other has followed the order, not the answers: it abstains. It abstains as
well where a reply cannot be read. Averaging alone would turn such pairs into labels near 1/2 that look like judgements.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Comparison(NamedTuple):
    """One question about two answers to a prompt."""

    prompt: str
    a: str
    b: str
    question: str


class Grading(NamedTuple):
    """One question about one answer to a prompt, to be answered with yes or no."""

    prompt: str
    answer: str
    question: str


class Reply(NamedTuple):
    """One reading of a judge: the probability of the first option (the answer shown first; yes), or None and why."""

    probability: float | None
    why: str = ""


class Verdict(NamedTuple):
    """`probability` that A is better, None where the judge abstains and `why` says the reason.

    `first` and `second` are the probabilities of A where it was shown first and where it was shown second.
    """

    probability: float | None
    first: float | None
    second: float | None
    why: str = ""

    @property
    def shown_first(self) -> tuple[float, ...]:
        """Of each order that was answered, the probability of the answer that was shown first."""
        return tuple(p for p in (self.first, None if self.second is None else 1 - self.second) if p is not None)


class Judge(Protocol):
    """Whoever compares and grades. `identity` is what a manifest says of it."""

    @property
    def name(self) -> str:
        """How messages name it."""
        ...

    def identity(self) -> dict[str, str]:
        """Kind, model and fingerprints."""
        ...

    def compare(self, asked: Sequence[Comparison]) -> list[Verdict]:
        """A verdict for each, in order; both orders are asked."""
        ...

    def grade(self, asked: Sequence[Grading]) -> list[Reply]:
        """The probability of yes for each, in order."""
        ...


def combine(a_first: Reply, b_first: Reply) -> Verdict:
    """One verdict of two orders. `a_first` is the reply where A was shown first, `b_first` where B was."""
    first = a_first.probability
    second = None if b_first.probability is None else 1 - b_first.probability
    if first is None or second is None:
        return Verdict(None, first, second, a_first.why or b_first.why)
    if (first - 0.5) * (second - 0.5) < 0:
        return Verdict(None, first, second, "the orders contradict each other")
    return Verdict((first + second) / 2, first, second)
