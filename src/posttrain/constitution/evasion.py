"""Evasiveness of revisions, round by round: a policy that revises itself may drift to refusals and to boilerplate.

    only refuse     share of texts that are a refusal of at most two sentences: nothing follows it
    distinct        distinct texts / texts, without case and white space
    openings        first five words that several prompts share
    phrases         four words in a row that the texts of several prompts share
    shared phrases  mean share of a text's four-word phrases that the text of another prompt has too

Round 0 is the first answers, for comparison. Openings and phrases that occur in a prompt are not listed, so that no prompt is
printed.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from posttrain.constitution.trail_files import RoundRecord
from posttrain.evaluate import refusal
from posttrain.evaluate.stats import wilson

OPENING_WORDS, PHRASE_WORDS = 5, 4
# Sentences of a text that does nothing but refuse.
REFUSAL_SENTENCES = 2
LISTED = 5
_WORD = re.compile(r"[\w'’]+")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?:\s+|$)|\n+")


def evasion(rounds: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    """Figures of the first answers (round 0) and of the kept revisions of each round."""
    numbers = sorted({row.round for row in rounds})
    prompts = [turn.content for row in rounds if row.round == numbers[0] for turn in row.prompt] if numbers else []
    known = {phrase for prompt in prompts for n in (OPENING_WORDS, PHRASE_WORDS) for phrase in _phrases(prompt, n)}
    first = [row.answer for row in rounds if row.round == numbers[0]] if numbers else []
    texts = {0: first} | {n: [row.after for row in rounds if row.round == n and row.revised] for n in numbers}
    return [{"round": number, **_of_texts(texts[number], known)} for number in texts]


def only_refuses(text: str) -> bool:
    """Whether a text is a refusal and nothing more: at most two sentences."""
    return refusal.judge(text).refused and len([s for s in _SENTENCE_END.split(text) if s.strip()]) <= REFUSAL_SENTENCES


def _of_texts(texts: Sequence[str], known: set[str]) -> dict[str, Any]:
    if not texts:
        return {"texts": 0, "only_refuse": None, "distinct": None, "openings": [], "phrases": [], "shared_phrases": None}
    refusing = wilson(sum(map(only_refuses, texts)), len(texts))
    openings = Counter(" ".join(words[:OPENING_WORDS]) for text in texts if len(words := _words(text)) >= OPENING_WORDS)
    sets = [set(_phrases(text, PHRASE_WORDS)) for text in texts]
    phrases = Counter(phrase for found in sets for phrase in found)
    shares = [sum(phrases[phrase] > 1 for phrase in found) / len(found) for found in sets if found]
    return {
        "texts": len(texts),
        "only_refuse": {key: round(value, 6) for key, value in refusing._asdict().items()},
        "distinct": round(len({" ".join(text.casefold().split()) for text in texts}) / len(texts), 6),
        "openings": _repeated(openings, known),
        "phrases": _repeated(phrases, known),
        "shared_phrases": round(sum(shares) / len(shares), 6) if shares else None,
    }


def _repeated(counts: Counter[str], known: set[str]) -> list[list[Any]]:
    """The most common entries that occur more than once and in no prompt, ties in alphabetical order."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return [[text, count] for text, count in ordered if count > 1 and text not in known][:LISTED]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _phrases(text: str, size: int) -> list[str]:
    words = _words(text)
    return [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]
