"""Verdicts of a language model that are sampled: after reasoning, or one word from a server without log-probabilities.

    p(A) = samples that choose A / samples with a readable answer

The model reasons and ends with `Answer: A`. Both orders are averaged as for every judge. After reasoning a model is nearly
always certain, so the average is limited to between `clamp` and 1 - clamp (Bai et al. 2022 used 0.4). Probabilities that do not
come from reasoning are never limited. The replies of the single orders are not limited either.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from posttrain.judge.verdict import Reply, Verdict, combine


class Reasoning(NamedTuple):
    """Samples for each prompt, the longest reasoning in tokens, and the limit of the probabilities."""

    samples: int
    tokens: int
    clamp: float

    def identity(self) -> dict[str, str]:
        """The settings, for the identity of a judge."""
        return {"reasoning": f"{self.samples} samples of at most {self.tokens} tokens, limited by {self.clamp:g}"}

    def limited(self, probability: float | None) -> float | None:
        """A probability within the limits; None stays None."""
        return None if probability is None else min(max(probability, self.clamp), 1 - self.clamp)


def final_answer(text: str, options: tuple[str, str]) -> int | None:
    """The option (0 or 1) after the last `Answer:` in a text; None if no option follows it."""
    found = re.findall(rf"\b[Aa]nswer\s*:[\s*`(\[\"']*({_either(options)})", text)
    return _index(found[-1], options) if found else None


def first_word(text: str, options: tuple[str, str]) -> int | None:
    """The option that a text begins with, after marks such as quotes and `Answer:`; None if it begins otherwise."""
    found = re.match(rf"\W*(?:[Aa]nswer\W+)?({_either(options)})", text)
    return _index(found.group(1), options) if found else None


def _either(options: tuple[str, str]) -> str:
    """A pattern of both options. No word may follow a letter: "A better answer" chooses nothing."""
    return "|".join(
        rf"(?i:{re.escape(option)})(?![\w'’-])(?![ \t]+\w)" if len(option) == 1 else rf"(?i:{re.escape(option)})\b"
        for option in options
    )


def _index(word: str, options: tuple[str, str]) -> int:
    return [option.lower() for option in options].index(word.lower())


def share(chosen: Sequence[int | None]) -> Reply:
    """The share of the first option among readable samples (0: first option, 1: second, None: unreadable)."""
    readable = [option for option in chosen if option is not None]
    if not readable:
        return Reply(None, "no sample ends in one of the two options")
    return Reply(readable.count(0) / len(readable))


def verdicts(replies: Sequence[Reply], reasoning: Reasoning | None) -> list[Verdict]:
    """The verdicts of replies to both orders of each pair, limited if they come from reasoning."""
    combined = [combine(a_first, b_first) for a_first, b_first in zip(replies[::2], replies[1::2], strict=True)]
    if reasoning is None:
        return combined
    return [verdict._replace(probability=reasoning.limited(verdict.probability)) for verdict in combined]


def grades(replies: Sequence[Reply], reasoning: Reasoning | None) -> list[Reply]:
    """The replies about single answers, limited if they come from reasoning."""
    if reasoning is None:
        return list(replies)
    return [reply._replace(probability=reasoning.limited(reply.probability)) for reply in replies]
