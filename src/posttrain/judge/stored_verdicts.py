"""Verdicts that were stored earlier, of any judge: the figures of an audit without the model.

JSON lines, one a pair of answers a and b:

    {"gold": "a", "ab": "a", "ba": "b"}       ab: the verdict with a shown first, ba: with b shown first

A verdict is "a" or "b" (the preferred answer, not its place), the probability between 0 and 1 that a is better, or null if it
could not be read. Optional: "id", "category", "a" and "b" (the texts, for the length), "author_a" and "author_b".
LLMBar's released transcripts (a JSON list with "label" and "results") are read too.
"""

from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import expand_home
from posttrain.errors import DataError
from posttrain.judge.verdict import Reply, Verdict, combine
from posttrain.reading import Unreadable, decode_text, json_lines, parse_json

UNREAD = "a stored verdict is missing"
_LAYOUT = '{"gold": "a", "ab": "a", "ba": "b"}: gold is "a" or "b"; a verdict is "a", "b", a probability of a, or null'
_LLMBAR = ("swap = False", "swap = True")


class StoredPair(NamedTuple):
    """A stored pair with the verdict about its gold answer. Lengths are in characters, None if the texts are not stored."""

    id: str
    category: str
    verdict: Verdict
    lengths: tuple[int, int] | None
    authors: tuple[str, str]


def read_verdicts(file: str) -> list[StoredPair]:
    """The pairs of a file. Raises DataError with the line for a file that has another layout."""
    where = f'verdicts "{file}"'
    try:
        text = decode_text(expand_home(file).read_bytes())
    except OSError as error:
        raise DataError(where, f"cannot be read ({error.strerror})", do="correct the path") from None
    except Unreadable as error:
        raise DataError(where, error.found, do=error.do) from None
    try:
        listed = text.lstrip().startswith("[")
        rows = list(enumerate(parse_json(text), 1)) if listed else list(json_lines(text))
    except Unreadable as error:
        raise DataError(f"{where}, line {error.line}" if error.line else where, error.found, do=error.do) from None
    pairs = []
    for number, row in rows:
        try:
            pairs.append(_pair(_plain(row) if listed else row, number, Path(file).stem))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise DataError(f"{where}, pair {number}", "is not a stored verdict", allowed=_LAYOUT) from None
    if not pairs:
        raise DataError(where, "no verdicts", allowed=_LAYOUT)
    return pairs


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A pair of LLMBar's transcripts, where "winner" names the output and not its place. Other lists are left as they are."""
    if "results" not in row:
        return row
    winners = [row["results"][0][order].get("winner") for order in _LLMBAR]
    named = {"1": "a", "2": "b", 1: "a", 2: "b"}
    ab, ba = (named.get(winner) for winner in winners)
    return {"gold": named[row["label"]], "ab": ab, "ba": ba, "a": row["output_1"], "b": row["output_2"]}


def _pair(row: dict[str, Any], number: int, category: str) -> StoredPair:
    """Raises ValueError, KeyError or TypeError for a row with another layout."""
    gold = row["gold"]
    if gold not in ("a", "b"):
        raise ValueError("gold")
    order = ("a", "b") if gold == "a" else ("b", "a")
    ab, ba = (_probability(row[name], gold) for name in ("ab", "ba"))
    gold_first, gold_second = (ab, ba) if gold == "a" else (ba, ab)
    replies = [Reply(p, "" if p is not None else UNREAD) for p in (gold_first, gold_second)]
    verdict = combine(replies[0], replies[1] if gold_second is None else Reply(1 - gold_second))
    texts = [text for name in order if isinstance(text := row.get(name), str)]
    lengths = (len(texts[0]), len(texts[1])) if len(texts) == 2 else None
    authors = tuple(str(row.get(f"author_{name}") or "") for name in order)
    return StoredPair(
        str(row.get("id", number)), str(row.get("category", category)), verdict, lengths, (authors[0], authors[1])
    )


def _probability(value: Any, gold: str) -> float | None:
    """The probability that the gold answer is better."""
    if value is None:
        return None
    if isinstance(value, str):
        if value not in ("a", "b"):
            raise ValueError("verdict")
        return float(value == gold)
    if isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError("verdict")
    return float(value) if gold == "a" else 1 - float(value)
