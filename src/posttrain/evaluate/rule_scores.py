"""Rules of form that a function decides exactly: 1.0 where an answer follows the rule, else 0.0.

    no_digits         recipes/rules/no-digits.toml
    polite_opening    recipes/rules/polite-opening.toml
    two_sentences     recipes/rules/two-sentences.toml

Each rule has a constitution of one principle, so what a stage learned from the constitution can be compared with the truth.
A recipe names a function as a judge (`rule:posttrain.evaluate.rule_scores:no_digits`), as a reward
(`posttrain.evaluate.rule_scores:no_digits`) or as gold. The prompts are not read. An answer without a visible character
follows no rule. Left out: whether an answer is true or useful; a short greeting alone is a polite opening.

`checks.py` has the rules of the evaluation, which take parameters and score one answer.
"""

import re
from collections.abc import Callable, Sequence

# How a polite answer begins, in any case. "Thanks to its height, …" states a reason.
GREETINGS = ("hello", "hi", "greetings", "good morning", "good afternoon", "good evening", "good day", "thank you", "thanks")
_OPENING = re.compile(rf"\s*(?!thanks to\b)(?:{'|'.join(GREETINGS)})(?![\w'’-])", re.IGNORECASE)
_END = re.compile(r"[.!?](?=\s|$)")
MAX_SENTENCES = 2


def no_digits(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1.0 for each answer without a decimal digit of any script (Unicode category Nd).

    Left out: other signs for numbers ("²", "½", "Ⅷ") and numbers in words, which are allowed.
    """
    return _scores(completions, lambda answer: not any(map(str.isdecimal, answer)))


def polite_opening(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1.0 for each answer whose first sentence begins with one of GREETINGS.

    Left out: other greetings, other languages, and openings in quotation marks.
    """
    return _scores(completions, lambda answer: _OPENING.match(answer) is not None)


def two_sentences(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1.0 for each answer of at most two sentences.

    A sentence ends at a run of "." "!" "?" before a space or the end. Text after the last end counts as a sentence.

    Left out: abbreviations and list numbers end a sentence ("Dr. Lee", "1. Wash it"); an end mark before a closing quotation
    mark or bracket does not; nor does a line break, so a list without full stops is one sentence.
    """
    return _scores(completions, lambda answer: count_sentences(answer) <= MAX_SENTENCES)


def count_sentences(answer: str) -> int:
    """The number of sentences as `two_sentences` counts them. A part without a letter or a digit is none."""
    return sum(any(map(str.isalnum, part)) for part in _END.split(answer))


def _scores(completions: Sequence[str], holds: Callable[[str], bool]) -> list[float]:
    return [float(bool(answer.strip()) and holds(answer)) for answer in completions]
