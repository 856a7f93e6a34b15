"""Rules that drop a revision: empty, copied, truncated, or a critique in place of a revision.

The rules compare words. They do not find a revision that is merely worse; the gate and the evaluation do.
"""

import re
from itertools import pairwise

from posttrain.constitution.prompts import NOTHING_FOUND

# How a reply begins that talks about the answer instead of replacing it.
_ABOUT_THE_ANSWER = re.compile(
    r"^(?:the|this|that|your|my) (?:\w+ )?(?:answer|response|reply|statement|text)\b (?:\w+ly )?"
    r"(?:is (?:too|not|missing|un)|was|has|lacks?|fails?|could|should|would|does not|doesn't|do not|did not|misses|leaves"
    r"|gives|uses|contains|needs|ignores)"
    r"|^(?:here is|here's|below is|sure|certainly|okay|of course)[^\n]{0,60}\b(?:critique|what is wrong|criticism)\b"
    r"|^critique\b",
    re.IGNORECASE,
)
# Share of the words of a critique's run that a revision may repeat.
_SAME_AS_CRITIQUE = 0.8
_WORD = re.compile(r"\w+")


def fault_of(revision: str, answer: str, critique: str, *, ended: bool) -> str:
    """Why a revision cannot be used, or "". `ended` says that it ends with the end token."""
    if not revision:
        return "empty"
    if not ended:
        return "truncated"
    words, before, said = (_WORD.findall(text.lower()) for text in (revision, answer, critique))
    if (words or revision.split()) == (before or answer.split()):
        return "copied"
    if revision.strip().rstrip(".").lower() == NOTHING_FOUND.rstrip(".").lower():
        return "a critique instead of a revision"
    if _ABOUT_THE_ANSWER.search(revision) or _overlap(words, said) >= _SAME_AS_CRITIQUE:
        return "a critique instead of a revision"
    return ""


def _overlap(words: list[str], others: list[str]) -> float:
    """Jaccard's index of the pairs of neighbouring words; 0 where a text has fewer than two words."""
    a, b = ({*pairwise(text)} for text in (words, others))
    return len(a & b) / len(a | b) if a and b else 0.0
